"""The policy: from a state packet and the candidates for it to one decision.

Equal packets, reports, posterior and seed give equal decisions, bit for bit: the random stream of a decision is drawn
from the run's seed, the run's id and the packet's sequence, and the decision's time is the packet's.

    figure       formula
    confidence   ADD_SEED: log odds of P(reward > 0) of the candidate drawn, plus those of P(plateau) P(capacity lacks)
                 UNSTABLE, OVERFITTING: P(state) shrunk by 0.9, since a smaller step helps mostly but not always
                 REMOVE_SEED: P(contribution < 0) from its interval, or (n + 1) / (n + 2) after n new errors
    urgency      ADD_SEED: t (0.5 + 0.25 r + 0.25 (1 - exp(-n / n0))) with r the share of the planned epochs left, n the
                 epochs the plateau has lasted and t = min(1, epochs left / epochs that growth needs): growth early is
                 worth more, a plateau costs more the longer it lasts, and what cannot be trained any more is no matter
                 of urgency. Unplanned runs count as half done
                 UNSTABLE: 1.   OVERFITTING: 0.6 + 0.4 (1 - exp(-n / n0)).   REMOVE_SEED: 0.9 on errors, else 0.7
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from esper.blueprints import cost
from esper.contracts.blueprint import BlueprintCost
from esper.contracts.decision import (
    AdaptationDecision,
    AdaptationPlan,
    AdaptationType,
    CurveState,
    Evidence,
    ParameterChange,
)
from esper.contracts.errors import InvalidStateError
from esper.contracts.lifecycle import SeedLifecycleState
from esper.contracts.run import AdaptationOutcome, FieldReport, LayerStatus, RunPhase, SeedStatus, SystemStatePacket
from esper.services.tamiyo.candidates import Candidate
from esper.services.tamiyo.config import TamiyoConfig
from esper.services.tamiyo.curve import CurveReading, read_curve
from esper.services.tamiyo.normal import join_evidence, normal_cdf, probability_positive
from esper.services.tamiyo.posterior import (
    Belief,
    RewardPosterior,
    contribution_variance,
    family_of,
    features_of,
    observation_of,
    place_of,
    reach_of,
)
from esper.services.tamiyo.run_memory import UNDER_WAY, RunMemory, budget_left, open_adaptations
from esper.services.tamiyo.seed_selection import SeedSelection, SeedSelector

MAX_RUNS: Final = 256
"""Runs remembered at once; the one heard of longest ago is forgotten."""

_HELPS: Final = 0.9


@dataclass(frozen=True, kw_only=True, slots=True)
class _Draft:
    """A decision before it gets its identity."""

    kind: AdaptationType = AdaptationType.OPTIMIZE_PARAMETERS
    confidence: float
    urgency: float
    explanation: str
    layer: str = ""
    seed_index: int | None = None
    choice: _Choice | None = None
    change: ParameterChange | None = None
    evidence: tuple[Evidence, ...] = ()

    @property
    def asks(self) -> bool:
        """Whether it asks for anything at all."""
        return self.kind is not AdaptationType.OPTIMIZE_PARAMETERS or self.change is not None


@dataclass(frozen=True, slots=True)
class _Choice:
    """The candidate drawn, with what is believed of it."""

    candidate: Candidate
    belief: Belief
    seed: SeedSelection


class Policy:
    """Decides for any number of runs; keeps what it must remember of each. Not thread-safe."""

    def __init__(self, config: TamiyoConfig | None = None, posterior: RewardPosterior | None = None) -> None:
        self.config = config or TamiyoConfig()
        self.posterior = posterior or RewardPosterior(self.config.posterior)
        self._runs: OrderedDict[str, RunMemory] = OrderedDict()
        self._forecasts: dict[str, tuple[float, bool]] = {}

    def analyze(self, packet: SystemStatePacket, candidates: Sequence[Candidate]) -> AdaptationDecision:
        """Decide on a packet; the same run and sequence give the decision taken before.

        Raises:
            InvalidStateError: A newer packet of the run was seen already, and this one was never decided on.
        """
        memory = self._memory(packet.run_id)
        known = memory.decisions.get(packet.sequence)
        if known is not None:
            return known
        reading = self._take_in(packet, memory)
        draft = self._decide(packet, reading, memory, candidates)
        decision = self._decision(packet, reading, draft)
        memory.remember(decision, draft.choice.candidate.cost if draft.choice else None)
        return decision

    def begin(self, packet: SystemStatePacket) -> frozenset[str]:
        """Take a packet in and give the layers for which `analyze` will want candidates; none where it will not grow.

        Raises:
            InvalidStateError: See `analyze`.
        """
        memory = self._memory(packet.run_id)
        if packet.sequence in memory.decisions:
            return frozenset()
        reading = self._take_in(packet, memory)
        grows = packet.phase is RunPhase.TRAINING and reading.state is CurveState.PLATEAU
        if not grows or reading.capacity_lacks < 0.5:
            return frozenset()
        return frozenset(self._open_seeds(packet, memory))

    def decided(self, run_id: str, sequence: int) -> AdaptationDecision | None:
        """Give the decision taken on a packet, where it is still in memory."""
        memory = self._runs.get(run_id)
        return None if memory is None else memory.decisions.get(sequence)

    def remembers(self, run_id: str) -> bool:
        """Say whether packets of a run are in memory."""
        return run_id in self._runs and self._runs[run_id].last_sequence > 0

    def forget(self, run_id: str) -> None:
        """Let go of what is remembered of a run; what was learned from it stays."""
        self._runs.pop(run_id, None)

    def restore(self, packet: SystemStatePacket, decision: AdaptationDecision | None) -> None:
        """Take in a packet and the decision that was taken on it, in order, without deciding anew."""
        memory = self._memory(packet.run_id)
        if packet.sequence > memory.last_sequence:
            memory.observe(packet)
        if decision is not None:
            blueprint, site = decision.blueprint, decision.site
            memory.remember(decision, None if blueprint is None or site is None else cost(blueprint.ir, site))

    def learn(self, report: FieldReport, *, family: str = "") -> bool:
        """Learn from a report; false when its reward was learned before or it holds none.

        Raises:
            InvalidInputError: Its figures are no figures.
        """
        learned = self.recall(report, family=family)
        self.note_report(report)
        return learned

    def note_report(self, report: FieldReport) -> None:
        """Take in what a report says of its own run, and nothing else."""
        self._memory(report.run_id).note_report(report)

    def recall(self, report: FieldReport, *, family: str = "") -> bool:
        """Learn what a report teaches of its blueprint and of past confidences; see ``learn``."""
        if report.contribution is not None:
            contribution_variance(report)
        if report.adaptation_type == AdaptationType.ADD_SEED and report.outcome is not AdaptationOutcome.FAILED:
            kept = report.outcome is AdaptationOutcome.KEPT
            self._forecasts[report.adaptation_id] = (report.decision_confidence, kept)
        observation = observation_of(report, family=family, config=self.config.posterior)
        return observation is not None and self.posterior.learn(observation)

    def note_plan(self, plan: AdaptationPlan) -> None:
        """Take in what a run made of a decision."""
        self._memory(plan.run_id).note_plan(plan)

    def reliability(self) -> tuple[float, int] | None:
        """Give the Brier score of past confidences (0 is perfect, 0.25 a coin) and their number, if there are any."""
        if not self._forecasts:
            return None
        errors = [(confidence - float(kept)) ** 2 for confidence, kept in self._forecasts.values()]
        return math.fsum(errors) / len(errors), len(errors)

    def _memory(self, run_id: str) -> RunMemory:
        memory = self._runs.setdefault(run_id, RunMemory())
        self._runs.move_to_end(run_id)
        while len(self._runs) > MAX_RUNS:
            self._runs.popitem(last=False)
        return memory

    def _take_in(self, packet: SystemStatePacket, memory: RunMemory) -> CurveReading:
        """Take a packet in, unless that was done, and read the curve with it."""
        begun = packet.sequence == memory.last_sequence and not memory.is_decided
        if packet.sequence <= memory.last_sequence and not begun:
            raise InvalidStateError(
                f"state.sequence must be above {memory.last_sequence}, the newest seen of run {packet.run_id}, "
                f"got {packet.sequence}",
                parameter="state.sequence",
            )
        if packet.sequence > memory.last_sequence:
            memory.observe(packet)
        return read_curve(memory.points, self.config.curve)

    def _decide(
        self, packet: SystemStatePacket, reading: CurveReading, memory: RunMemory, candidates: Sequence[Candidate]
    ) -> _Draft:
        if packet.phase is not RunPhase.TRAINING:
            return _nothing(reading, f"The run is {packet.phase.name.lower()}; nothing is decided until it trains.")
        if reading.state is CurveState.UNSTABLE:
            return self._calm(reading, memory)
        removal = _removal(packet, memory)
        if removal is not None:
            return removal
        if reading.state is CurveState.OVERFITTING:
            return self._regularise(reading, memory)
        if reading.state is not CurveState.PLATEAU:
            return _nothing(reading, f"The curve is {reading.state.value.replace('_', ' ')}; there is nothing to do.")
        if reading.capacity_lacks < 0.5:
            return _nothing(
                reading,
                "The control loss is flat while training loss still falls with a wide gap: capacity is not what lacks.",
            )
        return self._grow(packet, reading, memory, candidates)

    def _calm(self, reading: CurveReading, memory: RunMemory) -> _Draft:
        if memory.parameters_rest(self.config.parameter_cooldown_epochs):
            return _nothing(reading, "The run is unstable, but its settings were changed a moment ago.")
        factor = self.config.learning_rate_factor
        return _Draft(
            confidence=reading.probability * _HELPS,
            urgency=1.0,
            change=ParameterChange(learning_rate_factor=factor),
            explanation=f"The run is unstable ({reading.evidence[0].detail}): learn at {factor:g} of the rate.",
        )

    def _regularise(self, reading: CurveReading, memory: RunMemory) -> _Draft:
        if memory.parameters_rest(self.config.parameter_cooldown_epochs):
            return _nothing(reading, "The run overfits, but its settings were changed a moment ago.")
        rate, decay = self.config.learning_rate_factor, self.config.weight_decay_factor
        return _Draft(
            confidence=reading.probability * _HELPS,
            urgency=0.6 + 0.4 * self._lasted(reading),
            change=ParameterChange(learning_rate_factor=rate, weight_decay_factor=decay),
            explanation=f"Control loss rises while training loss falls: rate times {rate:g}, decay times {decay:g}.",
        )

    def _grow(
        self, packet: SystemStatePacket, reading: CurveReading, memory: RunMemory, candidates: Sequence[Candidate]
    ) -> _Draft:
        if self._is_full(packet, memory):
            return _nothing(reading, "At a plateau, but as many adaptations as allowed are under way.")
        seeds = self._open_seeds(packet, memory)
        reserved = [one.cost for one in memory.pending(self.config.pending_epochs).values()]
        open_candidates = self._affordable(packet, memory, seeds, candidates, reserved)
        if not open_candidates:
            return _nothing(reading, _why_none(packet, seeds, candidates))
        random = _random(packet)
        choice = self._choose(packet, memory, seeds, open_candidates, random)
        helps = probability_positive(choice.belief.mean, choice.belief.deviation)
        reports = Evidence(name="posterior_observations", value=self.posterior.num_observations, detail="rewards known")
        chance = Evidence(name="probability_of_reward", value=helps, detail="of the candidate drawn, before the curve")
        blueprint, layer, source = choice.candidate.blueprint, choice.candidate.layer, choice.candidate.source
        reads = f" on the input of {source}" if source else ""
        return _Draft(
            kind=AdaptationType.ADD_SEED,
            confidence=join_evidence(helps, reading.probability * reading.capacity_lacks),
            urgency=self._growth_urgency(packet, reading),
            layer=layer,
            seed_index=choice.seed.seed_index,
            choice=choice,
            evidence=(chance, reports, *self._reliability_evidence()),
            explanation=(
                f"Plateau for {reading.stretch_epochs} epochs: germinate {blueprint.name} at {layer}{reads}, seed "
                f"{choice.seed.seed_index} ({choice.candidate.cost.parameters} parameters), drawn from "
                f"{len(open_candidates)} candidates."
            )[:500],
        )

    def _is_full(self, packet: SystemStatePacket, memory: RunMemory) -> bool:
        waiting = memory.pending(self.config.pending_epochs)
        return open_adaptations(packet) + len(waiting) >= self.config.max_open_adaptations

    def _open_seeds(self, packet: SystemStatePacket, memory: RunMemory) -> Mapping[str, Sequence[SeedStatus]]:
        """Give the dormant seeds of every layer that may be grown now."""
        if self._is_full(packet, memory):
            return {}
        taken = {one.layer for one in memory.pending(self.config.pending_epochs).values()}
        free: dict[str, list[SeedStatus]] = {}
        for layer in packet.layers:
            busy = layer.layer in taken or any(seed.state in UNDER_WAY for seed in layer.seeds)
            if busy or memory.layer_rests(layer.layer, self.config.layer_cooldown_epochs):
                continue
            dormant = [seed for seed in layer.seeds if seed.state is SeedLifecycleState.DORMANT]
            rested = [seed for seed in dormant if self._rested(memory, layer.layer, seed)]
            if rested:
                free[layer.layer] = rested
        return free

    def _rested(self, memory: RunMemory, layer: str, seed: SeedStatus) -> bool:
        since = memory.history_of(layer, seed.seed_index).steps_since_attempt
        return since is None or since >= self.config.selection.cooldown_steps

    def _affordable(
        self,
        packet: SystemStatePacket,
        memory: RunMemory,
        seeds: Mapping[str, Sequence[SeedStatus]],
        candidates: Sequence[Candidate],
        reserved: list[BlueprintCost | None],
    ) -> list[Candidate]:
        """Give the candidates at free layers that the budget allows and no embargo forbids."""
        parameters, flops, adaptations = budget_left(packet.budget, reserved)
        if adaptations < 1:
            return []
        return [
            one
            for one in candidates
            if one.layer in seeds
            and one.cost.parameters <= parameters
            and one.cost.flops <= flops
            and not memory.embargoed(one.layer, one.blueprint.id, self.config.embargo_epochs)
        ]

    def _choose(
        self,
        packet: SystemStatePacket,
        memory: RunMemory,
        seeds: Mapping[str, Sequence[SeedStatus]],
        candidates: Sequence[Candidate],
        random: np.random.Generator,
    ) -> _Choice:
        """Draw every candidate's reward from the posterior and take the best draw; then draw the seed."""
        rows = sorted(candidates, key=lambda one: (one.layer, one.source, one.blueprint.id))
        if len(rows) > self.config.max_candidates:
            picked = random.choice(len(rows), self.config.max_candidates, replace=False)
            rows = [rows[place] for place in sorted(picked)]
        asked = [
            features_of(
                one.site,
                one.blueprint.id,
                parameters=one.cost.parameters,
                progress=_progress(packet),
                family=family_of(one.blueprint.ir),
                place=place_of(packet.run_id, one.layer, one.source),
                reach=reach_of(one.source),
            )
            for one in rows
        ]
        beliefs = self.posterior.believe(asked, random)
        best = max(range(len(rows)), key=lambda place: beliefs[place].draw)
        layer = rows[best].layer
        selector = SeedSelector(random.integers(0, 2**63, size=4).tolist(), self.config.selection)
        histories = [memory.history_of(layer, seed.seed_index) for seed in seeds[layer]]
        return _Choice(rows[best], beliefs[best], selector.select_seed_for_adaptation(layer, histories))

    def _growth_urgency(self, packet: SystemStatePacket, reading: CurveReading) -> float:
        progress = _progress(packet)
        left = 0.5 if progress is None else 1.0 - progress
        trainable = 1.0
        if packet.planned_epochs is not None:
            trainable = min(1.0, max(0, packet.planned_epochs - packet.epoch) / self.config.training_epochs)
        return trainable * (0.5 + 0.25 * left + 0.25 * self._lasted(reading))

    def _lasted(self, reading: CurveReading) -> float:
        return 1.0 - math.exp(-reading.stretch_epochs / self.config.stretch_epochs)

    def _reliability_evidence(self) -> tuple[Evidence, ...]:
        score = self.reliability()
        if score is None:
            return ()
        return (Evidence(name="confidence_brier", value=score[0], detail=f"over {score[1]} adaptations; 0 is perfect"),)

    def _decision(self, packet: SystemStatePacket, reading: CurveReading, draft: _Draft) -> AdaptationDecision:
        choice, config = draft.choice, self.config
        reaches = draft.confidence >= config.confidence_threshold and draft.urgency >= config.urgency_threshold
        return AdaptationDecision(
            adaptation_id=adaptation_id(packet.run_id, packet.sequence),
            run_id=packet.run_id,
            state_sequence=packet.sequence,
            epoch=packet.epoch,
            adaptation_type=draft.kind,
            layer=draft.layer,
            seed_index=draft.seed_index,
            blueprint_id=choice.candidate.blueprint.id if choice else "",
            confidence=min(max(draft.confidence, 0.0), 1.0),
            urgency=min(max(draft.urgency, 0.0), 1.0),
            expected_reward=choice.belief.mean if choice else None,
            exploration_bonus=max(0.0, choice.belief.draw - choice.belief.mean) if choice else None,
            curve_state=reading.state,
            evidence=(*reading.evidence, *draft.evidence),
            actionable=draft.asks and reaches,
            parameter_change=draft.change,
            explanation=draft.explanation,
            created_at=packet.created_at,
            blueprint=choice.candidate.blueprint if choice else None,
            site=choice.candidate.site if choice else None,
            source=choice.candidate.source if choice else "",
        )


def adaptation_id(run_id: str, sequence: int) -> str:
    """Give the identity of the decision on one packet: ``a`` and 32 hex digits."""
    return "a" + hashlib.sha256(f"{run_id}:{sequence}".encode()).hexdigest()[:32]


def _random(packet: SystemStatePacket) -> np.random.Generator:
    """Give the random stream of the decision on one packet."""
    text = f"tamiyo:{packet.random_seed}:{packet.run_id}:{packet.sequence}"
    return np.random.default_rng(np.frombuffer(hashlib.sha256(text.encode()).digest(), dtype=np.uint32))


def _progress(packet: SystemStatePacket) -> float | None:
    """Give the share of the planned epochs that has passed, 0 to 1; ``None`` without a plan."""
    if not packet.planned_epochs:
        return None
    return min(1.0, packet.epoch / packet.planned_epochs)


def _nothing(reading: CurveReading, explanation: str) -> _Draft:
    return _Draft(confidence=reading.probability, urgency=0.0, explanation=explanation)


def _removal(packet: SystemStatePacket, memory: RunMemory) -> _Draft | None:
    """Give the removal of a fossil that fails or that no longer pays, the surest first."""
    found = [
        draft
        for layer in packet.layers
        for seed in layer.seeds
        if seed.state is SeedLifecycleState.FOSSILIZED
        for draft in (_failing(layer, seed, memory), _unprofitable(layer, seed, memory))
        if draft is not None
    ]
    return max(found, key=lambda draft: (draft.confidence, draft.urgency), default=None)


def _failing(layer: LayerStatus, seed: SeedStatus, memory: RunMemory) -> _Draft | None:
    """Give the removal of the newest fossil of a layer that has begun to fail."""
    errors = memory.new_errors.get(layer.layer, 0)
    fossils = [one for one in layer.seeds if one.state is SeedLifecycleState.FOSSILIZED]
    newest = max(fossils, key=lambda one: (one.last_transition_step, one.seed_index))
    if not errors or seed is not newest:
        return None
    return _Draft(
        kind=AdaptationType.REMOVE_SEED,
        confidence=(errors + 1) / (errors + 2),
        urgency=0.9,
        layer=layer.layer,
        seed_index=seed.seed_index,
        evidence=(Evidence(name="new_errors", value=errors, detail="failures of the layer since the last packet"),),
        explanation=f"{layer.layer} failed {errors} times since the last packet: remove its newest fossil.",
    )


def _unprofitable(layer: LayerStatus, seed: SeedStatus, memory: RunMemory) -> _Draft | None:
    """Give the removal of a fossil whose newest measurement is negative."""
    measured = memory.contributions.get(seed.adaptation_id)
    if measured is None or measured.estimate >= 0:
        return None
    error = max((measured.high - measured.low) / 4.0, 1e-9)
    return _Draft(
        kind=AdaptationType.REMOVE_SEED,
        confidence=normal_cdf(-measured.estimate / error),
        urgency=0.7,
        layer=layer.layer,
        seed_index=seed.seed_index,
        evidence=(Evidence(name="contribution", value=measured.estimate, detail="as measured last"),),
        explanation=f"Seed {seed.seed_index} of {layer.layer} was measured again and does harm: remove it.",
    )


def _why_none(
    packet: SystemStatePacket, seeds: Mapping[str, Sequence[SeedStatus]], candidates: Sequence[Candidate]
) -> str:
    if not candidates:
        return "At a plateau, but no blueprint fits any layer."
    if not seeds:
        return "At a plateau, but every layer is busy, resting or without a dormant seed."
    budget = packet.budget
    return (
        f"At a plateau, but none of {len(candidates)} candidates is within the budget ({budget.added_parameters} of "
        f"{budget.max_added_parameters} parameters, {budget.adaptations} of {budget.max_adaptations} adaptations) "
        "and free of an embargo."
    )

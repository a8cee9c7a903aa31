"""The policy: from a state packet and the candidates for it to one decision, or to those of one race.

Equal packets, reports, posterior and seed give equal decisions, bit for bit: the random stream of a decision is drawn
from the run's seed and the packet's sequence, and the decision's time is the packet's.

    figure       formula
    belief       ADD_SEED: log odds of P(reward > 0) of the likeliest candidate in the race, plus those of P(plateau)
                 P(capacity lacks), before a plateau of the latter alone; all decisions of a race share it: together
                 they ask for one seed that pays
                 UNSTABLE, OVERFITTING: P(state) shrunk by 0.9, since a smaller step helps mostly but not always
                 REMOVE_SEED: as `removal.py` has it
    confidence   the belief, calibrated by what came of earlier decisions (`calibration.py`); REMOVE_SEED and what asks
                 for nothing: the belief itself
    urgency      ADD_SEED: t (0.5 + 0.25 r + 0.25 (1 - exp(-n / n0))) with r the share of the planned epochs left, n the
                 epochs the plateau has lasted and t = min(1, epochs left / epochs that growth needs): growth early is
                 worth more, a plateau costs more the longer it lasts, and what cannot be trained any more is no matter
                 of urgency. Unplanned runs count as half done
                 UNSTABLE: 1.   OVERFITTING: 0.6 + 0.4 (1 - exp(-n / n0)).   REMOVE_SEED: as `removal.py` has it

The threshold is held against the belief. It is hopeful on purpose, so that what nobody tried is tried, and a trial that
does harm is undone; held against the confidence, a few fruitless races would end growth for good.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from esper.blueprints import cost, plan
from esper.contracts.decision import (
    AdaptationDecision,
    AdaptationPlan,
    AdaptationType,
    ArchitectureChange,
    CurveState,
    Evidence,
    ParameterChange,
)
from esper.contracts.errors import InvalidStateError
from esper.contracts.lifecycle import SeedLifecycleState
from esper.contracts.run import AdaptationOutcome, FieldReport, RunPhase, SeedStatus, SystemStatePacket
from esper.services.tamiyo.affordable import is_spent, too_small, why_none
from esper.services.tamiyo.calibration import Calibrator, Kind
from esper.services.tamiyo.candidates import Candidate
from esper.services.tamiyo.config import TamiyoConfig
from esper.services.tamiyo.curve import CurveReading, read_curve
from esper.services.tamiyo.normal import join_evidence
from esper.services.tamiyo.posterior import (
    Belief,
    Features,
    RewardPosterior,
    contribution_variance,
    family_of,
    features_of,
    observation_of,
    place_of,
    reach_of,
)
from esper.services.tamiyo.removal import find_removal
from esper.services.tamiyo.rivals import draw_rivals
from esper.services.tamiyo.run_memory import UNDER_WAY, RunMemory, budget_left
from esper.services.tamiyo.seed_selection import SeedSelection, SeedSelector

MAX_RUNS: Final = 256
"""Runs remembered at once; the one heard of longest ago is forgotten."""

_HELPS: Final = 0.9


@dataclass(frozen=True, kw_only=True, slots=True)
class _Draft:
    """A decision before it gets its identity."""

    kind: AdaptationType = AdaptationType.OPTIMIZE_PARAMETERS
    belief: float
    urgency: float
    explanation: str
    layer: str = ""
    seed_index: int | None = None
    choices: tuple[_Choice, ...] = ()
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

    @property
    def change(self) -> ArchitectureChange | None:
        """How the host itself changes; ``None`` for a seed that is no widening or deepening of it."""
        one = self.candidate
        if "widening" in one.blueprint.metadata.tags and len(one.blueprint.ir.nodes) > 1:
            *_, units, _ = plan(one.blueprint.ir, one.site).steps  # what the last map reads
            return ArchitectureChange(added_units=units.output.features)
        return ArchitectureChange() if "deepening" in one.blueprint.metadata.tags else None

    @property
    def words(self) -> str:
        """What is asked for, in words."""
        one = self.candidate
        reads = f" on the input of {one.source}" if one.source else ""
        verb = "germinate" if self.change is None else "modify the host by"
        return (
            f"{verb} {one.blueprint.name} at {one.layer}{reads}, seed {self.seed.seed_index} "
            f"({one.cost.parameters} parameters)"
        )


class Policy:
    """Decides for any number of runs; keeps what it must remember of each. Not thread-safe."""

    def __init__(self, config: TamiyoConfig | None = None, posterior: RewardPosterior | None = None) -> None:
        self.config = config or TamiyoConfig()
        self.posterior = posterior or RewardPosterior(self.config.posterior)
        self.calibrator = Calibrator(self.config.calibration)
        self._runs: OrderedDict[str, RunMemory] = OrderedDict()
        self._forecasts: dict[str, tuple[float, bool]] = {}

    def analyze(self, packet: SystemStatePacket, candidates: Sequence[Candidate]) -> tuple[AdaptationDecision, ...]:
        """Decide on a packet: one decision, or all those of a race. The same run and sequence give those taken before.

        Raises:
            InvalidStateError: A newer packet of the run was seen already, and this one was never decided on.
        """
        memory = self._memory(packet.run_id)
        known = memory.decisions.get(packet.sequence)
        if known is not None:
            return known
        for decision, choice in self._drawn(packet, memory, candidates):
            memory.remember(decision, choice.candidate.cost if choice else None)
        return memory.decisions[packet.sequence]

    def reconsider(
        self, packet: SystemStatePacket, candidates: Sequence[Candidate], decided: Sequence[AdaptationDecision]
    ) -> tuple[AdaptationDecision, ...]:
        """Give what `analyze` would decide on a packet, and remember what was ``decided`` on it, as `restore` does.

        Raises:
            InvalidStateError: See `analyze`.
        """
        found = self._drawn(packet, self._memory(packet.run_id), candidates)
        self.restore(packet, decided)
        return tuple(decision for decision, _ in found)

    def begin(self, packet: SystemStatePacket) -> frozenset[str]:
        """Take a packet in and give the layers for which `analyze` will want candidates; none where it will not grow.

        Raises:
            InvalidStateError: See `analyze`.
        """
        memory = self._memory(packet.run_id)
        if packet.sequence in memory.decisions:
            return frozenset()
        reading = self._take_in(packet, memory)
        if packet.phase is not RunPhase.TRAINING or not self._may_grow(reading, memory):
            return frozenset()
        return frozenset(self._open_seeds(packet, memory))

    def decided(self, run_id: str, sequence: int) -> tuple[AdaptationDecision, ...]:
        """Give the decisions taken on a packet, where they are still in memory; empty elsewhere."""
        memory = self._runs.get(run_id)
        return () if memory is None else memory.decisions.get(sequence, ())

    def last_sequence(self, run_id: str) -> int:
        """Give the sequence of the newest packet of a run that is in memory; 0 where none is."""
        return self._runs[run_id].last_sequence if run_id in self._runs else 0

    def remembers(self, run_id: str) -> bool:
        """Say whether packets of a run are in memory."""
        return self.last_sequence(run_id) > 0

    def forget(self, run_id: str) -> None:
        """Let go of what is remembered of a run; what was learned from it stays."""
        self._runs.pop(run_id, None)

    def restore(self, packet: SystemStatePacket, decisions: Sequence[AdaptationDecision]) -> None:
        """Take in a packet and the decisions that were taken on it, in order, without deciding anew."""
        memory = self._memory(packet.run_id)
        if packet.sequence > memory.last_sequence:
            memory.observe(packet)
        for decision in decisions:
            blueprint, site = decision.blueprint, decision.site
            memory.remember(decision, None if blueprint is None or site is None else cost(blueprint.ir, site))

    def learn(self, report: FieldReport, *, family: str = "", begun: AdaptationDecision | None = None) -> bool:
        """Learn from a report on the decision ``begun``; false when its reward was learned before or it holds none.

        Raises:
            InvalidInputError: Its figures are no figures.
        """
        learned = self.recall(report, family=family, begun=begun)
        self.note_report(report)
        return learned

    def note_report(self, report: FieldReport) -> None:
        """Take in what a report says of its own run, and nothing else."""
        self._memory(report.run_id).note_report(report)

    def recall(self, report: FieldReport, *, family: str = "", begun: AdaptationDecision | None = None) -> bool:
        """Learn what a report teaches of its blueprint and of past confidences; see ``learn``."""
        if begun is not None:
            self.calibrator.learn(report, begun)
        if report.contribution is not None:
            contribution_variance(report)
        if report.grew and report.outcome is not AdaptationOutcome.FAILED:
            # A race asks for one seed that pays: its confidence came true when any of its seeds was kept.
            kept = report.outcome is AdaptationOutcome.KEPT or self._forecasts.get(report.group, (0.0, False))[1]
            self._forecasts[report.group] = (report.decision_confidence, kept)
        observation = observation_of(report, family=family, config=self.config.posterior)
        return observation is not None and self.posterior.learn(observation)

    def note_plan(self, plan: AdaptationPlan) -> bool:
        """Take in what a run made of a decision; false where that changes nothing."""
        return self._memory(plan.run_id).note_plan(plan)

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
        return read_curve(memory.curve, self.config.curve)

    def _drawn(
        self, packet: SystemStatePacket, memory: RunMemory, candidates: Sequence[Candidate]
    ) -> list[tuple[AdaptationDecision, _Choice | None]]:
        """Take a packet in and give the decisions on it."""
        reading = self._take_in(packet, memory)
        draft = self._decide(packet, reading, memory, candidates)
        return list(self._decisions(packet, reading, draft, memory))

    def _decide(
        self, packet: SystemStatePacket, reading: CurveReading, memory: RunMemory, candidates: Sequence[Candidate]
    ) -> _Draft:
        if packet.phase is not RunPhase.TRAINING:
            return _nothing(reading, f"The run is {packet.phase.name.lower()}; nothing is decided until it trains.")
        if reading.state is CurveState.UNSTABLE:
            return self._calm(reading, memory)
        removal = find_removal(packet, memory)
        if removal is not None and self._reaches(removal.belief, removal.urgency):  # one in doubt holds up nothing else
            return _Draft(
                kind=AdaptationType.REMOVE_SEED,
                layer=removal.layer,
                seed_index=removal.seed_index,
                belief=removal.belief,
                urgency=removal.urgency,
                evidence=removal.evidence,
                explanation=removal.explanation,
            )
        if reading.state is CurveState.OVERFITTING:
            return self._regularise(reading, memory)
        if self._may_grow(reading, memory):
            return self._grow(packet, reading, memory, candidates)
        if reading.state is not CurveState.PLATEAU:
            return _nothing(reading, f"The curve is {reading.state.value.replace('_', ' ')}; there is nothing to do.")
        return _nothing(
            reading,
            "The control loss is flat while training loss still falls with a wide gap: capacity is not what lacks.",
        )

    def _reaches(self, belief: float, urgency: float) -> bool:
        """Say whether a decision would be acted on."""
        return belief >= self.config.confidence_threshold and urgency >= self.config.urgency_threshold

    def _may_grow(self, reading: CurveReading, memory: RunMemory) -> bool:
        """Say whether the curve asks for growth, or lets a race be held beside it: a first one, or one after a success.

        A race costs the host nothing, and what is found early has the rest of the run to be trained; behind a host that
        has learnt its training set by heart, a seed learns little (experiment 0008). Where the last race had a seed
        that was kept, the host lacks capacity though it still improves (experiment 0010).
        """
        if reading.capacity_lacks < 0.5:
            return False
        if reading.state is CurveState.PLATEAU:
            return True
        improves = reading.state in (CurveState.WARMING_UP, CurveState.IMPROVING)
        is_due = memory.pays if memory.has_tried else len(memory.points) >= self.config.first_race_epochs
        return improves and is_due

    def _calm(self, reading: CurveReading, memory: RunMemory) -> _Draft:
        """Lower the rate; where that was done before and the run is unstable again, begin the optimizer's state anew.

        Moments that a few huge gradients have filled move the weights long after, whatever the rate (T. Huang et al.,
        SPAM: Spike-aware Adam with momentum reset, ICLR 2025). The rate is lowered with them, for the first steps of
        fresh moments are as long as it allows. Packets hold no figure per group, so none is named: all are changed.
        """
        if memory.parameters_rest(self.config.parameter_cooldown_epochs):
            return _nothing(reading, "The run is unstable, but its settings were changed a moment ago.")
        factor, calmed, seen = self.config.learning_rate_factor, memory.calmed_epoch, reading.evidence[0].detail
        explanation, evidence = (
            f"The run is unstable ({seen}): learn at {factor:g} of the rate.",
            tuple[Evidence, ...](),
        )
        if calmed is not None:
            explanation = (
                f"The run is unstable again ({seen}) though its rate was lowered after epoch {calmed}: begin the "
                f"optimizer's state anew and learn at {factor:g} of the rate."
            )
            detail = "epoch after which the rate was lowered for the same reason"
            evidence = (Evidence(name="calmed_epoch", value=calmed, detail=detail),)
        return _Draft(
            belief=reading.probability * _HELPS,
            urgency=1.0,
            change=ParameterChange(learning_rate_factor=factor, resets_state=calmed is not None),
            evidence=evidence,
            explanation=explanation,
        )

    def _regularise(self, reading: CurveReading, memory: RunMemory) -> _Draft:
        if memory.parameters_rest(self.config.parameter_cooldown_epochs):
            return _nothing(reading, "The run overfits, but its settings were changed a moment ago.")
        rate, decay = self.config.learning_rate_factor, self.config.weight_decay_factor
        return _Draft(
            belief=reading.probability * _HELPS,
            urgency=0.6 + 0.4 * self._lasted(reading),
            change=ParameterChange(learning_rate_factor=rate, weight_decay_factor=decay),
            explanation=f"Control loss rises while training loss falls: rate times {rate:g}, decay times {decay:g}.",
        )

    def _grow(
        self, packet: SystemStatePacket, reading: CurveReading, memory: RunMemory, candidates: Sequence[Candidate]
    ) -> _Draft:
        flat = reading.state is CurveState.PLATEAU
        occasion = "At a plateau" if flat else "While the run improves"
        if self._is_full(packet, memory):
            return _nothing(reading, f"{occasion}, but as many adaptations as allowed are under way.")
        if memory.rests(self.config.rest_epochs):
            return _nothing(reading, f"{occasion}, but what was tried lately came to nothing so far: growing rests.")
        seeds = self._open_seeds(packet, memory)
        open_candidates = self._affordable(packet, memory, seeds, candidates)
        if not open_candidates:
            is_settled = not memory.open_groups(packet, self.config.pending_epochs)
            small = too_small(packet.budget, [one for one in candidates if one.layer in seeds]) if is_settled else ()
            why = why_none(packet, seeds, candidates, self.config.min_budget_share)
            return _nothing(reading, f"{occasion}, but {why}", small)
        choices, helps = self._choose(packet, memory, seeds, open_candidates)
        reports = Evidence(name="posterior_observations", value=self.posterior.num_observations, detail="rewards known")
        chance = Evidence(name="probability_of_reward", value=helps, detail="of the likeliest drawn, before the curve")
        return _Draft(
            kind=AdaptationType.ADD_SEED,
            belief=join_evidence(helps, (reading.probability if flat else 1.0) * reading.capacity_lacks),
            urgency=self._growth_urgency(packet, reading),
            choices=choices,
            evidence=(chance, reports, *self._reliability_evidence()),
            explanation=f"{_words_of(reading, memory)}; drawn from {len(open_candidates)} candidates:",
        )

    def _is_full(self, packet: SystemStatePacket, memory: RunMemory) -> bool:
        return len(memory.open_groups(packet, self.config.pending_epochs)) >= self.config.max_open_adaptations

    def _open_seeds(self, packet: SystemStatePacket, memory: RunMemory) -> Mapping[str, Sequence[SeedStatus]]:
        """Give the dormant seeds of every layer that may be grown now."""
        if self._is_full(packet, memory) or memory.rests(self.config.rest_epochs):
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
    ) -> list[Candidate]:
        """Give the candidates at free layers that the budget allows and no embargo forbids."""
        reserved = memory.pending(self.config.pending_epochs).values()
        parameters, flops, adaptations = budget_left(packet.budget, reserved)
        if adaptations < 1 or is_spent(packet.budget, parameters, self.config.min_budget_share):
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
    ) -> tuple[tuple[_Choice, ...], float]:
        """Draw the rivals of a race, then a seed for each; also give the probability that any of them helps."""
        random = _random(packet)
        rows = sorted(candidates, key=lambda one: (one.layer, one.source, one.blueprint.id))
        if len(rows) > self.config.max_candidates:
            picked = random.choice(len(rows), self.config.max_candidates, replace=False)
            rows = [rows[place] for place in sorted(picked)]
        reserved = memory.pending(self.config.pending_epochs).values()
        parameters, _, adaptations = budget_left(packet.budget, reserved)
        room = min(self._race_size(packet, parameters), adaptations)
        free = {layer: len(found) for layer, found in seeds.items()}
        asked = [(one, _features(packet, one)) for one in rows]
        field = draw_rivals(self.posterior, asked, size=int(room), free=free, random=random)
        selector = SeedSelector(random.integers(0, 2**63, size=4).tolist(), self.config.selection)
        taken: set[tuple[str, int]] = set()
        choices: list[_Choice] = []
        for rival in field.rivals:
            layer = rival.candidate.layer
            indices = [seed.seed_index for seed in seeds[layer] if (layer, seed.seed_index) not in taken]
            histories = [memory.history_of(layer, index) for index in indices]
            seed = selector.select_seed_for_adaptation(layer, histories)
            taken.add((layer, seed.seed_index))
            choices.append(_Choice(rival.candidate, rival.belief, seed))
        return tuple(choices), field.helps

    def _race_size(self, packet: SystemStatePacket, parameters: float) -> int:
        """Give how many rivals are worth their cost: the share of ``race_size`` that is left of the parameters."""
        whole = packet.budget.max_added_parameters
        return self.config.race_size if not whole else max(1, math.ceil(self.config.race_size * parameters / whole))

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

    def _decisions(
        self, packet: SystemStatePacket, reading: CurveReading, draft: _Draft, memory: RunMemory
    ) -> Iterator[tuple[AdaptationDecision, _Choice | None]]:
        """Give the draft as one decision, or as those of a race."""
        confidence, earlier = self._calibrated(packet, draft, memory)
        whole = AdaptationDecision(
            adaptation_id=adaptation_id(packet.run_id, packet.sequence),
            run_id=packet.run_id,
            state_sequence=packet.sequence,
            epoch=packet.epoch,
            adaptation_type=draft.kind,
            layer=draft.layer,
            seed_index=draft.seed_index,
            confidence=confidence,
            urgency=min(max(draft.urgency, 0.0), 1.0),
            curve_state=reading.state,
            evidence=(*reading.evidence, *draft.evidence, *earlier),
            actionable=draft.asks and self._reaches(draft.belief, draft.urgency),
            parameter_change=draft.change,
            explanation=draft.explanation,
            created_at=packet.created_at,
        )
        if not draft.choices:
            yield whole, None
            return
        size = len(draft.choices)
        race_id, race_size = (whole.adaptation_id, size) if size > 1 else ("", 0)
        for place, choice in enumerate(draft.choices):
            candidate = choice.candidate
            yield (
                replace(
                    whole,
                    adaptation_type=draft.kind if choice.change is None else AdaptationType.MODIFY_ARCHITECTURE,
                    architecture_change=choice.change,
                    adaptation_id=adaptation_id(packet.run_id, packet.sequence, place),
                    layer=candidate.layer,
                    seed_index=choice.seed.seed_index,
                    blueprint_id=candidate.blueprint.id,
                    expected_reward=choice.belief.mean,
                    exploration_bonus=max(0.0, choice.belief.draw - choice.belief.mean),
                    explanation=f"{draft.explanation} {choice.words}{_racing(place, size)}."[:500],
                    blueprint=candidate.blueprint,
                    site=candidate.site,
                    source=candidate.source,
                    race_id=race_id,
                    race_size=race_size,
                ),
                choice,
            )

    def _calibrated(
        self, packet: SystemStatePacket, draft: _Draft, memory: RunMemory
    ) -> tuple[float, tuple[Evidence, ...]]:
        """Give the confidence in a draft, and what it was made of."""
        belief = min(max(draft.belief, 0.0), 1.0)
        kind = Kind.of(draft.kind)
        if kind is None or not draft.asks:
            return belief, ()
        under_way = memory.open_groups(packet, self.config.pending_epochs)
        asked = self.calibrator.ask(kind, belief, run_id=packet.run_id, under_way=under_way)
        return self.calibrator.confidence(asked), asked.evidence


def _words_of(reading: CurveReading, memory: RunMemory) -> str:
    """Say why a race is held now."""
    if reading.state is CurveState.PLATEAU:
        return f"Plateau for {reading.stretch_epochs} epochs"
    why = "The last race found a seed that pays" if memory.has_tried else "Nothing was tried yet"
    return f"{why}, and the run still improves: seeds may learn beside it"


def _racing(place: int, size: int) -> str:
    return f", {place + 1} of {size} that race for one place" if size > 1 else ""


def _features(packet: SystemStatePacket, candidate: Candidate) -> Features:
    """Give what the posterior sees of a candidate."""
    return features_of(
        candidate.site,
        candidate.blueprint.id,
        parameters=candidate.cost.parameters,
        progress=_progress(packet),
        family=family_of(candidate.blueprint.ir),
        place=place_of(packet.run_id, candidate.layer, candidate.source),
        reach=reach_of(candidate.source),
    )


def adaptation_id(run_id: str, sequence: int, place: int = 0) -> str:
    """Give the identity of the decision on one packet, or of one in its race: ``a`` and 32 hex digits."""
    rival = f":{place}" if place else ""
    return "a" + hashlib.sha256(f"{run_id}:{sequence}{rival}".encode()).hexdigest()[:32]


def _random(packet: SystemStatePacket) -> np.random.Generator:
    """Give the random stream of the decision on one packet."""
    text = f"tamiyo:{packet.random_seed}:{packet.sequence}"
    return np.random.default_rng(np.frombuffer(hashlib.sha256(text.encode()).digest(), dtype=np.uint32))


def _progress(packet: SystemStatePacket) -> float | None:
    """Give the share of the planned epochs that has passed, 0 to 1; ``None`` without a plan."""
    if not packet.planned_epochs:
        return None
    return min(1.0, packet.epoch / packet.planned_epochs)


def _nothing(reading: CurveReading, explanation: str, evidence: tuple[Evidence, ...] = ()) -> _Draft:
    return _Draft(belief=reading.probability, urgency=0.0, explanation=explanation, evidence=evidence)

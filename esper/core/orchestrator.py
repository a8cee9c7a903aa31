"""The seed orchestrator: turns decisions into plans, carries them out, keeps their history, enforces the limits.

    decision -> gates -> LOADING -> kernel arrives -> ACTIVE (learns alone) -> EVALUATING (alpha ramps, then the effect
    is measured, ``max_looks`` times or more) -> FOSSILIZED or CULLED (ramped out) -> field report

Seeds of one race learn side by side; the best of them is blended in, others wait for what comes of it
(``esper.core.race``). It works at step and epoch boundaries of the training thread, in memory alone. One seed is
blended in at a time, so that a measured effect has one cause, or those of one race in company, where each effect is
measured with the others in place; at the mean of the epoch's weights (``esper.core.smoothing``).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import asdict
from typing import Any, Final

import torch

from esper.contracts.decision import AdaptationDecision, AdaptationType, PlanStatus
from esper.contracts.errors import EsperError, InvalidStateError
from esper.contracts.lifecycle import SeedLifecycleState
from esper.contracts.run import AdaptationOutcome, Contribution, GateCheck, GrowthPhase
from esper.core import gates, pricing
from esper.core.adaptation import Adaptation
from esper.core.blending import BlendSchedule
from esper.core.context import RunContext
from esper.core.evaluation import (
    Judgement,
    is_hopeless,
    is_last_look,
    is_trifle,
    judge,
    level_per_look,
)
from esper.core.leaving import Leaving
from esper.core.link import KernelArrival
from esper.core.looks import Looks
from esper.core.nursery import Nursery
from esper.core.pacing import SeedPacer
from esper.core.race_desk import Hands, RaceDesk
from esper.core.rechecks import Rechecks
from esper.core.shelf import KernelShelf
from esper.core.smoothing import EpochMean
from esper.core.telling import Teller
from esper.core.tuning import TrialBench
from esper.execution.layers.base import KasminaLayer
from esper.execution.state import SeedTransition
from esper.telemetry.tracing import adaptation_span

log = logging.getLogger(__name__)

State = SeedLifecycleState
_STANDING: Final = frozenset({State.ACTIVE, State.EVALUATING, State.FOSSILIZED, State.ERROR})


class SeedOrchestrator:
    """Carries adaptations through their life; see the module's docstring."""

    def __init__(self, context: RunContext) -> None:
        self._context = context
        self.adaptations: dict[str, Adaptation] = {}
        self._nursery = Nursery(context)
        self._ramps: dict[str, BlendSchedule] = {}
        self._mean = EpochMean(context.model, context.costs)
        self._trials = TrialBench(context, self._mean)
        self._pacer = SeedPacer(context.optimizer, context.clock, context.growth)
        self._shelf = KernelShelf()
        self._gate_step = -1
        self._places: dict[tuple[str, int], Adaptation] = {}
        self._tell = Teller(context)
        self._leaving = Leaving(context, self._pacer, self._tell, self._places)
        self._desk = RaceDesk(context, self._mean, self._leaving, self._hands())
        self._looks = Looks(context, self._mean)
        self._rechecks = Rechecks(context, self._mean, self._tell)
        self._unsubscribe = context.model.seed_states.subscribe(self._on_transition)
        self._starters: Mapping[AdaptationType, Callable[[AdaptationDecision], list[GateCheck]]] = {
            AdaptationType.ADD_SEED: self._start_seed,
            AdaptationType.REMOVE_SEED: self._start_removal,
            AdaptationType.OPTIMIZE_PARAMETERS: self._start_trial,
            AdaptationType.MODIFY_ARCHITECTURE: self._start_seed,  # a widening or deepening stands as a seed
        }

    # ------------------------------------------------------------------ what others ask

    @property
    def layers(self) -> Mapping[str, KasminaLayer]:
        """Layers with seeds by dotted name."""
        return self._context.model.kasmina_layers

    def ongoing(self) -> list[Adaptation]:
        """Give the adaptations under way, oldest first."""
        return [item for item in self.adaptations.values() if item.open]

    def decide(self, decision: AdaptationDecision) -> list[GateCheck]:
        """Take a decision: begin it when every gate opens; gives the gates' answers. A repeated one changes nothing."""
        if decision.adaptation_id in self.adaptations or not decision.actionable:
            return []
        with adaptation_span("plan", decision.adaptation_id, run_id=self._context.run_id):
            checks = self._starters[decision.adaptation_type](decision)
            failed = [check for check in checks if not check.passed]
            status = PlanStatus.REJECTED if failed else PlanStatus.ACCEPTED
            reason = "; ".join(f"{check.name}: {check.detail}" for check in failed)
            self._tell.plan(decision.adaptation_id, status, reason, tuple(checks))
            if not failed and decision.adaptation_type is AdaptationType.REMOVE_SEED:
                self._carry_out_removal(decision)  # it ends at once: its plan is told as accepted before that
        early = self._shelf.take_early(decision.adaptation_id, refused=bool(failed))
        if early is not None:
            self.receive_kernel(early)
        return checks

    def receive_kernel(self, arrival: KernelArrival) -> None:
        """Take a kernel: germinate the seed that waits for it, or a rival when it is its turn.

        One that nobody waits for yet is kept for a while.
        """
        adaptation = self.adaptations.get(arrival.ready.adaptation_id)
        if adaptation is None:
            self._shelf.keep_early(arrival)
        elif not adaptation.open or adaptation.state is not State.LOADING:
            return
        elif arrival.kernel is None:
            self._fail(adaptation, f"no kernel: {arrival.error}")
        elif adaptation.decision.race_size > 1:
            self._shelf.keep_in_turn(arrival)
        else:
            self._bear(arrival)

    def bear_due(self, *, every: bool = False) -> None:
        """Let rivals be born whose kernels are at hand, one a step; ``every`` before a state is saved without them."""
        shelf = self._shelf
        for _ in range(len(shelf.waiting) if every else shelf.num_due(self._context.clock.steps_per_epoch)):
            self._bear_next()

    def tick(self, batch: tuple[torch.Tensor, torch.Tensor] | None) -> None:
        """Do one step's share: seeds that learn alone learn, alphas on a ramp move. Nothing to do costs nothing."""
        is_idle = self._nursery.is_empty and not self._ramps and self._trials.is_idle and not self._leaving.fading
        if is_idle and not self._rechecks.is_due(self.adaptations.values()):
            return
        grafted = {self.adaptations[key].decision.group for key in self._ramps} | self._leaving.groups
        self._let_learn(batch, besides=grafted)
        for adaptation_id, ramp in list(self._ramps.items()):
            adaptation = self.adaptations[adaptation_id]
            if self._tripped(adaptation):
                continue
            adaptation.graft_steps += 1
            self.layers[adaptation.layer].set_alpha(adaptation.seed_index, ramp.alpha_at(adaptation.graft_steps))
        self._leaving.tick()
        self._mean.note()

    def end_epoch(self) -> None:
        """Move every adaptation on that has come to a gate; call after the clock has counted the epoch."""
        self._clear_failed()
        self.bear_due(every=True)
        for adaptation in self._each_open():
            pricing.charge(self._context, adaptation)
            if adaptation.decision.adaptation_type is AdaptationType.OPTIMIZE_PARAMETERS:
                self._judge_trial(adaptation)
            elif adaptation.state is State.LOADING:
                self._check_loading(adaptation)
            elif self._too_slow(adaptation):
                continue
            elif adaptation.state is State.ACTIVE:
                self._desk.check(adaptation)
            elif adaptation.state is State.EVALUATING:
                self._check_graft(adaptation)
        self._rechecks.end_epoch(self.adaptations.values())
        self._mean.restart()
        self._gate_step = self._context.clock.step
        self._leaving.lift_embargoes()

    def finish(self) -> None:
        """End what is still open at the end of the run: measured and kept if it pays, else removed."""
        self._clear_failed()
        self._leaving.end_all()
        for adaptation in self._each_open():
            if adaptation.decision.adaptation_type is AdaptationType.OPTIMIZE_PARAMETERS:
                reason = f"undone: the run ended before it was judged{self._trials.undo(adaptation)}"
                self._close(adaptation, AdaptationOutcome.CULLED, reason)
            elif adaptation.state is State.EVALUATING:
                self._look(adaptation, self._blended(), run_ends=True)
            elif adaptation.state is State.ACTIVE or adaptation.id in self._shelf.waiting:
                self._remove(adaptation, AdaptationOutcome.CULLED, "the run ended before it was grafted")
            else:
                self._fail(adaptation, "the run ended before its kernel came")
        self._leaving.end_all()

    def end_failed_fades(self) -> None:
        """Let go of seeds that failed on their way out: a pass outside of training may have freed them."""
        self._leaving.end_failed()

    def withdraw_grafts(self, reason: str) -> bool:
        """Take out at once every seed that is blended in or on its way out, as the governor asks; whether any was."""
        faded = self._leaving.end_all()
        blended = self._blended()
        for adaptation in blended:
            self._remove(adaptation, AdaptationOutcome.ROLLED_BACK, reason)
        return faded or bool(blended)

    def remove_seed(self, layer: str, seed_index: int, reason: str) -> None:
        """Remove a live or fossilised seed: a share is ramped out; one that is on its way out already goes at once.

        Raises:
            InvalidStateError: Nothing stands there.
        """
        found = [a for a in self.adaptations.values() if (a.layer, a.seed_index) == (layer, seed_index)]
        live = next((a for a in reversed(found) if a.state in _STANDING), None)
        fading = next((a.id for a in found if a.id in self.fading), None)
        if live is not None:
            if not self._tripped(live):  # one that has failed is cleared away as such
                self._remove(live, AdaptationOutcome.CULLED, reason)
        elif fading is not None:
            self._leaving.end(fading)
        else:
            self.layers[layer].require_seed(seed_index)
            self._leaving.clear_away((layer, seed_index), reason)

    @property
    def fading(self) -> frozenset[str]:
        """Adaptations whose seed is on its way out: they have ended, and it still has a share."""
        return self._leaving.fading

    @property
    def awaits_kernel(self) -> bool:
        """Whether a seed waits for its kernel."""
        return any(item.state is State.LOADING and item.id not in self._shelf.waiting for item in self.ongoing())

    def germinate_in_place(self, adaptation_id: str) -> None:
        """Build the blueprint of an accepted adaptation here, without compiler or library.

        Raises:
            InvalidStateError: It does not wait for a kernel.
            EsperError: The blueprint does not build or fit; the adaptation has failed.
        """
        adaptation = self.adaptations[adaptation_id]
        blueprint = adaptation.decision.blueprint
        if blueprint is None or not adaptation.open or adaptation.state is not State.LOADING:
            raise InvalidStateError(f"adaptation {adaptation_id} must wait for its kernel, got one that does not")
        layer = self.layers[adaptation.layer]
        try:
            with self._tell.because("built in place", hoped=True):
                layer.germinate(
                    adaptation.seed_index,
                    blueprint.ir,
                    blueprint_id=blueprint.id,
                    random_seed=self._context.birth_seed(adaptation.seed_index),
                    adaptation_id=adaptation_id,
                    source=adaptation.decision.source,
                )
            self._nursery.take_in(adaptation)
            self._mean.welcome()
        except EsperError as error:
            self._fail(adaptation, f"does not germinate: {error}")
            raise

    def abandon_since(self, known: Iterable[str], reason: str) -> None:
        """End the adaptations begun after those ``known``: the state they stood in, or were kept in, was taken back."""
        for one in [item for key, item in self.adaptations.items() if key not in known]:
            if one.open:
                self._close(one, AdaptationOutcome.ROLLED_BACK, reason)
            elif one.decision.adaptation_type is not AdaptationType.REMOVE_SEED:  # a removal is carried out, and stays
                one.unkeep(AdaptationOutcome.ROLLED_BACK, reason)

    def remove_again(self, removed: Iterable[Adaptation]) -> None:
        """Take out once more what a loaded state brought back; each was told when it ended, and is not told again."""
        for later in removed:
            restored = self.adaptations[later.id]
            assert later.outcome is not None
            restored.outcome, restored.reason = later.outcome, later.reason
            restored.ended_step, restored.contribution = later.ended_step, later.contribution
            if restored.decision.adaptation_type is AdaptationType.OPTIMIZE_PARAMETERS:
                self._trials.undo(restored)
            else:
                self._remove(restored, later.outcome, later.reason, at_once=True)

    def let_go(self) -> None:
        """Drop everything under way without touching the model, before another state is loaded."""
        self._nursery.release_all()
        self._ramps.clear()
        self._trials.clear()
        self._pacer.clear()
        self._places.clear()
        self._leaving.let_go()
        self._gate_step = -1

    def forget(self) -> None:
        """Forget every record, so that a state that is loaded next stands alone."""
        self.adaptations = {}
        self._context.ledger.clear()

    def close(self) -> None:
        """Stop listening to the model; idempotent."""
        self._nursery.release_all()
        self._pacer.clear()
        self._unsubscribe()
        self._unsubscribe = lambda: None

    def state_dict(self) -> dict[str, Any]:
        """Give adaptations, budget and what is under way, as plain data with tensors."""
        return {
            "adaptations": {key: item.to_plain() for key, item in self.adaptations.items()},
            **self._context.ledger.state_dict(),
            "incubators": self._nursery.state_dict(),
            "ramps": {key: asdict(ramp) for key, ramp in self._ramps.items()},
            "trials": self._trials.state_dict(),
            "paces": self._pacer.state_dict(),
            "mean": self._mean.state_dict(),
            **self._leaving.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave; the model must hold the seeds already.

        Adaptations that the state does not know stay on record; no seed of theirs stands any more. Adaptations once
        begun stay counted.
        """
        kept = {key: item for key, item in self.adaptations.items() if key not in state["adaptations"]}
        for item in kept.values():
            item.state = None if item.state is None else State.DORMANT
        now_s = time.monotonic()
        found = {key: Adaptation.from_plain(item, now_s) for key, item in state["adaptations"].items()}
        self.adaptations = found | kept
        groups = {key: item.decision.group for key, item in found.items() if item.open}
        self._context.ledger.load_state_dict(state, groups)
        self._leaving.load_state_dict(state, found)
        self._ramps = {key: BlendSchedule(**item) for key, item in state["ramps"].items()}
        self._trials.load_state_dict(state["trials"], found)
        for adaptation in found.values():
            if adaptation.state not in (None, State.DORMANT):
                self._places[(adaptation.layer, adaptation.seed_index)] = adaptation
            if adaptation.state is State.FOSSILIZED and adaptation.contribution is not None:
                layer = self.layers[adaptation.layer]
                layer.record_contribution(adaptation.seed_index, adaptation.contribution)
        self._pacer.load_state_dict(state.get("paces", {"begun": ()}), self.layers)
        self._mean.load_state_dict(state.get("mean", {"steps": 0, "means": {}}))
        self._nursery.load_state_dict(state["incubators"], found)

    # ------------------------------------------------------------------ beginning

    def _start_seed(self, decision: AdaptationDecision) -> list[GateCheck]:
        place = gates.check_place(decision, self.layers)
        if not place.passed:
            return [place]
        layer = self.layers[decision.layer]
        site, fits = gates.check_site(decision, layer)
        cost, priced = gates.price_blueprint(decision, site)
        checks = [
            place,
            gates.check_dormant(decision, layer),
            gates.check_room(decision, self.adaptations.values(), self._context.growth),
            gates.check_allowed(decision, self._context.growth),
            fits,
            priced,
        ]
        if cost is not None:
            checks.append(gates.check_budget(decision, cost, self._context.ledger))
        if cost is None or not all(check.passed for check in checks):
            return checks
        self._context.ledger.book(decision.adaptation_id, cost, decision.group)
        adaptation = self._record(decision)
        adaptation.cost = cost
        pricing.charge(self._context, adaptation)
        self._places[(adaptation.layer, adaptation.seed_index)] = adaptation
        self._move(adaptation, State.LOADING, "decision accepted", tuple(checks))
        return checks

    def _start_removal(self, decision: AdaptationDecision) -> list[GateCheck]:
        place = gates.check_place(decision, self.layers)
        if not place.passed:
            return [place]
        live = gates.check_removable(decision, self.layers[decision.layer])
        if live.passed:
            self._record(decision)
        return [place, live]

    def _carry_out_removal(self, decision: AdaptationDecision) -> None:
        self.remove_seed(decision.layer, decision.seed_index or 0, decision.explanation or "removed by decision")
        self._close(self.adaptations[decision.adaptation_id], AdaptationOutcome.KEPT, "removed")

    def _start_trial(self, decision: AdaptationDecision) -> list[GateCheck]:
        checks = self._trials.checks(decision)
        if all(check.passed for check in checks):
            self._trials.begin(self._record(decision))
        return checks

    def _record(self, decision: AdaptationDecision) -> Adaptation:
        adaptation = Adaptation.begun(decision, self._context.clock)
        self.adaptations[adaptation.id] = adaptation
        return adaptation

    def _each_open(self) -> Iterator[Adaptation]:
        """Give the adaptations under way, each unless what was done with one before it ended it; grafts come first."""
        found = sorted(self.ongoing(), key=lambda item: item.state is not State.EVALUATING)
        return (item for item in found if item.open)

    # ------------------------------------------------------------------ on the way

    def _let_learn(self, batch: tuple[torch.Tensor, torch.Tensor] | None, *, besides: AbstractSet[str]) -> None:
        """Let seeds learn alone, but for these groups; those of a race begin when all that are at hand are born."""
        unborn = {self.adaptations[key].decision.group for key in self._shelf.waiting}
        alone = [self.adaptations[key] for key in self._nursery.adaptation_ids]
        alone = [item for item in alone if not self._tripped(item) and item.decision.group not in besides]
        ready = [item for item in alone if item.decision.group not in unborn]
        self._nursery.step(ready, [item for item in alone if item not in ready], batch)

    def _bear_next(self) -> None:
        """Let the next rival be born whose kernel is at hand; in order of decisions, so that equal runs do the same."""
        arrival = self._shelf.take_next(item.id for item in self.ongoing() if item.state is State.LOADING)
        if arrival is not None:
            with self._context.costs.phase(GrowthPhase.BIRTH):
                self._bear(arrival)

    def _bear(self, arrival: KernelArrival) -> None:
        adaptation = self.adaptations[arrival.ready.adaptation_id]
        try:
            self._germinate(adaptation, arrival)
        except EsperError as error:
            self._fail(adaptation, f"kernel refused: {error}")

    def _germinate(self, adaptation: Adaptation, arrival: KernelArrival) -> None:
        assert arrival.kernel is not None
        context, index, layer = self._context, adaptation.seed_index, self.layers[adaptation.layer]
        with adaptation.span("germinate", context.run_id):
            with self._tell.because("kernel loaded", hoped=True):
                layer.attach_kernel(
                    index,
                    arrival.kernel,
                    adaptation_id=adaptation.id,
                    source=adaptation.decision.source,
                    random_seed=context.birth_seed(index),
                )
            adaptation.artifact_id = arrival.ready.artifact_id
            adaptation.fallbacks = arrival.kernel.manifest.fallbacks
        self._nursery.take_in(adaptation)
        self._mean.welcome()

    def _check_loading(self, adaptation: Adaptation) -> None:
        waited_s = time.monotonic() - adaptation.begun_monotonic_s
        if waited_s > self._context.growth.loading_timeout_s:
            limit_s = self._context.growth.loading_timeout_s
            self._fail(adaptation, f"kernel must come within {limit_s:g} s, waited {waited_s:.1f} s")

    def _too_slow(self, adaptation: Adaptation) -> bool:
        """Whether the seed's kernel holds training up; then it is removed. What time it takes is charged."""
        layer = self.layers[adaptation.layer]
        check = gates.check_latency(layer, adaptation.seed_index, self._context.growth)
        if not check.passed:
            reason = f"its kernel is too slow: {check.detail}"
            self._remove(adaptation, AdaptationOutcome.CULLED, reason, (check,), at_once=True)
            return True
        pricing.charge_latency(self._context, adaptation)
        return False

    def _graft(self, adaptation: Adaptation, evidence: GateCheck) -> None:
        layer = self.layers[adaptation.layer]
        self._nursery.release(adaptation.id)
        self._pacer.join(layer, adaptation.layer, adaptation.seed_index)
        self._move(adaptation, State.EVALUATING, "graft begins", (evidence,))
        self._ramps[adaptation.id] = self._context.growth.ramp(self._context.clock.steps_per_epoch)

    def _check_graft(self, adaptation: Adaptation) -> None:
        company = [item for item in self._blended() if item.graft_steps >= self._ramps[item.id].num_steps]
        if any(item is adaptation for item in company):
            self._look(adaptation, company)

    def _blended(self) -> list[Adaptation]:
        return [item for item in self.ongoing() if item.state is State.EVALUATING]

    def _look(self, adaptation: Adaptation, company: Sequence[Adaptation], *, run_ends: bool = False) -> None:
        max_looks = self._context.growth.max_looks
        if not adaptation.looks or self._gate_step != self._context.clock.step:  # else: looked at as the epoch ended
            level = level_per_look(self._context.growth.confidence_level, 2 * max_looks)
            with adaptation.span("evaluate", self._context.run_id):
                adaptation.contribution = self._looks.effect(adaptation, company, level=level)
            adaptation.looks += 1
        if self._tripped(adaptation):
            return
        effect, price = adaptation.contribution, math.nan if adaptation.price is None else adaptation.price
        assert effect is not None
        judgement, check = judge(effect, price)
        last = run_ends or is_last_look(effect, price, adaptation.looks, max_looks)
        if judgement is Judgement.PAYS:
            self._fossilize(adaptation, check)
        elif last or self._is_hopeless(effect, judgement, price, looks_left=max_looks - adaptation.looks):
            reason = f"{judgement.value} after {adaptation.looks} looks: {check.detail}"
            self._remove(adaptation, AdaptationOutcome.CULLED, reason, (check,))

    def _is_hopeless(self, effect: Contribution, judgement: Judgement, price: float, *, looks_left: int) -> bool:
        """One that may still pay, or helps if not yet by its price, goes on learning: it has just been grafted."""
        dear = judgement is Judgement.DOES_NOT_PAY and is_hopeless(effect, price, looks_left)
        return dear or is_trifle(effect, self._context.control_loss)

    # ------------------------------------------------------------------ ending

    def _hands(self) -> Hands:
        return Hands(
            records=lambda: list(self.adaptations.values()), tripped=self._tripped, cull=self._cull, graft=self._graft
        )

    def _cull(self, adaptation: Adaptation, reason: str, checks: tuple[GateCheck, ...]) -> None:
        self._remove(adaptation, AdaptationOutcome.CULLED, reason, checks)

    def _fossilize(self, adaptation: Adaptation, check: GateCheck) -> None:
        self._ramps.pop(adaptation.id, None)
        assert adaptation.contribution is not None
        self.layers[adaptation.layer].record_contribution(adaptation.seed_index, adaptation.contribution)
        self._move(adaptation, State.FOSSILIZED, "its effect is above its price", (check,))
        self._close(adaptation, AdaptationOutcome.KEPT, f"kept: {check.detail}")
        reasons = self._context.ledger.keep(adaptation.id)
        for other in [item for item in self.ongoing() if item.decision.group == adaptation.decision.group]:
            if other.id in reasons or other.state is State.LOADING:  # the others may be grafted beside it
                lost = f"lost its race to {adaptation.label}, which was kept: "
                self._remove(other, AdaptationOutcome.CULLED, lost + reasons.get(other.id, "its kernel had not come"))

    def _fail(self, adaptation: Adaptation, reason: str) -> None:
        self._remove(adaptation, AdaptationOutcome.FAILED, reason)

    def _tripped(self, adaptation: Adaptation) -> bool:
        """Whether the seed's circuit breaker has ended it; then it is cleared away."""
        state = self.layers[adaptation.layer].state_layout.state(adaptation.seed_index)
        if state is not State.ERROR:
            return False
        failure = self._last_failure(adaptation.layer, adaptation.seed_index)
        self._remove(adaptation, AdaptationOutcome.FAILED, f"its kernel failed three times in a row, last {failure}")
        return True

    def _last_failure(self, layer: str, seed_index: int) -> str:
        seed = self.layers[layer].find_seed(seed_index)
        return seed.breaker.last_failure if seed is not None else "while it was loading"

    def _clear_failed(self) -> None:
        """Clear away every seed whose breaker has opened, kept ones too."""
        self._context.model.settle_failures()
        for adaptation in list(self._places.values()):
            self._tripped(adaptation)

    def _remove(
        self,
        adaptation: Adaptation,
        outcome: AdaptationOutcome,
        reason: str,
        checks: tuple[GateCheck, ...] = (),
        *,
        at_once: bool = False,
    ) -> None:
        """Take a seed out and end its adaptation; one that is culled with a share is ramped out, unless ``at_once``."""
        index, layer = adaptation.seed_index, self.layers[adaptation.layer]
        self._nursery.release(adaptation.id)
        self._ramps.pop(adaptation.id, None)
        if adaptation.id in self._leaving.fading:
            self._leaving.end(adaptation.id)
            return
        fades = outcome is AdaptationOutcome.CULLED and not at_once and self._leaving.has_share(adaptation)
        if not fades:
            self._pacer.leave(layer, adaptation.layer, index)
        if layer.state_layout.state(index) is State.LOADING:
            self._move(adaptation, State.ERROR, reason)
        if layer.state_layout.state(index) is not State.CULLED:
            self._move(adaptation, State.CULLED, reason, checks)
        if fades:
            self._leaving.fade(adaptation)
        else:
            self._leaving.rest(adaptation)
        if adaptation.open:
            self._close(adaptation, outcome, reason)
        adaptation.unkeep(outcome, reason)

    def _close(self, adaptation: Adaptation, outcome: AdaptationOutcome, reason: str) -> None:
        adaptation.outcome, adaptation.reason = outcome, reason[:500]
        adaptation.ended_step = max(adaptation.begun_step, self._context.clock.step)
        self._tell.outcome(adaptation)
        log.info("adaptation_ended", extra={"adaptation_id": adaptation.id, "outcome": outcome.name, "reason": reason})

    def _judge_trial(self, adaptation: Adaptation) -> None:
        judgement = self._trials.end_epoch(adaptation)
        if judgement is not None:
            self._close(adaptation, *judgement)

    # ------------------------------------------------------------------ steps of seeds

    def _move(self, adaptation: Adaptation, to: State, reason: str, checks: tuple[GateCheck, ...] = ()) -> None:
        with self._tell.because(reason, checks):
            self.layers[adaptation.layer].state_layout.transition(adaptation.seed_index, to, self._context.clock.step)

    def _on_transition(self, transition: SeedTransition) -> None:
        """Write down and tell every step a seed takes, whoever made it."""
        adaptation = self._places.get((transition.layer, transition.seed_index))
        if adaptation is not None:
            adaptation.state, adaptation.state_since_epoch = transition.to_state, self._context.clock.epoch
        if transition.to_state is State.ERROR and transition.from_state is not State.LOADING:
            with self._tell.because(self._last_failure(transition.layer, transition.seed_index)):
                self._tell.seed_step(transition, adaptation)
            return
        self._tell.seed_step(transition, adaptation)

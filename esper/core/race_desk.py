"""From learning alone to the graft: when the rounds of a race are held, and who is blended in after the last one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from esper.contracts.lifecycle import SeedLifecycleState
from esper.contracts.run import AdaptationOutcome, GateCheck, GrowthPhase
from esper.core import race
from esper.core.adaptation import Adaptation
from esper.core.context import RunContext
from esper.core.evaluation import seed_contribution
from esper.core.leaving import Leaving
from esper.core.smoothing import EpochMean

GLANCE_EPOCHS: Final = 1
"""Epochs of learning alone after which it is looked whether most rivals do harm: then more of it is wasted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Hands:
    """What the desk asks of the orchestrator."""

    records: Callable[[], list[Adaptation]]
    """Gives every adaptation of the run, oldest first."""
    tripped: Callable[[Adaptation], bool]
    """Says whether a seed's breaker has ended it, and clears it away."""
    cull: Callable[[Adaptation, str, tuple[GateCheck, ...]], None]
    """Takes a seed out, with the reason."""
    graft: Callable[[Adaptation, GateCheck], None]
    """Begins to blend a seed in, with the evidence."""


class RaceDesk:
    """Moves on the seeds that learn alone; a seed that nobody races against is a race of one."""

    def __init__(self, context: RunContext, mean: EpochMean, leaving: Leaving, hands: Hands) -> None:
        self._context = context
        self._mean = mean
        self._leaving = leaving
        self._hands = hands

    def check(self, adaptation: Adaptation) -> None:
        """Do what the end of an epoch asks of the race that a seed belongs to."""
        growth, epoch = self._context.growth, self._context.clock.epoch
        rivals = [item for item in self._ongoing() if item.decision.group == adaptation.decision.group]
        if adaptation.awaits_turn:
            self._take_turns(adaptation, rivals)
            return
        if rivals[0] is not adaptation or any(item.state is not SeedLifecycleState.ACTIVE for item in rivals):
            return  # one of them speaks for all, once all have begun
        learnt = epoch - max(item.state_since_epoch for item in rivals)
        last = learnt >= growth.incubation_epochs
        blended = any(item.state is SeedLifecycleState.EVALUATING for item in self._ongoing())
        if last and (blended or self._leaving.fading):  # what is on its way out has an effect, and is booked
            return  # one race at a time; until its turn comes the seed goes on learning
        if last or learnt in race.round_ends(growth.incubation_epochs, growth.race_rounds):
            rivals = self._run_round(rivals, last=last)
        elif learnt == GLANCE_EPOCHS:
            rivals = self._run_round(rivals, glance=True)
        if rivals and rivals[0].awaits_turn:
            self._take_turns(rivals[0], rivals)
        elif last and rivals:
            self._check_isolated(rivals[0])

    def _ongoing(self) -> list[Adaptation]:
        return [item for item in self._hands.records() if item.open]

    def _run_round(self, rivals: list[Adaptation], *, last: bool = False, glance: bool = False) -> list[Adaptation]:
        """Hold the rivals of a race against each other; gives those that stay, best first."""
        groups = {item.decision.group for item in rivals}
        kept = (item for item in self._hands.records() if item.outcome is AdaptationOutcome.KEPT)
        won = any(item.decision.group in groups for item in kept)
        if len(rivals) < (1 if won else 2):
            return rivals
        with self._context.costs.phase(GrowthPhase.RACE), self._mean.applied():
            found = race.run_round(self._context, rivals, last=last, won=won, glance=glance)
        sound = [item for item in rivals if not self._hands.tripped(item)]
        if len(sound) < len(rivals):
            return self._run_round(sound, last=last, glance=glance)
        for item, check in found.gone:
            self._hands.cull(item, check.detail, (check,))
        for item in found.stay:
            item.awaits_turn = found.takes_turns
        return found.stay

    def _take_turns(self, speaker: Adaptation, rivals: list[Adaptation]) -> None:
        """Blend in whoever has room now; the others wait for the next turn, if there is time for one."""
        waiting = self._with_a_turn(rivals)
        blended = [item for item in self._ongoing() if item.state is SeedLifecycleState.EVALUATING]
        is_busy = bool(self._leaving.fading) or any(item not in rivals for item in blended)
        if is_busy or not waiting or waiting[0] is not speaker:
            return  # one race at a time is blended in, and one of its rivals speaks for all
        left = self._context.clock.epochs_left
        if left is not None and left <= self._context.growth.graft_epochs:
            for item in waiting:
                self._hands.cull(item, f"its turn came {left} epochs before the run ends, too late to be judged", ())
            return
        ledger = self._context.ledger
        chosen = race.company(waiting, blended, lambda some: ledger.fit_together([one.id for one in some]))
        if chosen:
            ledger.blend([one.id for one in chosen])
        for item in chosen:
            detail = f"its turn has come, with {len(chosen) - 1} others: learning alone tells no more of it"
            self._hands.graft(item, GateCheck(name="turn", passed=True, detail=detail))

    def _with_a_turn(self, rivals: list[Adaptation]) -> list[Adaptation]:
        """Give those of a race that wait for their turn; those go whose site has had all it gets."""
        had = Counter(
            race.site_of(item)
            for item in self._hands.records()
            if item.graft_steps and item.decision.group == rivals[0].decision.group
        )
        waiting = [item for item in rivals if item.state is SeedLifecycleState.ACTIVE]
        for item in waiting:
            if had[race.site_of(item)] >= race.TURNS_PER_SITE:
                self._hands.cull(item, f"{race.TURNS_PER_SITE} of its race have had their turn where it stands", ())
        return [item for item in waiting if item.open]

    def _check_isolated(self, adaptation: Adaptation) -> None:
        with self._context.costs.phase(GrowthPhase.RACE), self._mean.applied():
            contribution = seed_contribution(self._context, adaptation, level=self._context.growth.confidence_level)
        adaptation.contribution = contribution
        if self._hands.tripped(adaptation):
            return
        effect = f"{contribution.estimate:+.4f} ({contribution.low:+.4f} to {contribution.high:+.4f})"
        helps = GateCheck(name="isolated_effect", passed=contribution.high > 0.0, detail=effect)
        if helps.passed:
            self._hands.graft(adaptation, helps)
        else:
            self._hands.cull(adaptation, f"learnt alone, it does harm: {effect}", (helps,))

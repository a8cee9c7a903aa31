"""Kept seeds are measured again: what a seed brings changes as the host learns beside it.

Every ``GrowthConfig.recheck_epochs`` epochs after it was kept, a fossil's effect is measured as it was before it was
kept, at the mean of the epoch's weights, by its own absence with all others in place; it is told with the price of its
cost at the present control loss. Where several are measured, so is the absence of all: what they bring together beside
the sum of what each brings is their interaction. What to do about one that no longer pays is the policy's decision.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from esper.contracts.lifecycle import SeedLifecycleState
from esper.contracts.run import Contribution
from esper.core import pricing
from esper.core.adaptation import Adaptation
from esper.core.context import RunContext
from esper.core.evaluation import judge
from esper.core.smoothing import EpochMean
from esper.core.telling import Teller
from esper.execution.counterfactual import evaluate_configurations, paired_interval
from esper.execution.overrides import SeedRef


class Rechecks:
    """Measures the kept seeds of a run whose time has come; belongs to the training thread."""

    def __init__(self, context: RunContext, mean: EpochMean, tell: Teller) -> None:
        self._context, self._mean, self._tell = context, mean, tell

    def is_due(self, known: Iterable[Adaptation]) -> bool:
        """Say whether any of the run's adaptations is measured again as the epoch under way ends."""
        return bool(self._due(known, self._context.clock.epoch + 1))

    def end_epoch(self, known: Iterable[Adaptation]) -> None:
        """Measure and tell what is due; model and random streams are as before afterwards."""
        known = list(known)
        due = self._due(known, self._context.clock.epoch)
        if not due:
            return
        self._check_books(known)
        with due[0].span("recheck", self._context.run_id):
            effects, together = self._measure(due)
        for one, effect in zip(due, effects, strict=True):
            if one.state is SeedLifecycleState.FOSSILIZED:  # else its kernel failed meanwhile
                self._note(one, effect, _interaction(effects, together))

    def _due(self, known: Iterable[Adaptation], epoch: int) -> list[Adaptation]:
        spacing = self._context.growth.recheck_epochs
        if not spacing:
            return []
        ages = ((one, epoch - one.state_since_epoch) for one in known if one.state is SeedLifecycleState.FOSSILIZED)
        return [one for one, age in ages if age > 0 and age % spacing == 0]

    def _measure(self, due: list[Adaptation]) -> tuple[list[Contribution], Contribution]:
        """Give what each brings with the others in place, and what all bring."""
        context = self._context
        on = {SeedRef(one.layer, one.seed_index): 1.0 for one in due}
        configurations = [on, *({**on, ref: 0.0} for ref in on)]
        if len(on) > 1:
            configurations.append(dict.fromkeys(on, 0.0))
        with self._mean.applied():
            losses = evaluate_configurations(context.model, context.control.batches, context.loss_rows, configurations)
        level = context.growth.confidence_level
        effects = [paired_interval(off - losses[0], confidence_level=level) for off in losses[1:]]
        return effects[: len(on)], effects[-1]

    def _note(self, one: Adaptation, effect: Contribution, interaction: str) -> None:
        price = pricing.present_price(self._context, one)
        age = self._context.clock.epoch - one.state_since_epoch
        figures = (effect.estimate, effect.low, effect.high, price)
        if not all(math.isfinite(figure) for figure in figures):
            self._tell.recheck(one, None, None, f"measured again after {age} epochs: the loss is no number")
            return
        one.contribution, one.price = effect, price
        self._context.model.kasmina_layers[one.layer].record_contribution(one.seed_index, effect)
        verdict = judge(effect, price)[1].detail
        self._tell.recheck(one, effect, price, f"measured again after {age} epochs: {verdict}{interaction}")

    def _check_books(self, known: Iterable[Adaptation]) -> None:
        """What stands is booked: a limit that was kept when a seed was begun is kept now."""
        standing = [one.cost for one in known if one.state is SeedLifecycleState.FOSSILIZED and one.cost is not None]
        booked = self._context.ledger.status()
        assert sum(cost.parameters for cost in standing) <= booked.added_parameters
        assert sum(cost.flops for cost in standing) <= booked.added_flops


def _interaction(effects: list[Contribution], together: Contribution) -> str:
    """Say in words what kept seeds bring together, beside the sum of what each brings; empty for one alone."""
    if len(effects) == 1:
        return ""
    parts = sum(effect.estimate for effect in effects)
    return f"; {len(effects)} kept seeds bring {together.estimate:+.4f} together, one by one {parts:+.4f}"

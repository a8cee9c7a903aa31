"""Looks at seeds that are blended in: what each brings, those of one company measured in the same passes.

The passes with all of them on serve every one: n seeds cost n + 1 passes over the control split in place of 2 n.
"""

from __future__ import annotations

from collections.abc import Sequence

from esper.contracts.lifecycle import SeedLifecycleState
from esper.contracts.run import Contribution
from esper.core.adaptation import Adaptation
from esper.core.context import RunContext
from esper.core.smoothing import EpochMean
from esper.execution.counterfactual import evaluate_configurations, paired_interval
from esper.execution.overrides import SeedRef


class Looks:
    """Measures at the mean of the epoch's weights; belongs to the training thread."""

    def __init__(self, context: RunContext, mean: EpochMean) -> None:
        self._context, self._mean = context, mean
        self._step = -1
        self._found: dict[str, Contribution] = {}

    def effect(self, adaptation: Adaptation, company: Sequence[Adaptation], *, level: float) -> Contribution:
        """Give what a seed brings at alpha 1 against alpha 0, those of its ``company`` at alpha 1; each is told once.

        What is measured along with it answers for the others of the company until the next step. ``level`` is the
        coverage of each interval. Model and random streams stay untouched.
        """
        if self._step != self._context.clock.step:
            self._step, self._found = self._context.clock.step, {}
        if adaptation.id not in self._found:
            self._measure([adaptation, *(one for one in company if one is not adaptation)], level)
        return self._found.pop(adaptation.id)

    def _measure(self, due: Sequence[Adaptation], level: float) -> None:
        """Measure all; of others, what a kernel that fails meanwhile took part in is not told, or measured anew."""
        context, on = self._context, {SeedRef(one.layer, one.seed_index): 1.0 for one in due}
        configurations = [on, *({**on, ref: 0.0} for ref in on)]
        with self._mean.applied():
            losses = evaluate_configurations(context.model, context.control.batches, context.loss_rows, configurations)
        failed = [one for one in due if one.state is SeedLifecycleState.ERROR]
        if failed and failed[0] is not due[0]:
            self._measure([one for one in due if one not in failed], level)
            return
        told = due[:1] if failed else due
        for one, off in zip(told, losses[1:], strict=False):
            self._found[one.id] = paired_interval(off - losses[0], confidence_level=level)

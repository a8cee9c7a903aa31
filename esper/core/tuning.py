"""Changes of the optimizer's settings, tried and kept only where the control loss says so.

A smaller rate makes the last step's weights quieter, and every loss measured at them smaller, whatever it does for the
run. So the losses before and after are taken at the mean of an epoch's weights, which is as quiet without it: a change
waits for the end of the epoch in which it was decided. In a run that is unstable there is no waiting.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch.optim import Optimizer

from esper.contracts.decision import AdaptationDecision, CurveState, ParameterChange
from esper.contracts.run import AdaptationOutcome, Contribution, GateCheck
from esper.core.adaptation import Adaptation
from esper.core.context import RunContext
from esper.core.optimizers import groups
from esper.execution.counterfactual import paired_interval

_FACTORS: Final = (("lr", "learning_rate_factor"), ("weight_decay", "weight_decay_factor"))


class ParameterTrial:
    """A change of learning rate or weight decay that is on trial; :meth:`begin` makes it."""

    def __init__(self, optimizer: Optimizer, change: ParameterChange) -> None:
        self._optimizer = optimizer
        self._change = change
        self._losses_before: torch.Tensor | None = None
        self._before: list[dict[str, Any]] = []
        self._after: list[dict[str, Any]] = []
        self.begun_epoch: int | None = None

    def begin(self, losses_before: torch.Tensor, epoch: int) -> None:
        """Make the change, and remember what it changed."""
        self._losses_before, self.begun_epoch = losses_before, epoch
        self._before = self._settings()
        for setting, field in _FACTORS:
            factor = getattr(self._change, field)
            if factor is not None:
                for group in groups(self._optimizer):
                    if setting in group:
                        group[setting] = group[setting] * factor
        self._after = self._settings()

    def effect(self, losses_after: torch.Tensor, level: float) -> Contribution:
        """Give the fall of the control loss since the change, paired by example."""
        assert self._losses_before is not None
        before = self._losses_before.to(losses_after.device)
        return paired_interval(before - losses_after, confidence_level=level)

    def undo(self) -> None:
        """Put the settings back to the bit; what a scheduler moved meanwhile is divided by the factor instead."""
        for setting, field in _FACTORS:
            factor = getattr(self._change, field)
            if factor is None:
                continue
            for group, before, after in zip(groups(self._optimizer), self._before, self._after, strict=True):
                if setting in group:
                    untouched = _same(group[setting], after[setting])
                    group[setting] = before[setting] if untouched else group[setting] / factor

    def state_dict(self) -> dict[str, Any]:
        """Give what a later :meth:`effect` and :meth:`undo` need."""
        return {
            "losses_before": self._losses_before,
            "before": self._before,
            "after": self._after,
            "begun_epoch": self.begun_epoch,
        }

    def load_state_dict(self, state: Mapping[str, Any], begun_epoch: int) -> None:
        """Take over a change that the optimizer's settings hold already; older states do not say when it was made."""
        self._losses_before = state["losses_before"]
        self._before, self._after = list(state["before"]), list(state["after"])
        self.begun_epoch = state.get("begun_epoch", begun_epoch)

    def _settings(self) -> list[dict[str, Any]]:
        names = [setting for setting, _ in _FACTORS]
        return [{name: _copied(group[name]) for name in names if name in group} for group in groups(self._optimizer)]


class TrialBench:
    """The one change of settings that may be on trial at a time; belongs to the training thread."""

    def __init__(self, context: RunContext) -> None:
        self._context = context
        self._trials: dict[str, ParameterTrial] = {}

    def checks(self, decision: AdaptationDecision) -> list[GateCheck]:
        """Say whether a change is named and no other is on trial."""
        named = decision.parameter_change is not None
        return [
            GateCheck(name="change", passed=named, detail="a change is named" if named else "no change is named"),
            GateCheck(name="room", passed=not self._trials, detail=f"{len(self._trials)} changes are on trial"),
        ]

    @property
    def is_idle(self) -> bool:
        """Whether nothing is on trial, nor waits to be."""
        return not self._trials

    def begin(self, adaptation: Adaptation) -> None:
        """Take on the change that an adaptation's decision names; where the run is unstable it is made at once."""
        trial = self._trials[adaptation.id] = self._trial_of(adaptation)
        if adaptation.decision.curve_state is CurveState.UNSTABLE:
            trial.begin(self._losses(), self._context.clock.epoch)

    def end_epoch(self, adaptation: Adaptation) -> tuple[AdaptationOutcome, str] | None:
        """Make the change that waited, or judge it when it had its time; call with the model at the epoch's mean."""
        trial, epoch = self._trials[adaptation.id], self._context.clock.epoch
        if trial.begun_epoch is None:
            trial.begin(self._losses(), epoch)
        elif epoch - trial.begun_epoch >= self._context.growth.settle_epochs:
            return self._judge(adaptation)
        return None

    def _judge(self, adaptation: Adaptation) -> tuple[AdaptationOutcome, str]:
        """Measure the change's effect and undo it unless it is shown to help; gives outcome and reason."""
        trial = self._trials.pop(adaptation.id)
        contribution = trial.effect(self._losses(), self._context.growth.confidence_level)
        adaptation.contribution = contribution
        interval = f"({contribution.low:+.5f} to {contribution.high:+.5f})"
        effect = f"control loss fell by {contribution.estimate:+.5f} {interval}"
        if contribution.low <= 0.0:
            trial.undo()
            return AdaptationOutcome.CULLED, f"undone: {effect}"
        return AdaptationOutcome.KEPT, f"kept: {effect}"

    def undo(self, adaptation: Adaptation) -> None:
        """Undo a change without judging it."""
        trial = self._trials.pop(adaptation.id)
        if trial.begun_epoch is not None:
            trial.undo()

    def clear(self) -> None:
        """Forget what is on trial; the optimizer's settings stay."""
        self._trials.clear()

    def state_dict(self) -> dict[str, Any]:
        """Give the trials under way."""
        return {key: trial.state_dict() for key, trial in self._trials.items()}

    def load_state_dict(self, state: Mapping[str, Any], adaptations: Mapping[str, Adaptation]) -> None:
        """Take over trials under way; the optimizer holds their settings already."""
        for key, item in state.items():
            trial = self._trials[key] = self._trial_of(adaptations[key])
            trial.load_state_dict(item, adaptations[key].begun_epoch)

    def _trial_of(self, adaptation: Adaptation) -> ParameterTrial:
        change = adaptation.decision.parameter_change
        assert change is not None
        return ParameterTrial(self._context.optimizer, change)

    def _losses(self) -> torch.Tensor:
        return self._context.control.evaluate(self._context.model, self._context.loss_rows).losses


def _same(left: Any, right: Any) -> bool:
    return bool(left == right)


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value

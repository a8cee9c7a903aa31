"""Changes of the optimizer's settings, tried and undone when the control loss says so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch.optim import Optimizer

from esper.contracts.decision import AdaptationDecision, ParameterChange
from esper.contracts.run import AdaptationOutcome, Contribution, GateCheck
from esper.core.adaptation import Adaptation
from esper.core.context import RunContext
from esper.core.optimizers import groups
from esper.execution.counterfactual import paired_interval

_FACTORS: Final = (("lr", "learning_rate_factor"), ("weight_decay", "weight_decay_factor"))


class ParameterTrial:
    """A change of learning rate or weight decay that is on trial; :meth:`begin` makes it."""

    def __init__(self, optimizer: Optimizer, change: ParameterChange, losses_before: torch.Tensor) -> None:
        self._optimizer = optimizer
        self._change = change
        self._losses_before = losses_before
        self._before: list[dict[str, Any]] = []
        self._after: list[dict[str, Any]] = []

    def begin(self) -> None:
        """Make the change, and remember what it changed."""
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
        return paired_interval(self._losses_before - losses_after, confidence_level=level)

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
        return {"losses_before": self._losses_before, "before": self._before, "after": self._after}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a change that the optimizer's settings hold already."""
        self._losses_before = state["losses_before"].to(self._losses_before.device)
        self._before, self._after = list(state["before"]), list(state["after"])

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

    def begin(self, adaptation: Adaptation) -> None:
        """Make the change that an adaptation's decision names."""
        trial = self._trial_of(adaptation, self._losses())
        self._trials[adaptation.id] = trial
        trial.begin()

    def judge(self, adaptation: Adaptation) -> tuple[AdaptationOutcome, str]:
        """Measure the change's effect and undo it when it harms; gives outcome and reason."""
        trial = self._trials.pop(adaptation.id)
        contribution = trial.effect(self._losses(), self._context.growth.confidence_level)
        adaptation.contribution = contribution
        interval = f"({contribution.low:+.5f} to {contribution.high:+.5f})"
        effect = f"control loss fell by {contribution.estimate:+.5f} {interval}"
        if contribution.high < 0.0:
            trial.undo()
            return AdaptationOutcome.CULLED, f"undone: {effect}"
        return AdaptationOutcome.KEPT, f"kept: {effect}"

    def undo(self, adaptation: Adaptation) -> None:
        """Undo a change without judging it."""
        self._trials.pop(adaptation.id).undo()

    def clear(self) -> None:
        """Forget what is on trial; the optimizer's settings stay."""
        self._trials.clear()

    def state_dict(self) -> dict[str, Any]:
        """Give the trials under way."""
        return {key: trial.state_dict() for key, trial in self._trials.items()}

    def load_state_dict(self, state: Mapping[str, Any], adaptations: Mapping[str, Adaptation]) -> None:
        """Take over trials under way; the optimizer holds their settings already."""
        for key, item in state.items():
            trial = self._trial_of(adaptations[key], item["losses_before"])
            trial.load_state_dict(item)
            self._trials[key] = trial

    def _trial_of(self, adaptation: Adaptation, losses_before: torch.Tensor) -> ParameterTrial:
        change = adaptation.decision.parameter_change
        assert change is not None
        return ParameterTrial(self._context.optimizer, change, losses_before)

    def _losses(self) -> torch.Tensor:
        return self._context.control.evaluate(self._context.model, self._context.loss_rows).losses


def _same(left: Any, right: Any) -> bool:
    return bool(left == right)


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value

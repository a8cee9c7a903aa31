"""Changes of the optimizer's settings or state, tried and kept only where the control loss says so.

A smaller rate makes the last step's weights quieter, and every loss measured at them smaller, whatever it does for the
run. So the losses before and after are taken at the mean of an epoch's weights, which is as quiet without it: a change
waits for the end of the epoch in which it was decided. In a run that is unstable there is no waiting.

Training never stops for a trial: there is no second network in which the change is tried. What is taken back of one
that is not shown to help is ``GrowthConfig.undone``:

    "change"     what was changed: settings, and where the state was begun anew, the state of before. The weights keep
                 what they learned since, and moments that were not touched by the change stay those of the last step.
    "snapshot"   besides, weights, buffers and the optimizer's whole state, as they were when it began: the steps of
                 the trial are lost. Clock, schedulers, data and tracked averages go on. It is put back whole or not at
                 all: where a seed joined or left the optimizer meanwhile, the weights of before are those of another
                 network, and only the change is taken back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import torch

from esper.contracts.decision import AdaptationDecision, CurveState, ParameterChange
from esper.contracts.errors import InvalidInputError
from esper.contracts.run import AdaptationOutcome, Contribution, GateCheck
from esper.core import optimizers
from esper.core.adaptation import Adaptation
from esper.core.clock import RunClock
from esper.core.context import RunContext
from esper.core.copies import StateCopy, WeightCopy
from esper.core.optimizers import Group
from esper.core.smoothing import EpochMean
from esper.execution.counterfactual import paired_interval

_FACTORS: Final = (("lr", "learning_rate_factor"), ("weight_decay", "weight_decay_factor"))


class ParameterTrial:
    """A change of learning rate, weight decay or state of one group, or of all, on trial; :meth:`begin` makes it."""

    def __init__(self, context: RunContext, change: ParameterChange) -> None:
        self._context, self._optimizer = context, context.optimizer
        self._change = change
        self._losses_before: torch.Tensor | None = None
        self._groups: list[Group] = []
        self._before: list[dict[str, Any]] = []
        self._after: list[dict[str, Any]] = []
        self._state: StateCopy | None = None
        self._weights: WeightCopy | None = None
        self.begun_epoch: int | None = None
        self._begun_step = 0

    def begin(self, losses_before: torch.Tensor, clock: RunClock) -> None:
        """Make the change, and remember what it changed; the model stands at its own weights, not at a mean."""
        self._losses_before, self.begun_epoch, self._begun_step = losses_before, clock.epoch, clock.step
        self._groups = [group for _, group in optimizers.chosen(self._optimizer, self._change.group)]
        self._before = self._settings()
        if self._context.growth.undone == "snapshot":
            self._state = StateCopy.of(self._optimizer, None)
            self._weights = WeightCopy(self._optimizer, self._context.model)
        elif self._change.resets_state:
            self._state = StateCopy.of(self._optimizer, self._change.group)
        for setting, factor in self._factors():
            for group in self._groups:
                if setting in group:
                    group[setting] = group[setting] * factor
        if self._change.resets_state:
            optimizers.reset_state(self._optimizer, self._change.group)
        self._after = self._settings()

    def losses_fell(self, losses_after: torch.Tensor, level: float) -> tuple[bool, Contribution | None, str]:
        """Say whether the control loss fell beyond doubt since the change, by how much (paired by example), in words.

        A loss that is not finite has no measure; one that is finite again has fallen.
        """
        assert self._losses_before is not None
        before = self._losses_before.to(losses_after.device)
        if not math.isfinite(float(losses_after.sum())):
            return False, None, "control loss is not finite"
        if not math.isfinite(float(before.sum())):
            return True, None, "control loss is finite again"
        fall = paired_interval(before - losses_after, confidence_level=level)
        interval = f"({fall.low:+.5f} to {fall.high:+.5f})"
        return fall.low > 0.0, fall, f"control loss fell by {fall.estimate:+.5f} {interval}"

    def undo(self) -> int | None:
        """Take the change back, to the bit; give the steps that are lost with it, ``None`` where the weights stay.

        What a scheduler moved meanwhile is divided by the factor instead; groups that came since stay as they are.
        """
        for setting, factor in self._factors():
            for group, before, after in zip(self._groups, self._before, self._after, strict=True):
                if setting in group:
                    untouched = _same(group[setting], after[setting])
                    group[setting] = before[setting] if untouched else group[setting] / factor
        if self._weights is not None and self._weights.fits:
            assert self._state is not None
            self._state.put_back(None)
            self._weights.put_back()
            return self._context.clock.step - self._begun_step
        if self._change.resets_state:
            assert self._state is not None
            self._state.put_back(self._change.group)
        return None

    def state_dict(self) -> dict[str, Any]:
        """Give what a later judgement and :meth:`undo` need."""
        model, known = self._context.model, optimizers.groups(self._optimizer)
        return {
            "losses_before": self._losses_before,
            "groups": [number for number, group in enumerate(known) if any(group is own for own in self._groups)],
            "before": self._before,
            "after": self._after,
            "begun_epoch": self.begun_epoch,
            "begun_step": self._begun_step,
            "state": None if self._state is None else self._state.state_dict(model),
            "weights": None if self._weights is None else self._weights.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], begun_epoch: int) -> None:
        """Take over a change that the optimizer holds already; older states do not say when it was made."""
        optimizer, model = self._optimizer, self._context.model
        self._losses_before = state["losses_before"]
        self._before, self._after = list(state["before"]), list(state["after"])
        known = optimizers.groups(optimizer)
        chosen = range(len(known)) if self._change.group is None else (self._change.group,)
        self._groups = [known[number] for number in state.get("groups", chosen)]
        self.begun_epoch, self._begun_step = state.get("begun_epoch", begun_epoch), state.get("begun_step", 0)
        kept, weights = state.get("state"), state.get("weights")
        self._state = None if kept is None else StateCopy.from_state(optimizer, model, kept)
        self._weights = None if weights is None else WeightCopy.from_state(optimizer, model, weights)

    def _factors(self) -> list[tuple[str, float]]:
        """Give the settings that are changed, each with its factor."""
        asked = [(setting, getattr(self._change, field)) for setting, field in _FACTORS]
        return [(setting, factor) for setting, factor in asked if factor is not None]

    def _settings(self) -> list[dict[str, Any]]:
        names = [setting for setting, _ in _FACTORS]
        return [{name: _copied(group[name]) for name in names if name in group} for group in self._groups]


class TrialBench:
    """The one change of settings that may be on trial at a time; belongs to the training thread."""

    def __init__(self, context: RunContext, mean: EpochMean) -> None:
        self._context, self._mean = context, mean
        self._trials: dict[str, ParameterTrial] = {}

    def checks(self, decision: AdaptationDecision) -> list[GateCheck]:
        """Say whether a change is named that can be made here, and no other is on trial."""
        refusal = _refusal(decision.parameter_change, len(optimizers.groups(self._context.optimizer)))
        return [
            GateCheck(name="change", passed=not refusal, detail=refusal[:500] or "a change is named"),
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
            trial.begin(self._losses(), self._context.clock)

    def end_epoch(self, adaptation: Adaptation) -> tuple[AdaptationOutcome, str] | None:
        """Make the change that waited, or judge it when it had its time; gives outcome and reason when it has ended."""
        trial, clock = self._trials[adaptation.id], self._context.clock
        if trial.begun_epoch is None:
            trial.begin(self._losses_at_mean(), clock)
        elif clock.epoch - trial.begun_epoch >= self._context.growth.settle_epochs:
            return self._judge(adaptation)
        return None

    def _judge(self, adaptation: Adaptation) -> tuple[AdaptationOutcome, str]:
        """Measure the change's effect and undo it unless it is shown to help; gives outcome and reason."""
        trial = self._trials.pop(adaptation.id)
        level = self._context.growth.confidence_level
        fell, adaptation.contribution, effect = trial.losses_fell(self._losses_at_mean(), level)
        if not fell:
            return AdaptationOutcome.CULLED, f"undone: {effect}{self._take_back(trial)}"
        return AdaptationOutcome.KEPT, f"kept: {effect}"

    def undo(self, adaptation: Adaptation) -> str:
        """Undo a change without judging it; gives in words what else went back, if anything."""
        trial = self._trials.pop(adaptation.id)
        return "" if trial.begun_epoch is None else self._take_back(trial)

    def _take_back(self, trial: ParameterTrial) -> str:
        lost = trial.undo()
        if lost is not None:
            self._mean.restart()  # it is of weights that are gone
            return f"; weights and optimizer state of {lost} steps ago are back"
        stay = "; the weights stay, for no copy fits the network as it is now"
        return stay if self._context.growth.undone == "snapshot" else ""

    def clear(self) -> None:
        """Forget what is on trial; the optimizer stays as it is."""
        self._trials.clear()

    def state_dict(self) -> dict[str, Any]:
        """Give the trials under way."""
        return {key: trial.state_dict() for key, trial in self._trials.items()}

    def load_state_dict(self, state: Mapping[str, Any], adaptations: Mapping[str, Adaptation]) -> None:
        """Take over trials under way; model and optimizer are those of the same moment already."""
        for key, item in state.items():
            trial = self._trials[key] = self._trial_of(adaptations[key])
            trial.load_state_dict(item, adaptations[key].begun_epoch)

    def _trial_of(self, adaptation: Adaptation) -> ParameterTrial:
        change = adaptation.decision.parameter_change
        assert change is not None
        return ParameterTrial(self._context, change)

    def _losses_at_mean(self) -> torch.Tensor:
        with self._mean.applied():
            return self._losses()

    def _losses(self) -> torch.Tensor:
        return self._context.control.evaluate(self._context.model, self._context.loss_rows).losses


def _refusal(change: ParameterChange | None, num_groups: int) -> str:
    """Say why a change cannot be made of an optimizer with so many groups; empty where it can."""
    if change is None or change.is_empty:
        return "no change is named"
    for _, field in _FACTORS:
        factor = getattr(change, field)
        if factor is not None and not 0.0 < factor < math.inf:
            return str(InvalidInputError.of(f"parameter_change.{field}", "be finite and > 0", factor))
    if change.group is not None and not 0 <= change.group < num_groups:
        return str(InvalidInputError.of("parameter_change.group", f"be 0 to {num_groups - 1}", change.group))
    return ""


def _same(left: Any, right: Any) -> bool:
    return bool(left == right)


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value

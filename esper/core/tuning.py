"""Changes of the optimizer's settings, tried and undone when the control loss says so."""

from __future__ import annotations

from typing import Final

import torch
from torch.optim import Optimizer

from esper.contracts.decision import ParameterChange
from esper.contracts.run import Contribution
from esper.execution.counterfactual import paired_interval

_FACTORS: Final = (("lr", "learning_rate_factor"), ("weight_decay", "weight_decay_factor"))


class ParameterTrial:
    """A change of learning rate or weight decay that is on trial; made when the object is."""

    def __init__(self, optimizer: Optimizer, change: ParameterChange, losses_before: torch.Tensor) -> None:
        self._optimizer = optimizer
        self._change = change
        self._losses_before = losses_before
        self._scale(invert=False)

    def effect(self, losses_after: torch.Tensor, level: float) -> Contribution:
        """Give the fall of the control loss since the change, paired by example."""
        return paired_interval(self._losses_before - losses_after, confidence_level=level)

    def undo(self) -> None:
        """Divide by the factors again, so that a scheduler's own changes meanwhile stay."""
        self._scale(invert=True)

    def _scale(self, *, invert: bool) -> None:
        for setting, field in _FACTORS:
            factor = getattr(self._change, field)
            if factor is None:
                continue
            for group in self._optimizer.param_groups:
                if setting in group:
                    group[setting] = group[setting] / factor if invert else group[setting] * factor

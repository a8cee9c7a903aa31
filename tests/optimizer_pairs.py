"""An optimizer made of two, as people pair Muon with AdamW."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.optim import AdamW, Muon, Optimizer


class MuonAndAdamW(Optimizer):
    """Muon for matrices and AdamW for the rest; it holds no parameters of its own but for what ``defaults`` says."""

    def __init__(
        self, parameters: Iterable[nn.Parameter], *, muon_lr: float, adamw_lr: float, defaults: dict[str, Any]
    ) -> None:
        found = list(parameters)
        self.optimizers = [
            Muon([value for value in found if value.ndim == 2], lr=muon_lr),
            AdamW([value for value in found if value.ndim != 2], lr=adamw_lr),
        ]
        super().__init__(found, defaults)

    def step(self, closure: Any = None) -> None:
        """Step both."""
        for inner in self.optimizers:
            inner.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of both."""
        for inner in self.optimizers:
            inner.zero_grad(set_to_none)

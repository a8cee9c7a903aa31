"""Evaluation on the control split: the held-out data that decisions see, and the sealed test never is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from esper.contracts.errors import EsperError, InvalidInputError
from esper.contracts.memory import raise_if_out_of_memory
from esper.core.losses import PerExampleLoss, accuracy_of
from esper.core.randomness import untouched_randomness
from esper.execution.overrides import GrowingModel, evaluating

Batch = tuple[torch.Tensor, torch.Tensor]
"""Inputs and targets, the batch dimension first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ControlFigures:
    """What one pass over the control split gives."""

    losses: torch.Tensor
    """Loss of every example in order, float64, shape (examples,)."""
    accuracy: float | None
    """Share of right answers; ``None`` where it has no meaning."""

    @property
    def loss(self) -> float:
        """Mean loss."""
        return float(self.losses.mean())

    @property
    def standard_error(self) -> float:
        """Standard error of the mean over examples; 0 for a single example."""
        count = len(self.losses)
        return float(self.losses.std()) / math.sqrt(count) if count > 1 else 0.0


class ControlSplit:
    """The control split in memory, so that every pass sees the same examples in the same order.

    Raises:
        InvalidInputError: The loader is empty, or a batch is not a pair of tensors of equal length.
    """

    def __init__(self, loader: Iterable[Any], *, device: torch.device) -> None:
        with untouched_randomness():
            self._batches: list[Batch] = [_pair(batch, device) for batch in loader]
        self._has_served = False
        self.num_examples = sum(len(inputs) for inputs, _ in self._batches)
        if self.num_examples == 0:
            raise InvalidInputError.of("control_loader", "hold at least one example", "an empty loader")

    @property
    def batches(self) -> Sequence[Batch]:
        """Every batch, in order."""
        return self._batches

    def example_inputs(self) -> torch.Tensor:
        """Give the first example with its batch dimension."""
        return self._batches[0][0][:1]

    def evaluate(self, model: GrowingModel, loss: PerExampleLoss) -> ControlFigures:
        """Give losses and accuracy of the model as it stands; model and random streams stay untouched.

        Raises:
            InvalidInputError: In the first pass: the model or the loss does not take a batch.
        """
        losses: list[torch.Tensor] = []
        right, counted = 0.0, 0
        with evaluating(model):
            for inputs, targets in self._batches:
                outputs, rows = self._pass(model, loss, inputs, targets)
                losses.append(rows.double())
                accuracy = accuracy_of(outputs, targets)
                if accuracy is not None:
                    right += accuracy * len(inputs)
                    counted += len(inputs)
        self._has_served = True
        return ControlFigures(losses=torch.cat(losses), accuracy=right / counted if counted else None)

    def _pass(
        self, model: GrowingModel, loss: PerExampleLoss, inputs: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Give outputs and losses; what fails before every batch went through once is laid to the loader."""
        try:
            outputs = model(inputs)
            return outputs, loss(outputs, targets)
        except Exception as error:
            if self._has_served or isinstance(error, EsperError | torch.OutOfMemoryError):
                raise
            raise_if_out_of_memory(error)
            why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            got = f"inputs {tuple(inputs.shape)} {inputs.dtype}, targets {tuple(targets.shape)} {targets.dtype}: {why}"
            raise InvalidInputError.of("control_loader", "yield batches that model and loss take", got) from error


def _pair(batch: Any, device: torch.device) -> Batch:
    if not isinstance(batch, list | tuple) or len(batch) != 2 or not all(isinstance(x, torch.Tensor) for x in batch):
        raise InvalidInputError.of("control_loader", "yield pairs of tensors (inputs, targets)", type(batch).__name__)
    inputs, targets = batch
    if inputs.ndim == 0 or targets.ndim == 0 or len(inputs) != len(targets):
        raise InvalidInputError.of(
            "control_loader", "yield as many targets as inputs", (tuple(inputs.shape), tuple(targets.shape))
        )
    return inputs.to(device), targets.to(device)

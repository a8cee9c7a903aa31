"""What stands between a failing kernel and the training step: its failures in a row are counted, then it is cut off."""

from __future__ import annotations

import math
from enum import StrEnum
from typing import Final

import torch
from torch import Tensor

FAILURE_LIMIT: Final = 3
"""Failed passes in a row after which a seed goes to ERROR."""


class FailureKind(StrEnum):
    """Why a kernel's contribution was dropped."""

    RAISED = "raised"
    WRONG_SHAPE = "wrong_shape"
    NON_FINITE = "non_finite"


class CircuitBreaker:
    """Counts one seed's failures in a row. Training thread only."""

    def __init__(self, limit: int = FAILURE_LIMIT) -> None:
        self.limit = limit
        self.failures_in_row = 0
        self.last_failure = ""

    @property
    def is_open(self) -> bool:
        """Whether the limit is reached."""
        return self.failures_in_row >= self.limit

    def note_success(self) -> None:
        """End the row of failures."""
        self.failures_in_row = 0

    def note_failure(self, kind: FailureKind, detail: str, *, in_row: int) -> bool:
        """Note that failures now stand at ``in_row`` in a row; true where that opens the breaker."""
        self.failures_in_row = in_row
        self.last_failure = f"{kind}: {detail}"
        return self.is_open


def is_finite(value: Tensor) -> bool:
    """Whether every element is finite; waits for the device, so it is meant for CPU tensors.

    The sum is non-finite whenever an element is, so one reduction answers nearly always; where the sum itself
    overflowed, the elements are looked at one by one.
    """
    detached = value.detach()
    total = detached.sum(dtype=torch.float32 if detached.dtype.itemsize < 4 else None)
    return math.isfinite(total.item()) or bool(torch.isfinite(detached).all())

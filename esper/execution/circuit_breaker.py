"""What stands between a failing kernel and the training step: its failures in a row are counted, then it is cut off."""

from __future__ import annotations

import math
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from esper.execution._native import all_finite
from esper.execution.health import is_real_tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.distributed import ProcessGroup
    from torch.multiprocessing.reductions import StorageWeakRef

    from esper.execution.gradient_gate import GradientGate

FAILURE_LIMIT: Final = 3
"""Failed passes in a row after which a seed goes to ERROR."""
PASS_LIMIT_MS: Final = 1000.0
"""Time that one pass of a module which is not a blueprint's own may take."""


class FailureKind(StrEnum):
    """Why a kernel's contribution was dropped."""

    RAISED = "raised"
    WRONG_SHAPE = "wrong_shape"
    WRONG_TYPE = "wrong_type"
    NON_FINITE = "non_finite"
    LEAKED = "leaked"
    SLOW = "slow"
    NO_INPUT = "no_input"


class KernelFaultError(Exception):
    """What is wrong with one pass of a kernel; the circuit breaker counts it, nobody else sees it."""

    def __init__(self, kind: FailureKind, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind
        self.detail = detail


class CircuitBreaker:
    """Counts one seed's failures in a row. Training thread only."""

    def __init__(self, limit: int = FAILURE_LIMIT) -> None:
        self.limit = limit
        self.failures_in_row = 0
        self.last_failure = ""
        self.has_failed_backward = False
        self.pass_limit_ms = PASS_LIMIT_MS
        self.num_passes = 0
        self.over: list[StorageWeakRef] = []
        """Activations of passes that are over."""
        self.num_overflows = 0
        """Steps in a row whose gradients overflowed and were left to a gradient scaler."""
        self.gate: GradientGate | None = None
        """What watches the kernel's parameters while a backward pass goes on whose gradients ranks average."""
        self.ranks: ProcessGroup | None = None
        """Ranks that train the seed together, none of which may cut it off alone; ``None`` without others."""

    @property
    def is_open(self) -> bool:
        """Whether the limit is reached."""
        return self.failures_in_row >= self.limit

    def __getstate__(self) -> dict[str, Any]:
        # A copy must not free what the weak references of another hold, nor watch another's backward pass; nor has
        # it been spread over ranks.
        return {**self.__dict__, "over": [], "gate": None, "ranks": None}

    def note_success(self) -> None:
        """Note a sound forward pass: it ends the row of failures, unless the last backward pass failed."""
        if not self.has_failed_backward:
            self.failures_in_row = 0
        self.has_failed_backward = False

    def note_failure(self, kind: FailureKind, detail: str, *, in_row: int) -> bool:
        """Note that failures now stand at ``in_row`` in a row; true where that opens the breaker."""
        self.failures_in_row = in_row
        self.last_failure = f"{kind}: {detail}"
        return self.is_open


def fault_of(delta: object, h: Tensor) -> KernelFaultError | None:
    """Say why a delta can't be added to h, but for its values: they are left to whoever may wait for the device."""
    if not isinstance(delta, Tensor) or delta.shape != h.shape:
        shown = tuple(delta.shape) if isinstance(delta, Tensor) else type(delta).__name__
        return KernelFaultError(FailureKind.WRONG_SHAPE, f"delta must be {tuple(h.shape)}, got {shown}")
    if not delta.is_floating_point() or delta.device != h.device or delta.layout != h.layout:
        shown = f"{delta.dtype} on {delta.device}, {delta.layout}"
        return KernelFaultError(FailureKind.WRONG_TYPE, f"delta must be of floating type on {h.device}, got {shown}")
    return None


def is_finite(value: Tensor) -> bool:
    """Whether every element is finite; waits for the device, so it is meant for CPU tensors.

    The sum is non-finite whenever an element is, so one reduction answers nearly always; where the sum itself
    overflowed, the elements are looked at one by one.
    """
    detached = value.detach() if value.requires_grad else value
    total = detached.sum(dtype=torch.float32 if detached.dtype.itemsize < 4 else None)
    return math.isfinite(total.item()) or bool(torch.isfinite(detached).all())


def are_finite(values: Sequence[Tensor]) -> bool:
    """Whether every element of CPU tensors is finite; float32 without gaps in one native call for all of them."""
    if all(value.dtype is torch.float32 and value.is_contiguous() and is_real_tensor(value) for value in values):
        return all_finite([value.data_ptr() for value in values], [value.numel() for value in values])
    return all(is_finite(value) for value in values)

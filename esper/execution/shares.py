"""The sum of a layer's output and its seeds' shares in CPU memory: ``h + sum_i alpha_i * delta_i``, checked.

Where nobody asks for gradients and all values are float32 without gaps, the native core adds and looks in one pass over
memory; else torch adds, and a reduction looks. Both give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from esper.execution._native import blend_checked
from esper.execution.circuit_breaker import is_finite
from esper.execution.health import is_real_tensor
from esper.execution.seed import Seed

_watching: Final = torch._C._len_torch_dispatch_stack
"""How many dispatch modes (FLOP counters, tracers) watch torch's operators: they must see the sum."""

Share = tuple[Seed, Tensor]
"""A seed and its delta."""


def checked_sum(h: Tensor, shares: Sequence[Share]) -> Tensor | None:
    """Give the sum; ``None`` where it holds what is not finite."""
    if h.dtype is torch.float32 and not h.requires_grad and _can_read(h) and not _watching():
        weights = [seed.weight for seed, _ in shares]
        if all(_fits(delta, weight) for (_, delta), weight in zip(shares, weights, strict=True)):
            return _native_sum(h, [delta for _, delta in shares], weights)
    total = h
    for seed, delta in shares:
        total = total + seed.scaled(delta, h)
    return total if is_finite(total) else None


def _can_read(value: Tensor) -> bool:
    return is_real_tensor(value) and value.is_contiguous()


def _fits(delta: Tensor, weight: Tensor | None) -> bool:
    """Whether the native sum may read a delta as it lies. REQUIRES: it has the shape and device of h."""
    return (
        delta.dtype is torch.float32
        and not delta.requires_grad
        and _can_read(delta)
        and (weight is None or weight.dtype is torch.float32)
    )


def _native_sum(h: Tensor, deltas: Sequence[Tensor], weights: Sequence[Tensor | None]) -> Tensor | None:
    out = torch.empty_like(h)
    sound = blend_checked(
        h.data_ptr(),
        [delta.data_ptr() for delta in deltas],
        [0 if weight is None else weight.data_ptr() for weight in weights],
        out.data_ptr(),
        h.numel(),
    )
    return out if sound else None

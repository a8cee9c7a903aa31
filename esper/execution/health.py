"""What one sampled forward pass says of a tensor, and rolling statistics over many."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from esper.contracts.run import HealthSummary
from esper.execution._native import probe

PROBE_SAMPLES: Final = 1024
"""Values looked at per tensor; the standard error of a share is at most 0.016, of the mean sigma / 32."""

HEALTH_WEIGHT: Final = 0.02
"""Weight of the newest sample once there are 50; before that the n-th weighs 1/n, as in the native layout."""

_DTYPE_NAMES: Final = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float64: "float64",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """Statistics of one tensor's values; NaN where there was no finite value."""

    mean: float
    """Mean of the finite values."""
    variance: float
    """Population variance of the finite values."""
    entropy: float
    """Entropy of their 32-bin histogram, in nats."""
    dead_share: float
    """Share of exact zeros, 0 to 1."""
    nonfinite_share: float
    """Share of values that are not finite, 0 to 1."""


def is_real_tensor(value: object) -> bool:
    """Whether the value is a plain tensor with memory of its own: not traced, not a subclass, not transformed."""
    return (
        (type(value) is Tensor or type(value) is torch.nn.Parameter)
        and not value.is_nested
        and torch._C._get_tracing_state() is None
        and not torch._C._functorch.is_functorch_wrapped_tensor(value)
    )


def can_probe(value: Tensor) -> bool:
    """Whether the tensor's memory can be read here and now: real, on the CPU, strided, of a floating type."""
    return (
        is_real_tensor(value)
        and value.device.type == "cpu"
        and value.layout == torch.strided
        and value.dtype in _DTYPE_NAMES
    )


def probe_tensor(value: Tensor) -> Figures:
    """Give the statistics of a tensor from a bounded sample, in one pass without the GIL.

    REQUIRES: ``can_probe(value)``.
    """
    is_dense = value.is_contiguous() or value.is_contiguous(memory_format=torch.channels_last)
    dense = value if is_dense else value.contiguous()
    found = probe(dense.data_ptr(), dense.numel(), _DTYPE_NAMES[dense.dtype], PROBE_SAMPLES)
    return Figures(mean=found[1], variance=found[2], entropy=found[3], dead_share=found[4], nonfinite_share=found[5])


class RollingMean:
    """Exponentially weighted mean that starts as the plain mean; ``None`` until something finite came."""

    __slots__ = ("count", "value")

    def __init__(self) -> None:
        self.count = 0
        self.value: float | None = None

    def add(self, sample: float | None) -> None:
        """Average one sample in; ``None`` and non-finite samples were not measured."""
        if sample is None or not math.isfinite(sample):
            return
        self.count += 1
        weight = max(HEALTH_WEIGHT, 1.0 / self.count)
        self.value = sample if self.value is None else self.value + weight * (sample - self.value)


class RollingHealth:
    """Rolling statistics of one layer over its sampled forward passes."""

    def __init__(self) -> None:
        self.count = 0
        self.dead_share: float | None = None
        self.mean, self.variance, self.entropy = RollingMean(), RollingMean(), RollingMean()
        self.gradient_variance, self.latency_ms = RollingMean(), RollingMean()

    def add(self, figures: Figures | None, *, latency_ms: float | None) -> None:
        """Average one sampled pass in; its gradient comes later, by ``gradient_variance.add``."""
        self.count += 1
        self.latency_ms.add(latency_ms)
        if figures is not None:
            self.mean.add(figures.mean)
            self.variance.add(figures.variance)
            self.entropy.add(figures.entropy)
            self.dead_share = figures.dead_share if math.isfinite(figures.dead_share) else None

    def summary(self, *, errors: int) -> HealthSummary:
        """Give the statistics as a domain value."""
        return HealthSummary(
            count=self.count,
            activation_mean=self.mean.value,
            activation_variance=self.variance.value,
            activation_entropy=self.entropy.value,
            gradient_variance=self.gradient_variance.value,
            latency_ms=self.latency_ms.value,
            dead_share=self.dead_share,
            errors=errors,
        )

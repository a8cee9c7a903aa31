"""Statistics of tensors that live on an accelerator: started on the layer's stream now, read at a later sample.

Nothing waits for the device: figures are copied to pinned memory behind the work that makes them, and taken only once
they have arrived. The sample and the formulas are those of the native probe (``csrc/include/esper/probe.h``): one
element of each of ``PROBE_SAMPLES`` equal strata, 32 bins, Miller-Madow correction.
"""

from __future__ import annotations

import math
import time
from functools import lru_cache
from typing import Final

import torch
from torch import Tensor

from esper.execution.health import PROBE_SAMPLES, Figures

_BINS: Final = 32
_GOLDEN: Final = 0x9E3779B97F4A7C15
_MASK: Final = (1 << 64) - 1


class PendingFigures:
    """Figures on their way from a device."""

    def __init__(self, value: Tensor) -> None:
        figures = _figures_of(value.detach())
        self._event: torch.cuda.Event | None = None
        if value.is_cuda:
            self._host = torch.empty(figures.shape, dtype=figures.dtype, pin_memory=True)
            self._host.copy_(figures, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(value.device))
        else:
            self._host = figures.cpu()

    def take(self) -> Figures | None:
        """Give the figures; ``None`` while they have not arrived. Does not wait."""
        if self._event is not None and not self._event.query():  # type: ignore[no-untyped-call]
            return None
        mean, variance, entropy, dead_share, nonfinite_share = self._host.tolist()
        return Figures(
            mean=mean, variance=variance, entropy=entropy, dead_share=dead_share, nonfinite_share=nonfinite_share
        )


class Stopwatch:
    """Time between its making and ``stop``, on the device's own clock where it has one."""

    def __init__(self, device: torch.device) -> None:
        self._start_ns = time.perf_counter_ns()
        self._stop_ns = 0
        self._events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        self._is_host = device.type == "cpu"
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            self._events = (begin, end)
            begin.record(torch.cuda.current_stream(device))

    def stop(self) -> None:
        """Note the end."""
        self._stop_ns = time.perf_counter_ns()
        if self._events is not None:
            self._events[1].record()

    def elapsed_ms(self) -> float | None:
        """Give the time in milliseconds; ``None`` while the device is not done, and on devices without a clock."""
        if self._events is not None:
            begin, end = self._events
            is_done = end.query()  # type: ignore[no-untyped-call]
            return float(begin.elapsed_time(end)) if is_done else None
        return (self._stop_ns - self._start_ns) / 1e6 if self._is_host else None


@torch.no_grad()
def _figures_of(value: Tensor) -> Tensor:
    """Give mean, variance, entropy, share of zeros and share of non-finite values, float32, on the value's device."""
    count = min(value.numel(), PROBE_SAMPLES)
    if count == 0:
        return torch.full((5,), torch.nan, device=value.device)
    sample = value.reshape(-1)[_sample_indices(value.numel(), value.device)].float()
    finite = torch.isfinite(sample)
    num_finite = finite.sum()
    zeros = torch.zeros_like(sample)
    mean = torch.where(finite, sample, zeros).sum() / num_finite
    variance = torch.where(finite, (sample - mean).square(), zeros).sum() / num_finite
    low = torch.where(finite, sample, torch.full_like(sample, torch.inf)).min()
    high = torch.where(finite, sample, torch.full_like(sample, -torch.inf)).max()
    width = torch.where(high > low, high - low, torch.ones_like(low))
    bins = torch.where(finite, ((sample - low) / width * _BINS).clamp(0, _BINS - 1), zeros).long()
    counts = torch.zeros(_BINS, device=value.device).scatter_add_(0, bins, finite.float())
    share = counts / num_finite
    correction = ((counts > 0).sum() - 1) / (2 * num_finite)
    entropy = -(torch.where(counts > 0, share * share.clamp_min(1e-30).log(), zeros[:1])).sum() + correction
    entropy = entropy.clamp_max(math.log(_BINS))
    dead_share = (sample == 0).float().mean()
    return torch.stack((mean, variance, entropy, dead_share, (~finite).float().mean()))


@lru_cache(maxsize=256)
def _sample_indices(numel: int, device: torch.device) -> Tensor:
    """Give the elements to look at: one per stratum, at an offset that a fixed hash chooses."""
    count = min(numel, PROBE_SAMPLES)
    length, longer = divmod(numel, count)
    indices = []
    for stratum in range(count):
        begin = stratum * length + min(stratum, longer)
        width = length + (stratum < longer)
        hashed = (((stratum + 1) * _GOLDEN) & _MASK) >> 32
        indices.append(begin + ((hashed * width) >> 32))
    return torch.tensor(indices, device=device)

"""Timing of two things against each other: interleaved, by ratios of neighbours, warmed up, without the collector.

    A B | B A | A B | ...      each bar is a round; the ratio of a round is ours over the reference

What slows a machine for longer than a round slows both alike, so it cancels in the ratio; who goes first alternates, so
that neither always finds the caches as the other left them. The figure is the median of the ratios.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from bench.report import Spread

Call = Callable[[], object]
Clock = Callable[[], int]
"""Gives nanoseconds."""

MIN_ROUNDS: Final = 15
"""Fewest rounds of a pairing."""
_Z_99: Final = 2.576


@dataclass(frozen=True, kw_only=True, slots=True)
class PairedTimes:
    """Times of one pairing, one entry a round."""

    ours_ns: tuple[float, ...]
    """Time of one call of ours, in nanoseconds."""
    reference_ns: tuple[float, ...]
    """Time of one call of the reference, in nanoseconds."""

    @property
    def ratios(self) -> list[float]:
        """Ours over the reference, round by round."""
        return [ours / reference for ours, reference in zip(self.ours_ns, self.reference_ns, strict=True)]

    @property
    def ratio(self) -> float:
        """Median of the ratios."""
        return statistics.median(self.ratios)

    @property
    def spread(self) -> Spread:
        """5 % to 95 % of the ratios."""
        return spread(self.ratios)

    @property
    def certain(self) -> Spread:
        """99 % interval of the median ratio."""
        return median_interval(self.ratios)

    def __add__(self, other: PairedTimes) -> PairedTimes:
        return PairedTimes(ours_ns=self.ours_ns + other.ours_ns, reference_ns=self.reference_ns + other.reference_ns)


def time_pair(
    ours: Call,
    reference: Call,
    *,
    seconds: float,
    calls: int = 1,
    warmup: int = 3,
    min_rounds: int = MIN_ROUNDS,
    clock: Clock = time.perf_counter_ns,
) -> PairedTimes:
    """Time two calls against each other.

    Args:
        ours: What is measured.
        reference: What it is measured against.
        seconds: Time that the rounds may take together; at least ``min_rounds`` are run.
        calls: Calls timed as one, so that a sample lasts much longer than reading the clock.
        warmup: Samples of each that are thrown away.
        min_rounds: Fewest rounds.
        clock: What times are read from. ``time.thread_time_ns`` leaves out the time in which other processes ran, and
            suits only work that the calling thread does alone and never waits in.
    """
    for _ in range(warmup):
        _sample_ns(ours, calls, clock)
        _sample_ns(reference, calls, clock)
    ours_ns: list[float] = []
    reference_ns: list[float] = []
    with no_collector():
        deadline = time.perf_counter() + seconds
        while len(ours_ns) < min_rounds or time.perf_counter() < deadline:
            if len(ours_ns) % 2:
                reference_ns.append(_sample_ns(reference, calls, clock))
                ours_ns.append(_sample_ns(ours, calls, clock))
            else:
                ours_ns.append(_sample_ns(ours, calls, clock))
                reference_ns.append(_sample_ns(reference, calls, clock))
    return PairedTimes(ours_ns=tuple(ours_ns), reference_ns=tuple(reference_ns))


def calls_lasting(call: Call, seconds: float, clock: Clock = time.perf_counter_ns) -> int:
    """Give how many calls last about so many seconds together, at least 1."""
    call()
    call()
    took_ns = min(_sample_ns(call, 1, clock) for _ in range(3))
    return max(1, round(seconds * 1e9 / max(took_ns, 1.0)))


def spread(values: Sequence[float]) -> Spread:
    """Give 5 % to 95 % of some values."""
    return Spread(percentile(values, 5), percentile(values, 95))


def percentile(values: Sequence[float], percent: float) -> float:
    """Give a percentile, linear between neighbours.

    REQUIRES: at least one value.
    """
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def median_interval(values: Sequence[float]) -> Spread:
    """Give the 99 % interval of the median, from the ranks of the values alone (no shape is assumed)."""
    ordered, count = sorted(values), len(values)
    half = _Z_99 * math.sqrt(count) / 2
    low = max(0, math.floor(count / 2 - half))
    high = min(count - 1, math.ceil(count / 2 + half) - 1)
    return Spread(ordered[low], ordered[max(low, high)])


@contextmanager
def no_collector() -> Iterator[None]:
    """Keep Python's cyclic collector out of what is timed."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _sample_ns(call: Call, calls: int, clock: Clock) -> float:
    """Time some calls as one; gives nanoseconds a call."""
    repeats = range(calls)
    start_ns = clock()
    for _ in repeats:
        call()
    return (clock() - start_ns) / calls

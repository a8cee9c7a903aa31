"""What growth costs a run: its time in the training thread by phase and, where they are asked for, its FLOPs.

Phases lie inside each other (a seed is born in its first step alone): what is within one is no part of the other.
Steps in which nothing grows are not timed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from esper.blueprints.flops import ThreadFlops
from esper.contracts.run import GrowthCost, GrowthPhase


class CostMeter:
    """Adds up time and FLOPs by phase since it was made; belongs to the training thread."""

    def __init__(self, *, counts_flops: bool = False) -> None:
        """Make a meter at 0; counting FLOPs slows every operator of growth's own work."""
        self._counts_flops = counts_flops
        self._seconds = dict.fromkeys(GrowthPhase, 0.0)
        self._flops = dict.fromkeys(GrowthPhase, 0)
        self._within = (0.0, 0)
        """Seconds and FLOPs of the phases within the one under way."""

    @contextmanager
    def phase(self, phase: GrowthPhase) -> Iterator[None]:
        """Book what is done within, but for phases within it."""
        around, self._within = self._within, (0.0, 0)
        counter = ThreadFlops() if self._counts_flops else None
        began_s = time.perf_counter()
        try:
            if counter is None:
                yield
            else:
                with counter:
                    yield
        finally:
            took_s, flops = time.perf_counter() - began_s, 0 if counter is None else counter.total
            self._seconds[phase] += took_s - self._within[0]
            self._flops[phase] += flops - self._within[1]
            self._within = around[0] + took_s, around[1] + flops

    def costs(self) -> tuple[GrowthCost, ...]:
        """Give what every phase has cost, in their order."""
        counted = self._counts_flops
        return tuple(
            GrowthCost(phase=one, seconds=self._seconds[one], flops=self._flops[one] if counted else None)
            for one in GrowthPhase
        )

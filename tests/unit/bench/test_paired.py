"""Timing in pairs."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest

from bench.paired import PairedTimes, calls_lasting, median_interval, no_collector, percentile, spread, time_pair


class Ticker:
    """A clock that moves only when a call says so."""

    def __init__(self) -> None:
        self.now_ns = 0
        self.order: list[str] = []

    def __call__(self) -> int:
        return self.now_ns

    def call(self, name: str, took_ns: int) -> Callable[[], None]:
        def run() -> None:
            self.now_ns += took_ns
            self.order.append(name)

        return run


def test_ratio_is_ours_over_the_reference() -> None:
    clock = Ticker()
    times = time_pair(clock.call("a", 30), clock.call("b", 20), seconds=0.0, calls=4, min_rounds=10, clock=clock)
    assert len(times.ratios) == 10
    assert times.ours_ns[0] == 30
    assert times.ratio == pytest.approx(1.5)
    assert times.spread == (1.5, 1.5)


def test_samples_are_interleaved_and_each_goes_first_in_turn() -> None:
    clock = Ticker()
    time_pair(clock.call("a", 1), clock.call("b", 1), seconds=0.0, warmup=0, min_rounds=4, clock=clock)
    assert "".join(clock.order) == "abbaabba"


def test_warm_up_is_not_counted() -> None:
    clock = Ticker()
    times = time_pair(clock.call("a", 1), clock.call("b", 1), seconds=0.0, warmup=5, min_rounds=2, clock=clock)
    assert clock.order.count("a") == 7
    assert len(times.ours_ns) == 2


def test_the_collector_is_off_while_timing_and_on_again_after() -> None:
    seen: list[bool] = []
    time_pair(lambda: seen.append(gc.isenabled()), lambda: None, seconds=0.0, warmup=0, min_rounds=1)
    assert seen == [False]
    assert gc.isenabled()
    with pytest.raises(RuntimeError, match="inside"), no_collector():
        raise RuntimeError("inside")
    assert gc.isenabled()


def test_calls_are_as_many_as_last_long_enough() -> None:
    clock = Ticker()
    assert calls_lasting(clock.call("a", 1_000), 1e-3, clock) == 1_000
    assert calls_lasting(clock.call("a", 10**9), 1e-3, clock) == 1


def test_percentiles_lie_between_neighbours() -> None:
    assert percentile([4.0, 1.0, 3.0, 2.0], 50) == pytest.approx(2.5)
    assert spread([float(value) for value in range(101)]) == (5.0, 95.0)
    assert percentile([7.0], 99) == 7.0


def test_the_interval_of_a_median_narrows_with_more_values() -> None:
    few, many = [median_interval([float(v) / n for v in range(n)]) for n in (20, 2_000)]
    assert few.low < 0.5 < few.high
    assert many.high - many.low < few.high - few.low


def test_times_of_several_turns_add_up() -> None:
    one = PairedTimes(ours_ns=(2.0,), reference_ns=(1.0,))
    assert (one + one).ratios == [2.0, 2.0]

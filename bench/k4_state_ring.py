"""K4: the native state layout and signal ring from Python against NumPy arrays and ``collections.deque``."""

from __future__ import annotations

import ctypes
import os
import statistics
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from bench.paired import MIN_ROUNDS, Call, PairedTimes, no_collector, spread, time_pair
from bench.report import Figure, Goal, Result, at_most
from esper.execution._native import SignalRing, StateLayout

Burst = Callable[[], object]

NUM_SEEDS: Final = 10_000
_ROUNDS_OF_BURST: Final = 128
_SEED: Final = 4321
_LOADING, _ACTIVE, _EVALUATING, _FOSSILIZED, _CULLED, _EMBARGOED, _DORMANT = 2, 3, 4, 5, 7, 8, 1
_PER_ROUND: Final = 7
"""Calls in one round of a burst: the steps of a whole life, so that it ends where it began."""

RECORD: Final = np.dtype(
    [
        ("state", "u1"),
        ("kernel_id", "u8"),
        ("blueprint_id", "u8"),
        ("alpha", "f4"),
        ("last_transition_step", "u8"),
        ("counters", "u8", 3),
        ("health_count", "u4"),
        ("health", "f4", 10),
    ]
)
"""A seed as a row of a NumPy structured array: the fields of ``SeedRecord``."""


def measure(*, quick: bool) -> Result:
    """Measure each figure against its reference, and the memory of a dormant seed."""
    seconds = 1.0 if quick else 8.0
    figures = [
        *push_figures(seconds),
        drain_figure(seconds),
        *transition_figures(seconds),
        *health_figures(seconds),
        *bulk_figures(seconds),
        *memory_figures(100_000 if quick else 1_000_000),
    ]
    return Result(name="k4_state_ring", figures=tuple(figures), notes=_NOTES)


def push_figures(seconds: float) -> list[Figure]:
    """Give a push in nanoseconds, and over appending the same record to a deque, with and without its time."""
    ring, queue = SignalRing(2 * _ROUNDS_OF_BURST * _PER_ROUND), deque[Any]()
    push = _pushing(ring)
    stamped = time_bursts(push, _appending_stamped(queue), seconds=seconds, after=(ring.drain, queue.clear))
    bare = time_bursts(push, _appending(queue), seconds=seconds, after=(ring.drain, queue.clear))
    if ring.dropped:
        raise AssertionError(f"{ring.dropped} pushes were drops, which cost less")
    ns_each = [took / (_ROUNDS_OF_BURST * _PER_ROUND) for took in bare.ours_ns]
    return [
        Figure(name="push", value=statistics.median(ns_each), unit="ns", spread=spread(ns_each)),
        _ratio("push, over deque.append of the same record, time included", stamped, at_most(1.0)),
        _ratio("push, over deque.append of the record without its time", bare, at_most(1.0)),
    ]


def drain_figure(seconds: float, num_records: int = 4096) -> Figure:
    """Give the ratio of draining a full ring into columns over emptying a deque into columns."""
    ring, queue = SignalRing(num_records), deque[Any]()
    push, append = _pushing(ring, num_records), _appending(queue, num_records)
    dtypes = [np.uint32, np.int32, np.uint64, *[np.float32] * 7]

    def emptied() -> object:
        columns = [np.array(column, dtype) for column, dtype in zip(zip(*queue, strict=True), dtypes, strict=True)]
        queue.clear()
        return columns

    times = time_bursts(ring.drain, emptied, seconds=seconds, before=(push, append))
    return _ratio(f"drain of {num_records:,}, over a deque into columns", times)


def transition_figures(seconds: float) -> list[Figure]:
    """Give the ratios of a transition over one assignment to an array's element, plain and structured."""
    states, records = np.zeros(NUM_SEEDS, np.uint8), np.zeros(NUM_SEEDS, RECORD)
    assigning = _assigning(states, 1), _assigning_field(records, "state", 1)
    return _over_assignments("state transition", _living(StateLayout(NUM_SEEDS)), assigning, seconds)


def health_figures(seconds: float) -> list[Figure]:
    """Give the ratios of a health update of five figures over one assignment to an array's element."""
    means, records = np.zeros(NUM_SEEDS, np.float32), np.zeros(NUM_SEEDS, RECORD)
    assigning = _assigning(means, 0.5), _assigning_field(records, "alpha", 0.5)
    return _over_assignments("health update", _ailing(StateLayout(NUM_SEEDS)), assigning, seconds)


def _over_assignments(name: str, ours: Burst, assigning: tuple[Burst, Burst], seconds: float) -> list[Figure]:
    kinds = ("a NumPy element", "a structured array's field")
    return [
        _ratio(f"{name}, over an assignment to {kind}", time_bursts(ours, one, seconds=seconds), at_most(1.5))
        for kind, one in zip(kinds, assigning, strict=True)
    ]


def bulk_figures(seconds: float, num_seeds: int = NUM_SEEDS) -> list[Figure]:
    """Give the ratios of snapshot, restore and reading all seeds over copies of as many bytes."""
    layout, records = StateLayout(num_seeds), np.zeros(num_seeds, RECORD)
    snapshot = layout.snapshot()
    memory, room = bytearray(snapshot), bytearray(len(snapshot))

    def copy_into() -> None:
        room[:] = snapshot

    pairs: dict[str, tuple[Call, Call, Goal | None]] = {
        "snapshot, over a copy of the same bytes": (layout.snapshot, lambda: bytes(memory), at_most(3.0)),
        "restore, over a copy of the same bytes": (lambda: layout.restore(snapshot), copy_into, None),
        "all records, over a copy of a structured array": (layout.read_all, records.copy, None),
    }
    return [
        _ratio(f"{name}, {num_seeds:,} seeds", time_pair(ours, reference, seconds=seconds), goal)
        for name, (ours, reference, goal) in pairs.items()
    ]


def memory_figures(num_seeds: int) -> list[Figure]:
    """Give the bytes of a seed's columns, and what a large layout takes of the machine with every column written."""
    _give_back_freed_memory()
    before = _resident_bytes()
    layout = StateLayout(num_seeds)
    layout.restore(layout.snapshot())
    resident = (_resident_bytes() - before) / layout.num_seeds
    return [
        Figure(name="memory a seed, its columns", value=StateLayout.bytes_per_seed, unit="bytes", goal=at_most(128)),
        Figure(name=f"memory a seed, resident, {num_seeds:,} seeds", value=resident, unit="bytes", goal=at_most(128)),
    ]


def time_bursts(
    ours: Burst,
    reference: Burst,
    *,
    seconds: float,
    before: tuple[Burst, Burst] | None = None,
    after: tuple[Burst, Burst] | None = None,
) -> PairedTimes:
    """Time two bursts as ``time_pair`` does, each with something done before or after that is not timed."""
    bursts = [(ours, 0), (reference, 1)]
    taken: tuple[list[float], list[float]] = ([], [])

    def sample(burst: Burst, which: int, *, is_kept: bool) -> None:
        if before is not None:
            before[which]()
        start_ns = time.perf_counter_ns()
        burst()
        took_ns = time.perf_counter_ns() - start_ns
        if after is not None:
            after[which]()
        if is_kept:
            taken[which].append(took_ns)

    with no_collector():
        for _ in range(3):
            for burst, which in bursts:
                sample(burst, which, is_kept=False)
        deadline = time.perf_counter() + seconds
        while len(taken[0]) < MIN_ROUNDS or time.perf_counter() < deadline:
            for burst, which in bursts:
                sample(burst, which, is_kept=True)
            bursts.reverse()
    return PairedTimes(ours_ns=tuple(taken[0]), reference_ns=tuple(taken[1]))


def _pushing(ring: SignalRing, count: int = _ROUNDS_OF_BURST * _PER_ROUND) -> Burst:
    def burst(layer: int = 7, step: int = 12_345, a: float = 0.1, b: float = 0.2, c: float = 0.3) -> None:
        for _ in range(count):
            ring.push(layer, -1, step, a, b, c, a, b, c, a)

    return burst


def _appending(queue: deque[Any], count: int = _ROUNDS_OF_BURST * _PER_ROUND) -> Burst:
    def burst(layer: int = 7, step: int = 12_345, a: float = 0.1, b: float = 0.2, c: float = 0.3) -> None:
        for _ in range(count):
            queue.append((layer, -1, step, a, b, c, a, b, c, a))

    return burst


def _appending_stamped(queue: deque[Any]) -> Burst:
    time_ns = time.time_ns

    def burst(layer: int = 7, step: int = 12_345, a: float = 0.1, b: float = 0.2, c: float = 0.3) -> None:
        for _ in range(_ROUNDS_OF_BURST * _PER_ROUND):
            queue.append((layer, -1, step, time_ns(), a, b, c, a, b, c, a, 0))

    return burst


def _living(layout: StateLayout) -> Burst:
    def burst(seed: int = _SEED, step: int = 12_345) -> None:
        for _ in range(_ROUNDS_OF_BURST):
            layout.transition(seed, _LOADING, step)
            layout.transition(seed, _ACTIVE, step)
            layout.transition(seed, _EVALUATING, step)
            layout.transition(seed, _FOSSILIZED, step)
            layout.transition(seed, _CULLED, step)
            layout.transition(seed, _EMBARGOED, step)
            layout.transition(seed, _DORMANT, step)

    return burst


def _ailing(layout: StateLayout) -> Burst:
    def burst(seed: int = _SEED, a: float = 0.1, b: float = 0.2, c: float = 0.3) -> None:
        for _ in range(_ROUNDS_OF_BURST):
            layout.record_health(seed, a, b, c, a, b)
            layout.record_health(seed, b, a, b, c, a)
            layout.record_health(seed, c, b, a, b, c)
            layout.record_health(seed, a, b, c, a, b)
            layout.record_health(seed, b, a, b, c, a)
            layout.record_health(seed, c, b, a, b, c)
            layout.record_health(seed, a, b, c, a, b)

    return burst


def _assigning(column: NDArray[Any], value: float) -> Burst:
    def burst(seed: int = _SEED) -> None:
        for _ in range(_ROUNDS_OF_BURST):
            column[seed] = value
            column[seed] = value
            column[seed] = value
            column[seed] = value
            column[seed] = value
            column[seed] = value
            column[seed] = value

    return burst


def _assigning_field(records: NDArray[Any], field: str, value: float) -> Burst:
    def burst(seed: int = _SEED) -> None:
        for _ in range(_ROUNDS_OF_BURST):
            records[field][seed] = value
            records[field][seed] = value
            records[field][seed] = value
            records[field][seed] = value
            records[field][seed] = value
            records[field][seed] = value
            records[field][seed] = value

    return burst


def _give_back_freed_memory() -> None:
    """Have the C library return what it holds free: else a layout may come to stand in it, and seem to take nothing."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's own
    if trim is not None:
        trim(0)


def _resident_bytes() -> int:
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def _ratio(name: str, times: PairedTimes, goal: Goal | None = None) -> Figure:
    certain = times.certain if goal is not None else None
    return Figure(name=name, value=times.ratio, unit="ratio", goal=goal, spread=times.spread, certain=certain)


_NOTES: Final = (
    "Every call is written out in a Python loop, with its arguments in local variables, as a training loop would.",
    "A pushed record carries its time; a deque's producer must read the clock for that. Without a time the floor is "
    "the call itself: in CPython 3.11 a C method of ten arguments that does nothing costs 0.8 of building and "
    "appending the tuple, and one that only unboxes them and stores 56 bytes 1.03.",
    "A health update averages five figures twice (weighted and by window) under the seed's sequence counter; the "
    "reference stores one number.",
    "Resident memory is the process's own count before and after; each column was written, and the default room to "
    "double was reserved.",
)

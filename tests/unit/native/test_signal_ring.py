"""SignalRing across the language border."""

from __future__ import annotations

import math
import sys
import threading
import time
from typing import Any

import numpy as np
import pytest

from esper.contracts.errors import InvalidInputError
from esper.execution._native import SignalRing

FIGURES = ["mean", "variance", "entropy", "dead_share", "nonfinite_share", "gradient_variance", "latency_ms"]

TICK_NS = 10_000_000
"""Longest time between two ticks of a Linux kernel's clock."""


def test_a_record_comes_out_as_it_went_in() -> None:
    ring = SignalRing(8)
    before = time.time_ns()
    assert ring.push(7, -1, 2**40, 1.0, 2.0, 3.0, 0.25, 0.5, 6.0, 7.0, 9)
    batch = ring.drain(10)
    assert (batch["layer_id"][0], batch["seed"][0], batch["step"][0], batch["flags"][0]) == (7, -1, 2**40, 9)
    assert [batch[name][0] for name in FIGURES] == [1.0, 2.0, 3.0, 0.25, 0.5, 6.0, 7.0]
    assert before - TICK_NS <= batch["time_ns"][0] <= time.time_ns()
    assert {name: column.dtype.name for name, column in batch.items()} == {
        "layer_id": "uint32",
        "seed": "int32",
        "step": "uint64",
        "time_ns": "uint64",
        "flags": "uint32",
        **dict.fromkeys(FIGURES, "float32"),
    }


def test_none_is_nan_and_flags_default_to_zero() -> None:
    ring = SignalRing(2)
    ring.push(0, 0, 0, None, float("nan"), 1, 0, 0, None, 2)
    batch = ring.drain()
    assert math.isnan(batch["mean"][0])
    assert math.isnan(batch["variance"][0])
    assert (batch["entropy"][0], batch["flags"][0]) == (1.0, 0)


def test_a_full_ring_drops_and_counts() -> None:
    ring = SignalRing(3)
    assert ring.capacity == 4
    accepted = [ring.push(0, 0, step, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0) for step in range(6)]
    assert accepted == [True] * 4 + [False] * 2
    assert (len(ring), ring.pushed, ring.dropped) == (4, 4, 2)
    assert ring.drain(3)["step"].tolist() == [0, 1, 2]
    assert ring.drain()["step"].tolist() == [3]
    assert ring.drain()["step"].tolist() == []


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((1, 2, 3), TypeError, r"push\(\) must get mean, got 3 positional arguments without it"),
        ((2**32, 0, 0, *[0.0] * 7), InvalidInputError, "layer_id must be between 0 and 4294967295, got 4294967296"),
        ((-1, 0, 0, *[0.0] * 7), InvalidInputError, "layer_id must be between 0 and 4294967295, got -1"),
        ((0, 2**31, 0, *[0.0] * 7), InvalidInputError, "seed must be between -2147483648 and 2147483647"),
        ((0, 0, -1, *[0.0] * 7), InvalidInputError, "step must be between 0 and 18446744073709551615, got -1"),
        ((0, 0, 0, "x", *[0.0] * 6), TypeError, "mean must be a real number, got str"),
        ((0, 0, 0, *[0.0] * 7, 2**32), InvalidInputError, "flags must be between 0 and 4294967295"),
    ],
)
def test_bad_pushes_are_refused_and_push_nothing(arguments: Any, error: type[Exception], message: str) -> None:
    ring = SignalRing(4)
    with pytest.raises(error, match=message):
        ring.push(*arguments)
    assert len(ring) == 0


def test_a_conversion_that_pushes_itself_loses_nothing() -> None:
    ring = SignalRing(8)

    class Pushes:
        def __float__(self) -> float:
            ring.push(1, 0, 1, *[0.0] * 7)
            return 0.5

    ring.push(2, 0, 2, Pushes(), *[0.0] * 6)  # type: ignore[arg-type]
    assert (ring.pushed, ring.drain()["step"].tolist()) == (2, [1, 2])


def test_push_belongs_to_a_ring() -> None:
    with pytest.raises(TypeError, match="SignalRing"):
        SignalRing.push(object(), 0, 0, 0, *[0.0] * 7)  # type: ignore[arg-type]
    hollow = SignalRing.__new__(SignalRing)
    with pytest.raises(TypeError, match="__init__"):
        SignalRing.push(hollow, 0, 0, 0, *[0.0] * 7)  # type: ignore[arg-type]


@pytest.mark.parametrize("capacity", [0, 2**24 + 1])
def test_a_nonsense_capacity_is_refused(capacity: int) -> None:
    with pytest.raises(InvalidInputError, match=f"between 1 and 2\\^24 records, got {capacity}"):
        SignalRing(capacity)


def test_pushing_leaks_no_reference() -> None:
    ring, value = SignalRing(4), 1234.5
    before = sys.getrefcount(value)
    for _ in range(100):
        ring.push(0, 0, 0, value, value, value, value, value, value, value)
    assert sys.getrefcount(value) == before


def test_a_draining_thread_loses_nothing_uncounted() -> None:
    ring, done = SignalRing(64), threading.Event()
    received: list[np.ndarray[Any, Any]] = []

    def drain() -> None:
        while not done.is_set() or len(ring):
            received.append(ring.drain(16)["step"])

    thread = threading.Thread(target=drain)
    thread.start()
    for step in range(20_000):
        ring.push(0, 0, step, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    done.set()
    thread.join(timeout=30)
    steps = np.concatenate(received)
    assert len(steps) == ring.pushed
    assert len(steps) + ring.dropped == 20_000
    assert (np.diff(steps.astype(np.int64)) > 0).all()

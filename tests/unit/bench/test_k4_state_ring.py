"""K4 in its smallest form: every figure comes out, and the bursts do what they are timed for."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np

from bench import k4_state_ring as k4
from esper.execution._native import SignalRing, StateLayout


def test_pushes_are_measured_with_their_time_and_without() -> None:
    figures = k4.push_figures(seconds=0.0)
    assert [figure.unit for figure in figures] == ["ns", "ratio", "ratio"]
    assert all(figure.value is not None and figure.value > 0 for figure in figures)
    assert [str(figure.goal) for figure in figures[1:]] == ["<= 1", "<= 1"]


def test_drain_transitions_and_health_are_measured() -> None:
    figures = [
        k4.drain_figure(seconds=0.0, num_records=256),
        *k4.transition_figures(seconds=0.0),
        *k4.health_figures(seconds=0.0),
    ]
    assert [figure.goal and figure.goal.limit for figure in figures] == [None, 1.5, 1.5, 1.5, 1.5]
    assert all(figure.value is not None and figure.value > 0 for figure in figures)


def test_bulk_work_is_measured_over_copies() -> None:
    figures = k4.bulk_figures(seconds=0.0, num_seeds=100)
    assert [figure.name.split(",")[0] for figure in figures] == ["snapshot", "restore", "all records"]
    assert all(figure.value is not None and figure.value > 0 for figure in figures)


def test_memory_of_a_seed_is_counted_twice() -> None:
    columns, resident = k4.memory_figures(200_000)
    assert columns.holds is True
    assert resident.value is not None
    assert resident.value > 0.5 * StateLayout.bytes_per_seed


def test_what_is_done_beside_a_burst_is_done_each_time() -> None:
    log: list[str] = []
    times = k4.time_bursts(
        lambda: log.append("ours"),
        lambda: log.append("reference"),
        seconds=0.0,
        before=(lambda: log.append("before ours"), lambda: log.append("before reference")),
        after=(lambda: log.append("after ours"), lambda: log.append("after reference")),
    )
    assert len(times.ours_ns) == len(times.reference_ns) >= k4.MIN_ROUNDS
    triples = {tuple(log[place : place + 3]) for place in range(0, len(log), 3)}
    assert triples == {
        ("before ours", "ours", "after ours"),
        ("before reference", "reference", "after reference"),
    }


def test_bursts_of_push_and_append_store_as_many_records() -> None:
    ring, queue = SignalRing(4096), deque[Any]()
    k4._pushing(ring, 100)()
    k4._appending(queue, 100)()
    drained = ring.drain()
    assert len(ring) == 0
    assert len(queue) == len(drained["step"]) == 100
    assert (drained["layer_id"][0], drained["step"][0]) == (queue[0][0], queue[0][2])


def test_bursts_of_state_and_health_reach_the_seed() -> None:
    layout = StateLayout(k4.NUM_SEEDS)
    k4._living(layout)()
    k4._ailing(layout)()
    record = layout.read(k4._SEED)
    assert (record.state, record.last_transition_step, record.health_count) == (1, 12_345, 128 * 7)
    column, records = np.zeros(k4.NUM_SEEDS), np.zeros(k4.NUM_SEEDS, k4.RECORD)
    k4._assigning(column, 2.0)()
    k4._assigning_field(records, "alpha", 0.5)()
    assert (column[k4._SEED], records["alpha"][k4._SEED]) == (2.0, 0.5)

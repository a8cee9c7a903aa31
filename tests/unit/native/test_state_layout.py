"""StateLayout across the language border: views, errors, snapshots, threads."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esper.contracts.errors import (
    CapacityExceededError,
    CorruptDataError,
    InvalidInputError,
    InvalidStateError,
    InvalidTransitionError,
)
from esper.execution._native import StateLayout, transition_table

DORMANT, LOADING, ACTIVE = 1, 2, 3
READ_ONLY = [
    "lifecycle_states",
    "kernel_ids",
    "blueprint_ids",
    "last_transition_steps",
    "forwards",
    "errors",
    "fallbacks",
    "health_counts",
    "means",
    "m2s",
    "entropies",
    "gradient_variances",
    "latencies_ms",
    "window_means",
    "window_m2s",
    "window_entropies",
    "window_gradient_variances",
    "window_latencies_ms",
]


def test_a_new_layout_is_dormant_and_unmeasured() -> None:
    layout = StateLayout(3)
    assert (len(layout), layout.num_seeds, layout.capacity) == (3, 3, 6)
    assert layout.lifecycle_states.tolist() == [DORMANT] * 3
    record = layout.read(0)
    assert (record.mean, record.m2, record.entropy, record.gradient_variance, record.latency_ms) == (None,) * 5
    assert np.isnan(layout.means).all()


def test_a_forbidden_transition_names_everything_and_changes_nothing() -> None:
    layout = StateLayout(2)
    with pytest.raises(InvalidTransitionError, match="seed 1 cannot go from DORMANT to ACTIVE; allowed: LOADING"):
        layout.transition(1, ACTIVE, 5)
    with pytest.raises(InvalidInputError, match="number of a seed state"):
        layout.transition(1, -1, 5)
    assert layout.read(1).last_transition_step == 0
    assert layout.state(1) == DORMANT


@pytest.mark.parametrize("column", READ_ONLY)
def test_only_alpha_can_be_written_from_python(column: str) -> None:
    layout = StateLayout(1)
    view = getattr(layout, column)
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 1
    with pytest.raises(ValueError, match="cannot set WRITEABLE"):
        view.setflags(write=True)


def test_views_show_later_changes_without_copying() -> None:
    layout = StateLayout(2)
    states, alpha = layout.lifecycle_states, torch.from_numpy(layout.alpha)
    layout.transition(0, LOADING, 1)
    layout.set_alpha(1, 0.5)
    assert states.tolist() == [LOADING, DORMANT]
    assert alpha.tolist() == [0.0, 0.5]
    alpha[0] = 0.25
    assert layout.read(0).alpha == 0.25


def test_views_outlive_the_name_of_the_layout_and_its_growth() -> None:
    layout = StateLayout(2, 100)
    view = layout.alpha
    address = view.__array_interface__["data"][0]
    assert layout.add_seeds(98) == 2
    assert layout.alpha.__array_interface__["data"][0] == address
    assert address % 64 == 0
    view[1] = 0.75
    del layout
    gc.collect()
    assert view.tolist() == [0.0, 0.75]


def test_growth_past_the_capacity_is_refused() -> None:
    layout = StateLayout(2, 3)
    with pytest.raises(CapacityExceededError, match="capacity of 3 seeds, got 2 on top of 2"):
        layout.add_seeds(2)
    assert layout.num_seeds == 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: StateLayout(2, 1), "num_seeds must be at most the capacity of 1, got 2"),
        (lambda: StateLayout(2, 0), "capacity must be at least 1 seed, got 0"),
        (lambda: StateLayout(2).read(2), "seed must be below num_seeds = 2, got 2"),
        (lambda: StateLayout(2).add_seeds(0), "n must be at least 1 seed, got 0"),
        (lambda: StateLayout(2).set_alpha(0, 1.5), r"alpha must be in \[0, 1\], got 1.5"),
        (lambda: StateLayout(2).set_alpha(0, float("nan")), r"alpha must be in \[0, 1\], got -?nan"),
    ],
)
def test_bad_input_is_named(call: Any, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        call()


def test_health_averages_and_skips_what_was_not_measured() -> None:
    layout = StateLayout(1)
    layout.record_health(0, 1.0, 4.0, 2.0, None, 5.0)
    layout.record_health(0, 3.0, 4.0, None, float("inf"), 7.0)
    record = layout.read(0)
    assert (record.health_count, record.mean, record.m2, record.entropy) == (2, 2.0, 5.0, 2.0)
    assert (record.gradient_variance, record.latency_ms) == (None, 6.0)


def test_counters_count() -> None:
    layout = StateLayout(2)
    for _ in range(3):
        layout.count_forward(1)
    layout.count_error(1)
    layout.count_fallback(1)
    record = layout.read(1)
    assert (record.forwards, record.errors, record.fallbacks) == (3, 1, 1)
    assert layout.forwards.tolist() == [0, 3]


def _filled(num_seeds: int) -> StateLayout:
    layout = StateLayout(num_seeds, 16)
    for seed in range(num_seeds):
        layout.transition(seed, LOADING, seed)
        layout.set_kernel(seed, 10 + seed, 2**64 - 1 - seed)
        layout.record_health(seed, seed, 1.0, 2.0, 3.0, 4.0)
    return layout


def test_a_snapshot_restores_every_column() -> None:
    source, target = _filled(5), StateLayout(2, 16)
    target.restore(source.snapshot())
    for column in [*READ_ONLY, "alpha"]:
        np.testing.assert_array_equal(getattr(source, column), getattr(target, column))
    assert target.snapshot() == source.snapshot()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda b: b[:10], "at least 32 bytes long, got 10"),
        (lambda b: b"X" + b[1:], "magic ESPRSEED"),
        (lambda b: b[:8] + b"\x01" + b[9:], "version from 2 to 3, got 1"),
        (lambda b: b[:-1], "121 bytes for each of its 3 seeds"),
        (lambda b: b[:-1] + bytes([b[-1] ^ 1]), "checksum"),
    ],
)
def test_a_damaged_snapshot_changes_nothing(spoil: Any, message: str) -> None:
    layout = _filled(3)
    before = layout.snapshot()
    with pytest.raises(CorruptDataError, match=message):
        layout.restore(spoil(StateLayout(3).snapshot()))
    assert layout.snapshot() == before


def test_a_snapshot_of_another_size_is_refused() -> None:
    with pytest.raises(InvalidStateError, match="at least the layout's 6 seeds, got 5"):
        StateLayout(6).restore(_filled(5).snapshot())
    with pytest.raises(CapacityExceededError, match="capacity of 4 seeds, got 5"):
        StateLayout(1, 4).restore(_filled(5).snapshot())


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 8)), max_size=60))
def test_random_walks_follow_the_table(walk: list[tuple[int, int]]) -> None:
    layout, table = StateLayout(4), set(transition_table())
    model = [DORMANT] * 4
    for step, (seed, to) in enumerate(walk):
        if (model[seed], to) in table:
            layout.transition(seed, to, step)
            model[seed] = to
        else:
            with pytest.raises(InvalidTransitionError):
                layout.transition(seed, to, step)
    assert layout.lifecycle_states.tolist() == model


def test_readers_in_threads_see_whole_records() -> None:
    layout, done, torn = StateLayout(1), threading.Event(), []

    def watch() -> None:
        while not done.is_set():
            record = layout.read(0)
            if record.kernel_id != record.blueprint_id:
                torn.append(record.kernel_id)

    threads = [threading.Thread(target=watch) for _ in range(2)]
    for thread in threads:
        thread.start()
    for i in range(20_000):
        layout.set_kernel(0, i, i)
    done.set()
    for thread in threads:
        thread.join(timeout=30)
    assert torn == []


def test_a_seed_costs_what_it_says() -> None:
    assert StateLayout.bytes_per_seed == 125


samples = st.one_of(st.none(), st.floats(-1e3, 1e3, width=32))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(samples, samples), min_size=1, max_size=150))
def test_windows_are_plain_averages_of_whole_windows(figures: list[tuple[float | None, float | None]]) -> None:
    layout, size = StateLayout(1), StateLayout.health_window
    for entropy, latency_ms in figures:
        layout.record_health(0, None, None, entropy, None, latency_ms)
    end = len(figures) // size * size
    record = layout.read(0)
    for column, got in enumerate((record.window_entropy, record.window_latency_ms)):
        expected = [row[column] for row in figures[end - size : end] if row[column] is not None] if end else []
        if expected:
            assert got == pytest.approx(np.mean(np.array(expected, dtype=np.float64)), abs=2e-3)
        else:
            assert got is None
    assert (record.window_mean, record.window_gradient_variance) == (None, None)


def test_a_window_mixes_means_and_variances_exactly() -> None:
    layout, random = StateLayout(1), np.random.default_rng(0)
    blocks = random.normal(3.0, 2.0, size=(2 * StateLayout.health_window, 50))
    for block in blocks:
        layout.record_health(0, float(block.mean()), float(block.var()), None, None, None)
    last = blocks[StateLayout.health_window :]
    record = layout.read(0)
    assert record.window_mean == pytest.approx(last.mean(), rel=1e-4)
    assert record.window_m2 == pytest.approx(last.var(), rel=1e-4)
    assert layout.window_m2s[0] == np.float32(record.window_m2)


def test_all_records_at_once_equal_one_after_the_other() -> None:
    layout = _filled(5)
    records = layout.read_all()
    assert len(records) == 5
    for seed in range(5):
        one = layout.read(seed)
        for name in records.dtype.names or ():
            value, single = records[seed][name], getattr(one, name)
            assert np.isnan(value) if single is None else value == single


def test_all_records_can_be_read_while_they_are_written() -> None:
    layout, done = StateLayout(64), threading.Event()
    torn: list[int] = []

    def watch() -> None:
        while not done.is_set():
            records = layout.read_all()
            torn.extend(np.flatnonzero(records["kernel_id"] != records["blueprint_id"]).tolist())

    threads = [threading.Thread(target=watch) for _ in range(2)]
    for thread in threads:
        thread.start()
    for number in range(20_000):
        layout.set_kernel(number % 64, number, number)
    done.set()
    for thread in threads:
        thread.join(timeout=30)
    assert torn == []


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 255))
def test_every_one_byte_corruption_is_refused(place: int, flips: int) -> None:
    layout = _filled(3)
    snapshot = bytearray(layout.snapshot())
    snapshot[place % len(snapshot)] ^= flips
    with pytest.raises(CorruptDataError, match="snapshot must"):
        layout.restore(bytes(snapshot))
    assert layout.snapshot() == _filled(3).snapshot()


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6))
def test_every_truncated_snapshot_is_refused(place: int) -> None:
    layout, snapshot = _filled(3), _filled(3).snapshot()
    with pytest.raises(CorruptDataError, match="snapshot must"):
        layout.restore(snapshot[: place % len(snapshot)])


def test_a_window_in_progress_survives_a_snapshot() -> None:
    whole, first = StateLayout(1), StateLayout(1)
    for number in range(StateLayout.health_window + 40):
        for layout in (whole, first) if number < 100 else (whole,):
            layout.record_health(0, float(number), 1.0, None, None, float(number))
    second = StateLayout(1)
    second.restore(first.snapshot())
    for number in range(100, StateLayout.health_window + 40):
        second.record_health(0, float(number), 1.0, None, None, float(number))
    assert second.snapshot() == whole.snapshot()


@pytest.mark.parametrize("column", [*READ_ONLY, "alpha"])
def test_every_view_keeps_the_layout_alive(column: str) -> None:
    layout = _filled(5)
    view, tensor = getattr(layout, column), torch.from_numpy(layout.alpha)
    expected, held = view.copy(), weakref.ref(layout)
    assert view.__array_interface__["data"][0] % 64 == 0
    del layout
    gc.collect()
    assert held() is not None
    np.testing.assert_array_equal(view, expected)
    del view, tensor
    gc.collect()
    assert held() is None

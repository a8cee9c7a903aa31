"""StateLayout across the language border: views, errors, snapshots, threads."""

from __future__ import annotations

import gc
import threading
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
        (lambda b: b[:8] + b"\x02" + b[9:], "version 1, got 2"),
        (lambda b: b[:-1], "81 bytes for each of its 3 seeds"),
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
    assert StateLayout.bytes_per_seed == 85

"""G3 in its smallest form: what is counted, and which mesh each run grows through."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from bench.g3_memory import Pair, figures_of, grow_ring
from bench.growth_hosts import make_cell
from bench.growth_training import Outcome, Tried


def outcome(ends: str, *, accuracy: float = 0.9) -> Outcome:
    """Give a run whose adaptations ended so: k kept, c culled, f failed."""
    names = {"k": "kept", "c": "culled", "f": "failed"}
    tried = tuple(
        Tried(
            blueprint="lora",
            layer="0",
            outcome=names[end],
            group=f"a{place}",
            confidence=0.5,
            contribution=None,
            low=None,
            high=None,
            price=None,
            parameters=1,
            begun_epoch=place,
        )
        for place, end in enumerate(ends)
    )
    return Outcome(
        accuracy=accuracy, loss=0.1, parameters=1, flops=0, seconds=1.0, curve=(), rate=0.01, tried=tried, topology=()
    )


def test_trials_are_summed_over_pairs_and_what_failed_to_run_is_no_trial() -> None:
    pairs = [
        Pair(fresh=outcome("kccccf"), second=outcome("kc", accuracy=0.92)),
        Pair(fresh=outcome("ccc"), second=outcome("kcc", accuracy=0.91)),
    ]
    ratio, gain, alone, second = figures_of("digits/mlp", pairs)
    assert (ratio.value, ratio.holds) == (5 / 8, True)
    assert ratio.spread is not None
    assert ratio.spread == (0.4, 1.0)
    assert gain.value == pytest.approx(1.5)
    assert gain.certain is not None
    assert gain.certain == pytest.approx((1.5 - 12.706 * 0.5, 1.5 + 12.706 * 0.5), rel=1e-3)
    assert gain.holds is None, "two pairs are not enough to tell"
    assert (alone.value, alone.holds) == (8, True)
    assert second.value == 2.5


def test_where_nothing_was_kept_there_is_no_figure() -> None:
    _, gain, alone, second = figures_of("digits/mlp", [Pair(fresh=outcome("cc"), second=outcome(""))])
    assert (alone.value, second.value) == (None, None)
    assert (gain.value, gain.certain) == (0.0, None)


def test_every_seed_grows_alone_and_after_the_one_before_it() -> None:
    opened: list[list[int]] = []

    @contextmanager
    def open_mesh() -> Iterator[Any]:
        opened.append([])
        yield opened[-1]

    def grow(mesh: list[int], _: Any, *, seed: int) -> Outcome:
        mesh.append(seed)
        return outcome("c" * len(mesh), accuracy=seed / 10)

    pairs = grow_ring(open_mesh, make_cell("digits", "mlp"), num_seeds=3, grow=grow)
    assert opened == [[0, 1], [1, 2], [2, 0]]
    assert [(len(one.fresh.tried), len(one.second.tried)) for one in pairs] == [(1, 2)] * 3
    assert [(one.fresh.accuracy, one.second.accuracy) for one in pairs] == [(0.0, 0.0), (0.1, 0.1), (0.2, 0.2)]

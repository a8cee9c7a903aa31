"""G3 in its smallest form: what is counted, and which mesh each run grows through."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from bench.g3_memory import Pair, figures_of, grow_pair
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
    assert (alone.value, alone.holds) == (8, True)
    assert second.value == 2.5


def test_where_nothing_was_kept_there_is_no_figure() -> None:
    *_, alone, second = figures_of("digits/mlp", [Pair(fresh=outcome("cc"), second=outcome(""))])
    assert (alone.value, second.value) == (None, None)


def test_the_second_run_alone_has_a_mesh_that_has_seen_another() -> None:
    opened: list[list[int]] = []

    @contextmanager
    def open_mesh() -> Iterator[Any]:
        opened.append([])
        yield opened[-1]

    def grow(mesh: list[int], _: Any, *, seed: int) -> Outcome:
        mesh.append(seed)
        return outcome("c" * len(mesh))

    pair = grow_pair(open_mesh, make_cell("digits", "mlp"), first=4, second=5, grow=grow)
    assert opened == [[5], [4, 5]]
    assert (len(pair.fresh.tried), len(pair.second.tried)) == (1, 2)

"""G3: what a run tries and keeps where its mesh has seen another of its kind, over the same run through a new mesh.

    fresh     seed b through a mesh that knows nothing
    second    seed b through a mesh that seed a has grown in before

Both have the same weights, batches and random streams, so that only what Tamiyo and Karn remember differs. Tried are
adaptations that were begun; those that failed for want of a kernel are left out. The sealed split is looked at once a
run, to see that fewer trials bring as much.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch

import esper
from bench.growth_grown import OpenMesh, grow_once
from bench.growth_hosts import Cell, make_cell
from bench.growth_tasks import TaskName
from bench.growth_training import Outcome
from bench.report import Figure, Result, Spread, at_least, at_most

TRIALS_GOAL: Final = at_most(2 / 3)
PER_KEPT_GOAL: Final = at_most(8)
_FAILED: Final = "failed"


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """One seed, grown with and without what another run taught."""

    fresh: Outcome
    """Through a mesh that knows nothing."""
    second: Outcome
    """Through a mesh that has seen another seed."""


def measure(*, quick: bool) -> Result:
    """Grow pairs of seeds: four each on digits and mnist1d, or one on digits."""
    torch.set_num_threads(1)
    tasks: Sequence[TaskName] = ("digits",) if quick else ("digits", "mnist1d")
    num_pairs = 1 if quick else 4
    figures: list[Figure] = []
    for task in tasks:
        cell = make_cell(task, "mlp")
        pairs = [grow_pair(esper.Mesh.embedded, cell, first=2 * one, second=2 * one + 1) for one in range(num_pairs)]
        figures += figures_of(cell.name, pairs)
    notes = (
        f"{num_pairs} pairs of seeds a task, perceptrons; settings and splits as in `growth`.",
        "Spreads are over the pairs.",
    )
    return Result(name="g3_memory", figures=tuple(figures), notes=notes)


def grow_pair(
    open_mesh: OpenMesh, cell: Cell, *, first: int, second: int, grow: Callable[..., Outcome] = grow_once
) -> Pair:
    """Grow seed ``second`` through a new mesh, and through one that has grown seed ``first``."""
    with open_mesh() as mesh:
        fresh = grow(mesh, cell, seed=second)
    with open_mesh() as mesh:
        grow(mesh, cell, seed=first)
        later = grow(mesh, cell, seed=second)
    print(f"{cell.name} seed {second}: tried {tried(fresh)}, then {tried(later)}", file=sys.stderr, flush=True)
    return Pair(fresh=fresh, second=later)


def tried(outcome: Outcome) -> int:
    """Give the number of adaptations that were tried."""
    return sum(item.grew and item.outcome != _FAILED for item in outcome.tried)


def kept(outcome: Outcome) -> int:
    """Give the number of adaptations that were kept."""
    return sum(item.is_kept for item in outcome.tried)


def figures_of(name: str, pairs: Sequence[Pair]) -> list[Figure]:
    """Give the figures of one cell; a ratio is of sums over the pairs."""
    fresh, second = [one.fresh for one in pairs], [one.second for one in pairs]
    gains = [one.second.accuracy - one.fresh.accuracy for one in pairs]
    ratios = [_over(tried(one.second), tried(one.fresh)) for one in pairs]
    known = [one for one in ratios if one is not None]
    return [
        Figure(
            name=f"{name}: tried by the second run over tried by the same run alone",
            value=_over(sum(map(tried, second)), sum(map(tried, fresh))),
            unit="ratio",
            goal=TRIALS_GOAL,
            spread=Spread(min(known), max(known)) if known else None,
        ),
        Figure(
            name=f"{name}: sealed accuracy, second less alone",
            value=100 * sum(gains) / len(gains),
            unit="points",
            goal=at_least(0),
            spread=Spread(100 * min(gains), 100 * max(gains)),
        ),
        _per_kept(f"{name}: tried for one kept, alone", fresh),
        _per_kept(f"{name}: tried for one kept, second run", second),
    ]


def _per_kept(name: str, outcomes: Sequence[Outcome]) -> Figure:
    ratio = _over(sum(map(tried, outcomes)), sum(map(kept, outcomes)))
    return Figure(name=name, value=ratio, unit="tried", goal=PER_KEPT_GOAL)


def _over(count: int, reference: int) -> float | None:
    return count / reference if reference else None

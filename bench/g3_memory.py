"""G3: what a run tries and keeps where its mesh has seen another of its kind, over the same run through a new mesh.

    fresh     a seed through a mesh that knows nothing
    second    the same seed through a mesh that the seed before it has grown in

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
from esper.execution.counterfactual import paired_interval

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
    """Grow five seeds each on digits and mnist1d, or two on digits."""
    torch.set_num_threads(1)
    tasks: Sequence[TaskName] = ("digits",) if quick else ("digits", "mnist1d")
    num_seeds = 2 if quick else 5
    figures: list[Figure] = []
    for task in tasks:
        cell = make_cell(task, "mlp")
        figures += figures_of(cell.name, grow_ring(esper.Mesh.embedded, cell, num_seeds=num_seeds))
    notes = (
        f"{num_seeds} seeds a task, perceptrons; settings and splits as in `growth`.",
        "The spread of the ratio is over the seeds; that of accuracy is the 95 % interval of its mean (Student's t): "
        "'unsure' where it holds 0.",
    )
    return Result(name="g3_memory", figures=tuple(figures), notes=notes)


def grow_ring(
    open_mesh: OpenMesh, cell: Cell, *, num_seeds: int, grow: Callable[..., Outcome] = grow_once
) -> list[Pair]:
    """Grow every seed through a new mesh, which has seen it when the next one grows; the last is followed by the first.

    REQUIRES: two seeds or more.
    """
    fresh: dict[int, Outcome] = {}
    second: dict[int, Outcome] = {}
    for seed in range(num_seeds):
        following = (seed + 1) % num_seeds
        with open_mesh() as mesh:
            fresh[seed] = grow(mesh, cell, seed=seed)
            second[following] = grow(mesh, cell, seed=following)
        told = f"tried {tried(fresh[seed])}, seed {following} after it {tried(second[following])}"
        print(f"{cell.name} seed {seed}: {told}", file=sys.stderr, flush=True)
    return [Pair(fresh=fresh[seed], second=second[seed]) for seed in range(num_seeds)]


def tried(outcome: Outcome) -> int:
    """Give the number of adaptations that were tried."""
    return sum(item.grew and item.outcome != _FAILED for item in outcome.tried)


def kept(outcome: Outcome) -> int:
    """Give the number of adaptations that were kept."""
    return sum(item.is_kept for item in outcome.tried)


def figures_of(name: str, pairs: Sequence[Pair]) -> list[Figure]:
    """Give the figures of one cell; a ratio is of sums over the pairs."""
    fresh, second = [one.fresh for one in pairs], [one.second for one in pairs]
    gains = [100 * (one.second.accuracy - one.fresh.accuracy) for one in pairs]
    ratios = [_over(tried(one.second), tried(one.fresh)) for one in pairs]
    known = [one for one in ratios if one is not None]
    gain = paired_interval(torch.tensor(gains, dtype=torch.float64)) if len(pairs) > 1 else None
    interval = None if gain is None else Spread(gain.low, gain.high)
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
            value=sum(gains) / len(gains),
            unit="points",
            goal=at_least(0),
            spread=interval,
            certain=interval,
        ),
        _per_kept(f"{name}: tried for one kept, alone", fresh),
        _per_kept(f"{name}: tried for one kept, second run", second),
    ]


def _per_kept(name: str, outcomes: Sequence[Outcome]) -> Figure:
    ratio = _over(sum(map(tried, outcomes)), sum(map(kept, outcomes)))
    return Figure(name=name, value=ratio, unit="tried", goal=PER_KEPT_GOAL)


def _over(count: int, reference: int) -> float | None:
    return count / reference if reference else None

"""Incubation: how well, and at what cost, does a seed learn behind the host's back? Every way, paired by seed.

toy      distance to an optimum that is known, at a site as good as the last layer and at one behind a stretched map
digits   share of the control loss (and of the sealed test's) that a seed takes away when its incubation ends
cost     a training step with a seed that learns alone, over one without: processor time in pairs, and FLOPs

The straight-through arm is a negative control: no part of the product learns so.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from typing import Final

import torch
from torch import nn

from bench import hosts
from bench.incubation_arms import (
    ARMS,
    DAMPED,
    HOSTS,
    INCUBATION_EPOCHS,
    PRETRAIN_EPOCHS,
    WAYS,
    WHOLE,
    SiteOutcome,
    StepCost,
    run_digits,
    run_toy,
    step_cost,
)
from bench.report import Figure, Goal, Result, Spread
from esper.core.control import Batch
from esper.execution.counterfactual import paired_interval

TOYS: Final[Mapping[str, float]] = {"toy, even": 1.0, "toy, stretched": 0.3}
"""Least stretch of the map behind the site; the greatest is 1."""
TOY_STEPS: Final = 200
"""Steps of the toy."""
TOY_ARMS: Final = tuple(arm for arm in ARMS if arm != "trial, norms by batch" and not arm.startswith("damped"))
"""The toy has no norms, and a squared error takes no damping (decision 0015)."""
TIMED: Final = (WHOLE, DAMPED, "trial, half", "trial, quarter", "local, reach 0.3")
"""Ways whose steps are timed; of all others that differ FLOPs are counted."""
MEASURED: Final = "local, reach measured"


@dataclass(frozen=True, kw_only=True, slots=True)
class CostCase:
    """A network, a batch and a seed whose steps are measured."""

    build: Callable[[], nn.Module]
    """Makes the network."""
    input_shape: tuple[int, ...]
    """Shape of a batch."""
    layer: str
    """Site."""
    template: str
    """Template."""

    def batch(self) -> Batch:
        """Give a batch of ten classes."""
        draw = torch.Generator().manual_seed(1)
        labels = torch.randint(0, 10, self.input_shape[:1], generator=draw)
        return torch.randn(self.input_shape, generator=draw), labels


_LARGE: Final = hosts.HOSTS[1]
COSTS: Final[Mapping[str, CostCase]] = {
    "digits mlp, first": CostCase(build=HOSTS["mlp"].build, input_shape=(32, 64), layer="0", template="widen"),
    "digits cnn, second": CostCase(build=HOSTS["cnn"].build, input_shape=(32, 64), layer="5", template="widen_conv"),
    "cnn 3x32x32, first": CostCase(
        build=_LARGE.build, input_shape=_LARGE.input_shape, layer="0", template="squeeze_excite"
    ),
    "cnn 3x32x32, third": CostCase(
        build=_LARGE.build, input_shape=_LARGE.input_shape, layer="6", template="squeeze_excite"
    ),
}


def measure(*, quick: bool) -> Result:
    """Run everything for two seeds, or for eight."""
    torch.set_num_threads(1)
    seeds = range(2 if quick else 8)
    with _pool() as pool:
        toys = {name: list(pool.map(partial(toy, name), seeds)) for name in TOYS}
        jobs = [(host, seed) for host in HOSTS for seed in seeds]
        outcomes = [one for found in pool.map(digits_outcomes, *zip(*jobs, strict=True)) for one in found]
    figures = [
        _mean(f"{name}: {arm}, distance", "ratio", [one[arm] for one in found])
        for name, found in toys.items()
        for arm in TOY_ARMS
    ]
    figures += figures_of(outcomes)
    for name, case in COSTS.items():
        figures += cost_figures(name, case, seconds=0.5 if quick else 1.5)
    return Result(name="incubation", figures=tuple(figures), notes=_notes(len(seeds)))


def toy(name: str, seed: int) -> dict[str, float]:
    """Give every arm's distance to the optimum of a toy."""
    found = run_toy(seed, stretch=TOYS[name], num_steps=TOY_STEPS, arms=TOY_ARMS)
    _tell(f"{name}, seed {seed}")
    return found


def digits_outcomes(host: str, seed: int) -> list[SiteOutcome]:
    """Give what the arms came to at every site of a host."""
    found = list(run_digits(host, seed=seed))
    _tell(f"digits {host}, seed {seed}")
    return found


def _pool() -> ProcessPoolExecutor:
    """Give a process for each core: what is not timed may run side by side."""
    return ProcessPoolExecutor(
        len(os.sched_getaffinity(0)), get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    )


def figures_of(outcomes: Sequence[SiteOutcome]) -> list[Figure]:
    """Give the bit check, then by host and arm: what seeds take away, and that over the trial on the whole batch."""
    touched = sum(not one.is_untouched for one in outcomes)
    figures = [Figure(name="hosts changed by a seed", value=touched, unit="runs", goal=Goal(sign="==", limit=0))]
    for host in dict.fromkeys(one.host for one in outcomes):
        mine = [one for one in outcomes if one.host == host]
        whole = by_seed(mine, WHOLE)
        for arm in mine[0].control:
            shares = by_seed(mine, arm)
            figures.append(_mean(f"{host}: {arm}, control", "%", shares))
            if arm != WHOLE:
                over = [ours - theirs for ours, theirs in zip(shares, whole, strict=True)]
                figures.append(_mean(f"{host}: {arm} minus {WHOLE}, control", "points", over))
            figures.append(_mean(f"{host}: {arm}, sealed", "%", by_seed(mine, arm, sealed=True)))
    return figures


def by_seed(outcomes: Sequence[SiteOutcome], arm: str, *, sealed: bool = False) -> list[float]:
    """Give an arm's share of the loss in per cent, one mean over sites and templates for each seed."""
    seeds = dict.fromkeys(one.seed for one in outcomes)
    rows = [[(one.sealed if sealed else one.control)[arm] for one in outcomes if one.seed == seed] for seed in seeds]
    return [100.0 * sum(row) / len(row) for row in rows]


def cost_figures(name: str, case: CostCase, *, seconds: float) -> list[Figure]:
    """Give what a step with a seed that learns by each way costs over a step without."""
    figures: list[Figure] = []
    for way in (*TIMED, MEASURED):
        cost: StepCost = step_cost(
            case.build,
            case.batch(),
            layer=case.layer,
            template=case.template,
            arm=way,
            seconds=seconds if way in TIMED else 0.0,
        )
        if cost.times is not None:
            figures.append(
                Figure(name=f"{name}: {way}, time", value=cost.times.ratio, unit="ratio", spread=cost.times.certain)
            )
        figures.append(Figure(name=f"{name}: {way}, FLOPs", value=cost.flops_ratio, unit="ratio"))
    _tell(f"cost of {name} done")
    return figures


def _mean(name: str, unit: str, values: Sequence[float]) -> Figure:
    """Give the mean over the seeds with its 95 % interval (Student's t)."""
    found = paired_interval(torch.tensor(values, dtype=torch.float64))
    return Figure(name=name, value=found.estimate, unit=unit, spread=Spread(found.low, found.high))


def _tell(text: str) -> None:
    """Say how far it is, for those who wait."""
    print(text, file=sys.stderr, flush=True)


def _notes(num_seeds: int) -> tuple[str, ...]:
    return (
        f"{num_seeds} seeds; means with 95 % intervals (Student's t over the seeds). All {len(ARMS)} arms learn beside "
        f"one host, so they are paired to the bit; ways: {', '.join(WAYS)}.",
        f"Toy: |delta - best| / |best| after {TOY_STEPS} steps on 64 of 512 examples, AdamW at 2e-2; 1 at birth. "
        "Even: every direction at the site counts the same; stretched: from 1 to 0.3.",
        f"Digits: host trained {PRETRAIN_EPOCHS} epochs, then {INCUBATION_EPOCHS} with seeds beside it (AdamW at "
        "3e-3); share of the host's loss that a seed takes away at alpha 1, mean over sites and templates; splits, "
        "weights and batches by the seed.",
        "Times: processor time of the thread, median of paired ratios with its 99 % interval. FLOPs of the measured "
        "reach: mean over the 16 steps of its turn.",
    )

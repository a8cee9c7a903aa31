"""Growth: does a network that grows under Esper end better than its controls? Paired by seed, on a sealed test.

grown                   the host, grown through an embedded mesh of its own: nothing is carried from seed to seed
host                    the host alone, same epochs
host, same compute      the host alone, for the FLOPs that growing spent, growth's own included
static                  an ordinary network of the grown size, same epochs
static, same compute    that network, for the FLOPs that growing spent
random growth           the same life cycle, sites and blueprints at random
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import torch

import esper
from bench.growth_arms import Outcome, epochs_for, grow, train_fixed
from bench.random_growth import RandomMesh
from bench.report import Figure, Result, Spread, at_least
from esper.cli import digits
from esper.core.report import RunReport
from esper.execution.counterfactual import paired_interval

EPOCHS: Final = 30
"""Epochs of every arm that is not given more compute."""
CONTROLS: Final = ("host", "host, same compute", "static", "static, same compute", "random growth")


@dataclass(frozen=True, kw_only=True, slots=True)
class SeedRun:
    """All arms of one seed."""

    seed: int
    """Seed of weights, batches and decisions."""
    arms: dict[str, Outcome]
    """Outcome by arm."""
    report: RunReport
    """Report of the grown run."""


def measure(*, quick: bool) -> Result:
    """Train every arm for three seeds, or for twelve."""
    torch.set_num_threads(1)
    splits = digits.load_digits()
    runs: list[SeedRun] = []
    for seed in range(3 if quick else 12):
        runs.append(run_seed(splits, seed=seed, epochs=EPOCHS))
        _tell(runs[-1])
    return Result(name="growth", figures=tuple(figures_of(runs)), notes=_notes(runs))


def run_seed(splits: digits.DigitsSplits, *, seed: int, epochs: int) -> SeedRun:
    """Grow one network and train its controls."""
    with esper.Mesh.embedded() as mesh:
        grown, report = grow(mesh, splits, epochs=epochs, seed=seed)
    width = digits.width_for(grown.parameters)

    def fixed(hidden: int, *, same_compute: bool) -> Outcome:
        length = epochs_for(grown.flops, splits, hidden=hidden) if same_compute else epochs
        return train_fixed(splits, hidden=hidden, epochs=length, seed=seed)

    arms = {
        "grown": grown,
        "host": fixed(digits.HIDDEN, same_compute=False),
        "host, same compute": fixed(digits.HIDDEN, same_compute=True),
        "static": fixed(width, same_compute=False),
        "static, same compute": fixed(width, same_compute=True),
        "random growth": grow(RandomMesh(seed), splits, epochs=epochs, seed=seed, wait_s=0.0)[0],
    }
    return SeedRun(seed=seed, arms=arms, report=report)


def figures_of(runs: Sequence[SeedRun]) -> list[Figure]:
    """Give margins over every control, then what each arm came to, then what growing took."""
    figures = [margin(runs, control) for control in CONTROLS]
    figures += [loss_margin(runs, control) for control in CONTROLS]
    figures += [_arm_mean(runs, arm, "sealed accuracy", "%") for arm in ("grown", *CONTROLS)]
    figures += [
        _arm_mean(runs, arm, "parameters", "parameters") for arm in ("grown", "host", "static", "random growth")
    ]
    figures.append(_mean(runs, "grown, FLOPs over the host's", "ratio", _flops_ratio))
    figures.append(_mean(runs, "adaptations tried", "adaptations", lambda run: len(run.report.adaptations)))
    figures.append(_mean(runs, "adaptations kept", "adaptations", lambda run: len(run.report.kept)))
    return figures


def margin(runs: Sequence[SeedRun], control: str) -> Figure:
    """Give grown minus control accuracy, paired by seed; the goal is met where the whole 95 % interval is above 0."""
    found = _paired(runs, lambda run: 100 * (run.arms["grown"].accuracy - run.arms[control].accuracy))
    name = f"grown minus {control}, sealed accuracy"
    return Figure(
        name=name, value=found[0], unit="points", goal=at_least(0.0), spread=found[1], certain=found[1], is_claim=True
    )


def loss_margin(runs: Sequence[SeedRun], control: str) -> Figure:
    """Give control minus grown cross-entropy, paired by seed: above 0 where growing is better."""
    found = _paired(runs, lambda run: run.arms[control].loss - run.arms["grown"].loss)
    return Figure(name=f"{control} minus grown, sealed loss", value=found[0], unit="nats", spread=found[1])


def _paired(runs: Sequence[SeedRun], difference: Callable[[SeedRun], float]) -> tuple[float, Spread]:
    """Give the mean difference with its 95 % interval (Student's t over the seeds)."""
    found = paired_interval(torch.tensor([difference(run) for run in runs], dtype=torch.float64))
    return found.estimate, Spread(found.low, found.high)


def _mean(runs: Sequence[SeedRun], name: str, unit: str, value: Callable[[SeedRun], float]) -> Figure:
    """Give the mean over the seeds, with the least and the greatest."""
    values = [value(run) for run in runs]
    return Figure(name=name, value=sum(values) / len(values), unit=unit, spread=Spread(min(values), max(values)))


def _arm_mean(runs: Sequence[SeedRun], arm: str, what: Literal["sealed accuracy", "parameters"], unit: str) -> Figure:
    def value(run: SeedRun) -> float:
        outcome = run.arms[arm]
        return 100 * outcome.accuracy if what == "sealed accuracy" else outcome.parameters

    return _mean(runs, f"{arm}, {what}", unit, value)


def _flops_ratio(run: SeedRun) -> float:
    return run.arms["grown"].flops / run.arms["host"].flops


def _tell(run: SeedRun) -> None:
    """Say how a seed went, for those who wait."""
    shown = ", ".join(f"{arm} {outcome.accuracy:.2%}" for arm, outcome in run.arms.items())
    tried = ", ".join(f"{item.blueprint or item.adaptation_type} {item.outcome}" for item in run.report.adaptations)
    print(f"seed {run.seed}: {shown}; {tried or 'nothing tried'}", file=sys.stderr, flush=True)


def _notes(runs: Sequence[SeedRun]) -> tuple[str, ...]:
    return (
        f"Digits of scikit-learn in three splits ({digits.NUM_TRAIN} train, {digits.NUM_CONTROL} control, the rest "
        f"sealed); host 64-{digits.HIDDEN}-10; {EPOCHS} epochs; {len(runs)} seeds.",
        "Margins: mean of paired differences with its 95 % interval (Student's t over the seeds); a goal is met where "
        "the whole interval lies above 0, so 'NO' means not shown. Means of arms: least and greatest over the seeds.",
        "FLOPs count the training thread's forward and backward passes, growth's own trials and evaluations included; "
        "compiling kernels is not in them.",
        "Same compute: as many epochs as it takes to spend the grown run's FLOPs; no control was stopped early.",
    )

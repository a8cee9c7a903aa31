"""What the arms of the growth measure come to: margins over every control, and what growing took."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from rich.table import Table

from bench.growth_arms import ARMS, CONTROLS, FIRST_TUNING_SEED, GROWN
from bench.growth_gromo import reason_not_measured
from bench.growth_hosts import Cell
from bench.growth_tasks import load
from bench.growth_training import RATE_FACTORS, Outcome, Tried
from bench.report import Figure, Goal, Spread, at_least, at_most
from esper.contracts.decision import AdaptationType
from esper.execution.counterfactual import paired_interval

ACCURACY_GOALS: Final = {"digits/mlp": 98.6, "mnist1d/mlp": 96.0}
"""Mean sealed accuracy that the grown network must reach, in percent."""
MAX_OWN_SHARE: Final = 0.3
"""Most of a run's FLOPs that may be growth's own work."""
MAX_TRIED_PER_KEPT: Final = 8.0
MAX_CALIBRATION_ERROR: Final = 0.1
NUM_BINS: Final = 10
"""Bins of confidence, equally wide, over which the calibration error is taken."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CellRuns:
    """All arms of all seeds of a cell."""

    cell: Cell
    """Task and host."""
    seeds: tuple[dict[str, Outcome], ...]
    """Outcomes by arm, one entry a seed."""
    first_seed: int = 0
    """The first of the seeds, which follow each other."""

    @property
    def arms(self) -> list[str]:
        """Arms that have been run for every seed, in order."""
        return [arm for arm in ARMS if all(arm in seed for seed in self.seeds)]

    def each(self, arm: str) -> list[Outcome]:
        """Give an arm's outcomes, seed by seed."""
        return [seed[arm] for seed in self.seeds]


def figures_of(runs: Iterable[CellRuns]) -> list[Figure]:
    """Give margins, goals and costs of every cell, then what is asked of all decisions together."""
    every = list(runs)
    figures = [figure for one in every for figure in _cell_figures(one)]
    tried = [outcome.tried for one in every for outcome in one.each(GROWN)]
    figures.append(
        Figure(
            name="calibration error of confidence, all decisions carried out",
            value=calibration_error(tried),
            unit="share",
            goal=at_most(MAX_CALIBRATION_ERROR),
        )
    )
    return figures


def _cell_figures(runs: CellRuns) -> Iterator[Figure]:
    name = runs.cell.name
    is_language = load(runs.cell.task).is_language
    for control in CONTROLS:
        if control in runs.arms:
            yield accuracy_margin(runs, control, is_claim=not is_language)
            yield loss_margin(runs, control, is_claim=is_language)
        else:
            yield Figure(name=f"{name}: grown minus {control}, sealed accuracy", value=None, unit="points")
    goal = ACCURACY_GOALS.get(name)
    yield _mean(runs, "grown, sealed accuracy", "%", _accuracies(runs, GROWN), None if goal is None else at_least(goal))
    if is_language:
        bits = [outcome.loss / math.log(2) for outcome in runs.each(GROWN)]
        yield _mean(runs, "grown, sealed loss", "bits per character", bits)
    yield from _growth_figures(runs)


def _growth_figures(runs: CellRuns) -> Iterator[Figure]:
    """Give what growing took, and whether what was kept had earned it."""
    grown, hosts = runs.each(GROWN), runs.each("host")
    tried = [item for outcome in grown for item in outcome.tried if item.grew]
    kept = [item for item in tried if item.is_kept]
    yield _mean(runs, "grown, parameters", "parameters", [float(outcome.parameters) for outcome in grown])
    most = max(outcome.parameters for outcome in grown)
    yield _single(runs, "grown, most parameters", most, "parameters", at_most(runs.cell.max_parameters))
    yield _mean(
        runs, "grown, FLOPs over the host's", "ratio", [a.flops / b.flops for a, b in zip(grown, hosts, strict=True)]
    )
    shares = [outcome.own_flops / outcome.flops for outcome in grown]
    yield _mean(runs, "growth's own share of the FLOPs", "share", shares, at_most(MAX_OWN_SHARE))
    yield _mean(
        runs,
        "grown, wall time over the host's",
        "ratio",
        [a.seconds / b.seconds for a, b in zip(grown, hosts, strict=True)],
    )
    yield _mean(runs, "seeds tried", "seeds", [float(sum(item.grew for item in outcome.tried)) for outcome in grown])
    yield _single(runs, "seeds kept", len(kept) / len(tried) if tried else None, "share")
    per_kept = len(tried) / len(kept) if kept else None
    yield _single(runs, "seeds tried per one kept", per_kept, "ratio", at_most(MAX_TRIED_PER_KEPT))
    earned = [item.low is not None and item.price is not None and item.low > item.price for item in kept]
    yield _single(
        runs, "kept seeds certain to pay", sum(earned) / len(earned) if earned else None, "share", at_least(1.0)
    )
    calibration = calibration_error([outcome.tried for outcome in grown])
    yield _single(runs, "calibration error of confidence", calibration, "share")
    repeated = [outcome.is_repeated is True for outcome in grown]
    yield _single(
        runs, "runs that a second one repeats to the bit", sum(repeated) / len(repeated), "share", at_least(1.0)
    )


def accuracy_margin(runs: CellRuns, control: str, *, is_claim: bool) -> Figure:
    """Give grown minus control accuracy, paired by seed; a claim holds where the whole 95 % interval is above 0."""
    pairs = zip(runs.each(GROWN), runs.each(control), strict=True)
    return _margin(
        runs,
        f"grown minus {control}, sealed accuracy",
        "points",
        [100 * (a.accuracy - b.accuracy) for a, b in pairs],
        is_claim,
    )


def loss_margin(runs: CellRuns, control: str, *, is_claim: bool) -> Figure:
    """Give control minus grown loss, paired by seed: above 0 where growing is better."""
    is_language = load(runs.cell.task).is_language
    scale, unit = (math.log(2), "bits per character") if is_language else (1.0, "nats")
    pairs = zip(runs.each(GROWN), runs.each(control), strict=True)
    return _margin(
        runs, f"{control} minus grown, sealed loss", unit, [(b.loss - a.loss) / scale for a, b in pairs], is_claim
    )


def _margin(runs: CellRuns, name: str, unit: str, differences: Sequence[float], is_claim: bool) -> Figure:
    """Give the mean difference with its 95 % interval (Student's t over the seeds); one seed has none."""
    goal = at_least(0.0) if is_claim else None
    name = f"{runs.cell.name}: {name}"
    if len(differences) == 1:
        return Figure(name=name, value=differences[0], unit=unit)
    found = paired_interval(torch.tensor(differences, dtype=torch.float64))
    spread = Spread(found.low, found.high)
    return Figure(
        name=name, value=found.estimate, unit=unit, goal=goal, spread=spread, certain=spread, is_claim=is_claim
    )


def _mean(runs: CellRuns, name: str, unit: str, values: Sequence[float], goal: Goal | None = None) -> Figure:
    """Give the mean over the seeds, with the least and the greatest."""
    mean, spread = sum(values) / len(values), Spread(min(values), max(values))
    return Figure(name=f"{runs.cell.name}: {name}", value=mean, unit=unit, goal=goal, spread=spread)


def _single(runs: CellRuns, name: str, value: float | None, unit: str, goal: Goal | None = None) -> Figure:
    return Figure(name=f"{runs.cell.name}: {name}", value=value, unit=unit, goal=goal)


def _accuracies(runs: CellRuns, arm: str) -> list[float]:
    return [100 * outcome.accuracy for outcome in runs.each(arm)]


def calibration_error(runs: Iterable[Sequence[Tried]]) -> float | None:
    """Give the expected calibration error: how far confidence lies from the share that came true, bin by bin.

    A decision asks for one seed that pays, or for a race of several: it came true when any of them was kept. ``runs``
    are the adaptations of each run, for groups are named within a run. A removal is carried out, and nothing shows
    whether it was right. ``None`` where nothing was decided.
    """
    bins: dict[int, list[float]] = {}
    for tried in runs:
        groups: dict[str, list[Tried]] = {}
        for item in tried:
            if item.adaptation_type != AdaptationType.REMOVE_SEED.value:
                groups.setdefault(item.group, []).append(item)
        for members in groups.values():
            confidence = members[0].confidence
            gap = confidence - any(item.outcome == "kept" for item in members)
            bins.setdefault(min(NUM_BINS - 1, int(confidence * NUM_BINS)), []).append(gap)
    count = sum(len(gaps) for gaps in bins.values())
    return sum(abs(sum(gaps)) for gaps in bins.values()) / count if count else None


# ------------------------------------------------------------------ arm by arm


@dataclass(frozen=True, kw_only=True, slots=True)
class ArmRow:
    """One arm of a cell, as means over the seeds."""

    arm: str
    """Arm."""
    accuracy: float
    """Sealed accuracy, in percent."""
    loss: float
    """Sealed loss, in nats; of text in bits per character."""
    parameters: float
    """Parameters at the end."""
    flops: float
    """FLOPs of the training."""
    seconds: float
    """Wall time of the training."""
    curve_area: float | None
    """Mean control accuracy over the epochs, in percent; ``None`` where nothing was held out."""
    reached: float | None
    """Share of seeds that came to the best control accuracy of the seed's host."""
    flops_to_reach: float | None
    """FLOPs until then, over those of the host until then; mean over the seeds that did."""
    seconds_to_reach: float | None
    """Seconds until then; mean over the seeds that did."""
    choices: tuple[str, ...]
    """What was chosen on the control split, seed by seed."""


def arm_rows(runs: CellRuns) -> list[ArmRow]:
    """Give every arm of a cell."""
    return [_arm_row(runs, arm) for arm in runs.arms]


def _arm_row(runs: CellRuns, arm: str) -> ArmRow:
    outcomes = runs.each(arm)
    scale = math.log(2) if load(runs.cell.task).is_language else 1.0
    areas = [curve_area(outcome) for outcome in outcomes]
    reached = [time_to(outcome, host) for outcome, host in zip(outcomes, runs.each("host"), strict=True)]
    held_out = all(area is not None for area in areas)
    came = [one for one in reached if one is not None]
    return ArmRow(
        arm=arm,
        accuracy=_average(100 * outcome.accuracy for outcome in outcomes),
        loss=_average(outcome.loss / scale for outcome in outcomes),
        parameters=_average(outcome.parameters for outcome in outcomes),
        flops=_average(outcome.flops for outcome in outcomes),
        seconds=_average(outcome.seconds for outcome in outcomes),
        curve_area=_average(100 * area for area in areas if area is not None) if held_out else None,
        reached=len(came) / len(reached) if held_out else None,
        flops_to_reach=_average(ratio for ratio, _ in came) if came else None,
        seconds_to_reach=_average(seconds for _, seconds in came) if came else None,
        choices=tuple(f"{outcome.rate:g}" + (f", {outcome.choice}" if outcome.choice else "") for outcome in outcomes),
    )


def curve_area(outcome: Outcome) -> float | None:
    """Give the mean accuracy on the control split over the epochs."""
    found = [point.accuracy for point in outcome.curve if point.accuracy is not None]
    return _average(found) if len(found) == len(outcome.curve) else None


def time_to(outcome: Outcome, host: Outcome) -> tuple[float, float] | None:
    """Give when an arm came to the host's best control accuracy: FLOPs over the host's own until then, and seconds."""
    best = max(point.accuracy or 0.0 for point in host.curve)

    def first(arm: Outcome) -> tuple[int, float] | None:
        points = (point for point in arm.curve if point.accuracy is not None and point.accuracy >= best)
        return next(((point.flops, point.seconds) for point in points), None)

    ours, theirs = first(outcome), first(host)
    if ours is None or theirs is None:
        return None
    return ours[0] / theirs[0], ours[1]


def _average(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def arm_table(runs: CellRuns) -> Table:
    """Give every arm of a cell as a table for people."""
    is_language = load(runs.cell.task).is_language
    table = Table(title=f"{runs.cell.name}, means over {len(runs.seeds)} seeds", title_justify="left")
    table.add_column("arm")
    names = ["accuracy %", "bits/char" if is_language else "loss", "parameters", "MFLOPs", "s"]
    for name in (*names, "area %", "reached", "FLOPs to", "s to"):
        table.add_column(name, justify="right")
    table.add_column("rate and choice, first seed", overflow="fold")
    for row in arm_rows(runs):
        shown = [f"{row.accuracy:.2f}", f"{row.loss:.4f}", f"{row.parameters:,.0f}", f"{row.flops / 1e6:,.0f}"]
        shown += [f"{row.seconds:.1f}", _or_dash(row.curve_area, ".2f"), _or_dash(row.reached, ".2f")]
        shown += [_or_dash(row.flops_to_reach, ".2f"), _or_dash(row.seconds_to_reach, ".1f")]
        table.add_row(row.arm, *shown, row.choices[0])
    return table


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def write_arms(runs: Sequence[CellRuns], directory: Path) -> Path:
    """Write every arm of every cell as JSON; gives the file."""
    plain: dict[str, Any] = {
        one.cell.name: [{name: getattr(row, name) for name in ArmRow.__dataclass_fields__} for row in arm_rows(one)]
        for one in runs
    }
    path = directory / "arms.json"
    path.write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")
    return path


def notes_of(runs: Sequence[CellRuns], num_tuning_seeds: int, files: Sequence[Path]) -> tuple[str, ...]:
    """Say what a reader must know."""
    cells, notes = [one.cell for one in runs], []
    for one in runs:
        cell = one.cell
        task, settings = load(cell.task), cell.settings
        notes.append(
            f"{cell.name}: {len(task.train)} train, {len(task.control)} control, {len(task.sealed)} sealed; host "
            f"{cell.host}, at most {cell.max_parameters:,} parameters; {settings.epochs} epochs of "
            f"{len(task.epoch_of_train)} examples, AdamW at "
            f"{settings.learning_rate:g}{' (fixed)' if cell.rate_is_fixed else ''}, decay {settings.weight_decay:g}, "
            f"batch {settings.batch_size}; seeds {one.first_seed} to {one.first_seed + len(one.seeds) - 1}."
        )
        if cell.kinds != "all":
            notes.append(f"{cell.name}: what grows, under Esper and at random, is {cell.kinds} blueprints alone.")
        reason = reason_not_measured(cell)
        if reason:
            notes.append(f"{cell.name}: gromo not measured: {reason}.")
    notes += sorted({load(cell.task).note for cell in cells} - {""})
    rates = ", ".join(f"{factor:g}" for factor in RATE_FACTORS)
    return (
        *notes,
        "Every arm learns from the train split alone, but for those named train+control; decisions and choices see the "
        "control split; each arm looks at the sealed split once, at its end.",
        f"Controls choose rate ({rates} times the cell's; constant, or falling at the end as grafted seeds' does) and "
        "shape on the control split: once a cell, mean of "
        f"{num_tuning_seeds} seeds from {FIRST_TUNING_SEED} on; static-final for each seed. What they spend on "
        "choosing is not charged to them.",
        "Margins: mean of paired differences with its 95 % interval (Student's t over the seeds); a goal is met where "
        "the whole interval lies above 0, so 'NO' means not shown. Other spreads: least and greatest over the seeds.",
        "FLOPs: the training thread's forward and backward passes, growth's own trials and evaluations included; "
        "compiling kernels is in the wall time and not in the FLOPs. Same compute: trained on until the grown run's "
        "FLOPs are spent; the epoch of least control loss is taken where it does better on the control split.",
        "Wall times are of a run without counting; several processes may have run side by side.",
        f"Written: {', '.join(str(path) for path in files)}.",
    )

"""Growth: does a network that grows under Esper end better than its controls? Paired by seed, on a sealed test.

Three tasks by three families of hosts: ``bench.growth_tasks``, ``bench.growth_hosts`` and ``bench.growth_arms`` say
what they are. Every arm of every seed is written down when it ends, so a run that is cut off goes on where it was:

    python -m bench growth                               all nine cells, 10 seeds
    python -m bench growth --quick                       perceptrons on digits and mnist1d, 3 seeds
    python -m bench.growth --task digits --host cnn --seeds 5 --workers 1
    python -m bench.growth --task mnist1d --host mlp --kinds dense
    python -m bench.growth --task digits --host mlp --first-seed 10      seeds on which no rule was chosen
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

import torch
from rich.console import Console

from bench.growth_arms import ARMS, FIRST_TUNING_SEED, KINDS, Kind, Option, choose, options, run_arm
from bench.growth_figures import CellRuns, arm_table, figures_of, notes_of, write_arms
from bench.growth_hosts import BLUEPRINT_KINDS, FAMILIES, Cell, FamilyName, make_cell
from bench.growth_log import RunLog, Versions, versions_here
from bench.growth_plots import plot_cell
from bench.growth_tasks import TASKS, TaskName
from bench.growth_training import Outcome
from bench.report import RESULTS_DIR, Result, publish
from esper.contracts.errors import EsperError

QUICK_CELLS: Final[tuple[tuple[TaskName, FamilyName], ...]] = (("digits", "mlp"), ("mnist1d", "mlp"))
RUNS_DIR: Final = RESULTS_DIR / "growth"
"""Where lines and plots go, below the current directory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Extent:
    """How much is measured."""

    cells: tuple[Cell, ...]
    """Tasks and hosts."""
    num_seeds: int
    """Seeds of each."""
    num_tuning_seeds: int
    """Seeds on which controls choose."""
    first_seed: int = 0
    """First of the seeds, which follow each other."""
    workers: int = 1
    """Processes side by side."""
    directory: Path = RUNS_DIR
    """Where lines and plots go."""

    @property
    def seeds(self) -> range:
        """What every arm is run with."""
        return range(self.first_seed, self.first_seed + self.num_seeds)

    @property
    def log_path(self) -> Path:
        """The file of lines."""
        return self.directory / "runs.jsonl"


def extent_of(*, quick: bool) -> Extent:
    """Give the extent of the quick measure, or of the whole."""
    names = QUICK_CELLS if quick else tuple((task, family) for task in TASKS for family in FAMILIES)
    return Extent(
        cells=tuple(make_cell(task, family) for task, family in names),
        num_seeds=3 if quick else 10,
        num_tuning_seeds=1 if quick else 3,
        workers=len(os.sched_getaffinity(0)),
    )


def measure(*, quick: bool) -> Result:
    """Run every arm of every cell and seed that has not been run."""
    return measure_extent(extent_of(quick=quick))


def measure_extent(extent: Extent) -> Result:
    """Run what has not been run of an extent; gives the figures, and draws the plots."""
    torch.set_num_threads(1)
    versions = versions_here()
    log = RunLog(extent.log_path, versions=versions)
    log.repair()
    _each(_choose_unit, [(extent, versions, cell, kind) for cell in extent.cells for kind in KINDS], extent.workers)
    seeds = [(extent, versions, cell, seed) for seed in extent.seeds for cell in extent.cells]
    _each(_seed_unit, seeds, extent.workers)
    runs = [
        CellRuns(
            cell=cell,
            seeds=tuple(log.outcomes(cell, seed) for seed in extent.seeds),
            first_seed=extent.first_seed,
        )
        for cell in extent.cells
    ]
    files = [write_arms(runs, extent.directory), *(path for one in runs for path in plot_cell(one, extent.directory))]
    console = Console(stderr=True, width=None if sys.stderr.isatty() else 150)
    for one in runs:
        console.print(arm_table(one))
    return Result(name="growth", figures=tuple(figures_of(runs)), notes=notes_of(runs, extent.num_tuning_seeds, files))


ChoiceUnit = tuple[Extent, Versions, Cell, Kind]
"""A choice of a control, with the versions of the sources: what one process does at a time."""
SeedUnit = tuple[Extent, Versions, Cell, int]
"""A seed of a cell; likewise."""
_Unit = TypeVar("_Unit", ChoiceUnit, SeedUnit)


def _each(work: Callable[[_Unit], None], units: Sequence[_Unit], workers: int) -> None:
    """Do the work of every unit, side by side where there is more than one worker."""
    if workers == 1:
        for unit in units:
            work(unit)
        return
    # Spawned, not forked: the threads of an embedded mesh do not outlive a fork.
    with multiprocessing.get_context("spawn").Pool(workers, initializer=_begin_worker) as pool:
        for _ in pool.imap_unordered(work, units):
            pass
        pool.close()
        pool.join()


def _begin_worker() -> None:
    """Leave Ctrl-C to the parent, which ends the workers; what they have written down stays."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def _choose_unit(unit: ChoiceUnit) -> None:
    """Let a control choose on the control split, unless it has."""
    extent, versions, cell, kind = unit
    log = RunLog(extent.log_path, versions=versions)
    if kind in log.chosen(cell, extent.num_tuning_seeds):
        return
    option = choose(cell, kind, num_seeds=extent.num_tuning_seeds)
    if option is not None:
        log.add_chosen(cell, extent.num_tuning_seeds, kind, option)
        _tell(f"{cell.name}: {kind} chose {option} at {option.rate:g}")


def _seed_unit(unit: SeedUnit) -> None:
    """Run the arms of a seed that have not been run."""
    extent, versions, cell, seed = unit
    log = RunLog(extent.log_path, versions=versions)
    run_seed(log, cell, seed, log.chosen(cell, extent.num_tuning_seeds))


def run_seed(log: RunLog, cell: Cell, seed: int, chosen: dict[Kind, Option]) -> dict[str, Outcome]:
    """Run the arms of a seed that the log lacks, and write each down; gives all."""
    done = log.outcomes(cell, seed)
    for arm in arms_of(cell):
        if arm not in done:
            done[arm] = run_arm(arm, cell, seed=seed, chosen=chosen, done=done)
            log.add_outcome(cell, seed, arm, done[arm])
            shown = done[arm]
            _tell(f"{cell.name} seed {seed}: {arm} {shown.accuracy:.2%}, {shown.seconds:.1f} s")
    return done


def arms_of(cell: Cell) -> list[str]:
    """Give the arms that can be measured on a cell, in order."""
    return [arm for arm in ARMS if arm != "gromo" or options(cell, "gromo")]


def _tell(text: str) -> None:
    """Say how it goes, for those who wait."""
    print(text, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure chosen cells; gives the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.growth", description="Growth, cell by cell.")
    parser.add_argument("--task", action="append", choices=TASKS, help="may be given several times; all without it")
    parser.add_argument("--host", action="append", choices=FAMILIES, help="may be given several times; all without it")
    parser.add_argument("--kinds", choices=BLUEPRINT_KINDS, default="all", help="kinds of blueprint that may grow; all")
    parser.add_argument("--seeds", type=int, help="seeds of each cell; 10, or 3 with --quick")
    parser.add_argument("--first-seed", type=int, default=0, help="first of them; 0. Rules were chosen on 0 to 9")
    parser.add_argument("--workers", type=int, help="processes side by side; as many as there are cores")
    parser.add_argument("--quick", action="store_true", help="3 seeds, one seed for choosing, perceptrons if no --host")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    asked = parser.parse_args(arguments)
    for name in ("seeds", "workers"):
        value = getattr(asked, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    whole = extent_of(quick=asked.quick)
    end = asked.first_seed + (asked.seeds or whole.num_seeds)
    if asked.first_seed < 0 or end > FIRST_TUNING_SEED:
        rule = f"--first-seed must be >= 0, and all seeds below {FIRST_TUNING_SEED}, with which controls choose"
        parser.error(f"{rule}, got {asked.first_seed} to {end - 1}")
    tasks: Sequence[TaskName] = asked.task or ([task for task, _ in QUICK_CELLS] if asked.quick else TASKS)
    families: Sequence[FamilyName] = asked.host or (["mlp"] if asked.quick else FAMILIES)
    extent = Extent(
        cells=tuple(make_cell(task, family, asked.kinds) for task in tasks for family in families),
        num_seeds=asked.seeds or whole.num_seeds,
        num_tuning_seeds=whole.num_tuning_seeds,
        first_seed=asked.first_seed,
        workers=asked.workers or whole.workers,
    )
    try:
        result = measure_extent(extent)
    except EsperError as error:
        print(f"growth: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("growth: interrupted; the same command goes on with what is missing", file=sys.stderr)
        return 130
    path = publish(result, json_alone=asked.json)
    print(f"written to {path}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    # By its importable name: spawned workers must find the same functions.
    from bench.growth import main as importable_main

    sys.exit(importable_main())

"""What a measure gives: figures against goals, as a table for people and one JSON object for programs."""

from __future__ import annotations

import json
import math
import operator
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from rich.console import Console
from rich.table import Table

RESULTS_DIR: Final = Path("bench-results")
"""Where JSON goes, below the current directory."""

_HOLDS: Final = {True: "yes", False: "NO", None: ""}
_COMPARE: Final = {"<=": operator.le, ">=": operator.ge, "==": operator.eq}


class Spread(NamedTuple):
    """An interval of a figure, in the figure's unit."""

    low: float
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Goal:
    """What a figure is held against."""

    sign: Literal["<=", ">=", "=="]
    """How the figure must compare to the limit."""
    limit: float
    """The limit, in the figure's unit."""

    def holds_for(self, value: float) -> bool:
        """Say whether a value reaches the goal."""
        return bool(_COMPARE[self.sign](value, self.limit))

    def __str__(self) -> str:
        return f"{self.sign} {self.limit:g}"


def at_most(limit: float) -> Goal:
    """Give the goal of a figure that must not be above a limit."""
    return Goal(sign="<=", limit=limit)


def at_least(limit: float) -> Goal:
    """Give the goal of a figure that must not be below a limit."""
    return Goal(sign=">=", limit=limit)


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One figure of a measure."""

    name: str
    """What was measured."""
    value: float | None
    """The figure; ``None`` where it could not be measured."""
    unit: str
    """Its unit; ``ratio`` is ours over the reference's."""
    goal: Goal | None = None
    """What it is held against; ``None`` where it only informs."""
    spread: Spread | None = None
    """5 % to 95 % of the single measurements, or the interval that the measure's notes name."""
    certain: Spread | None = None
    """Interval of ``value``; with one, a goal that lies inside is neither met nor missed."""
    is_claim: bool = False
    """Whether the goal is a claim to be shown: one that lies inside the interval is then missed."""

    @property
    def holds(self) -> bool | None:
        """Whether the goal is met; ``None`` without a goal, without a value, or where noise hides the answer."""
        if self.goal is None or self.value is None:
            return None
        if self.certain is None:
            return self.goal.holds_for(self.value)
        answers = {self.goal.holds_for(bound) for bound in self.certain}
        if self.is_claim:
            return answers == {True}
        return answers.pop() if len(answers) == 1 else None

    def to_plain(self) -> dict[str, Any]:
        """Give the figure as JSON has it."""
        return {
            "name": self.name,
            "value": _shortened(self.value),
            "unit": self.unit,
            "goal": None if self.goal is None else str(self.goal),
            "holds": self.holds,
            "spread": None if self.spread is None else [_shortened(bound) for bound in self.spread],
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What one run of a measure gave."""

    name: str
    """Name of the measure."""
    figures: tuple[Figure, ...]
    """Its figures, in the order in which people should read them."""
    notes: tuple[str, ...] = ()
    """What a reader must know to read the figures: conditions, floors, what was not measured."""

    def to_plain(self) -> dict[str, Any]:
        """Give the result as JSON has it, with commit and machine."""
        return {
            "name": self.name,
            "commit": commit(),
            "machine": machine(),
            "figures": [figure.to_plain() for figure in self.figures],
        }


def publish(result: Result, *, json_alone: bool, directory: Path = RESULTS_DIR) -> Path:
    """Print a result, table first unless ``json_alone``, and write its JSON; gives the file's path."""
    plain = result.to_plain()
    if not json_alone:
        _print_table(result, plain["machine"])
    print(json.dumps(plain))
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{result.name}.json"
    path.write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")
    return path


def commit() -> str:
    """Give the commit of the checkout, with ``-dirty`` where tracked files differ from it; empty outside of one."""
    line = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(line, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return found.stdout.strip()


def machine() -> Mapping[str, Any]:
    """Give what the figures depend on: processor, memory, versions, and how busy the machine is."""
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "torch": _version("torch"),
        "load_1min": round(os.getloadavg()[0], 2),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _shortened(value: float | None) -> float | None:
    """Give a figure with six significant digits; what is not finite has no place in JSON."""
    if value is None or not math.isfinite(value):
        return None
    return value if isinstance(value, int) else float(f"{value:.6g}")


def _shown(value: float | None) -> str:
    if value is None:
        return "not measured"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" if abs(value) >= 10 else f"{value:.4f}"


def _print_table(result: Result, where: Mapping[str, Any]) -> None:
    table = Table(title=result.name, title_justify="left")
    for column in ("figure", "value", "unit", "goal", "holds", "spread"):
        table.add_column(column, justify="right" if column in ("value", "spread") else "left")
    for figure in result.figures:
        spread = "" if figure.spread is None else f"{_shown(figure.spread.low)} .. {_shown(figure.spread.high)}"
        goal = "" if figure.goal is None else str(figure.goal)
        holds = "unsure" if figure.goal is not None and figure.holds is None else _HOLDS[figure.holds]
        table.add_row(figure.name, _shown(figure.value), figure.unit, goal, holds, spread)
    console = Console(width=None if Console().is_terminal else 140, highlight=False)
    console.print(table)
    for note in result.notes:
        console.print(f"- {note}", soft_wrap=True, markup=False)
    console.print(f"- {where['cpu']}, {where['cores']} cores, load {where['load_1min']}", markup=False)

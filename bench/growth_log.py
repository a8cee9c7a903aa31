"""The growth measure's memory: one line of JSON per arm and seed, so that a run that was cut off goes on.

A line counts only for the sources and settings it was made with. A control in which nothing of Esper's grows depends on
few sources (``_PLAIN_SOURCES``): its lines outlast changes of all others, and count whatever kinds may grow. Several
processes may append to one file.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import torch

from bench.growth_arms import KINDS, PLAIN_ARMS, Kind, Option
from bench.growth_hosts import Cell
from bench.growth_training import Outcome
from bench.report import commit
from esper.contracts.errors import CorruptDataError

_ROOT = Path(__file__).resolve().parents[1]
_PLAIN_SOURCES: Final = (
    "bench/growth_arms.py",
    "bench/growth_gromo.py",
    "bench/growth_hosts.py",
    "bench/growth_net2wider.py",
    "bench/growth_tasks.py",
    "bench/growth_training.py",
    "esper/blueprints/flops.py",
    "esper/core/pacing.py",
)
"""All that ``PLAIN_ARMS`` and choices run through."""
_SOURCES: Final = (
    *_PLAIN_SOURCES,
    "bench/growth_grown.py",
    "bench/random_growth.py",
    "csrc/**/*.[ch]pp",
    "esper/**/*.py",
    "services/**/*.py",
)
_PACKAGES: Final = ("torch", "numpy", "scikit-learn", "mnist1d", "gromo")


@dataclass(frozen=True, slots=True)
class Versions:
    """What results depend on beyond their settings, in a word for each kind of arm."""

    plain: str
    """Of ``PLAIN_ARMS`` and choices."""
    grown: str
    """Of all other arms."""

    def of(self, arm: str) -> str:
        """Give an arm's."""
        return self.plain if arm in PLAIN_ARMS else self.grown


class RunLog:
    """What has been run of some cells, in a file of lines.

    Raises:
        CorruptDataError: A line before the last is not JSON; a last line without its end was cut off and is dropped.
    """

    def __init__(self, path: Path, *, versions: Versions) -> None:
        self._path = path
        self._versions = versions
        path.parent.mkdir(parents=True, exist_ok=True)

    def repair(self) -> None:
        """Drop a last line that was cut off; call before others append."""
        data = self._path.read_bytes() if self._path.exists() else b""
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.truncate(self._path, whole)

    def outcomes(self, cell: Cell, seed: int) -> dict[str, Outcome]:
        """Give the arms that have been run, by name."""
        found = self._lines(what="arm", seed=seed)
        return {
            line["arm"]: Outcome.from_plain(line["outcome"]) for line in found if self._is_of(line, line["arm"], cell)
        }

    def chosen(self, cell: Cell, num_seeds: int) -> dict[Kind, Option]:
        """Give what has been chosen on the control split, over so many seeds."""
        found = self._lines(what="chosen", seed=num_seeds)
        by_name = {line["kind"]: line["option"] for line in found if self._is_of(line, line["kind"], cell)}
        return {kind: Option.from_plain(by_name[kind]) for kind in KINDS if kind in by_name}

    def add_outcome(self, cell: Cell, seed: int, arm: str, outcome: Outcome) -> None:
        """Write down an arm."""
        self._append(cell, arm, {"what": "arm", "seed": seed, "arm": arm, "outcome": outcome.to_plain()})

    def add_chosen(self, cell: Cell, num_seeds: int, kind: Kind, option: Option) -> None:
        """Write down what was chosen."""
        self._append(cell, kind, {"what": "chosen", "seed": num_seeds, "kind": kind, "option": option.to_plain()})

    def _append(self, cell: Cell, arm: str, line: dict[str, Any]) -> None:
        data = json.dumps({**self._key(cell, arm), "commit": commit(), **line}) + "\n"
        with self._path.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # let go when the file is closed
            file.write(data.encode())
            file.flush()
            os.fsync(file.fileno())

    def _key(self, cell: Cell, arm: str) -> dict[str, Any]:
        """Give what a line must have to count for a cell."""
        settled = replace(cell, kinds="all") if arm in PLAIN_ARMS else cell
        return {"version": self._versions.of(arm), "cell": asdict(settled)}

    def _is_of(self, line: dict[str, Any], arm: str, cell: Cell) -> bool:
        return all(line.get(key) == value for key, value in self._key(cell, arm).items())

    def _lines(self, *, what: str, seed: int) -> Iterator[dict[str, Any]]:
        if not self._path.exists():
            return
        for number, text in enumerate(self._path.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                line = json.loads(text)
            except ValueError as error:
                raise CorruptDataError(f"{self._path}:{number} must be a JSON object: {error}") from error
            if line["what"] == what and line["seed"] == seed:
                yield line


@cache
def versions_here() -> Versions:
    """Give the versions of this checkout, changes not committed included."""
    return versions_of(_ROOT)


def versions_of(root: Path) -> Versions:
    """Give the versions of a tree of sources on this machine: a SHA-256 each.

    In them are the sources, whatever commit they stand in, the packages and Python that results come from, and the
    processor's abilities, which decide last bits.
    """
    return Versions(plain=_digest(root, _PLAIN_SOURCES), grown=_digest(root, _SOURCES))


def _digest(root: Path, patterns: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for text in (*map(_package, _PACKAGES), platform.python_version(), torch.backends.cpu.get_cpu_capability()):
        digest.update(text.encode() + b"\0")
    for path in sorted({path for pattern in patterns for path in root.glob(pattern)}):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _package(name: str) -> str:
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return f"no {name}"

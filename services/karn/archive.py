"""The archive of designs: the best of every cell of cost, kind of operators and depth, by kind of site (MAP-Elites).

J.-B. Mouret and J. Clune, Illuminating search spaces by mapping elites, arXiv:1504.04909. A design enters with its
first report and leaves with its last; templates always stand in their cells, at a site of reference. Where a design
stands once reports came is said by the one with the least id, so a set of reports makes one archive in whatever order
it came. A cell's best is the design with the largest shrunk mean reward, n / (n + 1) times its mean: one lucky report
does not outdo many good ones, and a design that did harm gives way to one that nobody tried.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from esper.blueprints import structure_id
from esper.contracts.blueprint import Blueprint, SiteKind
from esper.contracts.errors import InvalidInputError


@dataclass(frozen=True, slots=True)
class Look:
    """How a design looks at one site."""

    cell: str
    """Cost band, operator kind and depth."""
    figures: NDArray[np.float64]
    """Its row of figures."""

    def __post_init__(self) -> None:
        if not self.cell:
            raise InvalidInputError.of("cell", "be named", self.cell)


@dataclass(slots=True)
class Entry:
    """One design of the archive."""

    blueprint: Blueprint
    """The design."""
    structure: str
    """Its structure id."""
    home: Look | None = None
    """Of a design that needs no report to stand here: how it looks at the site of reference."""
    trials: dict[str, tuple[float, Look]] = field(default_factory=dict)
    """Reward of every report, and how the design looks at the report's site."""

    @property
    def look(self) -> Look:
        """How it looks at the site of the report with the least id; without reports, at home."""
        chosen = self.trials[min(self.trials)][1] if self.trials else self.home
        assert chosen is not None
        return chosen

    @property
    def cell(self) -> str:
        """Cell in which it stands."""
        return self.look.cell

    @property
    def rewards(self) -> dict[str, float]:
        """Rewards by report, by id."""
        return {name: self.trials[name][0] for name in sorted(self.trials)}

    @property
    def mean_reward(self) -> float | None:
        """Mean of the rewards; ``None`` until one came."""
        return sum(self.rewards.values()) / len(self.trials) if self.trials else None

    @property
    def standing(self) -> float:
        """Shrunk mean reward: 0 without reports."""
        mean, count = self.mean_reward, len(self.trials)
        return 0.0 if mean is None else mean * count / (count + 1)


class Archive:
    """Designs by kind of site and cell. Not thread-safe."""

    def __init__(self) -> None:
        self._entries: dict[SiteKind, dict[str, Entry]] = {}

    def add(self, kind: SiteKind, blueprint: Blueprint, home: Look) -> None:
        """Add a design that stands here with or without reports."""
        self._entry(kind, blueprint).home = home

    def learn(self, kind: SiteKind, blueprint: Blueprint, report_id: str, reward: float, look: Look) -> None:
        """Take in the reward of a report, with how the design looks at the report's site."""
        self._entry(kind, blueprint).trials[report_id] = (reward, look)

    def forget(self, kind: SiteKind, blueprint_id: str, report_id: str) -> None:
        """Take a report out again; the design goes with its last one, unless it stands here without."""
        entry = self._entries[kind][blueprint_id]
        del entry.trials[report_id]
        if not entry.trials and entry.home is None:
            del self._entries[kind][blueprint_id]

    def _entry(self, kind: SiteKind, blueprint: Blueprint) -> Entry:
        known = self._entries.setdefault(kind, {})
        if blueprint.id not in known:
            known[blueprint.id] = Entry(blueprint, structure_id(blueprint.ir))
        return known[blueprint.id]

    def entry(self, kind: SiteKind, blueprint_id: str) -> Entry | None:
        """Give a design's entry."""
        return self._entries.get(kind, {}).get(blueprint_id)

    def elites(self, kind: SiteKind) -> list[Entry]:
        """Give the best design of every occupied cell, by the cell's name."""
        best: dict[str, Entry] = {}
        for entry in self.entries(kind):
            held = best.get(entry.cell)
            if held is None or entry.standing > held.standing:
                best[entry.cell] = entry
        return [best[cell] for cell in sorted(best)]

    def entries(self, kind: SiteKind) -> Sequence[Entry]:
        """Give every design of a kind of site, by content id."""
        known = self._entries.get(kind, {})
        return [known[name] for name in sorted(known)]

    def structures(self, kind: SiteKind) -> set[str]:
        """Give the structure ids of all designs of a kind of site."""
        return {entry.structure for entry in self._entries.get(kind, {}).values()}

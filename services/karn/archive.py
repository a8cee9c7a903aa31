"""The archive of designs: the best of every cell of cost, kind of operators and depth, by kind of site (MAP-Elites).

J.-B. Mouret and J. Clune, Illuminating search spaces by mapping elites, arXiv:1504.04909. A design enters with its
first report; templates stand in their cells from the start, at a site of reference. Where a design stands once reports
came is said by the one with the least id, so a set of reports makes one archive in whatever order it came.
A cell's best is the design with the largest shrunk mean reward, n / (n + 1) times its mean: one lucky report does not
outdo many good ones, and a design that did harm gives way to one that nobody tried.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from esper.contracts.blueprint import Blueprint, SiteKind
from esper.contracts.errors import InvalidInputError


@dataclass(slots=True)
class Entry:
    """One design of the archive."""

    blueprint: Blueprint
    """The design."""
    cell: str
    """Cost band, operator kind and depth, at the site of the report with the least id."""
    figures: NDArray[np.float64]
    """Its figures there."""
    rewards: dict[str, float] = field(default_factory=dict)
    """Rewards by report."""

    def learn(self, report_id: str, reward: float, *, cell: str, figures: NDArray[np.float64]) -> None:
        """Take in the reward of a report, with how the design looks at the report's site."""
        if report_id <= min(self.rewards, default=report_id):
            self.cell, self.figures = cell, figures
        self.rewards[report_id] = reward

    @property
    def mean_reward(self) -> float | None:
        """Mean of the rewards; ``None`` until one came."""
        return sum(self.rewards[name] for name in sorted(self.rewards)) / len(self.rewards) if self.rewards else None

    @property
    def standing(self) -> float:
        """Shrunk mean reward: 0 without reports."""
        mean, count = self.mean_reward, len(self.rewards)
        return 0.0 if mean is None else mean * count / (count + 1)


class Archive:
    """Designs by kind of site and cell. Not thread-safe."""

    def __init__(self) -> None:
        self._entries: dict[SiteKind, dict[str, Entry]] = {}

    def add(self, kind: SiteKind, blueprint: Blueprint, cell: str, figures: NDArray[np.float64]) -> Entry:
        """Add a design, or give the entry that is there."""
        if not cell:
            raise InvalidInputError.of("cell", "be named", cell)
        known = self._entries.setdefault(kind, {})
        return known.setdefault(blueprint.id, Entry(blueprint, cell, figures))

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

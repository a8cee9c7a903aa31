"""The genealogy of blueprints: a walk along the edges from children to parents, or back, page by page.

Edges never change once a blueprint is stored, so a relative keeps its place (its depth, then name and version), and
pages neither miss nor repeat one that was there when the first was read. Each page walks anew.
"""

# ruff: noqa: S608 - texts are put together from constants and whole numbers; what a caller gives is a parameter
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from esper.contracts.blueprint import Blueprint
from esper.mesh.driver_reads import ReadScript, Statement
from esper.services.urza.blueprint_records import FIELDS, LISTED, BlueprintRecord

_AFTER = " WHERE (n.depth, b.name, b.version) > ($2, $3, $4)"


class LineageDirection(IntEnum):
    """Which way to walk the genealogy."""

    ANCESTORS = 1
    DESCENDANTS = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Relative:
    """One relative of a blueprint."""

    blueprint: Blueprint
    """The relative."""
    depth: int
    """Steps away by the shortest way, from 1."""


class RelativeRecord(NamedTuple):
    """One relative of a blueprint, at rest."""

    record: BlueprintRecord
    """The relative."""
    depth: int
    """Steps away by the shortest way, from 1."""

    @property
    def place(self) -> tuple[int, str, int]:
        """Where it stands among all relatives."""
        return self.depth, self.record.name, self.record.version


def scope_of(blueprint_id: str, direction: LineageDirection, max_depth: int) -> str:
    """Give what a page token of a walk is bound to."""
    return f"GetLineage|{blueprint_id}|{direction.name}|{max_depth}"


def walk(
    blueprint_id: str, direction: LineageDirection, max_depth: int, after: tuple[int, str, int] | None, limit: int
) -> ReadScript[tuple[RelativeRecord, ...]]:
    """Walk the edges; UNION keeps one row per relative and depth, however many ways lead there."""
    here, there = ("child_id", "parent_id")
    if direction is LineageDirection.DESCENDANTS:
        here, there = there, here
    rows: Sequence[Sequence[object]] = yield Statement(
        f"WITH RECURSIVE walk (id, depth) AS (SELECT {there}, 1 FROM urza_blueprint_parents WHERE {here} = $1 "
        f"UNION SELECT p.{there}, w.depth + 1 FROM walk w JOIN urza_blueprint_parents p ON p.{here} = w.id "
        f"WHERE w.depth < {max_depth:d}) "
        f"SELECT {FIELDS}, n.depth FROM (SELECT id, min(depth) AS depth FROM walk GROUP BY id) n "
        f"JOIN urza_blueprints b ON b.id = n.id AND {LISTED} LEFT JOIN urza_statistics s ON s.blueprint_id = b.id"
        f"{'' if after is None else _AFTER} ORDER BY n.depth, b.name, b.version LIMIT {limit:d}",
        (blueprint_id, *(after or ())),
    )
    return tuple(RelativeRecord(BlueprintRecord(*row[:-1]), row[-1]) for row in rows)  # type: ignore[arg-type]

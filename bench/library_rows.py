"""A library of any size, written as rows: what its API would have stored one by one, made by the hundred thousand.

Every blueprint is a bottleneck adapter with a scale of its own behind it, so each is legal and has an id of its own;
twenty versions make a name, each the child of the one before; every tenth has been reported on. Tags:

    small | medium | large   one of three
    validated                every second block of 100
    lot-000 .. lot-999       one in a thousand
    series                   600 blueprints, however many there are
    chosen                   40 blueprints, however many there are
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Final

from esper.blueprints.ir import canonical_bytes
from esper.blueprints.registry import default_registry
from esper.contracts import wire
from esper.contracts.blueprint import BlueprintIR, BlueprintMetadata, BlueprintState, IRNode, Lineage, SiteKind
from esper.services.urza.rules import BlueprintDraft

MAX_NUMBER: Final = 2**24
"""Blueprints have numbers below this one."""
NUM_CHOSEN: Final = 40
"""Blueprints that have the tag ``chosen``."""
VERSIONS_PER_NAME: Final = 20
TABLES: Final = (
    "urza_blueprint_names",
    "urza_blueprints",
    "urza_blueprint_tags",
    "urza_blueprint_parents",
    "urza_blueprint_costs",
    "urza_state_changes",
    "urza_statistics",
)
"""Tables in which blueprints rest, in an order in which each row finds what it refers to."""
OWNER: Final = {"urza_blueprint_names": "name", "urza_blueprints": "id", "urza_blueprint_parents": "child_id"}
"""Column that says whose row it is, where it is not ``blueprint_id``."""

_NUM_SERIES: Final = 600
_STATISTICS_EVERY: Final = 10
_SIZES: Final = ("small", "medium", "large")
_NO_ID: Final = "0" * 64

Row = Mapping[str, Any]
"""One row, by column."""
Samples = Mapping[str, Sequence[Row]]
"""Rows of one blueprint, by table."""


def variant(number: int) -> BlueprintIR:
    """Give the graph of a number; another one for every number."""
    return _scaled(_scale_of(number))


def ir_bytes(number: int) -> bytes:
    """Give the canonical bytes of a number's graph, without building it: a million of them take seconds."""
    head, tail = _around_scale()
    return head + struct.pack("<d", _scale_of(number)) + tail


@lru_cache(maxsize=2**21)
def blueprint_id(number: int) -> str:
    """Give the content id of a number's graph."""
    return hashlib.sha256(ir_bytes(number)).hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class Shelf:
    """A library of blueprints 0 to ``size`` - 1; higher numbers are blueprints that can be added to it.

    REQUIRES: ``size`` is a multiple of ``VERSIONS_PER_NAME``.
    """

    size: int
    """Blueprints."""

    def draft(self, number: int) -> BlueprintDraft:
        """Give what a client would send to store a blueprint."""
        parent = self.parent(number)
        return BlueprintDraft(
            name=self.name(number),
            ir=variant(number),
            metadata=_metadata(self.tags(number)),
            lineage=replace(_LINEAGE, parent_ids=() if parent is None else (blueprint_id(parent),)),
            state=BlueprintState.ACTIVE,
        )

    def name(self, number: int) -> str:
        """Give the name under which a blueprint is a version."""
        return f"family-{number // VERSIONS_PER_NAME:07d}"

    def version(self, number: int) -> int:
        """Give the version of a blueprint."""
        return number % VERSIONS_PER_NAME + 1

    def parent(self, number: int) -> int | None:
        """Give the blueprint that one was made from; the first version of a name has none.

        What is added later has a parent from the shelf; the first two of it, ``size`` and ``size`` + 1, do without one
        and with each other.
        """
        if number > self.size + 1:
            return number % self.size
        return number - 1 if number % VERSIONS_PER_NAME else None

    def tags(self, number: int) -> tuple[str, ...]:
        """Give the tags of a blueprint."""
        tags = [_SIZES[number % 3], f"lot-{number % 1000:03d}"]
        if number // 100 % 2 == 0:
            tags.append("validated")
        if _is_one_of(number, _NUM_SERIES, self.size):
            tags.append("series")
        if _is_one_of(number, NUM_CHOSEN, self.size):
            tags.append("chosen")
        return tuple(tags)

    def rows(self, table: str, samples: Samples, numbers: Iterable[int]) -> Iterator[Row]:
        """Give the rows of one table for some blueprints.

        What does not depend on the blueprint is as ``samples`` has it: the rows of one blueprint, by table, as the
        library's own API wrote them.
        """
        if table == "urza_blueprint_names":
            for name in dict.fromkeys(map(self.name, numbers)):
                yield {**samples[table][0], "name": name, "newest_version": VERSIONS_PER_NAME}
            return
        for number in numbers:
            yield from self._rows_of(table, samples[table], number)

    def _rows_of(self, table: str, samples: Sequence[Row], number: int) -> Iterator[Row]:
        own_id, parent = blueprint_id(number), self.parent(number)
        owned = {OWNER.get(table, "blueprint_id"): own_id}
        if table == "urza_blueprints":
            yield {**samples[0], **owned, **self._columns(number)}
        elif table == "urza_blueprint_tags":
            for tag in self.tags(number):
                yield {**samples[0], **owned, "tag": tag}
        elif table == "urza_blueprint_parents":
            if parent is not None:
                yield {**samples[0], **owned, "parent_id": blueprint_id(parent)}
        elif table != "urza_statistics" or number % _STATISTICS_EVERY == 0:
            for sample in samples:
                yield {**sample, **owned}

    def _columns(self, number: int) -> Row:
        name, parent = self.name(number), self.parent(number)
        return {
            "name": name,
            "version": self.version(number),
            "ir": ir_bytes(number),
            "metadata": _metadata_bytes(self.tags(number)),
            "lineage": _lineage_bytes(None if parent is None else blueprint_id(parent)),
            "searchable": f"{name}\n{_DESCRIPTION}".casefold(),
        }


def _is_one_of(number: int, count: int, size: int) -> bool:
    """Say whether a number is among ``count`` that lie evenly below ``size``."""
    step = max(1, size // count)
    return number % step == 0 and number // step < count


def _scale_of(number: int) -> float:
    return 1.0 + number / MAX_NUMBER


def _scaled(scale: float) -> BlueprintIR:
    base = default_registry().create_blueprint("bottleneck_adapter").ir
    node = IRNode(name="scaled", op="scale", inputs=(base.output,), attributes={"value": scale})
    return BlueprintIR(nodes=(*base.nodes, node), output="scaled")


@lru_cache(maxsize=1)
def _around_scale() -> tuple[bytes, bytes]:
    """Give the canonical bytes before and after the eight that hold the scale."""
    mark = 1.0 + 0x5A5A5A / MAX_NUMBER
    head, _, tail = canonical_bytes(_scaled(mark)).partition(struct.pack("<d", mark))
    return head, tail


_DESCRIPTION: Final = "Bottleneck adapter with a scale behind it"
_LINEAGE: Final = Lineage(parent_ids=(_NO_ID,), operator="mutation", author="bench")


def _metadata(tags: tuple[str, ...]) -> BlueprintMetadata:
    return BlueprintMetadata(tags=list(tags), description=_DESCRIPTION, site_kinds=(SiteKind.LINEAR,))


@lru_cache(maxsize=100_000)
def _metadata_bytes(tags: tuple[str, ...]) -> bytes:
    return wire.serialize(_metadata(tags))


@lru_cache(maxsize=2)
def _lineage_template(has_parent: bool) -> bytes:
    return wire.serialize(_LINEAGE if has_parent else replace(_LINEAGE, parent_ids=()))


def _lineage_bytes(parent_id: str | None) -> bytes:
    template = _lineage_template(parent_id is not None)
    return template if parent_id is None else template.replace(_NO_ID.encode(), parent_id.encode())

# ruff: noqa: D102 - a test is named by the sentence that it proves
"""What a library does with blueprints whose rows have rotted, as a test suite over any database.

The fixture ``database`` is that of `esper.testing.urza_contract`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

import pytest
from sqlalchemy import select, update

from esper.blueprints.registry import BlueprintRegistry
from esper.contracts import wire
from esper.contracts.blueprint import BlueprintState, Lineage, SiteKind
from esper.contracts.errors import CorruptDataError
from esper.mesh.database import Database
from esper.services.urza.genealogy import LineageDirection
from esper.services.urza.models import BlueprintRow, CostRow, RottenBlueprintRow
from esper.services.urza.rules import BlueprintDraft, BlueprintQuery, PageRequest
from esper.services.urza.seeding import seed_library
from esper.services.urza.store import UrzaStore
from esper.testing.urza_contract import names
from esper.testing.urza_samples import field_report, graph

PARTS = [
    pytest.param("ir", b"\x0a\x00", "ir of moving@{} must be the graph that", id="ir"),
    pytest.param("blueprint_metadata", b"\xff\xff", "metadata of moving@{} must be as it was stored", id="metadata"),
    pytest.param("lineage", b"\x0a\x7f", "lineage of moving@{} must be as it was stored", id="lineage"),
]
"""Columns, what they are damaged to, and what is said of it."""


def release(number: int) -> BlueprintRegistry:
    """Give the templates of a release: one whose graph is another in every release, and one that stays."""
    registry = BlueprintRegistry()
    registry.register_template(
        "moving", lambda: graph(number), tags=("cheap",), description="Moves", site_kinds=(SiteKind.LINEAR,)
    )
    registry.register_template("resting", lambda: graph(1000))
    return registry


async def rot(database: Database, name: str, version: int, column: str, rotten: bytes) -> None:
    """Damage one column of one blueprint."""
    this = update(BlueprintRow).where(BlueprintRow.name == name, BlueprintRow.version == version)
    async with database.session() as session:
        await session.execute(this.values(**{column: rotten}))


async def found_rotten(database: Database) -> Sequence[RottenBlueprintRow]:
    """Give what is kept of rotten rows, in the order in which it was found."""
    async with database.reading() as session:
        return (await session.scalars(select(RottenBlueprintRow).order_by(RottenBlueprintRow.found_at_us))).all()


async def costs(database: Database, blueprint_id: str) -> list[tuple[int, int, int]]:
    """Give the rows by which a blueprint is found by its figures."""
    wanted = select(CostRow.site_kind, CostRow.parameters, CostRow.flops).where(CostRow.blueprint_id == blueprint_id)
    async with database.reading() as session:
        return sorted((kind, parameters, flops) for kind, parameters, flops in await session.execute(wanted))


class RotContract:
    """A rotten row is told of and kept for people to look into; the rest of the library goes on."""

    @pytest.fixture
    async def store(self, database: Database) -> UrzaStore:
        """Give a store into which two releases have put their templates."""
        store = UrzaStore(database)
        for number in (1, 2):
            await seed_library(store.blueprints, release(number))
        return store

    @pytest.mark.parametrize(("column", "rotten", "said"), PARTS)
    async def test_a_template_that_has_rotted_is_stored_anew_from_the_package(
        self,
        database: Database,
        store: UrzaStore,
        caplog: pytest.LogCaptureFixture,
        column: str,
        rotten: bytes,
        said: str,
    ) -> None:
        before = await store.blueprints.get("moving@2")
        await store.reports.record(field_report("r1", blueprint_id=before.id, estimate=0.5))
        before = await store.blueprints.get("moving@2")
        kept = (await store.blueprints.history(before.id), await costs(database, before.id))
        assert kept[1]
        await rot(database, "moving", 2, column, rotten)
        for _ in range(2):
            assert len(await seed_library(store.blueprints, release(2))) == 2
        assert await store.blueprints.get("moving") == before
        assert (await store.blueprints.history(before.id), await costs(database, before.id)) == kept
        assert (
            await names(store, all_tags=("cheap", "validated"), text="moves", site_kind=SiteKind.LINEAR)
            == ["moving"] * 2
        )
        [ancestor] = (await store.blueprints.lineage(before.id, LineageDirection.ANCESTORS)).items
        assert (ancestor.blueprint.version, before.lineage.parent_ids) == (1, (ancestor.blueprint.id,))
        [row] = await found_rotten(database)
        assert (row.blueprint_id, row.name, row.version, getattr(row, column)) == (before.id, "moving", 2, rotten)
        assert row.found.startswith(said.format(2))
        told = [record for record in caplog.records if record.message == "blueprint_set_aside"]
        assert [(record.levelno, record.blueprint) for record in told] == [(logging.ERROR, "moving@2")]  # type: ignore[attr-defined]
        assert caplog.messages.count("blueprint_restored") == 1

    @pytest.mark.parametrize(("column", "rotten", "said"), PARTS)
    async def test_an_older_version_that_has_rotted_is_set_aside_and_never_served(
        self, database: Database, store: UrzaStore, column: str, rotten: bytes, said: str
    ) -> None:
        await rot(database, "moving", 1, column, rotten)
        for _ in range(2):
            assert len(await seed_library(store.blueprints, release(2))) == 2
        assert await names(store) == ["moving", "resting"]
        newest = await store.blueprints.get("moving")
        assert (await store.blueprints.lineage(newest.id, LineageDirection.ANCESTORS)).items == ()
        with pytest.raises(CorruptDataError, match=said.format(1)):
            await store.blueprints.get("moving@1")
        assert [(row.version, getattr(row, column)) for row in await found_rotten(database)] == [(1, rotten)]

    @pytest.mark.parametrize(("column", "rotten", "said"), PARTS)
    async def test_one_that_rotted_since_it_was_shipped_last_stops_no_start(
        self, database: Database, store: UrzaStore, column: str, rotten: bytes, said: str
    ) -> None:
        await rot(database, "moving", 2, column, rotten)
        registry = BlueprintRegistry()
        registry.register_template("resting", lambda: graph(1000))
        await seed_library(store.blueprints, registry)
        assert await names(store, states=(BlueprintState.ACTIVE,)) == ["resting"]
        with pytest.raises(CorruptDataError, match=said.format(2)):
            await store.blueprints.get("moving")

    async def test_replicas_that_start_over_a_rotten_template_keep_one_copy(
        self, database: Database, store: UrzaStore
    ) -> None:
        await rot(database, "moving", 2, "ir", b"\x0a\x00")
        await asyncio.gather(*(seed_library(store.blueprints, release(2)) for _ in range(3)))
        assert (await store.blueprints.get("moving")).ir == graph(2)
        assert len(await found_rotten(database)) == 1

    async def test_a_listing_that_meets_rot_tells_of_it_once_and_goes_on_without_it(
        self, database: Database, store: UrzaStore
    ) -> None:
        lineage = Lineage(operator="mutation", author="karn")
        mine = BlueprintDraft(name="mine", ir=graph(50), lineage=lineage, state=BlueprintState.VALIDATED)
        await store.blueprints.create(mine)
        await rot(database, "mine", 1, "ir", b"rotten")
        with pytest.raises(CorruptDataError, match="ir of mine@1 must be the graph that"):
            await store.blueprints.search(BlueprintQuery(), PageRequest())
        assert await names(store) == ["moving", "moving", "resting"]
        restored, created = await store.blueprints.create(BlueprintDraft(name="mine", ir=graph(50)))
        assert (restored.state, restored.lineage, created) == (BlueprintState.VALIDATED, lineage, False)
        assert await names(store) == ["mine", "moving", "moving", "resting"]

    async def test_parents_that_cannot_be_read_are_those_of_the_genealogy(
        self, database: Database, store: UrzaStore
    ) -> None:
        parents = tuple(sorted([(await store.blueprints.get(name)).id for name in ("moving", "resting")]))
        lineage = Lineage(parent_ids=parents, operator="crossover", author="karn")
        await store.blueprints.create(BlueprintDraft(name="mine", ir=graph(50), lineage=lineage))
        await rot(database, "mine", 1, "lineage", b"\x0a\x7f")
        again = Lineage(operator="crossover", author="karn")
        restored, _ = await store.blueprints.create(BlueprintDraft(name="mine", ir=graph(50), lineage=again))
        assert restored.lineage == lineage

    async def test_one_that_is_sound_is_not_set_aside(self, database: Database, store: UrzaStore) -> None:
        assert not await store.blueprints.set_aside((await store.blueprints.get("moving")).id)
        assert await names(store) == ["moving", "moving", "resting"]
        assert not await found_rotten(database)

    async def test_one_set_aside_whose_row_was_mended_is_listed_once_its_graph_is_brought(
        self, database: Database, store: UrzaStore
    ) -> None:
        before = await store.blueprints.get("moving")
        await rot(database, "moving", 2, "lineage", b"\x0a\x7f")
        assert await store.blueprints.set_aside(before.id)
        await rot(database, "moving", 2, "lineage", wire.serialize(before.lineage))
        assert await names(store) == ["moving", "resting"]
        again, created = await store.blueprints.create(BlueprintDraft(name="moving", ir=before.ir))
        assert (again, created) == (before, False)
        assert await names(store) == ["moving", "moving", "resting"]

    async def test_a_part_that_another_release_may_know_is_no_rot(
        self, database: Database, store: UrzaStore, caplog: pytest.LogCaptureFixture
    ) -> None:
        unknown_kind = b"\x22\x01\x63"  # metadata.site_kinds = [99]
        await rot(database, "moving", 2, "blueprint_metadata", unknown_kind)
        seeded = await seed_library(store.blueprints, release(2))
        assert [one.name for one in seeded] == ["resting"]
        assert caplog.messages.count("template_unreadable") == 1
        assert not await found_rotten(database)

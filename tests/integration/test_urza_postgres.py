"""The store's contract on a real PostgreSQL, and what happens when that server goes away."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from sqlalchemy import text

from esper.contracts.errors import UnavailableError
from esper.mesh.database import Database
from esper.services.urza.rules import BlueprintQuery, PageRequest
from esper.services.urza.store import UrzaStore
from esper.testing.urza_contract import (
    BlueprintStoreContract,
    KernelStoreContract,
    MigrationContract,
    ReportStoreContract,
    put,
)
from esper.testing.urza_query_contract import (
    BoundsContract,
    FiguresMigrationContract,
    KernelStatisticsContract,
    TagExpressionContract,
    TotalContract,
)
from esper.testing.urza_rot_contract import RotContract
from esper.testing.urza_seeding_contract import SeedingContract, ShippedAgainContract, UnshippedContract
from esper.testing.urza_template import Library, rows_of


@pytest.fixture
async def empty_database(url: str) -> AsyncIterator[Database]:
    async with Database.open(url) as opened:
        yield opened


@pytest.fixture
def database(empty_library: Database) -> Database:
    return empty_library


class TestBlueprintStore(BlueprintStoreContract):
    pass


class TestKernelStore(KernelStoreContract):
    pass


class TestReportStore(ReportStoreContract):
    pass


class TestTagExpressions(TagExpressionContract):
    pass


class TestBounds(BoundsContract):
    pass


class TestKernelStatistics(KernelStatisticsContract):
    pass


class TestTotal(TotalContract):
    pass


class TestFiguresMigration(FiguresMigrationContract):
    pass


class TestSeeding(SeedingContract):
    pass


class TestUnshipped(UnshippedContract):
    pass


class TestShippedAgain(ShippedAgainContract):
    pass


class TestRot(RotContract):
    pass


class TestMigrations(MigrationContract):
    pass


async def test_a_library_that_was_emptied_is_as_its_migrations_left_it(database: Database, library: Library) -> None:
    await put(UrzaStore(database), 1, tags=("cheap",))
    assert await rows_of(database) != library.rows
    async with Database.open(library.url) as other:
        forgotten = other.session()
        session = await forgotten.__aenter__()
        await session.execute(text("SELECT count(*) FROM urza_blueprints"))  # its lock stays until it is ended
        await library.clear(database)
        with pytest.raises(UnavailableError, match="cannot be used"):
            await forgotten.__aexit__(None, None, None)
    assert await rows_of(database) == library.rows


async def test_two_replicas_number_versions_without_gaps(database: Database, postgres: Any) -> None:
    first = UrzaStore(database)
    await first.migrate()
    name = str(await _value(database, "SELECT current_database()"))
    async with Database.open(postgres.get_uri(name)) as other:
        second = UrzaStore(other)
        for number in range(10):
            stored = await put(first if number % 2 else second, number, "scale")
            assert stored.version == number + 1


async def test_a_connection_that_was_cut_is_replaced(database: Database) -> None:
    store = UrzaStore(database)
    await store.migrate()
    await put(store, 1)
    with pytest.raises(UnavailableError, match=r"store postgresql://.* cannot be used: "):
        await _value(database, "SELECT pg_terminate_backend(pg_backend_pid())")
    page = await store.blueprints.search(BlueprintQuery(), PageRequest())
    assert len(page.items) == 1


async def test_a_reading_session_cannot_write(database: Database) -> None:
    store = UrzaStore(database)
    await store.migrate()
    with pytest.raises(Exception, match="read-only transaction"):
        async with database.reading() as session:
            await session.execute(text("DELETE FROM urza_blueprints"))


async def test_an_unknown_database_is_unavailable(postgres: Any) -> None:
    async with Database.open(postgres.get_uri("nowhere").replace("//postgres:", "//postgres:secret")) as database:
        with pytest.raises(UnavailableError, match='database "nowhere" does not exist') as caught:
            await database.ping()
    assert "secret" not in str(caught.value)


async def _value(database: Database, statement: str) -> object:
    async with database.session() as session:
        return await session.scalar(text(statement))

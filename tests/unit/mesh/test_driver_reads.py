"""`Database.read`: scripts of SELECTs on the driver, on SQLite; the library's contracts run them on PostgreSQL."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from sqlalchemy import Column, Integer, MetaData, Table, insert

from esper.contracts.errors import CorruptDataError, NotFoundError, UnavailableError
from esper.mesh.database import Database
from esper.mesh.driver_reads import SQLITE_CACHE_KIB, ReadScript, Statement

METADATA = MetaData()
NUMBERS = Table("numbers", METADATA, Column("number", Integer, primary_key=True))


@pytest.fixture(params=["memory", "file"])
async def database(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Database]:
    url = "sqlite://" if request.param == "memory" else f"sqlite:///{tmp_path}/x.db"
    async with Database.open(url, pool_size=2) as opened:
        await opened.create_all(METADATA)
        yield opened


async def put(database: Database, *numbers: int) -> None:
    async with database.session() as session:
        await session.execute(insert(NUMBERS), [{"number": number} for number in numbers])


def within(low: int, high: int) -> ReadScript[list[int]]:
    rows = yield Statement("SELECT number FROM numbers WHERE number BETWEEN $1 AND $2 ORDER BY number", (low, high))
    return [row[0] for row in rows]


def of_most() -> ReadScript[tuple[int, list[int]]]:
    [[most]] = yield Statement("SELECT max(number) FROM numbers")
    return most, (yield from within(0, most))


async def test_a_script_reads_what_was_committed(database: Database) -> None:
    await put(database, 1, 2, 3)
    assert await database.read(within(2, 9)) == [2, 3]
    await put(database, 4)
    assert await database.read(of_most()) == (4, [1, 2, 3, 4])


async def test_scripts_side_by_side_do_not_mix(database: Database) -> None:
    await put(database, *range(50))
    found = await asyncio.gather(*(database.read(within(number, number + 1)) for number in range(49)))
    assert found == [[number, number + 1] for number in range(49)]


async def test_an_error_of_the_script_s_own_rises_and_the_next_script_works(database: Database) -> None:
    def refuses() -> ReadScript[int]:
        yield Statement("SELECT 1")
        raise NotFoundError("nothing of mine is there")

    for _ in range(4):  # more than there are connections
        with pytest.raises(NotFoundError, match="nothing of mine is there"):
            await database.read(refuses())
    assert await database.read(within(0, 9)) == []


async def test_a_connection_that_reads_a_file_holds_the_inner_nodes_of_large_indexes(tmp_path: Path) -> None:
    def cache_size() -> ReadScript[int]:
        [[size]] = yield Statement("SELECT cache_size FROM pragma_cache_size")
        return size

    async with Database.open(f"sqlite:///{tmp_path}/x.db") as database:
        await database.create_all(METADATA)
        assert await database.read(cache_size()) == -SQLITE_CACHE_KIB == -16_384


async def test_a_script_cannot_write(tmp_path: Path) -> None:
    def writes() -> ReadScript[None]:
        yield Statement("INSERT INTO numbers VALUES (1)")

    async with Database.open(f"sqlite:///{tmp_path}/x.db") as database:
        await database.create_all(METADATA)
        with pytest.raises(Exception, match="attempt to write a readonly database"):
            await database.read(writes())
        assert await database.read(within(0, 9)) == []


async def test_a_script_sees_one_snapshot_while_others_write(tmp_path: Path) -> None:
    began, written = threading.Event(), threading.Event()

    def twice() -> ReadScript[list[list[int]]]:
        before = yield from within(0, 9)
        began.set()
        assert written.wait(20)
        return [before, (yield from within(0, 9))]

    async with Database.open(f"sqlite:///{tmp_path}/x.db") as database:
        await database.create_all(METADATA)
        reading = asyncio.create_task(database.read(twice()))
        assert await asyncio.to_thread(began.wait, 20)
        await put(database, 1)
        written.set()
        assert await reading == [[], []]
        assert await database.read(within(0, 9)) == [1]


async def test_a_store_that_is_away_or_damaged_is_said_to_be(tmp_path: Path) -> None:
    (tmp_path / "garbage.db").write_bytes(b"no database at all" * 100)
    async with Database.open(f"sqlite:///{tmp_path}/garbage.db") as database:
        with pytest.raises(CorruptDataError, match=r"store sqlite:///.*garbage\.db is damaged"):
            await database.read(within(0, 9))
    (tmp_path / "folder.db").mkdir()
    async with Database.open(f"sqlite:///{tmp_path}/folder.db") as database:
        with pytest.raises(UnavailableError, match=r"store sqlite:///.*folder\.db cannot be used"):
            await database.read(within(0, 9))


async def test_closing_waits_for_scripts_and_is_harmless_twice(tmp_path: Path) -> None:
    database = Database.open(f"sqlite:///{tmp_path}/x.db")
    await database.create_all(METADATA)
    reading = [asyncio.create_task(database.read(within(0, 9))) for _ in range(8)]
    await asyncio.gather(*reading)
    await database.close()
    await database.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("esper-database-read")]

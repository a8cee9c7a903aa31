"""The one way a service opens its store: SQLite by path or in memory, PostgreSQL by URL, the same code over both.

What differs between the two is settled here, so that no store needs to know which one it stands on:

    transactions   a writing session takes SQLite's write lock at its start (no upgrade that could fail half-way);
                   a reading session sees one snapshot (SQLite WAL, PostgreSQL REPEATABLE READ)
    errors         a store that is away, busy for too long, full or damaged leaves as an Esper error that names the
                   URL without its password; a broken constraint stays SQLAlchemy's ``IntegrityError`` for its store

Several services may share one PostgreSQL database: give their tables a prefix (``urza_blueprints``).
A ``Database`` belongs to one event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

import asyncpg  # type: ignore[import-untyped]
from sqlalchemy import Connection, MetaData, event, exc, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL, make_url
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine

from esper.contracts.errors import ConfigError, CorruptDataError, EsperError, StorageFullError, UnavailableError
from esper.mesh.driver_reads import DriverReads, PostgresReads, ReadScript, SqliteReads, advance_async, numbered
from esper.mesh.sqlite_log import LOG_PAGES, SqliteLog

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy.sql.schema import Table

log = logging.getLogger(__name__)

T = TypeVar("T")

_DRIVER_ERRORS: Final = (
    *(exc.TimeoutError, exc.DBAPIError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError),
    sqlite3.Error,
)
_CLOSE_S: Final = 2.0
"""Longest wait of a store that is closed for the transactions under way, in seconds."""
_WRITE_OPTION: Final = "esper_write"
_SQLITE_FULL: Final = {13}
_SQLITE_DAMAGED: Final = {11, 26}
_SQLITE_AWAY: Final = {5, 6, 8, 10, 14}
_POSTGRES_FULL: Final = ("53100",)
_POSTGRES_AWAY: Final = ("08", "53", "55P03", "57", "58", "28", "3D000")
_POSTGRES_DAMAGED: Final = ("XX001", "XX002")


class Database:
    """An open store with a pool of connections; open it with `Database.open`.

    Sessions of one task must not be nested: SQLite has a single writer, and an in-memory store a single connection.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        *,
        shown_url: str,
        anchor: sqlite3.Connection | None,
        make_reads: Callable[[], DriverReads] | None,
        log_of_file: SqliteLog | None = None,
    ) -> None:
        self._engine = engine
        self._make_reads = make_reads
        self._reads: DriverReads | None = None
        self._log = log_of_file
        self._shown_url = shown_url
        self._anchor = anchor
        self._num_transactions = 0
        self._is_quiet = asyncio.Event()
        self._closed = False
        self._write_gate = asyncio.Lock() if engine.dialect.name == "sqlite" else None

    @classmethod
    def open(
        cls, url: str, *, pool_size: int = 5, busy_timeout_ms: int = 5_000, connect_timeout_s: float = 5.0
    ) -> Database:
        """Open ``sqlite:///path``, ``sqlite://`` (in memory, one store per object) or ``postgresql://…``.

        Touches no network yet; `ping` says whether the store answers. Creates the directory of a SQLite file.

        Args:
            url: Where the store is.
            pool_size: Connections held at most.
            busy_timeout_ms: How long to wait for SQLite's lock or for a free connection, in milliseconds.
            connect_timeout_s: How long PostgreSQL may take to accept a connection, in seconds.

        Raises:
            ConfigError: The URL is none of the three.
            UnavailableError: The directory of the SQLite file cannot be made.
        """
        parsed = _parse_url(url)
        if parsed.get_backend_name() == "postgresql":
            return cls._open_postgresql(parsed, pool_size, busy_timeout_ms, connect_timeout_s)
        return cls._open_sqlite(parsed, pool_size, busy_timeout_ms)

    @classmethod
    def _open_postgresql(cls, url: URL, pool_size: int, busy_timeout_ms: int, connect_timeout_s: float) -> Database:
        target = url.set(drivername="postgresql+asyncpg")
        connect_arguments: dict[str, Any] = {"timeout": connect_timeout_s, "command_timeout": 60}
        engine = create_async_engine(
            target,
            pool_size=pool_size,
            max_overflow=0,
            pool_timeout=busy_timeout_ms / 1_000,
            pool_pre_ping=True,
            connect_args=connect_arguments,
        )

        def make_reads() -> DriverReads:
            arguments = {**engine.dialect.create_connect_args(target)[1], **connect_arguments}
            return PostgresReads(num_connections=pool_size, wait_s=busy_timeout_ms / 1_000, **arguments)

        return cls(engine, shown_url=url.render_as_string(), anchor=None, make_reads=make_reads)

    @classmethod
    def _open_sqlite(cls, url: URL, pool_size: int, busy_timeout_ms: int) -> Database:
        in_memory = url.database in (None, "", ":memory:")
        anchor = None
        if in_memory:
            name = f"/esper-{uuid.uuid4().hex}"
            anchor = sqlite3.connect(f"file:{name}?vfs=memdb", uri=True, check_same_thread=False)
            target = URL.create("sqlite+aiosqlite", database=f"file:{name}", query={"vfs": "memdb", "uri": "true"})
        else:
            _make_parent(Path(str(url.database)), url)
            target = url.set(drivername="sqlite+aiosqlite")
        engine = create_async_engine(
            target,
            pool_size=1 if in_memory else pool_size,
            max_overflow=0,
            pool_timeout=busy_timeout_ms / 1_000,
            connect_args={"timeout": busy_timeout_ms / 1_000, "isolation_level": None},
        )
        _prepare_sqlite(engine, in_memory)

        shown_url = url.render_as_string()
        if in_memory:
            return cls(engine, shown_url=shown_url, anchor=anchor, make_reads=None)
        path, wait_s = Path(str(url.database)), busy_timeout_ms / 1_000
        return cls(
            engine,
            shown_url=shown_url,
            anchor=None,
            make_reads=lambda: SqliteReads(path, num_threads=pool_size, busy_timeout_s=wait_s),
            log_of_file=SqliteLog(path, busy_timeout_s=wait_s),
        )

    @property
    def url(self) -> str:
        """Where the store is, without a password."""
        return self._shown_url

    @property
    def dialect(self) -> str:
        """``sqlite`` or ``postgresql``."""
        return self._engine.dialect.name

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @asynccontextmanager
    async def session(self) -> AsyncIterator[AsyncSession]:
        """Give a session in one read-write transaction: committed at the end, rolled back on an error.

        Raises:
            UnavailableError: The store cannot be reached, or was busy for too long.
            StorageFullError: The store has no room left; nothing of the transaction stays.
            CorruptDataError: The store says it is damaged.
        """
        async with self._write_gate or nullcontext(), self._transaction({_WRITE_OPTION: True}) as session:
            yield session

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[AsyncSession]:
        """Give a session that sees one snapshot and must not write.

        Raises:
            UnavailableError: The store cannot be reached, or was busy for too long.
            CorruptDataError: The store says it is damaged.
        """
        options: dict[str, Any] = {}
        if self.dialect == "postgresql":
            options = {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
        async with self._transaction(options) as session:
            yield session

    async def read(self, script: ReadScript[T]) -> T:
        """Run a script of SELECTs on the driver and give what it returns; several times faster than `reading`.

        It reads through connections of its own, as many as ``pool_size``, and sees what was committed. An in-memory
        store has none to spare: there it takes the one there is.

        Raises:
            UnavailableError: The store cannot be reached, or was busy for too long.
            CorruptDataError: The store says it is damaged.
        """
        self._require_open()
        if self._make_reads is None:
            return await self._read_in_memory(script)
        with self._translated(connecting=True):
            if self._reads is None:
                self._reads = self._make_reads()
            return await self._reads.run(script)

    async def write_rows(self, session: AsyncSession, text: str, rows: Iterable[tuple[Any, ...]]) -> None:
        """Run one INSERT for every row on the driver; large values pass as they are, and views need no copy.

        The log of a SQLite file is written back in the background then, for such rows may be megabytes.

        Args:
            session: One of `session` that wrote something already, which is what began its transaction.
            text: The statement, with ``$1`` for the first value of a row.
            rows: Values, of the types that the columns have.
        """
        raw = await (await session.connection()).get_raw_connection()
        driver: Any = raw.driver_connection
        if self.dialect == "sqlite":
            await driver.executemany(numbered(text), rows)
            if (written := self._log) is not None:
                event.listen(session.sync_session, "after_commit", lambda _: written.write_back(), once=True)
            return
        assert driver.is_in_transaction()
        # A batch would be copied into one buffer that grows as it goes, which takes longer than a trip for each row.
        statement = await driver.prepare(text)
        for row in rows:
            await statement.fetch(*row)

    def insert(self, table: Table | type[Any]) -> sqlite.Insert | postgresql.Insert:
        """Give an INSERT of this dialect, with ``on_conflict_do_nothing`` and ``on_conflict_do_update``."""
        return sqlite.insert(table) if self.dialect == "sqlite" else postgresql.insert(table)

    async def run_sync(self, work: Callable[[Connection], T]) -> T:
        """Run synchronous SQLAlchemy work (schema, migrations) in one read-write transaction and give its result."""
        async with self.session() as session:
            connection = await session.connection()
            return await connection.run_sync(work)

    async def create_all(self, metadata: MetaData) -> None:
        """Create the tables that are not there; for stores that keep no migrations."""
        await self.run_sync(metadata.create_all)

    async def ping(self) -> None:
        """Return when the store answers.

        Raises:
            UnavailableError: It does not.
        """
        async with self.reading() as session:
            await session.execute(text("SELECT 1"))

    async def close(self) -> None:
        """Close every connection; an in-memory store is gone then. Idempotent.

        No transaction begins from now on; those under way have 2 s to end.
        """
        self._closed = True
        if self._num_transactions:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._is_quiet.wait(), _CLOSE_S)
        if self._reads is not None:
            await self._reads.close()
            self._reads = None
        if self._log is not None:
            await self._log.close()
        await self._engine.dispose()
        if self._anchor is not None:
            self._anchor.close()
            self._anchor = None

    async def _read_in_memory(self, script: ReadScript[T]) -> T:
        async with self.reading() as session:
            raw = await (await session.connection()).get_raw_connection()
            connection: Any = raw.driver_connection
            return await advance_async(
                script, lambda one: connection.execute_fetchall(numbered(one.text), one.parameters)
            )

    @asynccontextmanager
    async def _transaction(self, options: dict[str, Any]) -> AsyncIterator[AsyncSession]:
        with self._counted(), self._translated():
            session = AsyncSession(self._engine, expire_on_commit=False)
            try:
                with self._translated(connecting=True):
                    await session.connection(execution_options=options)
                yield session
            except BaseException:
                await _to_its_end(session.close())
                raise
            await _to_its_end(_committed(session))

    @contextmanager
    def _counted(self) -> Iterator[None]:
        self._require_open()
        self._num_transactions += 1
        self._is_quiet.clear()
        try:
            yield
        finally:
            self._num_transactions -= 1
            if not self._num_transactions:
                self._is_quiet.set()

    def _require_open(self) -> None:
        if self._closed:
            raise UnavailableError(f"store {self.url} must be open, it was closed")

    @contextmanager
    def _translated(self, *, connecting: bool = False) -> Iterator[None]:
        """Turn what a driver raises into the error tree; broken constraints and defects pass untouched."""
        try:
            yield
        except (exc.IntegrityError, EsperError):
            raise
        except _DRIVER_ERRORS as error:
            raise self._esper_error(error) or error from error
        except UnicodeDecodeError as error:
            if connecting:  # SQLite quotes the damaged schema in its message, which Python cannot read then
                raise CorruptDataError(f"store {self.url} is damaged: {error}") from error
            raise
        except OSError as error:
            if connecting or isinstance(error, ConnectionError):
                raise UnavailableError(f"store {self.url} cannot be reached: {str(error) or 'timed out'}") from error
            raise

    def _esper_error(self, error: Exception) -> EsperError | None:
        if isinstance(error, exc.TimeoutError):
            return UnavailableError(f"store {self.url} had no free connection in time")
        origin: BaseException = error.orig or error if isinstance(error, exc.DBAPIError) else error
        reason = " ".join(str(origin).split())
        if _is(origin, _SQLITE_FULL, _POSTGRES_FULL):
            return StorageFullError(f"store {self.url} has no room left: {reason}")
        if _is(origin, _SQLITE_DAMAGED, _POSTGRES_DAMAGED) or _is_undecodable(origin):
            return CorruptDataError(f"store {self.url} is damaged: {reason}")
        lost = isinstance(error, exc.DBAPIError) and error.connection_invalidated
        broken = isinstance(error, (asyncpg.InterfaceError, asyncpg.InternalClientError))
        if lost or broken or _is(origin, _SQLITE_AWAY, _POSTGRES_AWAY):
            return UnavailableError(f"store {self.url} cannot be used: {reason}")
        return None


def _is(origin: BaseException, sqlite_codes: set[int], postgres_prefixes: tuple[str, ...]) -> bool:
    """Tell whether a driver's error carries one of the codes."""
    code = getattr(origin, "sqlite_errorcode", None)
    if isinstance(code, int):
        return (code & 0xFF) in sqlite_codes
    state = getattr(origin, "sqlstate", None)
    return isinstance(state, str) and state.startswith(postgres_prefixes)


def _is_undecodable(origin: BaseException) -> bool:
    """Tell whether a text of a SQLite file is no text: the one such error that Python raises and SQLite does not."""
    return isinstance(origin, sqlite3.OperationalError) and not hasattr(origin, "sqlite_errorcode")


async def _committed(session: AsyncSession) -> None:
    try:
        await session.commit()
    finally:
        await session.close()


async def _to_its_end(work: Coroutine[Any, Any, None]) -> None:
    """Run what ends a transaction to its end, also where the caller is cancelled meanwhile.

    Cut short, it would leave a connection that nobody can use or close; SQLAlchemy logs each with a stack.
    """
    task = asyncio.create_task(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise


def _parse_url(url: str) -> URL:
    rule = "be sqlite:///path, sqlite:// or postgresql://user@host/name"
    try:
        parsed = make_url(url)
    except exc.ArgumentError as error:
        raise ConfigError(f"database url must {rule}, got text that is no URL", parameter="url") from error
    if parsed.drivername == "postgres":
        parsed = parsed.set(drivername="postgresql")
    if parsed.drivername not in ("sqlite", "postgresql"):
        raise ConfigError(f"database url must {rule}, got {parsed.render_as_string()}", parameter="url")
    return parsed


def _make_parent(path: Path, url: URL) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UnavailableError(f"store {url.render_as_string()} cannot be reached: {error}") from error


def _prepare_sqlite(engine: AsyncEngine, in_memory: bool) -> None:
    """Have every connection durable and strict, and every transaction begun by us rather than by the driver."""

    @event.listens_for(engine.sync_engine, "connect")
    def on_connect(connection: Any, _record: object) -> None:
        cursor = connection.cursor()
        cursor.execute("PRAGMA foreign_keys = ON")
        if not in_memory:
            cursor.execute("PRAGMA journal_mode = WAL")
            cursor.execute("PRAGMA synchronous = FULL")
            cursor.execute(f"PRAGMA wal_autocheckpoint = {LOG_PAGES}")
        cursor.close()

    @event.listens_for(engine.sync_engine, "begin")
    def on_begin(connection: Connection) -> None:
        writes = connection.get_execution_options().get(_WRITE_OPTION, False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN DEFERRED")

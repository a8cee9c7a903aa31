"""What stores of wire messages share: payloads rest as wire bytes with a CRC-32 beside them, in versioned tables.

A row that no longer reads is left where it is, counted and reported; what it held is missing, and nothing else. A
SQLite file that is damaged as a whole is set aside under another name, for stores that can begin anew.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from sqlalchemy import MetaData, select, update
from sqlalchemy.engine import make_url

from esper.contracts import wire
from esper.contracts.errors import CorruptDataError, InvalidInputError, InvalidStateError
from esper.mesh.database import Database

log = logging.getLogger(__name__)

T = TypeVar("T")


class WireStore:
    """Base of a store; subclasses name their tables. Safe for many tasks of one event loop."""

    owner: ClassVar[str]
    """Whose tables they are, for messages."""
    metadata: ClassVar[MetaData]
    """The tables."""
    schema_row: ClassVar[Any]
    """Mapped class of the one row (id 1) that holds the tables' version."""
    schema_version: ClassVar[int]
    """Version of the tables."""
    older_versions: ClassVar[tuple[int, ...]] = ()
    """Versions that lack nothing but whole tables; they are made, and the rows that are there stay as they are."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.num_unreadable = 0

    @property
    def database(self) -> Database:
        """The database underneath."""
        return self._database

    async def prepare(self) -> None:
        """Create the tables that are not there, and take over those of an older version.

        Raises:
            InvalidStateError: The tables are those of another version.
            CorruptDataError: The store is damaged.
            UnavailableError: The store cannot be reached.
        """
        await self._database.create_all(self.metadata)
        row = self.schema_row
        async with self._database.session() as session:
            version = await session.scalar(select(row.version).where(row.id == 1))
            if version is None:
                session.add(row(id=1, version=self.schema_version))
            elif version in self.older_versions:
                await session.execute(update(row).where(row.id == 1).values(version=self.schema_version))
                log.info("tables_migrated", extra={"owner": self.owner, "from": version, "to": self.schema_version})
            elif version != self.schema_version:
                raise InvalidStateError(f"{self.owner}'s tables must have version {self.schema_version}, got {version}")

    async def ping(self) -> None:
        """Return when the store answers.

        Raises:
            UnavailableError: It does not.
        """
        await self._database.ping()

    def read(self, payload: bytes, crc32: int, cls: type[T], name: str) -> T | None:
        """Give the value of a row, or ``None``, said aloud, when it no longer reads."""
        try:
            if zlib.crc32(payload) != crc32:
                raise CorruptDataError(f"{cls.__name__} {name} must have CRC-32 {crc32}, got {zlib.crc32(payload)}")
            return wire.parse(payload, cls)
        except (CorruptDataError, InvalidInputError) as error:
            self.num_unreadable += 1
            log.error("stored_row_unreadable", extra={"row": name, "kind": cls.__name__, "error": str(error)})
            return None


async def open_or_set_aside(url: str, opener: Callable[[str], Awaitable[T]]) -> T:
    """Open a store whose owner can begin anew; a SQLite file that is damaged is set aside, and a new one begun.

    Args:
        url: Where the store is.
        opener: Opens it and reads what its owner stands on, so that damage shows now; closes it where it raises.

    Raises:
        CorruptDataError: A store other than a SQLite file is damaged.
        EsperError: Whatever else the opener raises; the file stays where it is.
    """
    try:
        return await opener(url)
    except CorruptDataError as error:
        parsed = make_url(url)
        if parsed.get_backend_name() != "sqlite" or not parsed.database:
            raise
        path = Path(parsed.database)
        aside = set_aside(path)
        log.error("store_corrupt", extra={"file": path.name, "kept_as": aside.name, "error": str(error)})
        return await opener(url)


def set_aside(path: Path) -> Path:
    """Move a SQLite file and its companions out of the way, under the first free name; give the new name."""
    number = 1
    while (aside := path.with_name(f"{path.name}.corrupt-{number}")).exists():
        number += 1
    path.rename(aside)
    for suffix in ("-wal", "-shm"):
        companion = path.with_name(path.name + suffix)
        if companion.exists():
            companion.rename(aside.with_name(aside.name + suffix))
    return aside

"""Brings the library's tables from any earlier form to the newest, and back, in one transaction."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Final

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util.exc import CommandError
from sqlalchemy import Connection, text

from esper.contracts.errors import InvalidStateError
from esper.mesh.database import Database

log = logging.getLogger(__name__)

VERSION_TABLE: Final = "urza_alembic_version"
"""Where the revision is kept; prefixed, for databases that several services share."""

_SCRIPTS: Final = Path(__file__).parent / "migrations"
_LOCK_KEY: Final = 0x75727A61
"""Advisory lock under which replicas that start at once migrate one after the other."""


def newest_revision() -> str:
    """Give the revision of this build's tables."""
    head = ScriptDirectory.from_config(_config()).get_current_head()
    assert head is not None
    return head


async def current_revision(database: Database) -> str | None:
    """Give the revision of a database's tables; ``None`` for an empty one."""
    return await database.run_sync(_current)


async def migrate(database: Database, revision: str = "head") -> None:
    """Bring the tables to a revision, up or down; all of it or nothing.

    Raises:
        InvalidStateError: The tables have a revision that this build does not know.
        UnavailableError: The database cannot be reached.
    """
    await database.run_sync(lambda connection: _migrate(connection, revision))


def _migrate(connection: Connection, revision: str) -> None:
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK_KEY})
    config = _config()
    config.attributes["connection"] = connection
    before = _current(connection)
    scripts = ScriptDirectory.from_config(config)
    known = [script.revision for script in reversed(list(scripts.walk_revisions()))]
    if before is not None and before not in known:
        raise InvalidStateError(
            f"the library's tables must have one of the revisions {', '.join(known)}, got {before}: "
            "a newer Esper has written them"
        )
    wanted = {"head": known[-1], "base": None}.get(revision, revision)
    goes_down = before is not None and (wanted is None or known.index(wanted) < known.index(before))
    try:
        (command.downgrade if goes_down else command.upgrade)(config, revision)
    except CommandError as error:
        raise InvalidStateError(f"revision must be known to this build, got {revision!r}: {error}") from error
    if wanted != before:
        log.info("store_migrated", extra={"from_revision": before, "to_revision": wanted})


def _current(connection: Connection) -> str | None:
    options = {"version_table": VERSION_TABLE}
    return MigrationContext.configure(connection, opts=options).get_current_revision()


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(_SCRIPTS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config

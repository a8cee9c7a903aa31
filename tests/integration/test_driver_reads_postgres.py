"""`Database.read` on PostgreSQL where its driver has lost its way."""

from __future__ import annotations

import asyncpg
import pytest

from esper.contracts.errors import UnavailableError
from esper.mesh.database import Database
from esper.mesh.driver_reads import ReadScript, Statement

BACKEND = Statement("SELECT pg_backend_pid()")


def backend() -> ReadScript[int]:
    [[pid]] = yield BACKEND
    return int(pid)


def lost() -> ReadScript[int]:
    yield BACKEND
    raise asyncpg.InternalClientError("cannot switch to state 12; another operation (2) is in progress")


async def test_a_connection_whose_state_is_unknown_is_an_outage_and_is_not_used_again(database: Database) -> None:
    before = await database.read(backend())
    assert await database.read(backend()) == before, "one connection is used again and again"
    with pytest.raises(UnavailableError, match="cannot be used: cannot switch to state 12"):
        await database.read(lost())
    assert await database.read(backend()) != before

"""Kernels at rest on a real PostgreSQL: rot, what sweeps take, uploads that go on."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from esper.mesh.database import Database
from esper.services.urza.retention import RetentionPolicy
from esper.services.urza.store import UrzaStore
from esper.testing.urza_kernel_contract import (
    KEY,
    Clock,
    OutsideKernelStoreContract,
    RetentionContract,
    RotContract,
    UploadStoreContract,
)
from esper.testing.urza_samples import kernel_bytes


@pytest.fixture
def database(empty_library: Database) -> Database:
    return empty_library


@pytest.fixture
def rot(database: Database) -> Any:
    """A replica's session knows no foreign keys."""

    async def write(table: str, column: str, value: Any) -> None:
        async with database.session() as session:
            await session.execute(text("SET LOCAL session_replication_role = replica"))
            kind = await session.scalar(text(f"SELECT pg_typeof({column})::text FROM {table}"))
            known = value.decode() if kind in ("character varying", "text") else value
            written = await session.execute(text(f"UPDATE {table} SET {column} = :value"), {"value": known})
            assert written.rowcount == 1  # type: ignore[attr-defined]

    return write


@pytest.fixture
def texts_may_break() -> bool:
    return False


@pytest.fixture(params=["database", "file"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"file://{tmp_path}/blobs" if request.param == "file" else "database"


class TestKernelStoreOutside(OutsideKernelStoreContract):
    @pytest.fixture
    def place(self, tmp_path: Path) -> str:
        return f"file://{tmp_path}/blobs"


class TestRot(RotContract):
    pass


class TestRetention(RetentionContract):
    pass


class TestUploadStore(UploadStoreContract):
    @pytest.fixture
    def place(self) -> str:
        return "database"


async def test_replicas_that_sweep_at_once_take_every_kernel_once(database: Database, postgres: Any) -> None:
    clock = Clock()
    policy = RetentionPolicy(keep_unreferenced_days=1)
    first = UrzaStore(database, key_ring=KEY.ring(), clock=clock, retention=policy)
    await first.migrate()
    stored = {(await first.kernels.put(kernel_bytes(KEY, number)))[0].artifact_id for number in range(40)}
    clock.pass_days(2)
    async with database.reading() as session:
        name = await session.scalar(text("SELECT current_database()"))
    async with Database.open(postgres.get_uri(str(name))) as other:
        second = UrzaStore(other, key_ring=KEY.ring(), clock=clock, retention=policy)
        swept = await asyncio.gather(first.retention.sweep(), second.retention.sweep(), first.retention.sweep())
        rest = await second.retention.sweep()
    taken = [artifact_id for one in (*swept, rest) for artifact_id in one.kernel_ids]
    assert sorted(taken) == sorted(stored)

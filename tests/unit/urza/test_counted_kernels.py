"""A kernel with what its reports add up to, in one read: refused wherever the kernel alone would be."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from sqlalchemy import text

from esper.contracts.errors import CorruptDataError, InvalidInputError, NotFoundError, SignatureError
from esper.execution.keys import KeyRing, SigningKey
from esper.mesh.database import Database
from esper.services.urza.store import UrzaStore
from esper.testing.urza_samples import kernel_bytes

KEY = SigningKey.generate()


@pytest.fixture(params=["memory", "file"])
async def database(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Database]:
    url = "sqlite://" if request.param == "memory" else f"sqlite:///{tmp_path}/urza.db"
    async with Database.open(url) as opened:
        yield opened


async def opened(database: Database, ring: KeyRing | None = None) -> UrzaStore:
    store = UrzaStore(database, key_ring=ring)
    await store.migrate()
    return store


async def test_a_kernel_without_reports_is_given_without_counts(database: Database) -> None:
    store = await opened(database)
    record, _ = await store.kernels.put(kernel_bytes(KEY))
    assert await store.kernels.get_counted(artifact_id=record.artifact_id) == (record, None)
    assert await store.kernels.get_counted(content_key=record.content_key) == (record, None)
    await store.kernels.remove(record.artifact_id)
    with pytest.raises(NotFoundError, match="content_key must name a stored kernel"):
        await store.kernels.get_counted(content_key=record.content_key)
    with pytest.raises(InvalidInputError, match="exactly one of artifact_id and content_key"):
        await store.kernels.get_counted()


async def test_a_kernel_whose_key_is_no_longer_trusted_is_refused(database: Database) -> None:
    record, _ = await (await opened(database, KEY.ring())).kernels.put(kernel_bytes(KEY))
    distrusting = await opened(database, SigningKey.generate().ring())
    with pytest.raises(SignatureError, match="must be signed by a key that is trusted"):
        await distrusting.kernels.get_counted(content_key=record.content_key)


async def test_who_knows_a_kernels_manifest_is_given_its_size_while_it_stands(database: Database) -> None:
    store = await opened(database, KEY.ring())
    record, _ = await store.kernels.put(kernel_bytes(KEY))
    known = hashlib.sha256(record.manifest).digest()
    by_id = await store.kernels.size_if_known(known, artifact_id=record.artifact_id)
    by_key = await store.kernels.size_if_known(known, content_key=record.content_key)
    assert by_id == by_key == record.size_bytes > 0
    assert await store.kernels.size_if_known(bytes(32), content_key=record.content_key) == 0
    distrusting = await opened(database, SigningKey.generate().ring())
    assert await distrusting.kernels.size_if_known(known, content_key=record.content_key) == 0
    with pytest.raises(InvalidInputError, match="exactly one of artifact_id and content_key"):
        await store.kernels.size_if_known(known)
    await store.kernels.remove(record.artifact_id)
    assert await store.kernels.size_if_known(known, content_key=record.content_key) == 0


async def test_a_row_that_rotted_is_no_longer_known_by_its_manifest(database: Database) -> None:
    store = await opened(database)
    record, _ = await store.kernels.put(kernel_bytes(KEY))
    async with database.session() as session:
        await session.execute(text("UPDATE urza_kernels SET size_bytes = size_bytes + 1"))
    known = hashlib.sha256(record.manifest).digest()
    assert await store.kernels.size_if_known(known, content_key=record.content_key) == 0
    with pytest.raises(CorruptDataError, match="must match the digest of what is said of it"):
        await store.kernels.get_counted(content_key=record.content_key)


@pytest.mark.parametrize("value", ["'k' || x'ff'", "'k1'", "CAST(x'6bff' AS TEXT)"])
async def test_an_id_that_rotted_is_found_and_its_kernel_removed(database: Database, value: str) -> None:
    store = await opened(database)
    record, _ = await store.kernels.put(kernel_bytes(KEY))
    async with database.session() as session:
        await session.execute(text("PRAGMA defer_foreign_keys = ON"))
        await session.execute(text("DELETE FROM urza_kernel_chunks"))
        await session.execute(text(f"UPDATE urza_kernels SET artifact_id = {value}"))
    with pytest.raises(CorruptDataError, match="must match the digest of what is said of it"):
        await store.kernels.get_counted(content_key=record.content_key)
    with pytest.raises(NotFoundError):
        await store.kernels.get_counted(content_key=record.content_key)

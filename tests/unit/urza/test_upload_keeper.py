"""Pieces of an upload are written late: not at all when it is soon over, at once when it breaks or is asked for."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator

import pytest

from esper.contracts.chunks import split
from esper.execution.keys import SigningKey
from esper.mesh.database import Database
from esper.services.urza import upload_store
from esper.services.urza.kernel_upload import KernelUpload, UploadBudget
from esper.services.urza.store import UrzaStore
from esper.services.urza.upload_store import PIECE_BYTES
from esper.testing.urza_samples import kernel_bytes
from esper.testing.urza_template import lay_out

KEY = SigningKey.generate()
PAYLOAD = kernel_bytes(KEY, weight_floats=1_000_000)
DIGEST = hashlib.sha256(PAYLOAD).digest()
CHUNKS = list(split(PAYLOAD, chunk_bytes=PIECE_BYTES // 2))


@pytest.fixture
async def store() -> AsyncIterator[UrzaStore]:
    async with Database.open("sqlite://") as database:
        store = UrzaStore(database, key_ring=KEY.ring())
        await lay_out(database)
        yield store


def upload_to(store: UrzaStore) -> KernelUpload:
    return KernelUpload(store, UploadBudget(len(PAYLOAD)))


class Writes(list[int]):
    """Offsets of the pieces that are written, in turn; ``grew`` is set when another one was."""

    def __init__(self) -> None:
        self.grew = asyncio.Event()


@pytest.fixture
def writes(store: UrzaStore, monkeypatch: pytest.MonkeyPatch) -> Writes:
    offsets = Writes()
    keep = store.uploads.keep

    async def noted(sha256: bytes, total_bytes: int, offset: int, data: bytes) -> bool:
        offsets.append(offset)
        offsets.grew.set()
        return await keep(sha256, total_bytes, offset, data)

    monkeypatch.setattr(store.uploads, "keep", noted)
    return offsets


async def test_an_upload_that_is_soon_over_writes_no_piece(
    store: UrzaStore, writes: Writes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload_store, "KEEP_AFTER_S", 60.0)
    upload = upload_to(store)
    for chunk in CHUNKS:
        await upload.add(chunk)
    record, created = await upload.finish()
    upload.close()
    assert (created, record.sha256, writes) == (True, DIGEST, [])
    assert await store.uploads.held_bytes(DIGEST, len(PAYLOAD)) == 0


async def test_whoever_asks_how_far_it_got_has_it_written_first(
    store: UrzaStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload_store, "KEEP_AFTER_S", 60.0)
    upload = upload_to(store)
    for chunk in CHUNKS[:5]:
        await upload.add(chunk)
    assert await store.uploads.held_bytes(DIGEST, len(PAYLOAD)) == 2 * PIECE_BYTES
    for chunk in CHUNKS[5:]:
        await upload.add(chunk)
    assert (await upload.finish())[1]
    upload.close()
    assert await store.uploads.held_bytes(DIGEST, len(PAYLOAD)) == 0  # what was written went with the end


async def test_one_that_breaks_is_kept_and_another_goes_on(store: UrzaStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload_store, "KEEP_AFTER_S", 60.0)
    broken = upload_to(store)
    for chunk in CHUNKS[:6]:
        await broken.add(chunk)
    broken.close()
    held = await store.uploads.held_bytes(DIGEST, len(PAYLOAD))
    assert held == 3 * PIECE_BYTES
    upload = upload_to(store)
    for chunk in split(PAYLOAD, offset=held):
        await upload.add(chunk)
    record, created = await upload.finish()
    upload.close()
    assert (created, record.sha256) == (True, DIGEST)
    assert await store.uploads.held_bytes(DIGEST, len(PAYLOAD)) == 0


async def test_one_that_takes_long_is_written_while_it_comes(
    store: UrzaStore, writes: Writes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload_store, "KEEP_AFTER_S", 0.001)
    upload = upload_to(store)
    for chunk in CHUNKS[:4]:
        await upload.add(chunk)
    async with asyncio.timeout(20):
        while writes != [0, PIECE_BYTES]:
            writes.grew.clear()
            await writes.grew.wait()
    upload.close()
    assert await store.uploads.held_bytes(DIGEST, len(PAYLOAD)) == 2 * PIECE_BYTES

"""Kernels at rest: proven before they are stored, cut into checksummed pieces, all of one kernel or nothing."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import zlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from sqlalchemy import Select, delete, func, insert, literal, select, tuple_
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from esper.contracts.chunks import DOWNLOAD_CHUNK_BYTES, Chunk, split
from esper.contracts.errors import CapacityExceededError, CorruptDataError, InvalidInputError, NotFoundError
from esper.execution.keys import KeyRing
from esper.mesh.database import Database
from esper.mesh.page_token import decode_page_token, encode_page_token
from esper.services.urza.clock import moment_of, now_us
from esper.services.urza.models import KernelChunkRow, KernelRow
from esper.services.urza.rules import Page, PageRequest, fitting, require_artifact_id, require_content_id
from esper.services.urza.verification import ProvenKernel, prove_kernel

log = logging.getLogger(__name__)

_CHUNK_BYTES: Final = DOWNLOAD_CHUNK_BYTES
_ROWS_PER_INSERT: Final = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelRecord:
    """What the library says of a stored kernel."""

    artifact_id: str
    """Id of the kernel."""
    content_key: str
    """Content key of the compile request."""
    blueprint_id: str
    """Content id of the blueprint."""
    manifest: bytes
    """Serialised manifest, as signed."""
    key_id: str
    """Id of the signing key."""
    size_bytes: int
    """Size of the serialised artefact, in bytes."""
    sha256: bytes
    """Digest of the serialised artefact."""
    stored_at: datetime
    """When the library took it."""


class KernelStore:
    """The kernels of the library. Safe for many tasks of one event loop."""

    def __init__(
        self,
        database: Database,
        *,
        key_ring: KeyRing | None,
        max_kernel_bytes: int,
        max_stored_bytes: int,
        token_key: bytes = b"",
    ) -> None:
        self._database = database
        self._key_ring = key_ring
        self._token_key = token_key
        self._max_stored_bytes = max_stored_bytes
        self.max_kernel_bytes = max_kernel_bytes
        """Largest serialised artefact taken, in bytes."""

    async def put(self, payload: bytes) -> tuple[KernelRecord, bool]:
        """Store a serialised artefact, or give the kernel that is there for its content key; say which.

        Equal content keys mean equal requests, so the first kernel of a key stays, unless the key that signed it is no
        longer trusted: then the new one takes its place.

        Raises:
            CorruptDataError: It is no artefact, or a digest does not hold. Nothing is stored.
            SignatureError: There is a key ring and the signature does not hold. Nothing is stored.
            CapacityExceededError: It is too large, or the library holds as many bytes as it may.
        """
        if len(payload) > self.max_kernel_bytes:
            raise CapacityExceededError(
                f"a kernel must be at most {self.max_kernel_bytes} bytes, got {len(payload)}", parameter="total_bytes"
            )
        # Hashing and parsing many megabytes would hold up every other call.
        proven = await asyncio.to_thread(prove_kernel, payload, self._key_ring)
        known = await self._known(proven)
        if known is not None:
            return known, False
        try:
            return await self._insert(proven, payload)
        except IntegrityError:
            known = await self._known(proven)
            if known is None:
                raise
            return known, False

    async def get(self, *, artifact_id: str = "", content_key: str = "") -> KernelRecord:
        """Give what is said of one kernel, by id or by content key.

        Raises:
            InvalidInputError: Not exactly one of the two is given, or it breaks its rule.
            NotFoundError: There is no such kernel.
        """
        if bool(artifact_id) == bool(content_key):
            raise InvalidInputError.of("key", "be exactly one of artifact_id and content_key", "both or neither")
        if artifact_id:
            condition = KernelRow.artifact_id == require_artifact_id("artifact_id", artifact_id)
        else:
            condition = KernelRow.content_key == require_content_id("content_key", content_key)
        async with self._database.reading() as session:
            row = await session.scalar(select(KernelRow).where(condition))
        if row is None:
            parameter = "artifact_id" if artifact_id else "content_key"
            raise NotFoundError(
                f"{parameter} must name a stored kernel, got {artifact_id or content_key!r}", parameter=parameter
            )
        return _record(row)

    async def list(self, page: PageRequest, *, blueprint_id: str = "") -> Page[KernelRecord]:
        """Give one page of kernels, newest first; all, or those of one blueprint.

        Raises:
            InvalidInputError: The blueprint id is none, or the page token is not one that the same listing gave.
        """
        if blueprint_id:
            require_content_id("blueprint_id", blueprint_id)
        scope = f"ListKernels|{blueprint_id}"
        statement = _newest_first(blueprint_id).limit(page.limit + 1)
        after = decode_page_token(page.token, scope=scope, arity=2, key=self._token_key)
        if after is not None:
            place = tuple_(literal(int(after[0] or 0)), literal(str(after[1])))
            statement = statement.where(tuple_(KernelRow.stored_at_us, KernelRow.artifact_id) < place)
        async with self._database.reading() as session:
            rows = (await session.scalars(statement)).all()
        shown = rows[: fitting([len(row.manifest) for row in rows[: page.limit]])]
        token = ""
        if len(rows) > len(shown):
            key = (shown[-1].stored_at_us, shown[-1].artifact_id)
            token = encode_page_token(key, scope=scope, key=self._token_key)
        return Page(items=tuple(_record(row) for row in shown), next_token=token)

    async def open(self, artifact_id: str, *, offset: int = 0) -> tuple[KernelRecord, AsyncIterator[Chunk]]:
        """Give a kernel's record and its bytes from ``offset`` on, as checksummed chunks of at most 256 KiB.

        At the very end there is one empty chunk. No transaction stays open between chunks.

        Raises:
            InvalidInputError: The id is none, or the offset lies beyond the kernel.
            NotFoundError: There is no such kernel.
            CorruptDataError: While iterating: a stored piece is damaged; the kernel is removed.
        """
        record = await self.get(artifact_id=require_artifact_id("artifact_id", artifact_id))
        if not 0 <= offset <= record.size_bytes:
            raise InvalidInputError.of("offset", f"be within [0, {record.size_bytes}] bytes", offset)
        return record, self._chunks(record, offset)

    async def remove(self, artifact_id: str) -> bool:
        """Remove a kernel; say whether it was there."""
        require_artifact_id("artifact_id", artifact_id)
        async with self._database.session() as session:
            return await _delete(session, artifact_id)

    async def _chunks(self, record: KernelRecord, offset: int) -> AsyncIterator[Chunk]:
        place = offset
        while place < record.size_bytes or place == offset:
            data = await self._piece(record, place) if place < record.size_bytes else b""
            yield Chunk(
                total_bytes=record.size_bytes, sha256=record.sha256, offset=place, data=data, crc32=zlib.crc32(data)
            )
            place += len(data)
            if not data:
                return

    async def _piece(self, record: KernelRecord, place: int) -> bytes:
        """Give the bytes from ``place`` to the end of the stored piece it lies in."""
        index, within = divmod(place, _CHUNK_BYTES)
        async with self._database.reading() as session:
            row = await session.get(KernelChunkRow, (record.artifact_id, index))
        length = min(_CHUNK_BYTES, record.size_bytes - index * _CHUNK_BYTES)
        if row is not None and len(row.data) == length and zlib.crc32(row.data) == row.crc32:
            return row.data[within:]
        await self.remove(record.artifact_id)
        log.error("kernel_corrupt", extra={"artifact_id": record.artifact_id, "chunk_index": index})
        raise CorruptDataError(
            f"kernel {record.artifact_id} must match its checksums, piece {index} does not; it was removed",
            parameter="artifact_id",
        )

    async def _known(self, proven: ProvenKernel) -> KernelRecord | None:
        """Give the kernel that stands for the same request; one whose signer is no longer trusted does not."""
        async with self._database.reading() as session:
            row = await session.scalar(_same_request(proven))
        return None if row is None or self._outdated(row) else _record(row)

    def _outdated(self, row: KernelRow) -> bool:
        return self._key_ring is not None and row.key_id not in self._key_ring

    async def _insert(self, proven: ProvenKernel, payload: bytes) -> tuple[KernelRecord, bool]:
        async with self._database.session() as session:
            for row in (await session.scalars(_same_request(proven))).all():
                if not self._outdated(row):
                    return _record(row), False
                await _delete(session, row.artifact_id)
                session.expunge(row)
            held = await session.scalar(select(func.coalesce(func.sum(KernelRow.size_bytes), 0)))
            if int(held or 0) + len(payload) > self._max_stored_bytes:
                raise CapacityExceededError(
                    f"the library must hold at most {self._max_stored_bytes} bytes of kernels, got {len(payload)} "
                    f"bytes beyond the {held} it holds",
                    parameter="max_stored_bytes",
                )
            row = _row(proven, payload)
            session.add(row)
            await session.flush()
            await _write_chunks(session, row.artifact_id, payload)
            record = _record(row)
        log.info("kernel_stored", extra={"artifact_id": record.artifact_id, "size_bytes": record.size_bytes})
        return record, True


async def _write_chunks(session: AsyncSession, artifact_id: str, payload: bytes) -> None:
    batch: list[dict[str, Any]] = []
    for index, chunk in enumerate(split(payload, chunk_bytes=_CHUNK_BYTES)):
        batch.append({"artifact_id": artifact_id, "index": index, "data": chunk.data, "crc32": chunk.crc32})
        if len(batch) == _ROWS_PER_INSERT:
            await session.execute(insert(KernelChunkRow), batch)
            batch = []
    if batch:
        await session.execute(insert(KernelChunkRow), batch)


async def _delete(session: AsyncSession, artifact_id: str) -> bool:
    await session.execute(delete(KernelChunkRow).where(KernelChunkRow.artifact_id == artifact_id))
    gone = await session.execute(
        delete(KernelRow).where(KernelRow.artifact_id == artifact_id).returning(KernelRow.artifact_id)
    )
    return gone.first() is not None


def _same_request(proven: ProvenKernel) -> Select[KernelRow]:
    manifest = proven.manifest
    same_id = KernelRow.artifact_id == manifest.artifact_id
    return select(KernelRow).where(same_id | (KernelRow.content_key == manifest.content_key))


def _newest_first(blueprint_id: str) -> Select[KernelRow]:
    statement = select(KernelRow)
    if blueprint_id:
        statement = statement.where(KernelRow.blueprint_id == blueprint_id)
    return statement.order_by(KernelRow.stored_at_us.desc(), KernelRow.artifact_id.desc())


def _row(proven: ProvenKernel, payload: bytes) -> KernelRow:
    manifest = proven.manifest
    return KernelRow(
        artifact_id=manifest.artifact_id,
        content_key=manifest.content_key,
        blueprint_id=manifest.blueprint_id,
        manifest=proven.artifact.manifest,
        key_id=proven.artifact.key_id,
        size_bytes=len(payload),
        sha256=hashlib.sha256(payload).digest(),
        stored_at_us=now_us(),
    )


def _record(row: KernelRow) -> KernelRecord:
    return KernelRecord(
        artifact_id=row.artifact_id,
        content_key=row.content_key,
        blueprint_id=row.blueprint_id,
        manifest=row.manifest,
        key_id=row.key_id,
        size_bytes=row.size_bytes,
        sha256=row.sha256,
        stored_at=moment_of(row.stored_at_us),
    )

"""Kernels at rest: proven before they are stored, checked whenever they are read, all of one kernel or nothing.

A row lies under a digest of its own columns and every piece of the bytes under a CRC-32. What does not hold is
reported as `CorruptDataError` and removed, so that it can be built and stored again; only the very copy that was read
is removed, never one that took its place meanwhile.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final, NoReturn

from sqlalchemy import Select, delete, func, literal, select, tuple_
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from esper.contracts.blueprint import KernelStatistics
from esper.contracts.chunks import Chunk
from esper.contracts.errors import (
    CapacityExceededError,
    CorruptDataError,
    EsperError,
    InvalidInputError,
    NotFoundError,
    SignatureError,
    UnavailableError,
)
from esper.execution.keys import KeyRing
from esper.mesh.database import Database
from esper.mesh.driver_reads import ReadScript
from esper.mesh.page_token import decode_page_token, encode_page_token
from esper.services.urza.blobs import Blobs
from esper.services.urza.clock import now_us
from esper.services.urza.kernel_pieces import PIECE_BYTES, Piece, crcs_of, find_pieces, pieces_of, write_pieces
from esper.services.urza.kernel_rows import (
    COPY_ID,
    KernelRecord,
    delete_copy,
    find_row,
    find_rows,
    find_same,
    find_standing,
    is_sound,
    record_of,
    row_digest,
    use_key,
)
from esper.services.urza.models import KernelPinRow, KernelRow, LooseBlobRow
from esper.services.urza.read_ahead import given_up
from esper.services.urza.report_store import read_kernel_statistics
from esper.services.urza.rules import (
    ARTIFACT_ID,
    MAX_ACTOR_CHARS,
    MAX_REASON_CHARS,
    Page,
    PageRequest,
    fitting,
    require_artifact_id,
    require_content_id,
    require_text,
)
from esper.services.urza.verification import ProvenKernel, prove_kernel

log = logging.getLogger(__name__)

_PIECES_PER_READ: Final = 8
"""Pieces that are read at once; as many again wait, at most, while they are sent."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelLimits:
    """How much the library takes."""

    max_kernel_bytes: int
    """Largest serialised artefact, in bytes."""
    max_stored_bytes: int
    """Most bytes of kernels altogether."""


Withdrawn = Callable[[Sequence[str], str], Awaitable[None]]
"""Is told the ids of kernels that are no longer offered, and why."""


class KernelStore:
    """The kernels of the library. Safe for many tasks of one event loop."""

    def __init__(
        self,
        database: Database,
        *,
        key_ring: KeyRing | None,
        limits: KernelLimits,
        token_key: bytes = b"",
        blobs: Blobs | None = None,
        clock: Callable[[], int] = now_us,
        withdrawn: Withdrawn | None = None,
    ) -> None:
        """Build the store over an open database; ``withdrawn`` is told of kernels that are no longer offered."""
        self._database = database
        self._withdrawn = withdrawn
        self._key_ring = key_ring
        self._token_key = token_key
        self._limits = limits
        self._blobs = blobs
        self._clock = clock

    @property
    def max_kernel_bytes(self) -> int:
        """Largest serialised artefact taken, in bytes."""
        return self._limits.max_kernel_bytes

    def require_size(self, total_bytes: int) -> None:
        """Make sure that a kernel of so many bytes is one that the library takes.

        Raises:
            InvalidInputError: It is larger than any may be here. No waiting mends that, unlike a library that is full.
        """
        if total_bytes > self.max_kernel_bytes:
            raise InvalidInputError.of("total_bytes", f"be at most {self.max_kernel_bytes} bytes", total_bytes)

    async def put(self, payload: bytes, *, sha256: bytes = b"") -> tuple[KernelRecord, bool]:
        """Store a serialised artefact, or give the kernel that is there for its content key; say which.

        Equal content keys mean equal requests, so the first kernel of a key stays, unless the key that signed it is no
        longer trusted or its row is damaged: then the new one takes its place. ``sha256`` is the payload's digest where
        it is known already.

        Raises:
            CorruptDataError: It is no artefact, or a digest does not hold. Nothing is stored.
            SignatureError: There is a key ring and the signature does not hold. Nothing is stored.
            InvalidInputError: It is larger than any kernel may be here.
            CapacityExceededError: The library holds as many bytes as it may.
            UnavailableError: The database or the place for bytes outside cannot be reached.
        """
        self.require_size(len(payload))
        # Hashing and parsing many megabytes would hold up every other call.
        proven = await asyncio.to_thread(prove_kernel, payload, self._key_ring)
        known = await self._known(proven)
        if known is not None:
            return known, False
        sha256 = sha256 or await asyncio.to_thread(lambda: hashlib.sha256(payload).digest())
        row = _row(proven, payload, sha256, outside=self._blobs is not None, stored_at_us=self._clock())
        try:
            if self._blobs is None:
                return await self._insert(proven, row, payload)
            return await self._write_and_insert(self._blobs, proven, row, payload)
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
            CorruptDataError: What is said of it is damaged; the kernel was removed.
            SignatureError: The key that signed it is no longer trusted. It stays until it is built again or swept.
        """
        return record_of(await self._get(artifact_id, content_key))

    async def get_counted(
        self, *, artifact_id: str = "", content_key: str = ""
    ) -> tuple[KernelRecord, KernelStatistics | None]:
        """Give what `get` gives, and what the reports of the kernel add up to; one read for both."""
        column, wanted = _named(artifact_id, content_key)
        row, counted = await self._database.read(_with_counts(column, wanted, self._database.dialect))
        return record_of(await self._usable(row, column, wanted)), counted

    async def size_if_known(self, manifest_sha256: bytes, *, artifact_id: str = "", content_key: str = "") -> int:
        """Give the size of a kernel, in bytes; 0 where `get_counted` would not give one of this very manifest."""
        column, wanted = _named(artifact_id, content_key)
        found = await self._database.read(find_standing(column, wanted, self._database.dialect))
        same = found is not None and found.manifest_sha256 == manifest_sha256 and self._trusts(found.key_id)
        return found.size_bytes if found is not None and same else 0

    async def complete(self, sha256: bytes) -> KernelRecord | None:
        """Give the stored and trusted kernel whose serialised artefact has a digest; ``None`` where there is none."""
        rows = await self._database.read(find_rows("sha256", sha256, self._database.dialect))
        return next((record_of(row) for row in rows if is_sound(row) and not self._outdated(row)), None)

    async def list(self, page: PageRequest, *, blueprint_id: str = "") -> Page[KernelRecord]:
        """Give one page of kernels, newest first; all, or those of one blueprint.

        Raises:
            InvalidInputError: The blueprint id is none, or the page token is not one that the same listing gave.
            CorruptDataError: What is said of a kernel on the page is damaged; all such were removed.
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
        await self._require_sound(*rows)
        shown = rows[: fitting([len(row.manifest) for row in rows[: page.limit]])]
        token = ""
        if len(rows) > len(shown):
            key = (shown[-1].stored_at_us, shown[-1].artifact_id)
            token = encode_page_token(key, scope=scope, key=self._token_key)
        return Page(items=tuple(record_of(row) for row in shown), next_token=token)

    async def open(self, artifact_id: str, *, offset: int = 0) -> tuple[KernelRecord, AsyncIterator[Chunk]]:
        """Give a kernel's record and its bytes from ``offset`` on, as checksummed chunks of at most 256 KiB.

        At the very end there is one empty chunk. No transaction stays open between chunks.

        Raises:
            InvalidInputError: The id is none, or the offset lies beyond the kernel.
            NotFoundError: There is no such kernel; while iterating: it was removed or replaced meanwhile.
            CorruptDataError: What is said of it or, while iterating, a stored piece is damaged; the kernel was removed.
            SignatureError: The key that signed it is no longer trusted.
            UnavailableError: While iterating: the place for bytes outside cannot be reached.
        """
        row = await self._get(require_artifact_id("artifact_id", artifact_id), "")
        if not 0 <= offset <= row.size_bytes:
            raise InvalidInputError.of("offset", f"be within [0, {row.size_bytes}] bytes", offset)
        return record_of(row), self._chunks(row, offset)

    async def remove(self, artifact_id: str) -> bool:
        """Remove a kernel; say whether it was there."""
        require_artifact_id("artifact_id", artifact_id)
        async with self._database.reading() as session:
            row = await session.get(KernelRow, artifact_id)
        gone = row is not None and await self.remove_copy(row)
        if gone:
            await self.tell_withdrawn([artifact_id], "removed from the library")
        return gone

    async def withdraw_of(self, blueprint_id: str, reason: str) -> None:
        """Say that the kernels of a blueprint are no longer offered; they stay where they are."""
        of_it = select(KernelRow.artifact_id).where(KernelRow.blueprint_id == blueprint_id)
        async with self._database.reading() as session:
            artifact_ids = (await session.scalars(of_it)).all()
        await self.tell_withdrawn([one for one in artifact_ids if ARTIFACT_ID.fullmatch(one)], reason)

    async def tell_withdrawn(self, artifact_ids: Sequence[str], reason: str) -> None:
        """Tell whoever listens that some kernels are no longer offered."""
        if artifact_ids and self._withdrawn is not None:
            await self._withdrawn(artifact_ids, reason)

    async def remove_copy(self, row: KernelRow) -> bool:
        """Remove the very copy that a row spoke of when it was read; say whether it was there."""
        async with self._database.session() as session:
            gone = await delete_copy(session, row, now_us=self._clock())
        if gone and row.outside:
            await self.discard(row.copy_id)
        return gone

    async def discard(self, copy_id: str) -> bool:
        """Delete bytes outside that no row names; say whether it is done. Where the place is away, a sweep will."""
        if not COPY_ID.fullmatch(copy_id):  # the row's own rot; no name to delete by is left
            log.error("blob_left_behind", extra={"copy_id": repr(copy_id)})
            return False
        try:
            await self._outside().delete(copy_id)
        except EsperError as error:
            log.warning("blob_not_deleted", extra={"copy_id": copy_id, "error": str(error)})
            return False
        async with self._database.session() as session:
            await session.execute(delete(LooseBlobRow).where(LooseBlobRow.copy_id == copy_id))
        return True

    async def pin(self, artifact_id: str, *, actor: str, reason: str) -> bool:
        """Keep a kernel from every sweep; say whether it was not before. It stays so if it is built again.

        Raises:
            InvalidInputError: The id, the actor or the reason breaks its rule.
            NotFoundError: There is no such kernel.
        """
        require_text("actor", actor, max_chars=MAX_ACTOR_CHARS)
        require_text("reason", reason, max_chars=MAX_REASON_CHARS)
        await self.get(artifact_id=artifact_id)
        values = {"actor": actor, "reason": reason, "pinned_at_us": self._clock()}
        fresh = self._database.insert(KernelPinRow).values(artifact_id=artifact_id, **values)
        async with self._database.session() as session:
            # Until we are done no sweep may take it, and one that has it already makes us wait.
            there = select(KernelRow.size_bytes).where(KernelRow.artifact_id == artifact_id).with_for_update()
            if await session.scalar(there) is None:
                raise _unknown("artifact_id", artifact_id)
            done = await session.execute(fresh.on_conflict_do_nothing().returning(KernelPinRow.artifact_id))
            pinned = done.first() is not None
        if pinned:
            log.info("kernel_pinned", extra={"artifact_id": artifact_id, "actor": actor, "reason": reason})
        return pinned

    async def unpin(self, artifact_id: str, *, actor: str, reason: str) -> bool:
        """Let sweeps judge a kernel again; say whether it was pinned."""
        require_text("actor", actor, max_chars=MAX_ACTOR_CHARS)
        require_text("reason", reason, max_chars=MAX_REASON_CHARS)
        require_artifact_id("artifact_id", artifact_id)
        this = delete(KernelPinRow).where(KernelPinRow.artifact_id == artifact_id)
        async with self._database.session() as session:
            unpinned = (await session.execute(this.returning(KernelPinRow.artifact_id))).first() is not None
        if unpinned:
            log.info("kernel_unpinned", extra={"artifact_id": artifact_id, "actor": actor, "reason": reason})
        return unpinned

    async def _get(self, artifact_id: str, content_key: str) -> KernelRow:
        column, wanted = _named(artifact_id, content_key)
        row = await self._database.read(find_row(column, wanted, self._database.dialect))
        return await self._usable(row, column, wanted)

    async def _usable(self, row: KernelRow | None, column: str, wanted: str) -> KernelRow:
        """Give a row back when there is one, it is as it was written, and its signature counts."""
        if row is None:
            raise _unknown(column, wanted)
        await self._require_sound(row)
        if self._outdated(row):
            raise SignatureError(
                f"kernel {row.artifact_id} must be signed by a key that is trusted, key {row.key_id} no longer is",
                parameter="key_id",
            )
        return row

    async def _require_sound(self, *rows: KernelRow) -> None:
        """Remove the damaged ones of some rows, and say so of the first."""
        damaged = [row for row in rows if not is_sound(row)]
        for row in damaged:
            await self.remove_copy(row)
            log.error("kernel_row_corrupt", extra={"artifact_id": repr(row.artifact_id)})
        if damaged:
            raise CorruptDataError(
                f"kernel {damaged[0].artifact_id!r} must match the digest of what is said of it, it does not; it was "
                "removed",
                parameter="artifact_id",
            )

    async def _chunks(self, row: KernelRow, offset: int) -> AsyncIterator[Chunk]:
        """Give the chunks from ``offset`` on; while some are on their way the next ones are read."""
        if offset == row.size_bytes:
            yield _chunk(row, offset, b"", zlib.crc32(b""))
            return
        index, within = divmod(offset, PIECE_BYTES)
        num_pieces = -(-row.size_bytes // PIECE_BYTES)
        ahead = asyncio.create_task(self._pieces(row, index, 1))  # so that something is soon on its way
        place = offset
        try:
            while index < num_pieces:
                pieces = await ahead
                index += len(pieces)
                if index < num_pieces:
                    ahead = asyncio.create_task(self._pieces(row, index, _PIECES_PER_READ))
                for data, crc32 in pieces:
                    rest = data[within:] if within else data
                    yield _chunk(row, place, rest, zlib.crc32(rest) if within else crc32)
                    place += len(rest)
                    within = 0
        finally:
            await given_up(ahead)

    async def _pieces(self, row: KernelRow, index: int, most: int) -> Sequence[Piece]:
        """Give the proven pieces from a number on, ``most`` of them or fewer at the end."""
        end = min(-(-row.size_bytes // PIECE_BYTES), index + most)
        found = await (self._outside_pieces if row.outside else self._inside_pieces)(row, index, end)
        return [piece or await self._drop_damaged(row, number) for number, piece in enumerate(found, index)]

    async def _drop_damaged(self, row: KernelRow, number: int) -> NoReturn:
        if not await self.remove_copy(row):
            raise _gone(row)
        log.error("kernel_corrupt", extra={"artifact_id": row.artifact_id, "chunk_index": number})
        raise CorruptDataError(
            f"kernel {row.artifact_id} must match its checksums, piece {number} does not; it was removed",
            parameter="artifact_id",
        )

    async def _inside_pieces(self, row: KernelRow, index: int, end: int) -> Sequence[Piece | None]:
        """Give pieces with their checksums as of this copy: those of another one must not be mixed in."""
        found = await self._database.read(find_pieces(row, index, end))
        if found is None:
            raise _gone(row)
        return found

    async def _outside_pieces(self, row: KernelRow, index: int, end: int) -> Sequence[Piece | None]:
        start = index * PIECE_BYTES
        data = await self._outside().read(row.copy_id, start, min(end * PIECE_BYTES, row.size_bytes)) or b""
        return pieces_of(row, index, end, data)

    def _outside(self) -> Blobs:
        if self._blobs is None:
            raise UnavailableError(
                "blobs_url must name the place where kernels of this library rest outside its database, it is not set",
                parameter="blobs_url",
            )
        return self._blobs

    async def _known(self, proven: ProvenKernel) -> KernelRecord | None:
        """Give the kernel that stands for the same request, unless a new one may take its place."""
        manifest = proven.manifest
        same = find_same(manifest.artifact_id, manifest.content_key, self._database.dialect)
        rows = await self._database.read(same)
        return next((record_of(row) for row in rows if not self._replaceable(row)), None)

    def _replaceable(self, row: KernelRow) -> bool:
        return not is_sound(row) or self._outdated(row)

    def _outdated(self, row: KernelRow) -> bool:
        return not self._trusts(row.key_id)

    def _trusts(self, key_id: str) -> bool:
        return self._key_ring is None or key_id in self._key_ring

    async def _write_and_insert(
        self, blobs: Blobs, proven: ProvenKernel, row: KernelRow, payload: bytes
    ) -> tuple[KernelRecord, bool]:
        """Write the bytes outside before any row names them; until then they are loose, and swept if we die."""
        async with self._database.session() as session:
            await self._require_room(session, len(payload))
            session.add(LooseBlobRow(copy_id=row.copy_id, loose_since_us=self._clock()))
        try:
            await blobs.write(row.copy_id, payload)
            record, created = await self._insert(proven, row, payload)
        except Exception:
            await self.discard(row.copy_id)
            raise
        if not created:
            await self.discard(row.copy_id)
        return record, created

    async def _insert(self, proven: ProvenKernel, row: KernelRow, payload: bytes) -> tuple[KernelRecord, bool]:
        replaced: list[KernelRow] = []
        async with self._database.session() as session:
            for old in (await session.scalars(_same_request(proven))).all():
                if not self._replaceable(old):
                    return record_of(old), False
                await delete_copy(session, old, now_us=self._clock())
                replaced.append(old)
            await self._require_room(session, len(payload))
            session.add(row)
            await session.flush()
            if row.outside:
                await _claim(session, row.copy_id)
            else:
                await write_pieces(self._database, session, row.artifact_id, payload)
            record = record_of(row)
        for old in replaced:
            log.warning("kernel_replaced", extra={"artifact_id": repr(old.artifact_id), "sound": is_sound(old)})
            if old.outside:
                await self.discard(old.copy_id)
        gone = {old.artifact_id for old in replaced if ARTIFACT_ID.fullmatch(old.artifact_id)} - {record.artifact_id}
        await self.tell_withdrawn(sorted(gone), "replaced in the library")
        log.info("kernel_stored", extra={"artifact_id": record.artifact_id, "size_bytes": record.size_bytes})
        return record, True

    async def _require_room(self, session: AsyncSession, num_bytes: int) -> None:
        held = await session.scalar(select(func.coalesce(func.sum(KernelRow.size_bytes), 0)))
        if int(held or 0) + num_bytes > self._limits.max_stored_bytes:
            raise CapacityExceededError(
                f"the library must hold at most {self._limits.max_stored_bytes} bytes of kernels, got {num_bytes} "
                f"bytes beyond the {held} it holds",
                parameter="max_stored_bytes",
            )


def _named(artifact_id: str, content_key: str) -> tuple[str, str]:
    """Give the column by which a kernel is asked for, and the value, which keeps its rule."""
    if bool(artifact_id) == bool(content_key):
        raise InvalidInputError.of("key", "be exactly one of artifact_id and content_key", "both or neither")
    if artifact_id:
        return "artifact_id", require_artifact_id("artifact_id", artifact_id)
    require_content_id("content_key", content_key)
    return "content_key", content_key


def _with_counts(
    column: str, wanted: str, dialect: str
) -> ReadScript[tuple[KernelRow | None, KernelStatistics | None]]:
    row = yield from find_row(column, wanted, dialect)
    if row is None or not ARTIFACT_ID.fullmatch(row.artifact_id):  # the row's own rot: nothing is counted for that
        return row, None
    return row, (yield from read_kernel_statistics(row.artifact_id))


def _chunk(row: KernelRow, place: int, data: bytes, crc32: int) -> Chunk:
    return Chunk(total_bytes=row.size_bytes, sha256=row.sha256, offset=place, data=data, crc32=crc32)


def _unknown(parameter: str, value: str) -> NotFoundError:
    return NotFoundError(f"{parameter} must name a stored kernel, got {value!r}", parameter=parameter)


def _gone(row: KernelRow) -> NotFoundError:
    return NotFoundError(
        f"artifact_id must name a stored kernel, {row.artifact_id} was removed or replaced while it was read",
        parameter="artifact_id",
    )


async def _claim(session: AsyncSession, copy_id: str) -> None:
    """Have a row name bytes outside that were loose until now."""
    claimed = await session.execute(
        delete(LooseBlobRow).where(LooseBlobRow.copy_id == copy_id).returning(LooseBlobRow.copy_id)
    )
    if claimed.first() is None:
        raise UnavailableError("writing a kernel's bytes outside took so long that a sweep took them; try again")


def _same_request(proven: ProvenKernel) -> Select[KernelRow]:
    manifest = proven.manifest
    same_id = KernelRow.artifact_id == manifest.artifact_id
    return select(KernelRow).where(same_id | (KernelRow.content_key == manifest.content_key))


def _newest_first(blueprint_id: str) -> Select[KernelRow]:
    statement = select(KernelRow)
    if blueprint_id:
        statement = statement.where(KernelRow.blueprint_id == blueprint_id)
    return statement.order_by(KernelRow.stored_at_us.desc(), KernelRow.artifact_id.desc())


def _row(proven: ProvenKernel, payload: bytes, sha256: bytes, *, outside: bool, stored_at_us: int) -> KernelRow:
    manifest = proven.manifest
    row = KernelRow(
        artifact_id=manifest.artifact_id,
        content_key=manifest.content_key,
        blueprint_id=manifest.blueprint_id,
        manifest=proven.artifact.manifest,
        key_id=proven.artifact.key_id,
        size_bytes=len(payload),
        sha256=sha256,
        stored_at_us=stored_at_us,
        copy_id=secrets.token_hex(16),
        outside=int(outside),
        piece_crcs=crcs_of(payload) if outside else b"",
        use_key=use_key(proven.artifact.manifest),
    )
    row.row_sha256 = row_digest(row)
    return row

"""Uploads that are not complete: their pieces so far, so that a broken one goes on, and for so long."""

from __future__ import annotations

import asyncio
import logging
import zlib
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, Final, TypeVar

from sqlalchemy import delete, func, select, update
from sqlalchemy.exc import IntegrityError

from esper.contracts.chunks import MAX_CHUNK_BYTES, Chunk
from esper.contracts.errors import EsperError, InvalidStateError
from esper.mesh.database import Database
from esper.mesh.driver_reads import ReadScript, Statement
from esper.services.urza.clock import now_us
from esper.services.urza.models import UploadPieceRow, UploadRow

log = logging.getLogger(__name__)

T = TypeVar("T")

PIECE_BYTES: Final = MAX_CHUNK_BYTES
"""Size of a kept piece, in bytes; an upload goes on at a multiple of it, and a smaller one is not kept at all."""


KEEP_AFTER_S: Final = 0.2
"""How long a piece waits before it is written, in seconds; an upload that is done by then writes none."""


class UploadStore:
    """Pieces of uploads under way, by the digest of the whole. Safe for many tasks of one event loop."""

    def __init__(self, database: Database, *, max_bytes: int, clock: Callable[[], int] = now_us) -> None:
        self._database = database
        self._max_bytes = max_bytes
        self._clock = clock
        self._writing: set[asyncio.Task[Any]] = set()
        self._under_way: dict[str, set[UploadKeeper]] = {}

    def keeper(self, sha256: bytes, total_bytes: int) -> UploadKeeper:
        """Give what keeps the pieces of one upload as they come; whoever takes it must leave it."""
        keeper = UploadKeeper(self, sha256, total_bytes)
        self._under_way.setdefault(sha256.hex(), set()).add(keeper)
        return keeper

    async def held_bytes(self, sha256: bytes, total_bytes: int) -> int:
        """Give how many bytes are kept of a whole, from its start; a multiple of `PIECE_BYTES`.

        What came of it through this process, and waits to be written, is written first.
        """
        for keeper in tuple(self._under_way.get(sha256.hex(), ())):
            await keeper.settle()
        return await self._database.read(_held_bytes(sha256.hex(), total_bytes))

    async def pieces(self, sha256: bytes, total_bytes: int, until: int) -> AsyncIterator[Chunk]:
        """Give the kept pieces up to an offset, in order.

        Raises:
            InvalidStateError: So much is not kept, or a piece is damaged; in both cases, ask again how much is. What
                is damaged is dropped.
        """
        held = await self.held_bytes(sha256, total_bytes)
        if until > held or until % PIECE_BYTES:
            raise InvalidStateError(
                f"offset must be a multiple of {PIECE_BYTES} and at most {held}, the bytes kept of this upload, got "
                f"{until}",
                parameter="offset",
            )
        for index in range(until // PIECE_BYTES):
            async with self._database.reading() as session:
                row = await session.get(UploadPieceRow, (sha256.hex(), index))
            if row is None or len(row.data) != PIECE_BYTES or zlib.crc32(row.data) != row.crc32:
                await self.drop(sha256)
                log.error("upload_piece_corrupt", extra={"sha256": sha256.hex(), "piece_index": index})
                raise InvalidStateError(
                    f"the kept pieces of an upload must match their checksums, piece {index} does not; all were "
                    "dropped, begin anew",
                    parameter="offset",
                )
            offset = index * PIECE_BYTES
            yield Chunk(total_bytes=total_bytes, sha256=sha256, offset=offset, data=row.data, crc32=row.crc32)

    async def keep(self, sha256: bytes, total_bytes: int, offset: int, data: bytes) -> bool:
        """Keep the next piece; say whether it is kept.

        It is not where another upload of the same bytes is further or elsewhere, or no room is left. The upload itself
        goes on all the same. A piece is kept even if whoever brought it is gone before it is written.
        """
        return await asyncio.shield(self.spawn(self._keep(sha256.hex(), total_bytes, offset, data)))

    def spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run work to its end, whoever waits for it."""
        task = asyncio.create_task(work)
        self._writing.add(task)
        task.add_done_callback(self._writing.discard)
        return task

    def left(self, keeper: UploadKeeper) -> None:
        """Forget a keeper that has nothing more to write."""
        others = self._under_way.get(keeper.sha256.hex(), set())
        others.discard(keeper)
        if not others:
            self._under_way.pop(keeper.sha256.hex(), None)

    async def _keep(self, key: str, total_bytes: int, offset: int, data: bytes) -> bool:
        try:
            async with self._database.session() as session:
                others = select(func.coalesce(func.sum(UploadRow.held_bytes), 0)).where(UploadRow.sha256 != key)
                if int(await session.scalar(others) or 0) + offset + len(data) > self._max_bytes:
                    log.warning("upload_not_kept", extra={"sha256": key, "max_upload_bytes": self._max_bytes})
                    return False
                if offset == 0:
                    await session.execute(delete(UploadRow).where(UploadRow.sha256 == key))
                    fresh = UploadRow(sha256=key, total_bytes=total_bytes, held_bytes=0, touched_at_us=self._clock())
                    session.add(fresh)
                    await session.flush()
                grown = await session.execute(
                    update(UploadRow)
                    .where(UploadRow.sha256 == key, UploadRow.total_bytes == total_bytes)
                    .where(UploadRow.held_bytes == offset)
                    .values(held_bytes=offset + len(data), touched_at_us=self._clock())
                    .returning(UploadRow.held_bytes)
                )
                if grown.first() is None:
                    return False
                index = offset // PIECE_BYTES
                session.add(UploadPieceRow(sha256=key, index=index, data=data, crc32=zlib.crc32(data)))
        except IntegrityError:  # the same upload began twice at one moment; the other one keeps it
            return False
        return True

    async def drop(self, sha256: bytes) -> None:
        """Forget an upload."""
        async with self._database.session() as session:
            await session.execute(delete(UploadRow).where(UploadRow.sha256 == sha256.hex()))

    async def drop_older(self, before_us: int) -> int:
        """Forget uploads to which nothing came since a moment; say how many."""
        async with self._database.session() as session:
            gone = await session.execute(
                delete(UploadRow).where(UploadRow.touched_at_us < before_us).returning(UploadRow.sha256)
            )
            return len(gone.all())


def _held_bytes(key: str, total_bytes: int) -> ReadScript[int]:
    rows = yield Statement(
        "SELECT held_bytes FROM urza_uploads WHERE sha256 = $1 AND total_bytes = $2", (key, total_bytes)
    )
    return int(rows[0][0]) if rows else 0


class UploadKeeper:
    """Writes the pieces of one upload some time after they came, or at once when the upload breaks or is asked for.

    An upload that is over soon is stored whole and never goes on: writing its pieces, too, would double its time.
    Belongs to one event loop.
    """

    def __init__(self, store: UploadStore, sha256: bytes, total_bytes: int) -> None:
        self.sha256 = sha256
        self._store = store
        self._total_bytes = total_bytes
        self._waiting: list[tuple[int, bytes]] = []
        self._keeps = True
        self._wrote = False
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def wrote(self) -> bool:
        """Whether any piece was written, or is being written."""
        return self._wrote

    def add(self, offset: int, data: bytes) -> None:
        """Take the next piece, to be written soon."""
        if not self._keeps:
            return
        self._waiting.append((offset, data))
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(KEEP_AFTER_S, self._begin)

    async def settle(self) -> None:
        """Return when everything taken so far is written, or cannot be."""
        self._begin()
        if self._task is not None:
            await asyncio.shield(self._task)

    async def forget(self) -> None:
        """Write nothing more; returns when nothing is being written."""
        self._waiting.clear()
        self._keeps = False
        await self.settle()

    def leave(self) -> None:
        """Take nothing more; what waits is written, whoever is still there."""
        self._begin()
        if self._task is None or self._task.done():
            self._store.left(self)
        else:
            self._task.add_done_callback(lambda _: self._store.left(self))

    def _begin(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._waiting and (self._task is None or self._task.done()):
            self._wrote = True
            self._task = self._store.spawn(self._write())

    async def _write(self) -> None:
        while self._waiting:
            offset, data = self._waiting.pop(0)
            try:
                kept = await self._store.keep(self.sha256, self._total_bytes, offset, data)
            except EsperError as error:
                log.warning("upload_not_kept", extra={"sha256": self.sha256.hex(), "error": str(error)})
                kept = False
            if not kept:
                self._keeps = False
                self._waiting.clear()

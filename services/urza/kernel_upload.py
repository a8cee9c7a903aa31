"""One kernel on its way in: begun or gone on with, kept piece by piece, stored once it is whole and proven."""

from __future__ import annotations

import asyncio
from typing import Final

from esper.contracts.chunks import SHA256_BYTES, Assembler, Chunk, ChunkLike
from esper.contracts.errors import CapacityExceededError, CorruptDataError, InvalidInputError
from esper.services.urza.kernel_rows import KernelRecord
from esper.services.urza.store import UrzaStore
from esper.services.urza.upload_store import PIECE_BYTES, UploadKeeper

_EMPTY_CRC32: Final = 0
_WORTH_A_THREAD_BYTES: Final = 128 * 1024
"""Size from which the checks of a chunk run beside the event loop, in bytes; a hop takes as long as 64 KiB do."""


class UploadBudget:
    """Bytes that uploads under way may hold together, so that many of them at once cannot fill the memory.

    Belongs to one event loop.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._held_bytes = 0

    @property
    def held_bytes(self) -> int:
        """Bytes set aside now."""
        return self._held_bytes

    def take(self, num_bytes: int) -> None:
        """Set bytes aside.

        Raises:
            CapacityExceededError: Uploads under way hold too many already; try again later.
        """
        if self._held_bytes + num_bytes > self._max_bytes:
            raise CapacityExceededError(
                f"uploads under way must hold at most {self._max_bytes} bytes together, got {num_bytes} bytes beyond "
                f"{self._held_bytes}; retry after the hinted delay",
                parameter="total_bytes",
            )
        self._held_bytes += num_bytes

    def give_back(self, num_bytes: int) -> None:
        """Let bytes go that were set aside."""
        self._held_bytes -= num_bytes


async def progress_of(store: UrzaStore, sha256: bytes, total_bytes: int) -> tuple[int, str]:
    """Say how far the upload of a kernel got: the bytes kept, and its id once all of it is stored, else no id.

    Raises:
        InvalidInputError: The digest is none, or the size none that a kernel may have.
    """
    if len(sha256) != SHA256_BYTES:
        raise InvalidInputError.of("sha256", f"be {SHA256_BYTES} bytes", sha256)
    if total_bytes < 1:
        raise InvalidInputError.of("total_bytes", "be > 0", total_bytes)
    store.kernels.require_size(total_bytes)
    stored = await store.kernels.complete(sha256)
    if stored is not None:
        return stored.size_bytes, stored.artifact_id
    return await store.uploads.held_bytes(sha256, total_bytes), ""


def _taken(chunk: ChunkLike) -> Chunk:
    """Give a chunk that holds its bytes; a message copies them out every time that it is asked."""
    if isinstance(chunk, Chunk):
        return chunk
    return Chunk(
        total_bytes=chunk.total_bytes, sha256=chunk.sha256, offset=chunk.offset, data=chunk.data, crc32=chunk.crc32
    )


class KernelUpload:
    """Takes the chunks of one upload in order; `close` it, however it ends."""

    def __init__(self, store: UrzaStore, budget: UploadBudget) -> None:
        self._store = store
        self._budget = budget
        self._assembler = Assembler(max_bytes=store.kernels.max_kernel_bytes)
        self._sha256 = b""
        self._set_aside = 0
        self._pending = bytearray()
        self._keeper: UploadKeeper | None = None
        self._goes_on = False

    async def add(self, chunk: ChunkLike) -> None:
        """Take the next chunk; the first says what is uploaded, and where it goes on.

        Raises:
            InvalidInputError: The first chunk names no size, no digest or more bytes than a kernel may have, or a
                chunk is too large.
            InvalidStateError: The first chunk goes on further than is kept.
            CapacityExceededError: Too much is under way.
            CorruptDataError: The chunk is out of place, does not match its checksum, or goes beyond the whole.
        """
        if self._assembler.total_bytes is None:
            await self._begin(chunk)
        taken = _taken(chunk)
        if len(taken.data) < _WORTH_A_THREAD_BYTES:
            self._assembler.add(taken)
        else:
            await asyncio.to_thread(self._assembler.add, taken)
        if self._keeper is not None:
            self._keep(self._keeper, taken.data)

    async def finish(self) -> tuple[KernelRecord, bool]:
        """Store the kernel once it is whole and proven; say whether it was new.

        Raises:
            CorruptDataError: Bytes are missing, or a digest or signature does not hold. Nothing is stored, and what
                was kept of bytes that were all there and refused is dropped.
            CapacityExceededError: The library holds as many bytes as it may.
        """
        try:
            payload = await asyncio.to_thread(self._assembler.finish)
            stored = await self._store.kernels.put(payload, sha256=self._sha256)
        except CorruptDataError:
            if self._assembler.complete:
                await self._forget()
            raise
        await self._forget()
        return stored

    def close(self) -> None:
        """Give back the memory that was set aside; what came of an upload that broke is kept."""
        if self._keeper is not None:
            self._keeper.leave()
            self._keeper = None
        self._budget.give_back(self._set_aside)
        self._set_aside = 0

    async def _begin(self, first: ChunkLike) -> None:
        # Size and digest are judged before a byte is held.
        self._store.kernels.require_size(first.total_bytes)
        self._assembler.add(
            Chunk(total_bytes=first.total_bytes, sha256=first.sha256, offset=0, data=b"", crc32=_EMPTY_CRC32)
        )
        self._budget.take(first.total_bytes)
        self._set_aside = first.total_bytes
        self._sha256 = bytes(first.sha256)
        if first.total_bytes > PIECE_BYTES:
            self._keeper = self._store.uploads.keeper(self._sha256, first.total_bytes)
        if first.offset:
            self._goes_on = True
            async for piece in self._store.uploads.pieces(self._sha256, first.total_bytes, first.offset):
                self._assembler.add(piece)

    def _keep(self, keeper: UploadKeeper, data: bytes) -> None:
        """Have every full piece kept, so that a broken upload, or a killed library, loses little."""
        if not self._pending and len(data) == PIECE_BYTES:
            keeper.add(self._assembler.offset - PIECE_BYTES, data)
            return
        self._pending += data
        while len(self._pending) >= PIECE_BYTES:
            keeper.add(self._assembler.offset - len(self._pending), bytes(self._pending[:PIECE_BYTES]))
            del self._pending[:PIECE_BYTES]

    async def _forget(self) -> None:
        """Drop what was kept, by us or, where we went on, by an earlier one."""
        if self._keeper is None:
            return
        await self._keeper.forget()
        if (
            self._goes_on
            or self._keeper.wrote
            or await self._store.uploads.held_bytes(self._sha256, self._assembler.total_bytes or 0)
        ):
            await self._store.uploads.drop(self._sha256)

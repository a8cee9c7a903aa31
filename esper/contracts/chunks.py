"""Large payloads as checksummed chunks: cut by the sender, put together and proven by the receiver.

Every chunk names its place, the size and SHA-256 of the whole, and the CRC-32 of its own bytes, so that damage shows at
the chunk where it happened and nothing is used before the whole has been proven. ``UploadKernelRequest`` and
``DownloadKernelResponse`` both have these fields; any object that has them will do.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Protocol

from esper.contracts.errors import CapacityExceededError, CorruptDataError, InvalidInputError

DOWNLOAD_CHUNK_BYTES: Final = 256 * 1024
"""Size of the chunks that a library sends and keeps, in bytes."""

MAX_CHUNK_BYTES: Final = 1024 * 1024
"""Largest chunk that a receiver takes, in bytes."""

SHA256_BYTES: Final = 32
"""Size of a SHA-256 digest, in bytes."""


class ChunkLike(Protocol):
    """What a chunk says, on the wire or off it."""

    @property
    def total_bytes(self) -> int:
        """Size of the whole, in bytes."""

    @property
    def sha256(self) -> bytes:
        """SHA-256 of the whole."""

    @property
    def offset(self) -> int:
        """Place of the first byte in the whole."""

    @property
    def data(self) -> bytes:
        """The bytes."""

    @property
    def crc32(self) -> int:
        """CRC-32 of ``data``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """One piece of a payload."""

    total_bytes: int
    """Size of the whole, in bytes."""
    sha256: bytes
    """SHA-256 of the whole, 32 bytes."""
    offset: int
    """Place of the first byte in the whole."""
    data: bytes
    """The bytes."""
    crc32: int
    """CRC-32 of ``data``."""


def split(
    payload: bytes, *, chunk_bytes: int = DOWNLOAD_CHUNK_BYTES, offset: int = 0, sha256: bytes = b""
) -> Iterator[Chunk]:
    """Give the chunks of ``payload`` from ``offset`` on, in order; one empty chunk when nothing is left to send.

    ``sha256`` is the digest of the payload where the caller has it already, which spares a millisecond for each MB.

    Raises:
        InvalidInputError: ``chunk_bytes`` is not within [1, ``MAX_CHUNK_BYTES``], or ``offset`` not within the payload.
    """
    if not 1 <= chunk_bytes <= MAX_CHUNK_BYTES:
        raise InvalidInputError.of("chunk_bytes", f"be within [1, {MAX_CHUNK_BYTES}] bytes", chunk_bytes)
    if not 0 <= offset <= len(payload):
        raise InvalidInputError.of("offset", f"be within [0, {len(payload)}] bytes", offset)
    return _pieces(payload, chunk_bytes, offset, sha256)


def _pieces(payload: bytes, chunk_bytes: int, offset: int, known_sha256: bytes) -> Iterator[Chunk]:
    sha256 = known_sha256 or hashlib.sha256(payload).digest()
    for start in range(offset, len(payload), chunk_bytes) or (offset,):
        data = payload[start : start + chunk_bytes]
        yield Chunk(total_bytes=len(payload), sha256=sha256, offset=start, data=data, crc32=zlib.crc32(data))


class Assembler:
    """Takes chunks in order and gives the payload once it is whole and proven; holds at most ``max_bytes``.

    Survives a broken transfer: what arrived stays, and `offset` is where the next attempt has to begin.
    Not thread-safe.
    """

    def __init__(self, *, max_bytes: int, max_chunk_bytes: int = MAX_CHUNK_BYTES) -> None:
        if max_bytes < 0:
            raise InvalidInputError.of("max_bytes", "be >= 0 bytes", max_bytes)
        self._max_bytes = max_bytes
        self._max_chunk_bytes = max_chunk_bytes
        self._held: list[bytes] = []
        self._held_bytes = 0
        self._total_bytes: int | None = None
        self._sha256 = b""
        self._digest = hashlib.sha256()

    @property
    def offset(self) -> int:
        """Bytes held so far; the offset that the next chunk must have."""
        return self._held_bytes

    @property
    def total_bytes(self) -> int | None:
        """Size of the whole as the first chunk gave it; ``None`` before that."""
        return self._total_bytes

    @property
    def complete(self) -> bool:
        """Whether as many bytes are here as were announced."""
        return self._total_bytes is not None and self._held_bytes == self._total_bytes

    def add(self, chunk: ChunkLike) -> None:
        """Take the next chunk.

        Raises:
            InvalidInputError: The first chunk names no size or no digest, or a chunk is too large.
            CapacityExceededError: The whole would be larger than ``max_bytes``.
            CorruptDataError: The chunk is out of place, does not match its checksum, or goes beyond the whole.
        """
        if self._total_bytes is None:
            self._begin(chunk)
        assert self._total_bytes is not None
        data = chunk.data  # once: a message copies its bytes out every time
        if len(data) > self._max_chunk_bytes:
            raise InvalidInputError(
                f"data must be at most {self._max_chunk_bytes} bytes a chunk, got {len(data)} bytes",
                parameter="data",
            )
        if chunk.offset != self._held_bytes:
            raise CorruptDataError(
                f"offset must be {self._held_bytes}, where the chunk before ended, got {chunk.offset}",
                parameter="offset",
            )
        if zlib.crc32(data) != chunk.crc32:
            raise CorruptDataError(f"crc32 must match the data of the chunk at offset {chunk.offset}, it does not")
        if self._held_bytes + len(data) > self._total_bytes:
            raise CorruptDataError(
                f"the chunks must hold {self._total_bytes} bytes as announced, got more at offset {chunk.offset}"
            )
        self._held.append(data)
        self._held_bytes += len(data)
        self._digest.update(data)  # while the next chunk is on its way

    def finish(self) -> bytes:
        """Give the payload, proven against its digest.

        Raises:
            CorruptDataError: Bytes are missing, or the digest does not hold.
        """
        if self._total_bytes is None or self._held_bytes != self._total_bytes:
            announced = "an unknown number of" if self._total_bytes is None else self._total_bytes
            raise CorruptDataError(f"the chunks must hold {announced} bytes as announced, got {self._held_bytes}")
        if self._digest.digest() != self._sha256:
            raise CorruptDataError(
                f"sha256 must match the {self._held_bytes} bytes of the whole, it does not", parameter="sha256"
            )
        return b"".join(self._held)

    def _begin(self, chunk: ChunkLike) -> None:
        if chunk.total_bytes < 1:
            raise InvalidInputError.of("total_bytes", "be > 0 in the first chunk", chunk.total_bytes)
        if len(chunk.sha256) != SHA256_BYTES:
            raise InvalidInputError.of("sha256", f"be {SHA256_BYTES} bytes in the first chunk", chunk.sha256)
        if chunk.total_bytes > self._max_bytes:
            raise CapacityExceededError(
                f"total_bytes must be at most {self._max_bytes} bytes, got {chunk.total_bytes}",
                parameter="total_bytes",
            )
        self._total_bytes = chunk.total_bytes
        self._sha256 = bytes(chunk.sha256)

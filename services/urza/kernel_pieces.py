"""The bytes of a kernel as they lie in the database: pieces of one size, each beside its checksum."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from typing import Final

from sqlalchemy import delete
from sqlalchemy.ext.asyncio import AsyncSession

from esper.contracts.chunks import DOWNLOAD_CHUNK_BYTES
from esper.mesh.database import Database
from esper.mesh.driver_reads import ReadScript, Statement
from esper.services.urza.models import KernelChunkRow, KernelRow

PIECE_BYTES: Final = DOWNLOAD_CHUNK_BYTES
"""Size of every stored piece but the last, in bytes."""
_CRC_BYTES: Final = 4

Piece = tuple[bytes, int]
"""Bytes of one stored piece, and the checksum beside them."""

_INSERT: Final = "INSERT INTO urza_kernel_chunks (artifact_id, chunk_index, data, crc32) VALUES ($1, $2, $3, $4)"


async def write_pieces(database: Database, session: AsyncSession, artifact_id: str, payload: bytes) -> None:
    """Store the pieces of a kernel whose row the transaction holds."""
    # Pieces of a row whose id has rotted are still there under the right one.
    await session.execute(delete(KernelChunkRow).where(KernelChunkRow.artifact_id == artifact_id))
    rows = ((artifact_id, index, piece, zlib.crc32(piece)) for index, piece in enumerate(_cut(payload)))
    await database.write_rows(session, _INSERT, rows)


def crcs_of(payload: bytes) -> bytes:
    """Give the checksums of all pieces, for a kernel whose bytes rest outside."""
    return b"".join(zlib.crc32(piece).to_bytes(_CRC_BYTES, "big") for piece in _cut(payload))


def find_pieces(row: KernelRow, index: int, end: int) -> ReadScript[Sequence[Piece | None] | None]:
    """Give the pieces within [index, end) of a copy, ``None`` for one that does not hold; ``None`` where it is gone."""
    rows = yield Statement(
        "SELECT c.chunk_index, c.data, c.crc32 FROM urza_kernels k LEFT JOIN urza_kernel_chunks c "
        "ON c.artifact_id = k.artifact_id AND c.chunk_index >= $4 AND c.chunk_index < $5 "
        "WHERE k.artifact_id = $1 AND k.copy_id = $2 AND k.row_sha256 = $3 ORDER BY c.chunk_index",
        (row.artifact_id, row.copy_id, row.row_sha256, index, end),
    )
    if not rows:
        return None
    found = {place: (data, crc32) for place, data, crc32 in rows}
    return [_sound(row, number, *found.get(number, (None, None))) for number in range(index, end)]


def pieces_of(row: KernelRow, index: int, end: int, data: bytes) -> Sequence[Piece | None]:
    """Give the pieces within [index, end) of a copy outside from its bytes, ``None`` for one that does not hold."""
    return [
        _sound(
            row,
            number,
            data[(number - index) * PIECE_BYTES : (number - index + 1) * PIECE_BYTES],
            int.from_bytes(row.piece_crcs[number * _CRC_BYTES : (number + 1) * _CRC_BYTES], "big"),
        )
        for number in range(index, end)
    ]


def _sound(row: KernelRow, number: int, data: object, crc32: object) -> Piece | None:
    """Give a piece back when it is what was written; SQLite gives rot of any type."""
    length = min(PIECE_BYTES, row.size_bytes - number * PIECE_BYTES)
    if isinstance(data, bytes) and isinstance(crc32, int) and len(data) == length and zlib.crc32(data) == crc32:
        return data, crc32
    return None


def _cut(payload: bytes) -> Iterator[memoryview]:
    """Give the pieces, none copied: fresh pages of memory cost more than the checksums."""
    whole = memoryview(payload)
    return (whole[start : start + PIECE_BYTES] for start in range(0, len(payload), PIECE_BYTES))

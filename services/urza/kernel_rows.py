"""What holds a kernel's row together: the digest over its columns, and what it is a kernel for."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Final

from sqlalchemy import ColumnElement, and_, delete, true
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import InstrumentedAttribute

from esper.mesh.driver_reads import ReadScript, Row, Statement
from esper.services.urza.byte_text import ROTTEN, ByteText, as_bytes
from esper.services.urza.clock import moment_of
from esper.services.urza.models import KernelChunkRow, KernelRow, LooseBlobRow
from esper.services.urza.rules import ARTIFACT_ID
from esper.v1 import kernel_pb2

_SEALED: Final = (
    *("artifact_id", "content_key", "blueprint_id", "manifest", "key_id", "size_bytes", "sha256", "stored_at_us"),
    *("copy_id", "outside", "piece_crcs", "use_key"),
)
"""Columns under the digest, in its order; migrations have their own copy."""

_COLUMNS: Final = (*_SEALED, "row_sha256")
_TEXTS: Final = frozenset(name for name in _COLUMNS if isinstance(KernelRow.__table__.c[name].type, ByteText))

COPY_ID: Final = re.compile(r"[0-9a-f]{32}", re.ASCII)
"""Every copy's id; nothing that matches can be read as a path."""


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


@dataclass(frozen=True, kw_only=True, slots=True)
class StandingKernel:
    """What there is to know of a stored kernel to somebody who has read its manifest before."""

    manifest_sha256: bytes
    """Digest of the serialised manifest."""
    key_id: str
    """Id of the signing key."""
    size_bytes: int
    """Size of the serialised artefact, in bytes."""


def row_digest(row: KernelRow) -> bytes:
    """Give the SHA-256 over every column of a row but the digest itself, whatever became of their values."""
    return _digest_of(getattr(row, name) for name in _SEALED)


def _digest_of(sealed: Iterable[object]) -> bytes:
    digest = hashlib.sha256(b"esper-kernel-row-v1\n")
    for value in sealed:
        data = value if isinstance(value, bytes) else str(value).encode("utf-8", ROTTEN)
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.digest()


def is_sound(row: KernelRow) -> bool:
    """Tell whether a row is as it was written."""
    return row.row_sha256 == row_digest(row)


def use_key(manifest: bytes) -> str:
    """Give what a kernel is for: equal for one blueprint, site, target, device and purpose, whatever made it."""
    said = kernel_pb2.KernelManifest.FromString(manifest)
    what = f"{said.blueprint_id}|{said.target}|{said.device}|{bool(said.optimizations)}|"
    return hashlib.sha256(what.encode() + said.site.SerializeToString(deterministic=True)).hexdigest()


def find_row(column: str, wanted: str, dialect: str) -> ReadScript[KernelRow | None]:
    """Give the row in which a column of text has a value, whatever became of its other columns."""
    rows = yield from find_rows(column, wanted, dialect)
    return rows[0] if rows else None


def find_rows(column: str, wanted: str | bytes, dialect: str) -> ReadScript[list[KernelRow]]:
    """Give all rows in which a column has a value, whatever became of their other columns."""
    rows = yield Statement(_select(column, dialect), (wanted,))
    return [_row_of(row) for row in rows]


def find_same(artifact_id: str, content_key: str, dialect: str) -> ReadScript[list[KernelRow]]:
    """Give the rows that stand for one request: those of its kernel's id, and those of its content key."""
    by_id = yield from find_rows("artifact_id", artifact_id, dialect)
    return by_id + (yield from find_rows("content_key", content_key, dialect))


def find_standing(column: str, wanted: str, dialect: str) -> ReadScript[StandingKernel | None]:
    """Give what there is to know of a kernel that its reader knows; ``None`` where its row is gone or not sound."""
    rows = yield Statement(_select(column, dialect), (wanted,))
    if not rows:
        return None
    *sealed, row_sha256 = rows[0]
    if _digest_of(sealed) != row_sha256:
        return None
    values = dict(zip(_SEALED, sealed, strict=True))
    return StandingKernel(
        manifest_sha256=hashlib.sha256(values["manifest"]).digest(),
        key_id=values["key_id"].decode(),
        size_bytes=values["size_bytes"],
    )


def _row_of(found: Row) -> KernelRow:
    values = dict(zip(_COLUMNS, found, strict=True))
    for name in _TEXTS:
        if isinstance(values[name], bytes):
            values[name] = values[name].decode("utf-8", ROTTEN)
    return KernelRow(**values)


@lru_cache(maxsize=8)
def _select(column: str, dialect: str) -> str:
    """Give the text by which all columns of a row are read, those of text as bytes."""
    text = "CAST({} AS BLOB)" if dialect == "sqlite" else "convert_to({}, 'UTF8')"
    columns = ", ".join(text.format(name) if name in _TEXTS else name for name in _COLUMNS)
    return f"SELECT {columns} FROM urza_kernels WHERE {column} = $1"  # noqa: S608


def record_of(row: KernelRow) -> KernelRecord:
    """Give what is said of a kernel by a row that `is_sound`."""
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


def this_copy(row: KernelRow) -> ColumnElement[bool]:
    """Give the condition for the very copy that a row spoke of when it was read, be it rotten."""
    return and_(
        _equals(KernelRow.artifact_id, row.artifact_id),
        _equals(KernelRow.copy_id, row.copy_id),
        KernelRow.row_sha256 == row.row_sha256,
    )


async def delete_copy(
    session: AsyncSession, row: KernelRow, *, now_us: int, provided: ColumnElement[bool] | None = None
) -> bool:
    """Remove the very copy that a row spoke of when it was read, never one stored since; say whether it was there.

    With ``provided``, only while that holds, too.

    Bytes outside become loose; whoever calls deletes them after the transaction, or the next sweep does.
    """
    gone = await session.execute(
        delete(KernelRow)
        .where(this_copy(row), true() if provided is None else provided)
        .returning(KernelRow.size_bytes)
        .execution_options(synchronize_session=False)  # the row may be too rotten to be compared in Python
    )
    if gone.first() is None:
        return False
    if ARTIFACT_ID.fullmatch(row.artifact_id):
        await session.execute(delete(KernelChunkRow).where(KernelChunkRow.artifact_id == row.artifact_id))
    if row.outside and COPY_ID.fullmatch(row.copy_id):
        await session.merge(LooseBlobRow(copy_id=row.copy_id, loose_since_us=now_us))
    if row in session:
        session.expunge(row)
    return True


def _equals(column: InstrumentedAttribute[str], value: str) -> ColumnElement[bool]:
    # Rotten text can be compared by its bytes alone, which no index helps with.
    return column == value if value.isascii() else as_bytes(column) == value.encode("utf-8", ROTTEN)

"""Kernels under a digest of their row, with copies outside, pins and uses; uploads that go on; reports by kernel."""

from __future__ import annotations

import hashlib
import secrets
from typing import Any

import sqlalchemy as sa
from alembic import op
from google.protobuf.message import DecodeError

from esper.v1 import kernel_pb2, telemetry_pb2

revision = "r0005"
down_revision = "r0004"
branch_labels = None
depends_on = None

_BATCH = 200
_SEALED = (
    *("artifact_id", "content_key", "blueprint_id", "manifest", "key_id", "size_bytes", "sha256", "stored_at_us"),
    *("copy_id", "outside", "piece_crcs", "use_key"),
)


def _text(length: int) -> sa.String:
    return sa.String(length).with_variant(sa.String(length, collation="C"), "postgresql")


_KERNELS = sa.table(
    "urza_kernels",
    *(sa.column(name, sa.String) for name in ("artifact_id", "content_key", "blueprint_id", "key_id")),
    *(sa.column(name, sa.LargeBinary) for name in ("manifest", "sha256", "piece_crcs", "row_sha256")),
    *(sa.column(name, sa.BigInteger) for name in ("size_bytes", "stored_at_us", "outside")),
    *(sa.column(name, sa.String) for name in ("copy_id", "use_key")),
)
_REPORTS = sa.table(
    "urza_field_reports",
    sa.column("report_id", sa.String),
    sa.column("artifact_id", sa.String),
    sa.column("report", sa.LargeBinary),
)


def upgrade() -> None:
    op.add_column("urza_kernels", sa.Column("copy_id", _text(32), nullable=False, server_default=""))
    op.add_column("urza_kernels", sa.Column("outside", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("urza_kernels", sa.Column("piece_crcs", sa.LargeBinary(), nullable=False, server_default=""))
    op.add_column("urza_kernels", sa.Column("use_key", _text(64), nullable=False, server_default=""))
    op.add_column("urza_kernels", sa.Column("row_sha256", sa.LargeBinary(), nullable=False, server_default=""))
    op.add_column("urza_field_reports", sa.Column("artifact_id", _text(33), nullable=False, server_default=""))
    _seal_kernels()
    _name_kernels_of_reports()
    op.create_index("ix_urza_kernels_use_key", "urza_kernels", ["use_key"])
    op.create_index("ix_urza_kernels_sha256", "urza_kernels", ["sha256"])
    op.create_index("ix_urza_field_reports_artifact_id", "urza_field_reports", ["artifact_id"])
    op.create_index("ix_urza_field_reports_recorded_at_us", "urza_field_reports", ["recorded_at_us"])
    _create_tables()


def _create_tables() -> None:
    op.create_table(
        "urza_kernel_pins",
        sa.Column("artifact_id", _text(33), nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("pinned_at_us", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("artifact_id"),
    )
    op.create_table(
        "urza_loose_blobs",
        sa.Column("copy_id", _text(32), nullable=False),
        sa.Column("loose_since_us", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("copy_id"),
    )
    op.create_table(
        "urza_uploads",
        sa.Column("sha256", _text(64), nullable=False),
        sa.Column("total_bytes", sa.BigInteger(), nullable=False),
        sa.Column("held_bytes", sa.BigInteger(), nullable=False),
        sa.Column("touched_at_us", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("sha256"),
    )
    op.create_table(
        "urza_upload_pieces",
        sa.Column("sha256", _text(64), nullable=False),
        sa.Column("piece_index", sa.Integer(), nullable=False),
        sa.Column("data", sa.LargeBinary(), nullable=False),
        sa.Column("crc32", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("sha256", "piece_index"),
        sa.ForeignKeyConstraint(["sha256"], ["urza_uploads.sha256"], ondelete="CASCADE"),
    )


def downgrade() -> None:
    op.drop_table("urza_upload_pieces")
    op.drop_table("urza_uploads")
    op.drop_table("urza_loose_blobs")
    op.drop_table("urza_kernel_pins")
    # The earlier form has no place for bytes outside; such kernels can be built again.
    op.execute("DELETE FROM urza_kernels WHERE outside <> 0")
    op.drop_index("ix_urza_field_reports_recorded_at_us", "urza_field_reports")
    op.drop_index("ix_urza_field_reports_artifact_id", "urza_field_reports")
    op.drop_index("ix_urza_kernels_sha256", "urza_kernels")
    op.drop_index("ix_urza_kernels_use_key", "urza_kernels")
    op.drop_column("urza_field_reports", "artifact_id")
    for name in ("row_sha256", "use_key", "piece_crcs", "outside", "copy_id"):
        op.drop_column("urza_kernels", name)


def _seal_kernels() -> None:
    """Put every kernel under a digest whose columns say what its manifest says; the others are found when read."""
    connection = op.get_bind()
    columns = [_bytes_of(column) if isinstance(column.type, sa.String) else column for column in _KERNELS.c]
    after = b""
    while True:
        place = _bytes_of(_KERNELS.c.artifact_id)
        statement = sa.select(*columns).where(place > after).order_by(place).limit(_BATCH)
        rows = connection.execute(statement).all()
        for row in rows:
            values: dict[str, Any] = dict(zip((column.name for column in _KERNELS.c), row, strict=True))
            sealed = _sealed(values)
            if sealed:
                where = _bytes_of(_KERNELS.c.artifact_id) == values["artifact_id"]
                connection.execute(sa.update(_KERNELS).where(where).values(**sealed))
        if len(rows) < _BATCH:
            return
        after = rows[-1][0]


def _sealed(values: dict[str, Any]) -> dict[str, Any]:
    try:
        manifest = kernel_pb2.KernelManifest.FromString(values["manifest"])
    except DecodeError:
        return {}
    said = tuple(getattr(manifest, name).encode() for name in ("artifact_id", "content_key", "blueprint_id"))
    if said != tuple(values[name] for name in ("artifact_id", "content_key", "blueprint_id")):
        return {}
    added = {"copy_id": secrets.token_hex(16), "outside": 0, "piece_crcs": b"", "use_key": _use_key(manifest)}
    digest = hashlib.sha256(b"esper-kernel-row-v1\n")
    for name in _SEALED:
        value = (values | added)[name]
        data = value if isinstance(value, bytes) else str(value).encode()
        digest.update(len(data).to_bytes(8, "big") + data)
    return added | {"row_sha256": digest.digest()}


def _use_key(manifest: Any) -> str:
    what = f"{manifest.blueprint_id}|{manifest.target}|{manifest.device}|{bool(manifest.optimizations)}|"
    return hashlib.sha256(what.encode() + manifest.site.SerializeToString(deterministic=True)).hexdigest()


def _name_kernels_of_reports() -> None:
    connection = op.get_bind()
    after = ""
    while True:
        found = sa.select(_REPORTS.c.report_id, _REPORTS.c.report).where(_REPORTS.c.report_id > after)
        rows = connection.execute(found.order_by(_REPORTS.c.report_id).limit(_BATCH)).all()
        for report_id, report in rows:
            artifact_id = telemetry_pb2.FieldReport.FromString(report).artifact_id
            if len(artifact_id) == 33:
                named = sa.update(_REPORTS).where(_REPORTS.c.report_id == report_id)
                connection.execute(named.values(artifact_id=artifact_id))
        if len(rows) < _BATCH:
            return
        after = rows[-1][0]


def _bytes_of(column: Any) -> Any:
    if op.get_bind().dialect.name == "sqlite":
        return sa.cast(column, sa.LargeBinary)
    return sa.func.convert_to(column, "UTF8", type_=sa.LargeBinary)

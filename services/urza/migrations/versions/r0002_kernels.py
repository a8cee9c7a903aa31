"""Kernels: manifests and their bytes in checksummed pieces."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "r0002"
down_revision = "r0001"
branch_labels = None
depends_on = None


def _text(length: int) -> sa.String:
    return sa.String(length).with_variant(sa.String(length, collation="C"), "postgresql")


def upgrade() -> None:
    op.create_table(
        "urza_kernels",
        sa.Column("artifact_id", _text(33), nullable=False),
        sa.Column("content_key", _text(64), nullable=False),
        sa.Column("blueprint_id", _text(64), nullable=False),
        sa.Column("manifest", sa.LargeBinary(), nullable=False),
        sa.Column("key_id", sa.String(16), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.LargeBinary(), nullable=False),
        sa.Column("stored_at_us", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("artifact_id"),
        sa.UniqueConstraint("content_key"),
    )
    op.create_index("ix_urza_kernels_blueprint_id", "urza_kernels", ["blueprint_id"])
    op.create_index("ix_urza_kernels_newest", "urza_kernels", ["stored_at_us", "artifact_id"])
    op.create_table(
        "urza_kernel_chunks",
        sa.Column("artifact_id", _text(33), nullable=False),
        sa.Column("chunk_index", sa.Integer(), nullable=False),
        sa.Column("data", sa.LargeBinary(), nullable=False),
        sa.Column("crc32", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("artifact_id", "chunk_index"),
        sa.ForeignKeyConstraint(["artifact_id"], ["urza_kernels.artifact_id"], ondelete="CASCADE"),
    )


def downgrade() -> None:
    op.drop_table("urza_kernel_chunks")
    op.drop_table("urza_kernels")

"""Field reports, each kept once, and what they add up to by blueprint."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "r0003"
down_revision = "r0002"
branch_labels = None
depends_on = None


def _text(length: int) -> sa.String:
    return sa.String(length).with_variant(sa.String(length, collation="C"), "postgresql")


def upgrade() -> None:
    op.create_table(
        "urza_field_reports",
        sa.Column("report_id", _text(128), nullable=False),
        sa.Column("blueprint_id", _text(64), nullable=False),
        sa.Column("outcome", sa.Integer(), nullable=False),
        sa.Column("contribution", sa.Double(), nullable=True),
        sa.Column("report", sa.LargeBinary(), nullable=False),
        sa.Column("recorded_at_us", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("report_id"),
    )
    op.create_index("ix_urza_field_reports_blueprint_id", "urza_field_reports", ["blueprint_id"])
    op.create_table(
        "urza_statistics",
        sa.Column("blueprint_id", _text(64), nullable=False),
        sa.Column("trials", sa.BigInteger(), nullable=False),
        sa.Column("kept", sa.BigInteger(), nullable=False),
        sa.Column("contribution_sum", sa.Double(), nullable=False),
        sa.Column("contribution_count", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("blueprint_id"),
    )


def downgrade() -> None:
    op.drop_table("urza_statistics")
    op.drop_table("urza_field_reports")

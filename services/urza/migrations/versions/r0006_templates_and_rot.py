"""Releases of templates in their order; blueprints whose rows have rotted, set aside."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "r0006"
down_revision = "r0005"
branch_labels = None
depends_on = None

_OF_REGISTRY = "sequence = 1 AND actor = 'registry'"


def _text(length: int) -> sa.String:
    return sa.String(length).with_variant(sa.String(length, collation="C"), "postgresql")


def upgrade() -> None:
    op.add_column("urza_blueprints", sa.Column("set_aside_at_us", sa.BigInteger(), nullable=True))
    op.create_table(
        "urza_rotten_blueprints",
        sa.Column("blueprint_id", _text(64), nullable=False),
        sa.Column("found_at_us", sa.BigInteger(), nullable=False),
        sa.Column("found", sa.Text(), nullable=False),
        sa.Column("name", _text(128), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("state", sa.Integer(), nullable=False),
        sa.Column("ir", sa.LargeBinary(), nullable=False),
        sa.Column("metadata", sa.LargeBinary(), nullable=False),
        sa.Column("lineage", sa.LargeBinary(), nullable=False),
        sa.Column("created_at_us", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("blueprint_id", "found_at_us"),
    )
    op.create_table(
        "urza_template_releases",
        sa.Column("digest", _text(64), nullable=False),
        sa.Column("sequence", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("digest"),
    )
    op.execute("INSERT INTO urza_totals (name, total) VALUES ('template_releases', 0)")
    op.create_index(
        "ix_urza_state_changes_of_registry",
        "urza_state_changes",
        ["blueprint_id"],
        sqlite_where=sa.text(_OF_REGISTRY),
        postgresql_where=sa.text(_OF_REGISTRY),
    )


def downgrade() -> None:
    op.drop_index("ix_urza_state_changes_of_registry", "urza_state_changes")
    op.execute("DELETE FROM urza_totals WHERE name = 'template_releases'")
    op.drop_table("urza_template_releases")
    op.drop_table("urza_rotten_blueprints")
    op.drop_column("urza_blueprints", "set_aside_at_us")

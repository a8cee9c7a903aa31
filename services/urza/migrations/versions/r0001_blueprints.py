"""Blueprints: names, versions, tags, genealogy and life cycle."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "r0001"
down_revision = None
branch_labels = None
depends_on = None


def _text(length: int) -> sa.String:
    return sa.String(length).with_variant(sa.String(length, collation="C"), "postgresql")


def upgrade() -> None:
    op.create_table(
        "urza_blueprint_names",
        sa.Column("name", _text(128), nullable=False),
        sa.Column("newest_version", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("name"),
    )
    op.create_table(
        "urza_blueprints",
        sa.Column("id", _text(64), nullable=False),
        sa.Column("name", _text(128), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("state", sa.Integer(), nullable=False),
        sa.Column("ir", sa.LargeBinary(), nullable=False),
        sa.Column("metadata", sa.LargeBinary(), nullable=False),
        sa.Column("lineage", sa.LargeBinary(), nullable=False),
        sa.Column("searchable", sa.Text(), nullable=False),
        sa.Column("site_kinds", sa.Integer(), nullable=False),
        sa.Column("created_at_us", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
        sa.ForeignKeyConstraint(["name"], ["urza_blueprint_names.name"]),
        sa.UniqueConstraint("name", "version"),
        sa.CheckConstraint("version >= 1", name="version"),
        sa.CheckConstraint("state BETWEEN 1 AND 5", name="state"),
    )
    op.create_index("ix_urza_blueprints_state", "urza_blueprints", ["state"])
    op.create_table(
        "urza_blueprint_tags",
        sa.Column("blueprint_id", _text(64), nullable=False),
        sa.Column("tag", _text(64), nullable=False),
        sa.PrimaryKeyConstraint("blueprint_id", "tag"),
        sa.ForeignKeyConstraint(["blueprint_id"], ["urza_blueprints.id"], ondelete="CASCADE"),
    )
    op.create_index("ix_urza_blueprint_tags_tag", "urza_blueprint_tags", ["tag"])
    op.create_table(
        "urza_blueprint_parents",
        sa.Column("child_id", _text(64), nullable=False),
        sa.Column("parent_id", _text(64), nullable=False),
        sa.PrimaryKeyConstraint("child_id", "parent_id"),
        sa.ForeignKeyConstraint(["child_id"], ["urza_blueprints.id"], ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["parent_id"], ["urza_blueprints.id"]),
    )
    op.create_index("ix_urza_blueprint_parents_parent_id", "urza_blueprint_parents", ["parent_id"])
    op.create_table(
        "urza_state_changes",
        sa.Column("blueprint_id", _text(64), nullable=False),
        sa.Column("sequence", sa.Integer(), nullable=False),
        sa.Column("from_state", sa.Integer(), nullable=True),
        sa.Column("to_state", sa.Integer(), nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("changed_at_us", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("blueprint_id", "sequence"),
        sa.ForeignKeyConstraint(["blueprint_id"], ["urza_blueprints.id"], ondelete="CASCADE"),
    )


def downgrade() -> None:
    for table in (
        "urza_state_changes",
        "urza_blueprint_parents",
        "urza_blueprint_tags",
        "urza_blueprints",
        "urza_blueprint_names",
    ):
        op.drop_table(table)

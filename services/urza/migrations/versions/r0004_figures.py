"""What blueprints are searched for by: reference costs, latency, statistics by kernel, tags by one index, a total.

What is there already is costed and counted as if these tables had always been: costs from the graphs, statistics by
kernel from the reports, latencies from the manifests of the kernels that are still stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import sqlalchemy as sa
from alembic import op
from google.protobuf.message import DecodeError

from esper.contracts import wire
from esper.contracts.blueprint import BlueprintCost, BlueprintIR, BlueprintMetadata, SiteKind
from esper.services.urza.reference_costs import reference_costs
from esper.services.urza.report_store import latency_ms_of
from esper.services.urza.rules import ARTIFACT_ID
from esper.v1 import telemetry_pb2

revision = "r0004"
down_revision = "r0003"
branch_labels = None
depends_on = None

_ROWS_AT_ONCE = 500
_KEPT = 1
"""Outcome of an adaptation that ended FOSSILIZED."""
_COUNTS = ("trials", "kept", "contribution_sum", "contribution_count")
_LATENCIES = ("latency_ms_sum", "latency_count")


def _text(length: int) -> sa.String:
    return sa.String(length).with_variant(sa.String(length, collation="C"), "postgresql")


def upgrade() -> None:
    op.drop_index("ix_urza_blueprint_tags_tag", "urza_blueprint_tags")
    op.create_index("ix_urza_blueprint_tags_tag", "urza_blueprint_tags", ["tag", "blueprint_id"])
    costs = op.create_table(
        "urza_blueprint_costs",
        sa.Column("blueprint_id", _text(64), nullable=False),
        sa.Column("site_kind", sa.Integer(), nullable=False),
        sa.Column("parameters", sa.BigInteger(), nullable=False),
        sa.Column("flops", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("blueprint_id", "site_kind"),
        sa.ForeignKeyConstraint(["blueprint_id"], ["urza_blueprints.id"], ondelete="CASCADE"),
    )
    for figure in ("parameters", "flops"):
        op.create_index(f"ix_urza_blueprint_costs_{figure}", "urza_blueprint_costs", [figure, "blueprint_id"])
    op.add_column("urza_statistics", _latency_sum())
    op.add_column("urza_statistics", _latency_count())
    kernels = op.create_table(
        "urza_kernel_statistics",
        sa.Column("artifact_id", _text(33), nullable=False),
        sa.Column("trials", sa.BigInteger(), nullable=False),
        sa.Column("kept", sa.BigInteger(), nullable=False),
        sa.Column("contribution_sum", sa.Double(), nullable=False),
        sa.Column("contribution_count", sa.BigInteger(), nullable=False),
        _latency_sum(),
        _latency_count(),
        sa.PrimaryKeyConstraint("artifact_id"),
    )
    totals = op.create_table(
        "urza_totals",
        sa.Column("name", _text(32), nullable=False),
        sa.Column("total", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("name"),
    )
    connection = op.get_bind()
    num_blueprints = connection.scalar(sa.text("SELECT count(*) FROM urza_blueprints"))
    op.bulk_insert(totals, [{"name": "blueprints", "total": num_blueprints}])
    _cost_blueprints(connection, costs)
    _count_kernels(connection, kernels)


def downgrade() -> None:
    for table in ("urza_totals", "urza_kernel_statistics", "urza_blueprint_costs"):
        op.drop_table(table)
    for column in ("latency_count", "latency_ms_sum"):
        op.drop_column("urza_statistics", column)
    op.drop_index("ix_urza_blueprint_tags_tag", "urza_blueprint_tags")
    op.create_index("ix_urza_blueprint_tags_tag", "urza_blueprint_tags", ["tag"])


def _latency_sum() -> sa.Column[float]:
    return sa.Column("latency_ms_sum", sa.Double(), nullable=False, server_default="0")


def _latency_count() -> sa.Column[int]:
    return sa.Column("latency_count", sa.BigInteger(), nullable=False, server_default="0")


def _batches(connection: sa.Connection, table: str, key: str, *columns: str) -> Iterator[Sequence[sa.Row[Any]]]:
    """Give every row of a table in the order of its key, a few held at a time."""
    source = sa.table(table, *(sa.column(name) for name in (key, *columns)))
    statement = sa.select(source).order_by(source.c[key]).limit(_ROWS_AT_ONCE)
    rows = connection.execute(statement).all()
    while rows:
        yield rows
        rows = connection.execute(statement.where(source.c[key] > rows[-1][0])).all()


def _cost_blueprints(connection: sa.Connection, costs: sa.Table) -> None:
    for blueprints in _batches(connection, "urza_blueprints", "id", "ir", "metadata"):
        found = [
            {"blueprint_id": row.id, "site_kind": int(kind), "parameters": cost.parameters, "flops": cost.flops}
            for row in blueprints
            for kind, cost in _costs_of(row.ir, row.metadata)
        ]
        if found:
            connection.execute(costs.insert(), found)


def _costs_of(ir: bytes, metadata: bytes) -> Iterable[tuple[SiteKind, BlueprintCost]]:
    return reference_costs(wire.parse(ir, BlueprintIR), wire.parse(metadata, BlueprintMetadata)).items()


def _latency_ms(connection: sa.Connection, artifact_id: str) -> float | None:
    kernels = sa.table("urza_kernels", sa.column("artifact_id"), sa.column("manifest"))
    manifest = connection.scalar(sa.select(kernels.c.manifest).where(kernels.c.artifact_id == artifact_id))
    try:
        return None if manifest is None else latency_ms_of(manifest)
    except DecodeError:  # a piece that rotted is found, and removed, by whoever reads the kernel
        return None


def _count_kernels(connection: sa.Connection, kernels: sa.Table) -> None:
    """Count every report by its kernel, and the latency of its kernel by its blueprint."""
    latencies: dict[str, float | None] = {}
    by_kernel: dict[str, dict[str, Any]] = {}
    by_blueprint: dict[str, dict[str, Any]] = {}
    columns = ("blueprint_id", "outcome", "contribution", "report")
    reports = (row for rows in _batches(connection, "urza_field_reports", "report_id", *columns) for row in rows)
    for row in reports:
        artifact_id = telemetry_pb2.FieldReport.FromString(row.report).artifact_id
        if not ARTIFACT_ID.fullmatch(artifact_id):
            continue
        counted = by_kernel.setdefault(artifact_id, dict.fromkeys(_COUNTS + _LATENCIES, 0))
        counted["trials"] += 1
        counted["kept"] += row.outcome == _KEPT
        counted["contribution_sum"] += row.contribution or 0.0
        counted["contribution_count"] += row.contribution is not None
        if artifact_id not in latencies:
            latencies[artifact_id] = _latency_ms(connection, artifact_id)
        latency_ms = latencies[artifact_id]
        for one in (counted, by_blueprint.setdefault(row.blueprint_id, dict.fromkeys(_LATENCIES, 0))):
            one["latency_ms_sum"] += latency_ms or 0.0
            one["latency_count"] += latency_ms is not None
    if by_kernel:
        connection.execute(kernels.insert(), [{"artifact_id": key, **one} for key, one in by_kernel.items()])
    statistics = sa.table("urza_statistics", *(sa.column(name) for name in ("blueprint_id", *_LATENCIES)))
    for blueprint_id, timed in by_blueprint.items():
        connection.execute(statistics.update().where(statistics.c.blueprint_id == blueprint_id).values(timed))

"""A blueprint's rows inside a transaction: made of a draft, and read under their lock."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from esper.contracts import wire
from esper.contracts.blueprint import BlueprintCost, BlueprintMetadata, SiteKind
from esper.services.urza.blueprint_records import BlueprintRecord
from esper.services.urza.clock import now_us
from esper.services.urza.models import BlueprintRow, CostRow, StatisticsRow, TagRow
from esper.services.urza.rules import BlueprintDraft

_COLUMNS: Final = (
    *(BlueprintRow.id, BlueprintRow.name, BlueprintRow.version, BlueprintRow.state, BlueprintRow.ir),
    *(BlueprintRow.blueprint_metadata, BlueprintRow.lineage, BlueprintRow.created_at_us),
    *(StatisticsRow.trials, StatisticsRow.kept, StatisticsRow.contribution_sum, StatisticsRow.contribution_count),
    *(StatisticsRow.latency_ms_sum, StatisticsRow.latency_count),
)
"""What `FIELDS` says, for statements inside a transaction."""


async def find_record(session: AsyncSession, blueprint_id: str, *, lock: bool = False) -> BlueprintRecord | None:
    """Give a blueprint at rest by its id, with ``lock`` until the transaction ends."""
    joined = select(*_COLUMNS).select_from(BlueprintRow)
    statement = joined.outerjoin(StatisticsRow, StatisticsRow.blueprint_id == BlueprintRow.id)
    statement = statement.where(BlueprintRow.id == blueprint_id)
    if lock:
        statement = statement.with_for_update(of=BlueprintRow)
    row = (await session.execute(statement)).one_or_none()
    return None if row is None else BlueprintRecord(*tuple(row))


def blueprint_row(draft: BlueprintDraft, blueprint_id: str, ir_bytes: bytes, version: int) -> BlueprintRow:
    """Give the row of a new version."""
    return BlueprintRow(
        id=blueprint_id,
        name=draft.name,
        version=version,
        state=int(draft.state),
        ir=ir_bytes,
        blueprint_metadata=wire.serialize(draft.metadata),
        lineage=wire.serialize(draft.lineage),
        searchable=searchable(draft.name, draft.metadata),
        site_kinds=kinds_mask(draft.metadata.site_kinds),
        created_at_us=now_us(),
    )


def finding_rows(
    blueprint_id: str, metadata: BlueprintMetadata, costs: Mapping[SiteKind, BlueprintCost]
) -> Iterator[TagRow | CostRow]:
    """Give the rows by which a blueprint is found: its tags, and its cost at every reference site."""
    for tag in metadata.tags:
        yield TagRow(blueprint_id=blueprint_id, tag=tag)
    for kind, cost in costs.items():
        yield CostRow(blueprint_id=blueprint_id, site_kind=int(kind), parameters=cost.parameters, flops=cost.flops)


def searchable(name: str, metadata: BlueprintMetadata) -> str:
    """Give the text that a search looks into."""
    return f"{name}\n{metadata.description}".casefold()


def kinds_mask(kinds: tuple[SiteKind, ...]) -> int:
    """Give one bit per kind."""
    return sum(1 << kind for kind in kinds)

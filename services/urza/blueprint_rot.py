"""Blueprints whose rows have rotted: set aside, and put right once somebody brings their graph again.

Nothing of a rotten row is thrown away: what it held is copied to where people can look into it. Version, state,
history, genealogy, kernels and statistics have rows of their own and stay.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from sqlalchemy import delete, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from esper.contracts import wire
from esper.contracts.blueprint import BlueprintCost, SiteKind
from esper.contracts.errors import CorruptDataError
from esper.services.urza.blueprint_records import BlueprintRecord, readable_part
from esper.services.urza.blueprint_rows import finding_rows, kinds_mask, searchable
from esper.services.urza.clock import now_us
from esper.services.urza.models import BlueprintRow, CostRow, LineageRow, RottenBlueprintRow, TagRow
from esper.services.urza.rules import BlueprintDraft


async def set_aside(session: AsyncSession, record: BlueprintRecord, rot: CorruptDataError) -> bool:
    """Keep a rotten blueprint out of every listing and copy what its row holds; say whether that was to be done.

    The record was read under its lock.
    """
    now = now_us()
    listed = update(BlueprintRow).where(BlueprintRow.id == record.id, BlueprintRow.set_aside_at_us.is_(None))
    marked = await session.execute(listed.values(set_aside_at_us=now).returning(BlueprintRow.id))
    if marked.first() is None:
        return False
    session.add(
        RottenBlueprintRow(
            blueprint_id=record.id,
            found_at_us=now,
            found=str(rot),
            name=record.name,
            version=record.version,
            state=record.state,
            ir=record.ir,
            blueprint_metadata=record.metadata,
            lineage=record.lineage,
            created_at_us=record.created_at_us,
        )
    )
    await session.flush()
    return True


async def restore(
    session: AsyncSession,
    record: BlueprintRecord,
    draft: BlueprintDraft,
    ir_bytes: bytes,
    costs: Mapping[SiteKind, BlueprintCost],
) -> BlueprintRecord:
    """Put a blueprint right by a draft of the same graph, and list it again; give it as it rests now.

    What can still be read stays as it is. The record was read under its lock.
    """
    metadata = record.metadata
    found_by = {}
    if not _is_readable(record, "metadata"):
        metadata = wire.serialize(draft.metadata)
        found_by = {
            "searchable": searchable(record.name, draft.metadata),
            "site_kinds": kinds_mask(draft.metadata.site_kinds),
        }
        for table in (TagRow, CostRow):
            await session.execute(delete(table).where(table.blueprint_id == record.id))
        session.add_all(finding_rows(record.id, draft.metadata, costs))
    lineage = record.lineage
    if not _is_readable(record, "lineage"):
        edges = select(LineageRow.parent_id).where(LineageRow.child_id == record.id).order_by(LineageRow.parent_id)
        parents = tuple((await session.scalars(edges)).all())
        lineage = wire.serialize(dataclasses.replace(draft.lineage, parent_ids=parents))
    this = update(BlueprintRow).where(BlueprintRow.id == record.id)
    parts = {"ir": ir_bytes, "blueprint_metadata": metadata, "lineage": lineage, "set_aside_at_us": None}
    await session.execute(this.values(**parts, **found_by))
    await session.flush()
    return record._replace(ir=ir_bytes, metadata=metadata, lineage=lineage)


def _is_readable(record: BlueprintRecord, part: str) -> bool:
    try:
        readable_part(record, part)
    except CorruptDataError:
        return False
    return True

"""Blueprints at rest and their two forms: equal to each other, and nothing that has rotted leaves as either."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from sqlalchemy import update

from esper.contracts import wire
from esper.contracts.blueprint import Blueprint, BlueprintMetadata, BlueprintState, Lineage, SiteKind
from esper.contracts.errors import CorruptDataError
from esper.contracts.wire import from_wire, to_wire
from esper.mesh.database import Database
from esper.services.urza.blueprint_records import (
    BlueprintRecord,
    _kept_wire_of,
    blueprint_of,
    message_of,
    page_message,
)
from esper.services.urza.models import BlueprintRow
from esper.services.urza.rules import BlueprintDraft, BlueprintQuery, PageRequest
from esper.services.urza.store import UrzaStore
from esper.testing.urza_samples import field_report, graph
from esper.testing.urza_template import lay_out


@pytest.fixture
async def store() -> AsyncIterator[UrzaStore]:
    async with Database.open("sqlite://") as database:
        store = UrzaStore(database)
        await lay_out(database)
        yield store


async def records(store: UrzaStore) -> tuple[BlueprintRecord, ...]:
    first, _ = await store.blueprints.create(BlueprintDraft(name="plain", ir=graph(1)))
    metadata = BlueprintMetadata(
        description="däscribed " * 150, citation="c", tags=["x"], site_kinds=(SiteKind.CONV2D,)
    )
    lineage = Lineage(parent_ids=(first.id,), operator="mutation", author="karn")
    draft = BlueprintDraft(name="rich", ir=graph(2), metadata=metadata, lineage=lineage, state=BlueprintState.ACTIVE)
    second, _ = await store.blueprints.create(draft)
    await store.reports.record(field_report("r1", blueprint_id=second.id, estimate=0.5))
    await store.reports.record(field_report("r2", blueprint_id=first.id, estimate=None))
    return (await store.blueprints.search_records(BlueprintQuery(), PageRequest())).items


async def test_the_message_is_the_one_that_the_blueprint_has_on_the_wire(store: UrzaStore) -> None:
    found = await records(store)
    assert [record.name for record in found] == ["plain", "rich"]
    for record in found:
        assert message_of(record) == to_wire(blueprint_of(record))
        assert from_wire(message_of(record), Blueprint) == blueprint_of(record)
    answer = page_message(found, "next")
    assert list(answer.blueprints) == [message_of(record) for record in found]
    assert answer.next_page_token == "next"


async def test_what_was_answered_before_is_answered_as_it_is_now(store: UrzaStore) -> None:
    [plain, rich] = await records(store)
    assert page_message([plain, rich], "") == page_message([plain, rich], "")
    later = plain._replace(state=int(BlueprintState.DEPRECATED), trials=7)
    assert page_message([later], "").blueprints[0] == to_wire(blueprint_of(later))
    with pytest.raises(CorruptDataError, match=r"ir of plain@1 must be the graph that [0-9a-f]{64} names"):
        page_message([plain._replace(ir=rich.ir)], "")


async def test_answers_are_kept_for_small_blueprints_alone(store: UrzaStore) -> None:
    [plain, _] = await records(store)
    page_message([plain], "")
    kept = _kept_wire_of.cache_info().currsize
    for number in range(3):
        large = plain._replace(metadata=wire.serialize(BlueprintMetadata(description="d" * 4_096 + str(number))))
        assert message_of(large).metadata.description.endswith(str(number))
    assert _kept_wire_of.cache_info().currsize == kept


@pytest.mark.parametrize(
    ("column", "rotten", "said"),
    [
        ("ir", b"\x0a\x00", "ir of rich@1 must be the graph that [0-9a-f]{64} names, it has changed at rest"),
        ("blueprint_metadata", b"\xff\xff", "a part of rich@1 does not parse"),
        ("lineage", b"\x0a\x7f", "a part of rich@1 does not parse"),
    ],
)
async def test_a_part_that_has_rotted_is_data_loss_and_named(
    store: UrzaStore, column: str, rotten: bytes, said: str
) -> None:
    found = await records(store)
    async with store._database.session() as session:
        await session.execute(update(BlueprintRow).where(BlueprintRow.name == "rich").values(**{column: rotten}))
    page = await store.blueprints.search_records(BlueprintQuery(), PageRequest())
    with pytest.raises(CorruptDataError, match=said):
        page_message(page.items, "")
    with pytest.raises(CorruptDataError):
        await store.blueprints.get("rich")
    assert page_message(page.items[:1], "").blueprints[0].id == found[0].id

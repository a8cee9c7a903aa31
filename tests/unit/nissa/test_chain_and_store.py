"""The chain finds every edit; the store takes each event once and keeps anomalies over a restart."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete, text

from esper.contracts.decision import Anomaly, AnomalySeverity
from esper.contracts.errors import NotFoundError
from esper.services.nissa.chain import GENESIS, verify_chain
from esper.services.nissa.store import EventRow, NewEvent, NissaStore


@pytest.fixture
async def store() -> AsyncIterator[NissaStore]:
    opened = await NissaStore.open("sqlite://")
    yield opened
    await opened.database.close()


def event_of(number: int, at: Any, run_id: str = "run-1") -> NewEvent:
    return NewEvent(
        run_id=run_id,
        key=f"{run_id}:{number}",
        kind="control",
        recorded_at=at(number),
        payload=bytes([number]),
    )


async def filled(store: NissaStore, at: Any) -> NissaStore:
    for number in range(1, 6):
        assert await store.append(event_of(number, at))
    return store


async def test_an_empty_chain_holds(store: NissaStore) -> None:
    verdict = await store.verify_chain("run-1")
    assert (verdict.intact, verdict.length, verdict.head) == (True, 0, GENESIS)


async def test_a_chain_as_it_was_written_holds(store: NissaStore, at: Any) -> None:
    verdict = await (await filled(store, at)).verify_chain("run-1")
    assert (verdict.intact, verdict.length) == (True, 5)


@pytest.mark.parametrize(
    "edit",
    [
        "payload = x'ff'",
        "kind = 'state'",
        "key = 'other'",
        "recorded_us = recorded_us + 1",
        "digest = zeroblob(32)",
        "previous = zeroblob(32)",
    ],
)
async def test_any_edit_of_an_event_is_found(edit: str, store: NissaStore, at: Any) -> None:
    await filled(store, at)
    async with store.database.session() as session:
        await session.execute(text(f"UPDATE nissa_events SET {edit} WHERE position = 3"))
    verdict = await store.verify_chain("run-1")
    assert (verdict.intact, verdict.length) == (False, 2)
    assert "event 3 must" in verdict.reason


async def test_an_event_that_was_taken_out_is_found(store: NissaStore, at: Any) -> None:
    await filled(store, at)
    async with store.database.session() as session:
        await session.execute(delete(EventRow).where(EventRow.position == 2))
    verdict = await store.verify_chain("run-1")
    assert (verdict.intact, verdict.reason) == (False, "position must be 2, got 3")


async def test_an_event_moved_to_another_run_is_found(store: NissaStore, at: Any) -> None:
    events = await (await filled(store, at)).events("run-1")
    assert not verify_chain([replace(one, run_id="run-2") for one in events]).intact


async def test_a_chain_cut_short_has_another_head(store: NissaStore, at: Any) -> None:
    events = await (await filled(store, at)).events("run-1")
    assert verify_chain(events[:4]).head != verify_chain(events).head


async def test_an_event_is_taken_once_and_runs_have_chains_of_their_own(store: NissaStore, at: Any) -> None:
    await filled(store, at)
    assert not await store.append(event_of(3, at))
    assert await store.append(event_of(1, at, "run-2"))
    assert len(await store.events("run-1")) == 5
    assert (await store.verify_chain("run-2")).length == 1


async def test_two_writers_never_fork_a_chain(tmp_path: Path, at: Any) -> None:
    url = f"sqlite:///{tmp_path}/nissa.db"
    first, second = await NissaStore.open(url), await NissaStore.open(url)
    for number in range(1, 9):
        assert await (first if number % 3 else second).append(event_of(number, at))
        assert not await (second if number % 3 else first).append(event_of(number, at))
    verdict = await first.verify_chain("run-1")
    assert (verdict.intact, verdict.length) == (True, 8)
    await first.database.close()
    await second.database.close()


async def test_the_newest_run_is_the_one_first_heard_last(store: NissaStore, at: Any) -> None:
    assert await store.newest_run() is None
    await store.append(event_of(9, at, "late"))
    await store.append(event_of(1, at, "early"), ended=True)
    await store.append(event_of(20, at, "early"))
    assert await store.newest_run() == "late"
    assert await store.live_runs(5) == ["late"]


def anomaly_of(number: int, at: Any, **changes: Any) -> Anomaly:
    values: dict[str, Any] = {
        "anomaly_id": f"n{number}",
        "run_id": "run-1",
        "detector": "plateau",
        "subject": "control_loss",
        "severity": AnomalySeverity.INFO,
        "first_seen_at": at(number),
        "last_seen_at": at(number),
    }
    return Anomaly(**(values | changes))


async def test_anomalies_are_listed_newest_first_and_filtered(store: NissaStore, at: Any) -> None:
    for number in (1, 3, 2):
        assert await store.keep_anomaly(anomaly_of(number, at))
    await store.keep_anomaly(anomaly_of(4, at, run_id="run-2"))
    assert not await store.keep_anomaly(anomaly_of(3, at, resolved=True))
    assert [one.anomaly_id for one in await store.anomalies(limit=2)] == ["n4", "n3"]
    assert [one.anomaly_id for one in await store.anomalies(run_id="run-1", open_only=True)] == ["n2", "n1"]


async def test_an_acknowledgement_stays_with_the_first_who_saw_it(store: NissaStore, at: Any) -> None:
    await store.keep_anomaly(anomaly_of(1, at))
    assert (await store.acknowledge("n1", "ann")).acknowledged_by == "ann"
    assert (await store.acknowledge("n1", "bob")).acknowledged_by == "ann"
    await store.keep_anomaly(anomaly_of(1, at, resolved=True))
    [kept] = await store.anomalies()
    assert (kept.resolved, kept.acknowledged_by) == (True, "ann")


async def test_an_unknown_anomaly_cannot_be_acknowledged(store: NissaStore) -> None:
    with pytest.raises(NotFoundError, match="anomaly must be known, got 'n9'"):
        await store.acknowledge("n9", "ann")


async def test_everything_is_there_after_a_restart(tmp_path: Path, at: Any) -> None:
    url = f"sqlite:///{tmp_path}/nissa.db"
    store = await NissaStore.open(url)
    await filled(store, at)
    await store.keep_anomaly(anomaly_of(1, at))
    head = (await store.verify_chain("run-1")).head
    await store.database.close()
    again = await NissaStore.open(url)
    assert (await again.verify_chain("run-1")).head == head
    assert [one.anomaly_id for one in await again.unannounced()] == ["n1"]
    await again.mark_announced("n1")
    assert await again.unannounced() == []
    await again.database.close()

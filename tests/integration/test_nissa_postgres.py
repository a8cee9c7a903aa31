"""Nissa's store on a real PostgreSQL: chains of several writers, and anomalies."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

from sqlalchemy import text

from esper.contracts.decision import Anomaly, AnomalySeverity
from esper.contracts.errors import UnavailableError
from esper.services.nissa.store import NewEvent, NissaStore

MOMENT = datetime(2026, 1, 1, tzinfo=UTC)


def event_of(number: int) -> NewEvent:
    return NewEvent(run_id="run-1", key=f"{number}:m", kind="control", recorded_at=MOMENT, payload=bytes([number]))


async def append(store: NissaStore, number: int) -> None:
    """Add an event as the bus loop does: what another writer forestalled is tried again."""
    async with asyncio.timeout(30):
        while True:
            try:
                assert await store.append(event_of(number))
            except UnavailableError:
                continue
            else:
                return


async def test_writers_at_once_make_one_chain_without_a_fork(url: str) -> None:
    first = await NissaStore.open(url)
    second = await NissaStore.open(url)
    await asyncio.gather(*(append(store, number) for number, store in enumerate([first, second] * 10)))
    verdict = await second.verify_chain("run-1")
    assert (verdict.intact, verdict.length) == (True, 20)
    async with first.database.session() as session:
        await session.execute(text("UPDATE nissa_events SET payload = 'x'::bytea WHERE position = 7"))
    assert (await second.verify_chain("run-1")).length == 6
    await first.database.close()
    await second.database.close()


async def test_anomalies_are_kept_listed_and_acknowledged(url: str) -> None:
    store = await NissaStore.open(url)
    anomaly = Anomaly(
        anomaly_id="n1",
        run_id="run-1",
        detector="plateau",
        subject="control_loss",
        severity=AnomalySeverity.INFO,
        first_seen_at=MOMENT,
        last_seen_at=MOMENT,
    )
    assert await store.keep_anomaly(anomaly)
    assert not await store.keep_anomaly(anomaly)
    assert (await store.acknowledge("n1", "ann")).acknowledged_by == "ann"
    assert [one.anomaly_id for one in await store.anomalies(run_id="run-1", open_only=True, limit=5)] == ["n1"]
    await store.database.close()

"""The store keeps the newest word of every run and each event once, on files and in memory alike."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from esper.contracts.errors import UnavailableError
from esper.contracts.run import RunPhase
from esper.contracts.wire import serialize
from esper.services.tolaria.store import StoredEvent, TolariaStore


@pytest.fixture(params=["memory", "file"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[TolariaStore]:
    url = "sqlite://" if request.param == "memory" else f"sqlite:///{tmp_path / 'tolaria.db'}"
    one = await TolariaStore.open(url)
    yield one
    await one.database.close()


async def test_a_run_is_kept_whole_with_its_moments(store: TolariaStore, packet: Any) -> None:
    first, last = packet(1), packet(2, phase=RunPhase.FINISHED)
    assert await store.keep_packet(first)
    assert await store.keep_packet(last)
    run = await store.run("run-1")
    assert run is not None
    assert run.packet == last
    assert (run.started_at, run.finished_at) == (first.created_at, last.created_at)


async def test_a_packet_that_is_no_newer_changes_nothing(store: TolariaStore, packet: Any) -> None:
    await store.keep_packet(packet(3))
    assert not await store.keep_packet(packet(3, epoch=99))
    assert not await store.keep_packet(packet(2))
    run = await store.run("run-1")
    assert run is not None
    assert run.packet == packet(3)


async def test_a_run_that_goes_on_is_not_finished_any_more(store: TolariaStore, packet: Any) -> None:
    await store.keep_packet(packet(1, phase=RunPhase.FAILED))
    await store.keep_packet(packet(2))
    run = await store.run("run-1")
    assert run is not None
    assert run.finished_at is None


async def test_an_unknown_run_is_none(store: TolariaStore) -> None:
    assert await store.run("nobody") is None
    assert await store.events("nobody") == []


async def test_an_event_is_kept_once_and_in_order(store: TolariaStore, event: Any) -> None:
    payload = serialize(event())
    kept = [StoredEvent(adaptation_id=f"a{number}", kind="seed", payload=payload) for number in range(3)]
    for number in (2, 0, 1):
        assert await store.keep_event("run-1", number + 7, kept[number])
    assert not await store.keep_event("run-1", 8, kept[0])
    assert await store.events("run-1") == kept


async def test_runs_are_listed_newest_first_by_phase_and_after_a_place(store: TolariaStore, packet: Any) -> None:
    for number in range(4):
        moment = packet().created_at + timedelta(seconds=number // 2)  # two begin in the same moment
        phase = RunPhase.FINISHED if number == 0 else RunPhase.TRAINING
        await store.keep_packet(packet(1, f"run-{number}", created_at=moment, phase=phase))
    listed = await store.list_runs([], 10, None)
    assert [run.packet.run_id for run in listed] == ["run-3", "run-2", "run-1", "run-0"]
    after = (listed[1].started_us, listed[1].packet.run_id)
    assert [run.packet.run_id for run in await store.list_runs([], 10, after)] == ["run-1", "run-0"]
    assert [run.packet.run_id for run in await store.list_runs([RunPhase.FINISHED], 10, None)] == ["run-0"]
    assert len(await store.list_runs([], 2, None)) == 2


async def test_what_was_kept_is_there_after_a_restart(tmp_path: Path, packet: Any) -> None:
    url = f"sqlite:///{tmp_path / 'tolaria.db'}"
    store = await TolariaStore.open(url)
    await store.keep_packet(packet(1))
    await store.database.close()
    again = await TolariaStore.open(url)
    assert await again.run("run-1") is not None
    await again.database.close()


async def test_a_store_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UnavailableError, match="cannot be reached"):
        await TolariaStore.open(f"sqlite:///{tmp_path / 'file' / 'tolaria.db'}")

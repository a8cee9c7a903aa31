"""A run's report tells what growth has cost by phase, as the run's newest packet has it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from esper.contracts.run import GrowthCost, GrowthPhase
from esper.contracts.wire import serialize
from esper.services.nissa.report_markdown import to_markdown
from esper.services.nissa.service import Nissa
from esper.services.nissa.store import NewEvent, NissaStore


@pytest.fixture
async def nissa() -> AsyncIterator[Nissa]:
    store = await NissaStore.open("sqlite://")
    yield Nissa(store)
    await store.database.close()


async def report_of(nissa: Nissa, make: Any, *costs: tuple[GrowthCost, ...]) -> dict[str, Any]:
    for number, told in enumerate(costs, start=1):
        payload = serialize(make.packet(number, growth_costs=told))
        event = NewEvent(run_id="run-1", key=f"k{number}", kind="state", recorded_at=make.at(number), payload=payload)
        assert await nissa.take(event)
    return await nissa.get_run_report("run-1")


async def test_the_newest_packets_costs_stand_in_the_report(nissa: Nissa, make: Any) -> None:
    early = (GrowthCost(phase=GrowthPhase.RACE, seconds=0.25, flops=7),)
    late = (
        GrowthCost(phase=GrowthPhase.ISOLATION, seconds=1.5, flops=None),
        GrowthCost(phase=GrowthPhase.RACE, seconds=0.5, flops=1_200),
    )
    report = await report_of(nissa, make, early, late)
    assert report["growth_costs"] == [
        {"phase": "isolation", "seconds": 1.5, "flops": None},
        {"phase": "race", "seconds": 0.5, "flops": 1200},
    ]
    document = to_markdown(report)
    assert "## What growth cost" in document
    assert "| isolation | 1.5 | not measured |" in document
    assert "| race | 0.5 | 1200 |" in document


async def test_a_run_that_told_none_has_none(nissa: Nissa, make: Any) -> None:
    report = await report_of(nissa, make, ())
    assert report["growth_costs"] == []
    assert "The run told none." in to_markdown(report)

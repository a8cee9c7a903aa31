"""Tamiyo's and Karn's stores on a real PostgreSQL."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

from esper.contracts.decision import AdaptationDecision, AdaptationType, CurveState
from esper.contracts.lesson import Lesson
from esper.contracts.run import AdaptationOutcome, FieldReport, RunPhase, SystemStatePacket
from esper.services.karn import store as karn_store
from esper.services.tamiyo import store as tamiyo_store
from esper.services.tamiyo.policy import adaptation_id

MOMENT = datetime(2026, 1, 1, tzinfo=UTC)


def packet(sequence: int) -> SystemStatePacket:
    return SystemStatePacket(
        run_id="run-1", sequence=sequence, phase=RunPhase.TRAINING, epoch=sequence, step=sequence, created_at=MOMENT
    )


def decision(sequence: int) -> AdaptationDecision:
    return AdaptationDecision(
        adaptation_id=adaptation_id("run-1", sequence),
        run_id="run-1",
        state_sequence=sequence,
        epoch=sequence,
        adaptation_type=AdaptationType.OPTIMIZE_PARAMETERS,
        confidence=0.5,
        urgency=0.0,
        curve_state=CurveState.IMPROVING,
        created_at=MOMENT,
    )


def report(name: str) -> FieldReport:
    return FieldReport(
        report_id=name,
        adaptation_id="a1",
        run_id="run-1",
        layer="hidden",
        seed_index=0,
        outcome=AdaptationOutcome.FAILED,
        created_at=MOMENT,
    )


async def test_tamiyo_keeps_the_first_of_equal_decisions_and_lists_them_by_key(url: str) -> None:
    store = await tamiyo_store.open_store(url)
    for sequence in (1, 2, 3, 2):
        await store.keep(packet(sequence), (decision(sequence),))
    stored = await store.run("run-1")
    assert [one.sequence for one in stored.packets] == [1, 2, 3]
    assert sorted(stored.decisions) == [1, 2, 3]
    first = await store.list_decisions("run-1", 2, None)
    rest = await store.list_decisions("run-1", 2, first[-1][0])
    assert sorted(one.state_sequence for _, one in (*first, *rest)) == [1, 2, 3]
    assert await store.decision_of(adaptation_id("run-1", 2)) == decision(2)
    await store.database.close()


async def test_tamiyo_keeps_reports_once_and_over_a_restart(url: str) -> None:
    store = await tamiyo_store.open_store(url)
    assert [await store.add_report(report(name), "conv") for name in ("r1", "r2", "r1")] == [True, True, False]
    await store.database.close()
    again = await tamiyo_store.open_store(url)
    assert [(one.report.report_id, one.family) for one in await again.reports()] == [("r1", "conv"), ("r2", "conv")]
    await again.database.close()


async def test_tamiyo_keeps_lessons_in_one_order_with_its_reports(url: str) -> None:
    store = await tamiyo_store.open_store(url)
    await store.keep(packet(1), (replace(decision(1), adaptation_id="a1"),))
    await store.add_report(report("r9"), "conv")
    given = [Lesson(report=report("r2"), family="linear", decision=decision(2)), Lesson(report=report("r1"))]
    assert await store.add_lessons(given) == (given, 0)
    assert await store.add_lessons([*given, Lesson(report=replace(report("r9"), layer="head"))]) == ([], 1)
    await store.database.close()
    again = await tamiyo_store.open_store(url)
    own = Lesson(report=report("r9"), family="conv", decision=replace(decision(1), adaptation_id="a1"))
    everything = await again.lessons("", 10, None)
    assert [lesson for _, lesson in everything] == [own, *given]
    assert await again.lessons("run-1", 10, everything[0][0]) == everything[1:]
    assert await again.lessons("run-2", 10, None) == []
    assert [(one.report.report_id, one.is_own) for one in await again.reports()] == [
        ("r9", True),
        ("r2", False),
        ("r1", False),
    ]
    assert [one.report.report_id for one in await again.reports_of("run-1")] == ["r9"]
    await again.database.close()


async def test_karn_keeps_reports_once_beside_tamiyo(url: str) -> None:
    tamiyo, karn = await tamiyo_store.open_store(url), await karn_store.open_store(url)
    assert [await karn.add_report(report(name)) for name in ("r1", "r1")] == [True, False]
    assert await karn.has_report("r1")
    assert await tamiyo.num_reports() == 0
    for store in (tamiyo, karn):
        await store.database.close()

"""Tamiyo's and Karn's stores on a real PostgreSQL."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import pytest

from esper.contracts.decision import AdaptationDecision, AdaptationPlan, AdaptationType, CurveState, PlanStatus
from esper.contracts.errors import CorruptDataError
from esper.contracts.lesson import Lesson
from esper.contracts.run import AdaptationOutcome, FieldReport, RunPhase, SystemStatePacket
from esper.services.karn import store as karn_store
from esper.services.tamiyo import store as tamiyo_store
from esper.services.tamiyo.choices import Choice, digest_of
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


def choice(sequence: int, candidates: str = "", settings: str = "") -> Choice:
    return Choice(previous_sequence=sequence - 1, moment_us=7, num_lessons=0, candidates=candidates, settings=settings)


def plan(name: str) -> AdaptationPlan:
    return AdaptationPlan(adaptation_id=name, run_id="run-1", status=PlanStatus.REJECTED, created_at=MOMENT)


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
        await store.keep(packet(sequence), (decision(sequence),), choice(sequence), {})
    stored = await store.run("run-1")
    assert [one.sequence for one in stored.packets] == [1, 2, 3]
    assert sorted(stored.decisions) == [1, 2, 3]
    first = await store.list_decisions("run-1", 2, None)
    rest = await store.list_decisions("run-1", 2, first[-1][0])
    assert sorted(one.state_sequence for _, one in (*first, *rest)) == [1, 2, 3]
    assert await store.decision_of(adaptation_id("run-1", 2)) == decision(2)
    await store.database.close()


async def test_tamiyo_keeps_what_decisions_hung_on_and_lets_go_of_lists_that_nothing_names(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tamiyo_store, "PACKETS_KEPT", 2)
    store = await tamiyo_store.open_store(url)
    lists = [digest_of(payload) for payload in (b"first", b"second")]
    parts = {digest_of(payload): payload for payload in (b"first", b"second", b"settings")}
    for sequence, listed in ((1, lists[0]), (2, lists[1]), (3, lists[1])):
        await store.keep(
            packet(sequence), (decision(sequence),), choice(sequence, listed, digest_of(b"settings")), parts
        )
    for name in ("a1", "a2", "a1"):
        await store.add_plan(plan(name))
    assert [one.plan.adaptation_id for one in await store.plans_of("run-1")] == ["a1", "a2"]
    await store.database.close()
    again = await tamiyo_store.open_store(url)
    assert [(one.sequence, one.choice) for one in await again.packets("run-1", 9, 0)] == [
        (sequence, choice(sequence, lists[1], digest_of(b"settings"))) for sequence in (2, 3)
    ]
    kept = {lists[1]: b"second", digest_of(b"settings"): b"settings"}
    assert await again.parts([lists[1], digest_of(b"settings")]) == kept
    with pytest.raises(CorruptDataError, match=f"part {lists[0]} of a recorded decision must read, got nothing"):
        await again.parts(lists)
    assert again.moment_us == (await again.plans_of("run-1"))[-1].received_us, "moments go on from the newest"
    await again.database.close()


async def test_tamiyo_keeps_reports_once_and_over_a_restart(url: str) -> None:
    store = await tamiyo_store.open_store(url)
    assert [await store.add_report(report(name), "conv") for name in ("r1", "r2", "r1")] == [True, True, False]
    await store.database.close()
    again = await tamiyo_store.open_store(url)
    assert [(one.report.report_id, one.family) for one in await again.reports()] == [("r1", "conv"), ("r2", "conv")]
    await again.database.close()


async def test_tamiyo_keeps_lessons_in_one_order_with_its_reports(url: str) -> None:
    store = await tamiyo_store.open_store(url)
    await store.keep(packet(1), (replace(decision(1), adaptation_id="a1"),), choice(1), {})
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
    first, again, second = [await karn.add_report(report(name)) for name in ("r1", "r1", "r2")]
    assert again is None
    assert await karn.has_report("r1")
    assert [key for key, _ in await karn.reports(5, None)] == [second, first]
    assert await karn.reports(5, second) == [(first, report("r1"))]
    await karn.verify()
    assert await tamiyo.num_reports() == 0
    for store in (tamiyo, karn):
        await store.database.close()

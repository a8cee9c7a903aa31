"""A run's decisions taken again from what was recorded: to the bit, or with what differs or lacks, by name."""

from __future__ import annotations

import sqlite3
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from esper.client import AsyncEsperClient
from esper.contracts.decision import AdaptationPlan, PlanStatus
from esper.contracts.errors import (
    CapacityExceededError,
    CorruptDataError,
    InvalidInputError,
    InvalidStateError,
    NotFoundError,
)
from esper.contracts.lesson import Lesson
from esper.contracts.replay import ReplayDifference, Setting
from esper.contracts.run import AdaptationOutcome
from esper.mesh import InProcessChannel
from esper.services.tamiyo import service as service_module
from esper.services.tamiyo import servicer
from esper.services.tamiyo import store as store_module
from esper.services.tamiyo.candidates import CandidateConfig, CandidateSource
from esper.services.tamiyo.choices import changes_between, config_of, settings_of
from esper.services.tamiyo.config import TamiyoConfig
from esper.services.tamiyo.curve import CurveConfig
from esper.services.tamiyo.differences import MAX_DIFFERENCES, differences_between
from esper.services.tamiyo.policy import Policy
from esper.services.tamiyo.server import REGISTRAR
from esper.services.tamiyo.service import Tamiyo
from esper.services.tamiyo.store import open_store
from tests.unit.tamiyo.conftest import packet_of, report_of
from tests.unit.tamiyo.test_memory import Calls
from tests.unit.tamiyo.test_service import Library

KEPT, CULLED = AdaptationOutcome.KEPT, AdaptationOutcome.CULLED
CAUTIOUS = TamiyoConfig(confidence_threshold=1.0)


class Services:
    """Policies with stores, each behind a channel of its own, and closed at the end."""

    def __init__(self):
        self.opened = []

    async def open(self, url="sqlite://", config=None):
        store = await open_store(url)
        tamiyo = Tamiyo(store, Policy(config), CandidateSource(Library(), config=CandidateConfig(refresh_s=1e9)))
        await tamiyo.start()
        channel = InProcessChannel()
        channel.add_servicer(REGISTRAR, servicer.TamiyoServicer(tamiyo))
        tamiyo.client = AsyncEsperClient(transport=Calls(channel)).tamiyo
        self.opened.append((store, channel))
        return tamiyo

    async def close(self):
        for store, channel in self.opened:
            await channel.close()
            await store.database.close()


@pytest.fixture
async def services():
    found = Services()
    yield found
    await found.close()


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path}/tamiyo.db"


async def happen(tamiyo, sequence, race):
    """Have happen what may between two packets: own reports, others', lessons from elsewhere, plans given up."""
    if sequence == 3 and race[0].actionable:
        for place, one in enumerate(race):
            same = {"adaptation_id": one.adaptation_id, "race_id": one.race_id, "blueprint_id": one.blueprint_id}
            outcome = CULLED if place else KEPT
            await tamiyo.learn(report_of(f"r{place}", 0.05 - 0.02 * place, outcome=outcome, layer=one.layer, **same))
    elif race[0].actionable:
        for one in race:
            refused = AdaptationPlan(
                adaptation_id=one.adaptation_id,
                run_id=one.run_id,
                status=PlanStatus.REJECTED,
                created_at=one.created_at,
            )
            await tamiyo.note_plan(refused)
    if sequence in (1, 5):
        await tamiyo.learn(report_of(f"x{sequence}", 0.3, run_id="run-2", blueprint_id=f"{sequence}" * 64))
    if sequence == 4:
        lesson = Lesson(report=report_of("elsewhere", -0.2, blueprint_id="e" * 64), family="linear")
        await tamiyo.import_lessons([lesson])


async def live(tamiyo, packets):
    """Have a run live; give what was decided on each packet."""
    decided = []
    for packet in packets:
        decided.append(await tamiyo.analyze(packet))
        await happen(tamiyo, packet.sequence, decided[-1])
    return decided


async def replayed(tamiyo, run_id="run-1", **options):
    return [packet async for packet in tamiyo.client.replay_run(run_id, **options)]


def changed(tmp_path, statement, *values):
    """Change the store behind Tamiyo's back; give the rows changed."""
    with sqlite3.connect(tmp_path / "tamiyo.db") as connection:
        count = connection.execute(statement, values).rowcount
    connection.close()
    return count


async def test_a_run_replays_to_the_bit_with_all_that_came_in_between(services, flattening):
    tamiyo = await services.open()
    decided = await live(tamiyo, flattening)
    found = await replayed(tamiyo)
    assert [packet.sequence for packet in found] == [packet.sequence for packet in flattening]
    assert [packet.differences for packet in found] == [()] * len(flattening)
    assert [packet.replayed for packet in found] == [packet.recorded for packet in found] == decided
    assert [packet.changes for packet in found] == [()] * len(flattening)
    assert sum(row[0].actionable for row in decided) > 1
    assert found[2].num_candidates > 10
    lessons = [packet.num_lessons for packet in found]
    assert lessons[:4] == [0, 1, 1, 1 + len(decided[2])]
    assert lessons[-1] == len(decided[2]) + 3


async def test_a_replay_changes_nothing(services, flattening):
    watched, left_alone = await services.open(), await services.open()
    decided = []
    for packet in flattening:
        decided.append(await watched.analyze(packet))
        await happen(watched, packet.sequence, decided[-1])
        assert all(not one.differences for one in await replayed(watched))
    assert decided == await live(left_alone, flattening)


async def test_a_run_over_restarts_decides_and_replays_as_one_without(services, flattening, url):
    """Every order of packets, reports and plans is kept: a restart gives none of them back at another epoch."""
    expected = await live(await services.open(), flattening)
    decided = []
    for packet in flattening:
        fresh = await services.open(url)
        decided.append(await fresh.analyze(packet))
        await happen(fresh, packet.sequence, decided[-1])
    assert decided == expected
    found = await replayed(await services.open(url))
    assert [packet.replayed for packet in found] == expected
    assert [packet.differences for packet in found] == [()] * len(flattening)


async def test_other_settings_are_found_and_named(services, flattening, url):
    await live(await services.open(url), flattening)
    later = await services.open(url, CAUTIOUS)
    assert not any(packet.differences for packet in await replayed(later)), "what was recorded is what counts"
    found = await replayed(later, present_settings=True)
    acted_on = [packet.sequence for packet in found if packet.recorded[0].actionable]
    assert [packet.sequence for packet in found if packet.differences] == acted_on, "each on the history as it was"
    first = found[acted_on[0] - 1]
    assert first.sequence == 3
    assert ReplayDifference(field="decisions[0].actionable", recorded="True", replayed="False") in first.differences
    assert found[0].changes == (ReplayDifference(field="confidence_threshold", recorded="0.7", replayed="1.0"),)
    assert not any(packet.changes for packet in found[1:])


async def test_settings_that_changed_half_way_are_followed(services, flattening, url):
    await live(await services.open(url, CAUTIOUS), flattening[:5])
    decided = await live(await services.open(url), flattening[5:])
    acted_on = [row[0].state_sequence for row in decided if row[0].actionable]
    assert acted_on
    found = await replayed(await services.open(url))
    assert [packet.differences for packet in found] == [()] * len(flattening)
    instead = await replayed(await services.open(url, CAUTIOUS), present_settings=True)
    assert [packet.sequence for packet in instead if packet.changes] == [6]
    assert [packet.sequence for packet in instead if packet.differences] == acted_on


async def test_candidates_nobody_asked_for_then_are_not_made_up(services, flattening):
    hasty = TamiyoConfig(first_race_epochs=1)
    tamiyo = await services.open()
    await live(tamiyo, flattening)
    tamiyo.policy.config = hasty
    first = (await replayed(tamiyo, present_settings=True))[0]
    (difference,) = first.differences
    assert (difference.field, difference.recorded) == ("candidates", "asked for at no layer")
    assert difference.replayed == "asked for at head, hidden too, of which none are recorded"
    assert first.replayed == ()


async def test_a_decision_that_was_changed_is_found_and_no_other(services, flattening, url, tmp_path):
    tamiyo = await services.open(url)
    decided = await live(tamiyo, flattening)
    false = replace(decided[4][0], confidence=0.123)
    columns = store_module._columns(false)
    statement = "UPDATE tamiyo_decisions SET payload = ?, crc32 = ? WHERE sequence = 5"
    assert changed(tmp_path, statement, columns["payload"], columns["crc32"]) == 1
    found = await replayed(await services.open(url))
    assert [packet.sequence for packet in found if packet.differences] == [5]
    (difference,) = found[4].differences
    assert (difference.field, difference.recorded) == ("decisions[0].confidence", "0.123")
    assert difference.replayed == repr(decided[4][0].confidence)


async def test_a_run_of_before_is_refused_and_goes_on(services, flattening, url, tmp_path):
    """Tables of version 1 are taken over: what they hold still counts, and new runs can be replayed."""
    first = await services.open(url)
    decided = await live(first, flattening[:6])
    for table in ("choices", "parts", "plans"):
        changed(tmp_path, f"DROP TABLE tamiyo_{table}")
    assert changed(tmp_path, "UPDATE tamiyo_schema SET version = 1") == 1
    second = await services.open(url)
    assert await second.analyze(flattening[5]) == decided[5]
    await second.analyze(flattening[6])
    expected = r"run run-1 must be replayable, got packet 1, which was recorded before candidates were kept"
    with pytest.raises(InvalidStateError, match=expected) as refused:
        await replayed(second)
    assert refused.value.parameter == "run_id"
    await live(second, [replace(packet, run_id="run-3") for packet in flattening[:3]])
    assert [packet.differences for packet in await replayed(second, "run-3")] == [()] * 3


async def test_unknown_runs_and_names_that_are_none_are_refused(services):
    tamiyo = await services.open()
    with pytest.raises(NotFoundError, match="run_id must name a run of which packets are kept, got run-9"):
        await replayed(tamiyo, "run-9")
    with pytest.raises(InvalidInputError, match="run_id must match"):
        await replayed(tamiyo, "Run")


async def test_what_is_missing_or_damaged_is_said_and_not_guessed(services, flattening, url, tmp_path):
    await live(await services.open(url), flattening)
    for statement, message in (
        (
            "UPDATE tamiyo_reports SET payload = x'00ff' WHERE report_id = 'x1'",
            "lessons known at packet 2 of run run-1",
        ),
        ("UPDATE tamiyo_parts SET payload = x'00ff'", "of a recorded decision must read, got"),
        ("DELETE FROM tamiyo_parts", "of a recorded decision must read, got nothing"),
        ("DELETE FROM tamiyo_decisions WHERE sequence = 1", "packet 1 of run run-1 and its decisions must read"),
    ):
        assert changed(tmp_path, statement) > 0
        with pytest.raises(CorruptDataError, match=message):
            await replayed(await services.open(url))


async def test_storage_and_work_stay_bounded(services, flattening, url, tmp_path, monkeypatch):
    """Equal candidates are stored once; lists go with the packets that named them; a replay reads a page at a time."""
    tamiyo = await services.open(url)
    await live(tamiyo, flattening)
    with sqlite3.connect(tmp_path / "tamiyo.db") as connection:
        named = {row[0] for row in connection.execute("SELECT candidates FROM tamiyo_choices WHERE candidates != ''")}
        counted = connection.execute("SELECT COUNT(*) FROM tamiyo_parts").fetchone()[0]
    assert 0 < len(named) < 4
    monkeypatch.setattr(store_module, "PACKETS_KEPT", 4)
    for sequence in range(len(flattening) + 1, 60):
        await tamiyo.analyze(packet_of(sequence, 0.4153))
    with sqlite3.connect(tmp_path / "tamiyo.db") as connection:
        assert connection.execute("SELECT COUNT(*) FROM tamiyo_choices").fetchone()[0] == 4
        left = {row[0] for row in connection.execute("SELECT candidates FROM tamiyo_choices WHERE candidates != ''")}
        kept = {row[0] for row in connection.execute("SELECT digest FROM tamiyo_parts")}
    assert kept & named == left & named
    assert len(kept) - len(left) == counted - len(named), "blueprints, menus and settings are those there were"
    with pytest.raises(InvalidStateError, match="got one whose packet 55 is no longer kept; of a run its newest"):
        await replayed(tamiyo)


async def test_a_replay_reads_a_page_at_a_time_and_two_run_at_once(services, monkeypatch):
    tamiyo = await services.open()
    for sequence in range(1, 41):
        await tamiyo.analyze(packet_of(sequence, 1.0 / sequence, run_id="long"))
    read, whole = [], tamiyo.store.packets

    async def packets(*arguments):
        read.append(await whole(*arguments))
        return read[-1]

    monkeypatch.setattr(tamiyo.store, "packets", packets)
    under_way = [tamiyo.replay("long") for _ in range(service_module._MAX_REPLAYS)]
    for one in under_way:
        assert (await anext(one)).sequence == 1
    assert max(len(page) for page in read) <= 16
    with pytest.raises(CapacityExceededError, match="replays under way must be at most 2, got one more"):
        await replayed(tamiyo, "long")
    await tamiyo.analyze(packet_of(41, 0.02, run_id="long"))
    assert [packet.sequence async for packet in under_way[0]] == list(range(2, 41)), "what came later is left out"
    await under_way[1].aclose()
    assert len(await replayed(tamiyo, "long")) == 41


async def test_a_clock_that_is_set_back_changes_no_order(services, monkeypatch, url):
    tamiyo = await services.open(url)
    moments = [datetime(2030, 1, 1, tzinfo=UTC) - timedelta(days=day) for day in range(9)]

    class Clock(datetime):
        @classmethod
        def now(cls, tz):
            return moments.pop(0).astimezone(tz)

    monkeypatch.setattr(store_module, "datetime", Clock)
    names = ["r3", "r1"]
    for name in names:
        await tamiyo.learn(report_of(name))
    again = await services.open(url)
    await again.import_lessons([Lesson(report=report_of("r2"))])
    assert [one.report.report_id for one in await again.store.reports()] == [*names, "r2"]


def test_settings_come_back_as_they_were():
    config = TamiyoConfig(race_size=3, confidence_threshold=0.1 + 0.2, curve=CurveConfig(window=9))
    assert config_of(settings_of(config)) == config
    assert isinstance(config_of(settings_of(config)).race_size, int)


def test_settings_of_another_version_are_refused_or_named():
    present = settings_of(TamiyoConfig())
    stranger = replace(present, settings=(*present.settings, Setting(name="curve.mood", values=(1.0,))))
    with pytest.raises(InvalidStateError, match=r"settings must be known to this version .* got curve\.mood"):
        config_of(stranger)
    older = replace(present, settings=present.settings[1:], versions=present.versions[1:])
    assert config_of(older) == TamiyoConfig()
    assert [(one.field, one.recorded) for one in changes_between(older, present)] == [
        ("calibration version", ""),
        ("confidence_threshold", ""),
    ]


async def test_differences_are_to_the_bit_named_and_bounded(services, flattening):
    (row,) = [row for row in await live(await services.open(), flattening[:3]) if row[0].actionable]
    assert differences_between(row, row) == ()
    one = row[0]
    zeros = replace(one, urgency=0.0), replace(one, urgency=-0.0)
    assert differences_between(zeros[:1], zeros[1:]) == (
        ReplayDifference(field="decisions[0].urgency", recorded="0.0", replayed="-0.0"),
    )
    assert differences_between(row, row[:1]) == (
        ReplayDifference(field="num_decisions", recorded=str(len(row)), replayed="1"),
    )
    assert differences_between((one,), (replace(one, site=None),))[0].replayed == "nothing"
    many = tuple(replace(each, confidence=0.1, urgency=0.1, explanation="e" * 500) for each in row)
    found = differences_between(row * 9, many * 9)
    assert len(found) == MAX_DIFFERENCES
    assert max(len(one.replayed) for one in found) == 200

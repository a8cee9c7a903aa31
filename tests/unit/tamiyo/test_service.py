"""Tamiyo with its store: once only, over restarts, and with a damaged store."""

from __future__ import annotations

import sqlite3
from dataclasses import replace
from datetime import timedelta

import pytest

from esper.blueprints import default_registry
from esper.contracts.blueprint import BlueprintState
from esper.contracts.errors import InvalidInputError, InvalidStateError, UnavailableError
from esper.contracts.run import AdaptationOutcome, Contribution
from esper.contracts.wire import to_wire
from esper.services.tamiyo.calibration import Asked
from esper.services.tamiyo.candidates import CandidateSource
from esper.services.tamiyo.policy import Policy
from esper.services.tamiyo.seed_selection import SeedHistory
from esper.services.tamiyo.service import Tamiyo
from esper.services.tamiyo.store import open_store
from esper.v1 import urza_service_pb2

CULLED = AdaptationOutcome.CULLED


class Library:
    """Answers SearchBlueprints with every template."""

    async def SearchBlueprints(self, request, **_):
        answer = urza_service_pb2.SearchBlueprintsResponse()
        registry = default_registry()
        for name in registry.names():
            blueprint = replace(registry.create_blueprint(name), state=BlueprintState.ACTIVE)
            answer.blueprints.add().CopyFrom(to_wire(blueprint))
        return answer


async def open_tamiyo(url):
    store = await open_store(url)
    tamiyo = Tamiyo(store, Policy(), CandidateSource(Library()))
    await tamiyo.start()
    return tamiyo


@pytest.fixture
async def tamiyo():
    opened = await open_tamiyo("sqlite://")
    yield opened
    await opened.store.database.close()


async def test_the_same_packet_gives_the_decision_taken(tamiyo, flattening):
    decisions = [await tamiyo.analyze(packet) for packet in flattening]
    assert any(row[0].actionable for row in decisions)
    assert [await tamiyo.analyze(packet) for packet in flattening] == decisions


async def test_a_restart_changes_no_decision(tmp_path, flattening, tamiyo):
    expected = [await tamiyo.analyze(packet) for packet in flattening]
    url = f"sqlite:///{tmp_path}/tamiyo.db"
    found = []
    for packet in flattening:
        fresh = await open_tamiyo(url)
        found.append(await fresh.analyze(packet))
        await fresh.store.database.close()
    assert found == expected


async def test_a_restart_lengthens_no_rest_and_no_embargo(tmp_path, flattening, make_report):
    url = f"sqlite:///{tmp_path}/tamiyo.db"
    packets = [replace(one, created_at=one.created_at + timedelta(minutes=one.epoch)) for one in flattening]
    first, second = await open_tamiyo(url), await open_tamiyo(url)
    for packet in packets[:5]:
        await first.analyze(packet)
    await first.learn(make_report("r1", outcome=CULLED, created_at=packets[5].created_at))
    memory = first.policy._runs["run-1"]
    assert memory.rests(3)
    assert memory.embargoed("hidden", "b" * 64, 4)
    for packet in packets[5:]:
        await first.analyze(packet)
    await second.analyze(packets[-1])  # reads the run back
    for memory in (first.policy._runs["run-1"], second.policy._runs["run-1"]):
        assert memory.last_sequence == len(packets)
        assert not memory.rests(3)
        assert not memory.embargoed("hidden", "b" * 64, 4)
    for one in (first, second):
        await one.store.database.close()


async def test_reports_survive_a_restart_and_count_once(tmp_path, make_report):
    url = f"sqlite:///{tmp_path}/tamiyo.db"
    first = await open_tamiyo(url)
    assert await first.learn(make_report("r1"))
    arms = first.posterior(None)
    await first.store.database.close()
    second = await open_tamiyo(url)
    assert not await second.learn(make_report("r1"))
    assert second.posterior(None) == arms
    assert arms[0][0].num_reports == 1
    await second.store.database.close()


async def test_confidence_survives_a_restart(tmp_path, flattening, make_report):
    url = f"sqlite:///{tmp_path}/tamiyo.db"
    first = await open_tamiyo(url)
    race = next(row for row in [await first.analyze(packet) for packet in flattening] if row[0].actionable)
    fresh, asked = first.policy.calibrator.confidence(Asked.of(race[0])), Asked.of(race[0])
    for one in race:
        report = make_report(
            f"r-{one.adaptation_id}", adaptation_id=one.adaptation_id, race_id=one.race_id, outcome=CULLED
        )
        await first.learn(report)
    learned = first.policy.calibrator.confidence(asked)
    await first.store.database.close()
    second = await open_tamiyo(url)
    assert second.policy.calibrator.confidence(asked) == learned < fresh == race[0].confidence
    assert second.policy.calibrator.ask(asked.kind, 0.9, run_id="run-1", under_way=()).fruitless == 1
    await second.store.database.close()


async def test_a_report_knows_the_family_of_what_was_grown(tamiyo, flattening, make_report):
    decisions = [await tamiyo.analyze(packet) for packet in flattening]
    grown = next(row[0] for row in decisions if row[0].actionable)
    await tamiyo.learn(make_report("r1", adaptation_id=grown.adaptation_id, blueprint_id=grown.blueprint_id))
    stored = (await tamiyo.store.reports())[0]
    assert stored.family in ("conv", "attention", "linear", "pointwise")


async def test_a_damaged_store_is_set_aside_and_the_prior_speaks(tmp_path, make_report, caplog):
    path = tmp_path / "tamiyo.db"
    url = f"sqlite:///{path}"
    first = await open_tamiyo(url)
    await first.learn(make_report("r1"))
    await first.store.database.close()
    damaged = b"not a database" * 500
    path.write_bytes(damaged)
    second = await open_tamiyo(url)
    assert second.posterior(None) == []
    assert (tmp_path / "tamiyo.db.corrupt-1").read_bytes() == damaged
    assert "store_corrupt" in [record.message for record in caplog.records]
    assert await second.learn(make_report("r1"))
    await second.store.database.close()


async def test_a_damaged_row_is_left_out_kept_and_said(tmp_path, make_report, caplog):
    path = tmp_path / "tamiyo.db"
    first = await open_tamiyo(f"sqlite:///{path}")
    await first.learn(make_report("r1"))
    await first.learn(make_report("r2"))
    await first.store.database.close()
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE tamiyo_reports SET payload = x'00ff' WHERE report_id = 'r1'")
    connection.close()
    second = await open_tamiyo(f"sqlite:///{path}")
    assert second.posterior(None)[0][0].num_reports == 1
    assert second.store.num_unreadable > 0
    assert await second.store.num_reports() == 2
    assert "stored_row_unreadable" in [record.message for record in caplog.records]
    await second.store.database.close()


async def test_tables_of_another_version_are_refused(tmp_path):
    path = tmp_path / "tamiyo.db"
    first = await open_tamiyo(f"sqlite:///{path}")
    await first.store.database.close()
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE tamiyo_schema SET version = 99")
    connection.close()
    with pytest.raises(InvalidStateError, match="tables must have version 2, got 99"):
        await open_store(f"sqlite:///{path}")


async def test_a_decision_that_could_not_be_stored_is_taken_again(tamiyo, flattening, monkeypatch):
    for packet in flattening[:5]:
        await tamiyo.analyze(packet)

    async def away(*_):
        raise UnavailableError("the store is away")

    with monkeypatch.context() as patched:
        patched.setattr(tamiyo.store, "keep", away)
        with pytest.raises(UnavailableError, match="the store is away"):
            await tamiyo.analyze(flattening[5])
    again = await tamiyo.analyze(flattening[5])
    assert again == await tamiyo.store.decisions("run-1", 6)


async def test_decisions_are_listed_newest_first_by_key(tamiyo, flattening):
    decided = [await tamiyo.analyze(packet) for packet in flattening]
    first = await tamiyo.decisions("run-1", 5, None)
    second = await tamiyo.decisions("run-1", 50, first[-1][0])
    listed = [one for _, one in (*first, *second)]
    everything = [one for row in decided for one in row]
    assert sorted(listed, key=lambda one: one.adaptation_id) == sorted(everything, key=lambda one: one.adaptation_id)
    assert await tamiyo.decisions("run-9", 5, None) == []


async def test_a_seed_is_selected_with_and_without_a_site(tamiyo, flattening):
    seeds = [SeedHistory(seed_index=0, available=False), SeedHistory(seed_index=3)]
    for site in (None, flattening[0].layers[0].site):
        chosen = await tamiyo.select_seed("hidden", seeds, site)
        assert chosen.seed_index == 3
        assert chosen.expected_reward > 0
        assert chosen.exploration_bonus > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"run_id": "Run"}, "run_id must match"),
        ({"step": 1, "run_id": "dead"}, "run_id must not be one of"),
    ],
)
async def test_packets_that_break_a_rule_are_refused(tamiyo, make_packet, change, message):
    with pytest.raises(InvalidInputError, match=message):
        await tamiyo.analyze(make_packet(1, 1.0, **change))


async def test_a_layer_named_twice_is_refused(tamiyo, make_packet, make_layer):
    with pytest.raises(InvalidInputError, match=r"state\.layers must name every layer once"):
        await tamiyo.analyze(make_packet(1, 1.0, layers=(make_layer("head"), make_layer("head"))))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"report_id": ""}, r"report\.report_id must be 1 to 128 characters"),
        ({"decision_confidence": 2.0}, r"report\.decision_confidence must be finite and within \[0"),
        ({"price": -1.0}, r"report\.price must be finite and within \[0"),
        ({"contribution": Contribution(estimate=0, low=1, high=0, num_examples=1)}, "have low <= high"),
        (
            {"contribution": Contribution(estimate=0, low=0, high=0, confidence_level=1.0, num_examples=1)},
            "confidence_level must be within",
        ),
    ],
)
async def test_reports_that_break_a_rule_are_refused(tamiyo, make_report, change, message):
    with pytest.raises(InvalidInputError, match=message):
        await tamiyo.learn(make_report(**change))
    assert await tamiyo.store.num_reports() == 0

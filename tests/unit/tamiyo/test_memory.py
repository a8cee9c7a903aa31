"""What a policy has learned, handed to another: to the bit, once, in order, and apart from the runs of its own."""

from __future__ import annotations

import sqlite3
from dataclasses import replace

import numpy as np
import pytest

from esper.client import AsyncEsperClient
from esper.client.transport import AsyncStubTransport
from esper.contracts.decision import Evidence
from esper.contracts.errors import InvalidInputError, UnavailableError
from esper.contracts.lesson import ImportedMemory, Lesson
from esper.contracts.run import AdaptationOutcome, Contribution
from esper.mesh import InProcessChannel
from esper.services.tamiyo import servicer
from esper.services.tamiyo.calibration import RAW, Asked, Kind
from esper.services.tamiyo.candidates import CandidateSource
from esper.services.tamiyo.policy import Policy
from esper.services.tamiyo.posterior import features_of
from esper.services.tamiyo.server import REGISTRAR
from esper.services.tamiyo.service import Tamiyo
from esper.services.tamiyo.store import open_store
from esper.v1 import tamiyo_service_pb2
from esper.v1.karn_service_pb2 import KarnServiceSubmitFieldReportResponse
from esper.v1.tamiyo_service_pb2_grpc import TamiyoServiceStub
from tests.unit.tamiyo.conftest import SITES, candidates_of, report_of
from tests.unit.tamiyo.test_service import Library

CULLED = AdaptationOutcome.CULLED


class Karn:
    """Notes the reports it is told of, or is away."""

    def __init__(self):
        self.told = []
        self.is_away = False

    async def SubmitFieldReport(self, request, **_):
        if self.is_away:
            raise UnavailableError("Karn is away")
        self.told.append(request.report.report_id)
        return KarnServiceSubmitFieldReportResponse(learned=True)


class Policies:
    """Policies with stores, each behind a channel of its own, and closed at the end."""

    def __init__(self):
        self.opened = []

    async def open(self, url="sqlite://", karn=None):
        store = await open_store(url)
        tamiyo = Tamiyo(store, Policy(), CandidateSource(Library(), karn))
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


class Calls(AsyncStubTransport):
    """Calls of one policy in this process."""

    def __init__(self, channel):
        self.channel = channel

    def stub(self, service):
        assert service == "tamiyo"
        return TamiyoServiceStub(self.channel)


@pytest.fixture
async def policies():
    found = Policies()
    yield found
    await found.close()


async def experienced(policies, flattening, url="sqlite://"):
    """Give a policy that raced once and learned what became of every rival, and of one adaptation it did not begin."""
    tamiyo = await policies.open(url)
    race = next(row for row in [await tamiyo.analyze(packet) for packet in flattening] if row[0].actionable)
    for place, one in enumerate(reversed(race)):
        outcome = AdaptationOutcome.KEPT if place == 0 else CULLED
        changes = {"adaptation_id": one.adaptation_id, "race_id": one.race_id, "blueprint_id": one.blueprint_id}
        await tamiyo.learn(report_of(f"r{place}", 0.05 - 0.02 * place, outcome=outcome, **changes))
    await tamiyo.learn(report_of("x1", 0.01, run_id="run-2"))
    return tamiyo


def believed(tamiyo):
    """Give what a policy would draw for candidates of a run, and its confidence in them: all that it learned shows."""
    asked = [
        features_of(one.site, one.blueprint.id, parameters=one.cost.parameters, progress=0.2, place="run-1/hidden")
        for one in candidates_of()
    ]
    drawn = tamiyo.policy.posterior.draw(asked, np.random.default_rng(3), count=4)
    again = tamiyo.policy.calibrator.ask(Kind.GROW, 0.8, run_id="run-1", under_way=())
    assert again.helped == 1
    return drawn.draws.tobytes(), drawn.mean.tobytes(), tamiyo.policy.calibrator.confidence(again)


async def test_a_policy_that_is_given_the_memory_believes_the_same_to_the_bit(policies, flattening, tmp_path):
    first = await experienced(policies, flattening)
    memory = await first.client.export_memory()
    url = f"sqlite:///{tmp_path}/tamiyo.db"
    second = await policies.open(url)
    num = len(memory.lessons)
    assert num > 3
    assert await second.client.import_memory(memory.lessons) == ImportedMemory(learned=num, known=0, differing=0)
    assert believed(second) == believed(first)
    assert second.policy.reliability() == first.policy.reliability()
    assert second.posterior(None)[0][0] == first.posterior(None)[0][0]
    assert await second.client.import_memory(memory.lessons) == ImportedMemory(learned=0, known=num, differing=0)
    assert believed(await policies.open(url)) == believed(first), "it outlasts a restart"
    assert await second.client.export_memory() == memory, "it can be handed on as it came"


async def test_versions_go_with_it(policies, monkeypatch):
    monkeypatch.setattr(servicer, "MODEL_VERSION", 7)
    monkeypatch.setattr(servicer, "CALIBRATION_VERSION", 8)
    memory = await (await policies.open()).client.export_memory()
    assert (memory.lessons, memory.model_version, memory.calibration_version) == ((), 7, 8)


async def test_pages_give_all_in_the_order_in_which_it_was_learned(policies, flattening, monkeypatch):
    first = await experienced(policies, flattening)
    whole = await first.client.export_memory()
    names = [stored.report.report_id for stored in await first.store.reports()]
    assert [lesson.report.report_id for lesson in whole.lessons] == names
    monkeypatch.setattr(servicer, "_PAGE_BYTES", 1)
    page = await first.client._transport.call("tamiyo", "ExportMemory", tamiyo_service_pb2.ExportMemoryRequest())
    assert len(page.lessons) == 1, "a page is bounded by its bytes"
    assert await first.client.export_memory() == whole
    only = await first.client.export_memory("run-2")
    assert [lesson.report.report_id for lesson in only.lessons] == ["x1"]
    assert only.lessons[0].decision is None


async def test_what_is_imported_and_what_is_reported_stand_in_one_order(policies, flattening):
    lessons = (await (await experienced(policies, flattening)).client.export_memory()).lessons[::-1]
    second = await policies.open()
    await second.learn(report_of("own-1", 0.02, run_id="run-3"))
    await second.client.import_memory(lessons)
    await second.learn(report_of("own-2", 0.03, run_id="run-3"))
    given = [lesson.report.report_id for lesson in lessons]
    assert given == sorted(given, reverse=True), "their order is not that of their names"
    assert list(second.policy.posterior._observations) == ["own-1", *given, "own-2"]
    assert [stored.report.report_id for stored in await second.store.reports()] == ["own-1", *given, "own-2"]


async def test_a_run_of_the_same_name_goes_its_own_way(policies, flattening, tmp_path):
    """Elsewhere it raced and rests; here nothing was tried yet, before the import, after it, and after a restart."""
    lessons = (await (await experienced(policies, flattening)).client.export_memory()).lessons
    lost = [replace(one, report=replace(one.report, outcome=CULLED)) for one in lessons]
    url = f"sqlite:///{tmp_path}/tamiyo.db"
    second = await policies.open(url)
    for packet in flattening[:2]:
        await second.analyze(packet)
    before = [decision for _, decision in await second.decisions("run-1", 50, None)]
    await second.client.import_memory(lost)
    third = await policies.open(url)
    await third.analyze(flattening[1])
    for tamiyo in (second, third):
        memory = tamiyo.policy._runs["run-1"]
        assert not memory.rests(20)
        assert [memory.measured(one.report.adaptation_id) for one in lessons] == [None] * len(lessons)
        assert [decision for _, decision in await tamiyo.decisions("run-1", 50, None)] == before
        assert await tamiyo.store.reports_of("run-1") == []
        assert await tamiyo.store.decisions("run-1", 3) == (), "it decides on its own third packet itself"
    assert {one.decision.state_sequence for one in lessons if one.decision is not None} == {3}


async def test_a_report_that_comes_in_after_its_lesson_still_reaches_its_run(policies, flattening):
    first = await experienced(policies, flattening)
    memory = await first.client.export_memory()
    second = await policies.open()
    await second.client.import_memory(memory.lessons)
    beliefs = believed(second)
    report = memory.lessons[0].report
    assert await second.learn(report)
    measured = second.policy._runs["run-1"].measured(report.adaptation_id)
    assert measured is not None
    assert measured.effect == report.contribution.estimate
    assert believed(second) == beliefs, "its reward was learned before"


async def test_a_known_report_with_another_content_is_counted_and_stands(policies):
    tamiyo = await policies.open()
    await tamiyo.learn(report_of("r1", 0.05))
    given = [Lesson(report=report_of(name, 0.9)) for name in ("r1", "r2", "r2")]
    assert await tamiyo.client.import_memory(given) == ImportedMemory(learned=1, known=1, differing=1)
    assert [one.reward for one in tamiyo.policy.posterior._observations.values()] == [0.05, 0.9]


async def test_a_damaged_lesson_is_left_out_said_and_mended(policies, flattening, tmp_path):
    path = tmp_path / "tamiyo.db"
    first = await experienced(policies, flattening, f"sqlite:///{path}")
    whole = await first.client.export_memory()
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE tamiyo_reports SET payload = x'00ff' WHERE report_id = 'r0'")
    connection.close()
    second = await policies.open(f"sqlite:///{path}")
    memory = await second.client.export_memory()
    assert memory.num_unreadable == 1
    assert memory.lessons == whole.lessons[1:]
    found = await second.client.import_memory(whole.lessons)
    assert found == ImportedMemory(learned=1, known=len(whole.lessons) - 1, differing=0)
    assert believed(await policies.open(f"sqlite:///{path}")) == believed(first)


async def test_karn_is_told_first_or_nothing_is_learned(policies):
    karn = Karn()
    tamiyo = await policies.open(karn=karn)
    lessons = [Lesson(report=report_of(f"r{place}")) for place in range(3)]
    karn.is_away = True
    with pytest.raises(UnavailableError, match="Karn is away"):
        await tamiyo.client.import_memory(lessons)
    assert await tamiyo.store.reports() == []
    assert tamiyo.policy.posterior.num_observations == 0
    karn.is_away = False
    assert (await tamiyo.client.import_memory(lessons)).learned == 3
    assert karn.told == ["r0", "r1", "r2"]
    kind = SITES["hidden"].kind
    assert tamiyo.candidates._lessons[kind] == 3, "designs are asked for anew"


async def test_many_lessons_go_in_several_requests(policies):
    tamiyo = await policies.open()
    lessons = [Lesson(report=report_of(f"r{place:03}", None)) for place in range(201)]
    assert (await tamiyo.client.import_memory(lessons)).learned == 201
    assert (await tamiyo.client.export_memory()).lessons == tuple(lessons)
    assert await tamiyo.client.import_memory([]) == ImportedMemory(learned=0, known=0, differing=0)


@pytest.mark.parametrize("count", [0, 201])
async def test_a_request_of_another_size_is_refused(policies, count):
    tamiyo = await policies.open()
    request = tamiyo_service_pb2.ImportMemoryRequest(lessons=[tamiyo_service_pb2.Lesson()] * count)
    with pytest.raises(InvalidInputError, match=f"lessons must hold 1 to 200 lessons, got {count}"):
        await tamiyo.client._transport.call("tamiyo", "ImportMemory", request)


def evidence(name, value):
    return lambda one: replace(one, decision=replace(one.decision, evidence=(Evidence(name=name, value=value),)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda one: replace(one, family="Conv"), r"lesson\.family must match"),
        (lambda one: replace(one, family="c" * 33), r"lesson\.family must be 1 to 32 characters long"),
        (
            lambda one: replace(one, decision=replace(one.decision, adaptation_id="a" + "9" * 32)),
            r"lesson\.decision\.adaptation_id must be that of its report",
        ),
        (
            lambda one: replace(
                one, report=replace(one.report, contribution=Contribution(estimate=0, low=1, high=0, num_examples=1))
            ),
            "have low <= high",
        ),
        (evidence(RAW, 1.5), r"decision\.evidence\.confidence_before_calibration must be finite and within \[0"),
        (evidence(RAW, float("nan")), "confidence_before_calibration must be finite"),
        (evidence("fruitless_before", float("inf")), "fruitless_before must be finite"),
        (evidence("helped_before", -1.0), "helped_before must be finite and within"),
    ],
)
async def test_a_lesson_that_breaks_a_rule_is_refused_with_all_beside_it(policies, flattening, change, message):
    lessons = (await (await experienced(policies, flattening)).client.export_memory()).lessons
    assert Asked.of(lessons[0].decision) is not None
    karn = Karn()
    second = await policies.open(karn=karn)
    with pytest.raises(InvalidInputError, match=message):
        await second.client.import_memory([lessons[1], change(lessons[0])])
    assert await second.store.reports() == []
    assert karn.told == []

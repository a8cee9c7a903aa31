"""Tamiyo on an in-process bus with real servicers behind in-process channels."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

from esper.blueprints import default_registry
from esper.contracts.blueprint import BlueprintState
from esper.contracts.decision import AdaptationDecision, AdaptationPlan, PlanStatus
from esper.contracts.errors import InvalidInputError, InvalidStateError, NotFoundError, UnavailableError
from esper.contracts.kernel import CompileJob, CompileSpec, JobPhase, KernelForecast, KernelReady
from esper.contracts.run import AdaptationOutcome, FieldReport, SystemStatePacket
from esper.contracts.wire import from_wire, serialize, to_wire
from esper.mesh import InProcessChannel
from esper.services.tamiyo.bus_loop import BusLoopConfig
from esper.services.tamiyo.config import TamiyoConfig
from esper.services.tamiyo.server import REGISTRAR, TamiyoNode, TamiyoNodeConfig
from esper.telemetry import DEAD, EVENTS, MemoryBroker, MemoryBus, build_subject, dead_subject
from esper.telemetry.bus import CONTENT_TYPE_HEADER
from esper.telemetry.consumer import content_type, decode
from esper.v1 import decision_pb2, kernel_pb2, tamiyo_service_pb2, telemetry_pb2, tezzeret_service_pb2
from esper.v1.tamiyo_service_pb2_grpc import TamiyoServiceStub
from esper.v1.tezzeret_service_pb2 import CompileResponse
from esper.v1.tezzeret_service_pb2_grpc import (
    TezzeretServiceServicer,
    TezzeretServiceStub,
    add_TezzeretServiceServicer_to_server,
)
from esper.v1.urza_service_pb2 import SearchBlueprintsResponse
from esper.v1.urza_service_pb2_grpc import UrzaServiceServicer, UrzaServiceStub, add_UrzaServiceServicer_to_server
from tests.unit.tamiyo.conftest import MOMENT, SITES

MESSAGES = {
    SystemStatePacket: ("state", telemetry_pb2.SystemStatePacket),
    FieldReport: ("field_report", telemetry_pb2.FieldReport),
    AdaptationPlan: ("plan", decision_pb2.AdaptationPlan),
}
JOB = CompileJob(
    job_id="j1",
    content_key="0" * 64,
    blueprint_id="b",
    spec=CompileSpec(ir=default_registry().create_blueprint("lora").ir, site=SITES["hidden"]),
    phase=JobPhase.QUEUED,
    artifact_id="k" + "1" * 32,
    created_at=MOMENT,
)


class Library(UrzaServiceServicer):
    """Offers every template."""

    async def SearchBlueprints(self, request, context):
        answer = SearchBlueprintsResponse()
        registry = default_registry()
        for name in registry.names():
            blueprint = replace(registry.create_blueprint(name), state=BlueprintState.ACTIVE)
            answer.blueprints.add().CopyFrom(to_wire(blueprint))
        return answer


class Compiler(TezzeretServiceServicer):
    """Notes what it is asked; refuses when told to."""

    def __init__(self):
        self.requests = []
        self.foreseen = []
        self.phase = JobPhase.SUCCEEDED
        self.contexts = []
        self.asked = asyncio.Event()
        self.refuses = False

    async def Compile(self, request, context):
        if not request.adaptation_id:  # nobody waits for it
            self.foreseen.append(request)
            return CompileResponse(job=to_wire(replace(JOB, phase=self.phase)))
        self.requests.append(request)
        self.contexts.append(trace.get_current_span().get_span_context())
        self.asked.set()
        if self.refuses:
            raise InvalidStateError("the compiler refuses")
        return CompileResponse()


class Mesh:
    """One broker, its bus, the services around Tamiyo, and Tamiyo itself."""

    def __init__(self):
        self.broker = MemoryBroker()
        self.bus = MemoryBus(self.broker)
        self.channel = InProcessChannel()
        self.compiler = Compiler()
        self.channel.add_servicer(add_UrzaServiceServicer_to_server, Library())
        self.channel.add_servicer(add_TezzeretServiceServicer_to_server, self.compiler)
        self.node = None

    async def open(self, *, url="sqlite://", tezzeret=True, race_size=1, **loop):
        await self.bus.ensure_streams()
        policy = TamiyoConfig(race_size=race_size)
        config = TamiyoNodeConfig(database_url=url, policy=policy, bus_loop=BusLoopConfig(retry_delay_s=0.0, **loop))
        compiler = TezzeretServiceStub(self.channel) if tezzeret else None
        self.node = await TamiyoNode.open(config, bus=self.bus, urza=UrzaServiceStub(self.channel), tezzeret=compiler)
        return self

    async def send(self, *values):
        for value in values:
            kind, message = MESSAGES[type(value)]
            headers = {CONTENT_TYPE_HEADER: content_type(message)}
            await self.bus.publish(build_subject(value.run_id, kind), serialize(value), headers=headers, durable=True)

    async def published(self, kind, message, cls, count, run="run-1"):
        """Give the first ``count`` messages of a kind, waiting for them at most ten seconds."""
        consumer = await self.bus.consume(EVENTS.name, f"test-{kind}-{run}", build_subject(run, kind))
        found = []
        async with asyncio.timeout(10):
            while len(found) < count:
                delivery = await anext(consumer)
                found.append((from_wire(decode(delivery.message, message), cls), delivery.message))
                await delivery.ack()
        await consumer.close()
        return found

    async def decisions(self, count, run="run-1"):
        return await self.published("decision", decision_pb2.AdaptationDecision, AdaptationDecision, count, run)

    async def dead(self):
        consumer = await self.bus.consume(DEAD.name, "test-dead", dead_subject(EVENTS.name))
        async with asyncio.timeout(10):
            return (await anext(consumer)).message


@pytest.fixture
async def mesh():
    mesh = Mesh()
    yield mesh
    if mesh.node is not None:
        await mesh.node.close()
    await mesh.channel.close()
    await mesh.bus.close()


async def test_every_packet_is_answered_and_growth_is_sent_to_be_compiled(mesh, flattening):
    await mesh.open()
    await mesh.send(*flattening)
    decisions = [one for one, _ in await mesh.decisions(len(flattening))]
    assert [one.state_sequence for one in decisions] == list(range(1, len(flattening) + 1))
    grown = [one for one in decisions if one.actionable]
    assert grown
    async with asyncio.timeout(5):
        await mesh.compiler.asked.wait()
    request = mesh.compiler.requests[0]
    assert request.adaptation_id == grown[0].adaptation_id
    assert request.run_id == "run-1"
    assert not request.wait
    assert request.spec.random_seed == 0


async def test_runs_of_other_seeds_ask_for_the_same_kernels(mesh, flattening):
    await mesh.open()
    for seed in (7, 8):
        run = f"run-{seed}"
        await mesh.send(*(replace(one, run_id=run, random_seed=seed) for one in flattening))
        await mesh.decisions(len(flattening), run)
    asked = {(one.run_id, one.spec.random_seed) for one in mesh.compiler.requests}
    assert {run for run, _ in asked} == {"run-7", "run-8"}
    assert {seed for _, seed in asked} == {0}


async def test_a_run_is_told_which_kernels_it_is_likely_to_want_next(mesh, flattening):
    await mesh.open()
    told = await mesh.bus.subscribe(build_subject("run-1", "forecast"))
    await mesh.send(*flattening)
    async with asyncio.timeout(10):
        message = await anext(told)
    forecast = from_wire(decode(message, kernel_pb2.KernelForecast), KernelForecast)
    assert forecast == KernelForecast(run_id="run-1", artifact_ids=(JOB.artifact_id,) * len(forecast.artifact_ids))
    assert len(forecast.artifact_ids) == len(mesh.compiler.foreseen) > 8
    assert {one.priority for one in mesh.compiler.foreseen} == {tezzeret_service_pb2.JOB_PRIORITY_BULK}
    assert {one.run_id for one in mesh.compiler.foreseen} == {""}


async def test_a_forecaster_that_fails_costs_no_decision(mesh, flattening, monkeypatch, caplog):
    await mesh.open()

    async def broken(_):
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(mesh.node._loop._forecaster, "foresee", broken)
    await mesh.send(*flattening)
    assert len(await mesh.decisions(len(flattening))) == len(flattening)
    assert "forecast_failed" in caplog.text


async def test_a_redelivered_packet_publishes_nothing_new(mesh, flattening):
    await mesh.open()
    await mesh.send(*flattening, *flattening)
    await mesh.decisions(len(flattening))
    report = [one async for one in mesh.bus.replay(build_subject("run-1", "decision"))]
    assert len(report) == len(flattening)


async def test_when_the_compiler_refuses_the_run_is_told(mesh, flattening):
    mesh.compiler.refuses = True
    await mesh.open()
    await mesh.send(*flattening)
    (failure, _), *_ = await mesh.published("kernel", kernel_pb2.KernelReady, KernelReady, 1)
    assert failure.artifact_id == ""
    assert "the compiler refuses" in failure.error
    assert failure.adaptation_id.startswith("a")


async def test_without_a_compiler_the_run_is_told(mesh, flattening):
    await mesh.open(tezzeret=False)
    await mesh.send(*flattening)
    (failure, _), *_ = await mesh.published("kernel", kernel_pb2.KernelReady, KernelReady, 1)
    assert "no compiler is configured" in failure.error


async def test_reports_and_plans_from_the_bus_are_taken_in(mesh, flattening, make_report):
    await mesh.open()
    plan = AdaptationPlan(
        adaptation_id="a1", run_id="run-1", status=PlanStatus.REJECTED, created_at=flattening[0].created_at
    )
    await mesh.send(make_report("r1"), make_report("r1"), plan, *flattening[:1])
    await mesh.decisions(1)
    assert await mesh.node.tamiyo.store.num_reports() == 1
    assert mesh.node.tamiyo.policy.posterior.num_observations == 1


async def test_a_message_that_breaks_a_rule_goes_to_the_dead_letters(mesh, make_report, flattening):
    await mesh.open()
    await mesh.send(make_report("r1", decision_confidence=7.0), flattening[0])
    dead = await mesh.dead()
    assert "decision_confidence" in dead.headers["Esper-Dead-Reason"]
    assert await mesh.decisions(1), "the loop goes on"


async def test_while_the_store_is_away_nothing_is_lost(mesh, flattening, monkeypatch):
    await mesh.open()
    store, failures = mesh.node.tamiyo.store, []
    keep = store.keep

    async def away_twice(packet, *rest):
        if len(failures) < 2:
            failures.append(packet.sequence)
            raise UnavailableError("the store is away")
        await keep(packet, *rest)

    monkeypatch.setattr(store, "keep", away_twice)
    await mesh.send(flattening[0])
    (decision, _), *_ = await mesh.decisions(1)
    assert decision.state_sequence == 1
    assert failures == [1, 1]


async def test_a_defect_costs_one_message_and_not_the_loop(mesh, flattening, make_report, monkeypatch):
    await mesh.open()

    async def broken(_):
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(mesh.node.tamiyo, "learn", broken)
    await mesh.send(make_report("r1"), flattening[0])
    assert "ZeroDivisionError: a defect" in (await mesh.dead()).headers["Esper-Dead-Reason"]
    assert await mesh.decisions(1)


async def test_packets_from_long_ago_are_taken_in_and_nobody_is_told(mesh, flattening, make_report):
    await mesh.bus.ensure_streams()
    await mesh.send(*flattening[:5], make_report("last", decision_confidence=7.0))
    await mesh.open(stale_after_s=1e-9)
    await mesh.dead()  # messages are handled in order: with the last one dead, the packets are done
    tracker = mesh.node.tamiyo.tracker
    assert (await tracker.get_seed_metrics("hidden")).num_samples == 5
    assert [one async for one in mesh.bus.replay(build_subject("run-1", "decision"))] == []


async def test_after_a_restart_the_place_and_the_run_are_kept(mesh, flattening, tmp_path):
    url = f"sqlite:///{tmp_path}/tamiyo.db"
    await mesh.open(url=url)
    await mesh.send(*flattening[:8])
    await mesh.decisions(8)
    await mesh.node.close()
    await mesh.send(*flattening[8:])
    await mesh.open(url=url)
    later = [one for one, _ in await mesh.decisions(len(flattening) - 8)]
    assert [one.state_sequence for one in later] == list(range(9, len(flattening) + 1))


async def test_one_adaptation_is_one_trace(mesh, flattening, monkeypatch):
    provider = TracerProvider(shutdown_on_exit=False)
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
    await mesh.open()
    await mesh.send(*flattening)
    decisions = await mesh.decisions(len(flattening))
    acted = next(message for one, message in decisions if one.actionable)
    async with asyncio.timeout(5):
        await mesh.compiler.asked.wait()
    trace_id = acted.headers["traceparent"].split("-")[1]
    assert format(mesh.compiler.contexts[0].trace_id, "032x") == trace_id
    quiet = next(message for one, message in decisions if not one.actionable)
    assert quiet.headers.get("traceparent", "--").split("-")[1] != trace_id


async def test_the_servicer_answers_every_method(mesh, flattening, make_report):
    await mesh.open()
    mesh.channel.add_servicer(REGISTRAR, mesh.node.servicer)
    stub = TamiyoServiceStub(mesh.channel)
    for packet in flattening:
        answer = await stub.Analyze(tamiyo_service_pb2.AnalyzeRequest(state=to_wire(packet)))
        decision = from_wire(answer.decision, AdaptationDecision)
        assert 0 <= decision.confidence <= 1
        assert decision.adaptation_type in ("add_seed", "remove_seed", "modify_architecture", "optimize_parameters")
    submit = tamiyo_service_pb2.SubmitFieldReportRequest(report=to_wire(make_report("r1")))
    assert (await stub.SubmitFieldReport(submit)).learned
    assert not (await stub.SubmitFieldReport(submit)).learned
    arms = (await stub.GetPosterior(tamiyo_service_pb2.GetPosteriorRequest())).arms
    assert [arm.reports for arm in arms] == [1]
    seeds = [tamiyo_service_pb2.SeedPerformance(seed_index=2, rewards=[0.1], available=True)]
    chosen = await stub.SelectSeed(tamiyo_service_pb2.SelectSeedRequest(layer="hidden", seeds=seeds))
    assert chosen.seed_index == 2
    assert chosen.expected_reward > 0
    assert chosen.exploration_bonus > 0


async def test_pages_of_decisions_meet_without_gap_or_repeat(mesh, flattening):
    await mesh.open()
    mesh.channel.add_servicer(REGISTRAR, mesh.node.servicer)
    stub = TamiyoServiceStub(mesh.channel)
    for packet in flattening:
        await stub.Analyze(tamiyo_service_pb2.AnalyzeRequest(state=to_wire(packet)))
    seen, token = [], ""
    while True:
        request = tamiyo_service_pb2.ListDecisionsRequest(run_id="run-1", page_size=5, page_token=token)
        page = await stub.ListDecisions(request)
        seen += [one.state_sequence for one in page.decisions]
        token = page.next_page_token
        if not token:
            break
    assert sorted(seen) == list(range(1, len(flattening) + 1))
    with pytest.raises(InvalidInputError, match="page_token must be empty or one this listing gave"):
        await stub.ListDecisions(tamiyo_service_pb2.ListDecisionsRequest(page_token="x"))


@pytest.mark.parametrize(
    ("method", "request_", "message"),
    [
        ("Analyze", tamiyo_service_pb2.AnalyzeRequest(), "state must be set, got 'nothing'"),
        ("SubmitFieldReport", tamiyo_service_pb2.SubmitFieldReportRequest(), "report must be set, got 'nothing'"),
        ("SelectSeed", tamiyo_service_pb2.SelectSeedRequest(layer="l"), "seeds must hold 1 to 4096 seeds, got 0"),
        ("GetPosterior", tamiyo_service_pb2.GetPosteriorRequest(site_kind=99), "site_kind must be one of LINEAR"),
        ("ListDecisions", tamiyo_service_pb2.ListDecisionsRequest(run_id="A"), "run_id must match"),
    ],
)
async def test_bad_requests_are_refused_with_the_field(mesh, method, request_, message):
    await mesh.open()
    mesh.channel.add_servicer(REGISTRAR, mesh.node.servicer)
    with pytest.raises(InvalidInputError, match=message):
        await getattr(TamiyoServiceStub(mesh.channel), method)(request_)


def test_settings_that_break_their_rule_are_refused():
    with pytest.raises(InvalidInputError, match="stale_after_s must be > 0 seconds, got 0"):
        BusLoopConfig(stale_after_s=0)
    with pytest.raises(InvalidInputError, match="retry_delay_s must be >= 0 seconds, got -1"):
        BusLoopConfig(retry_delay_s=-1)
    with pytest.raises(InvalidInputError, match="max_deliver must be >= 1, got 0"):
        BusLoopConfig(max_deliver=0)


async def test_every_decision_of_a_race_is_published_compiled_and_kept(mesh, flattening, tmp_path):
    url = f"sqlite:///{tmp_path}/tamiyo.db"
    await mesh.open(url=url, race_size=6)
    await mesh.send(*flattening)
    decisions = [one for one, _ in await mesh.decisions(len(flattening) + 2)]
    race = [one for one in decisions if one.race_size and one.actionable]
    assert len(race) >= 3
    rivals = [one for one in race if one.race_id == race[0].adaptation_id]
    assert len(rivals) == race[0].race_size >= 3
    store = mesh.node.tamiyo.store
    assert await store.decisions("run-1", race[0].state_sequence) == tuple(rivals)
    for one in rivals:
        assert await store.decision_of(one.adaptation_id) == one
    mesh.channel.add_servicer(REGISTRAR, mesh.node.servicer)
    packet = flattening[race[0].state_sequence - 1]
    answer = await TamiyoServiceStub(mesh.channel).Analyze(tamiyo_service_pb2.AnalyzeRequest(state=to_wire(packet)))
    assert [from_wire(one, AdaptationDecision) for one in (answer.decision, *answer.rivals)] == rivals
    await mesh.node.close()
    await mesh.open(url=url, race_size=6)
    assert await mesh.node.tamiyo.analyze(packet) == tuple(rivals)
    assert {one.adaptation_id for one in rivals} <= {one.adaptation_id for one in mesh.compiler.requests}


async def test_a_decision_is_explained_with_its_race_and_what_became_of_it(mesh, flattening, make_report):
    await mesh.open(race_size=6)
    mesh.channel.add_servicer(REGISTRAR, mesh.node.servicer)
    stub = TamiyoServiceStub(mesh.channel)
    tamiyo = mesh.node.tamiyo
    rows = [await tamiyo.analyze(packet) for packet in flattening]
    first, second, *others = next(row for row in rows if row[0].actionable)
    third = others[0]
    kept = make_report("r1", adaptation_id=first.adaptation_id, race_id=first.race_id, price=0.01, reason="it pays")
    lost = make_report(
        "r2",
        reward=-0.02,
        adaptation_id=second.adaptation_id,
        race_id=first.race_id,
        outcome=AdaptationOutcome.CULLED,
        reason="lost its race",
    )
    for report in (kept, lost, make_report("r3", adaptation_id="a" + "9" * 32)):
        await tamiyo.learn(report)
    answer = await stub.Explain(tamiyo_service_pb2.ExplainRequest(adaptation_id=first.adaptation_id))
    assert from_wire(answer.decision, AdaptationDecision) == first
    assert [from_wire(one, AdaptationDecision) for one in answer.rivals] == [second, *others]
    assert [one.report_id for one in answer.reports] == ["r1", "r2"]
    text = "\n".join(answer.lines)
    assert f"{first.adaptation_id}, run run-1, epoch {first.epoch}: {first.adaptation_type.value}, acted on" in text
    assert f"confidence {first.confidence:.2f} (" in text
    assert " before calibration, threshold 0.7)" in text
    assert "curve: warming up" in text
    assert "epochs_seen = 3" in text
    assert f"raced against {1 + len(others)}:" in text
    assert "culled, brought -0.0200 (-0.0300 to -0.0100) at a price of 0.0000: lost its race" in text
    assert f"{third.blueprint.name} at {third.layer}: no report yet" in text
    assert "came to: kept, brought +0.0500 (+0.0400 to +0.0600) at a price of 0.0100: it pays" in text
    quiet = rows[0][0]
    short = (await stub.Explain(tamiyo_service_pb2.ExplainRequest(adaptation_id=quiet.adaptation_id))).lines
    assert "not acted on" in short[0]
    assert not any("raced" in line or "came to" in line for line in short)


@pytest.mark.parametrize(
    ("adaptation_id", "error", "message"),
    [
        ("", InvalidInputError, "adaptation_id must"),
        ("a" * 33, NotFoundError, "adaptation_id must name a decision of this policy, got aaa"),
    ],
)
async def test_what_cannot_be_explained_is_said(mesh, adaptation_id, error, message):
    await mesh.open()
    mesh.channel.add_servicer(REGISTRAR, mesh.node.servicer)
    with pytest.raises(error, match=message):
        await TamiyoServiceStub(mesh.channel).Explain(tamiyo_service_pb2.ExplainRequest(adaptation_id=adaptation_id))

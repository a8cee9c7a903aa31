"""Tamiyo, Karn and Urza on a real bus and real sockets: from packets to decisions to what is learned from them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from esper.contracts.blueprint import Site, SiteKind
from esper.contracts.decision import AdaptationDecision
from esper.contracts.errors import InvalidStateError
from esper.contracts.kernel import KernelReady
from esper.contracts.lifecycle import SeedLifecycleState
from esper.contracts.run import (
    AdaptationOutcome,
    BudgetStatus,
    Contribution,
    FieldReport,
    LayerStatus,
    RunPhase,
    SeedStatus,
    SystemStatePacket,
)
from esper.contracts.wire import from_wire, serialize, to_wire
from esper.mesh import MeshServer, ServerConfig, open_channel
from esper.services.karn.server import KarnNode
from esper.services.tamiyo.bus_loop import BusLoopConfig
from esper.services.tamiyo.config import TamiyoConfig
from esper.services.tamiyo.server import TamiyoNode, TamiyoNodeConfig
from esper.services.urza.server import UrzaConfig, UrzaService, register
from esper.telemetry import EVENTS, NatsBus, NatsServer, NatsServerConfig, build_subject
from esper.telemetry.consumer import decode
from esper.v1 import decision_pb2, karn_service_pb2, kernel_pb2, tamiyo_service_pb2
from esper.v1.karn_service_pb2_grpc import KarnServiceStub
from esper.v1.tamiyo_service_pb2_grpc import TamiyoServiceStub
from esper.v1.tezzeret_service_pb2 import CompileRequest, CompileResponse
from esper.v1.tezzeret_service_pb2_grpc import (
    TezzeretServiceServicer,
    TezzeretServiceStub,
    add_TezzeretServiceServicer_to_server,
)
from esper.v1.urza_service_pb2_grpc import UrzaServiceStub

SITE = Site(kind=SiteKind.LINEAR, input_shape=(64,), output_shape=(16,))
LOSSES = (2.0, 1.2, 0.8, 0.6, 0.5, 0.45, 0.43, 0.42, 0.417, 0.416, 0.4155, 0.4153)


class Compiler(TezzeretServiceServicer):
    """Notes what it is asked to compile, or refuses."""

    def __init__(self) -> None:
        self.requests: list[CompileRequest] = []
        self.refuses = False

    async def Compile(self, request: CompileRequest, context: Any) -> CompileResponse:
        if not request.adaptation_id:  # of a forecast
            return CompileResponse()
        self.requests.append(request)
        if self.refuses:
            raise InvalidStateError("no worker is left")
        return CompileResponse()


@dataclass
class Mesh:
    """Everything a test needs of the running services."""

    bus: NatsBus
    tamiyo: TamiyoNode
    karn: KarnNode
    compiler: Compiler
    stubs: dict[str, Any]
    nats: NatsServer

    async def publish(self, value: SystemStatePacket | FieldReport) -> None:
        kind = "state" if isinstance(value, SystemStatePacket) else "field_report"
        await self.bus.publish(build_subject(value.run_id, kind), serialize(value), durable=True)

    async def published(self, kind: str, message: Any, cls: Any, count: int) -> list[Any]:
        consumer = await self.bus.consume(EVENTS.name, f"test-{kind}", build_subject("run-1", kind))
        found: list[Any] = []
        async with asyncio.timeout(30):
            while len(found) < count:
                delivery = await anext(consumer)
                found.append(from_wire(decode(delivery.message, message), cls))
                await delivery.ack()
        await consumer.close()
        return found

    async def decisions(self, count: int) -> list[AdaptationDecision]:
        return await self.published("decision", decision_pb2.AdaptationDecision, AdaptationDecision, count)


@pytest.fixture
async def mesh(tmp_path: Path) -> AsyncIterator[Mesh]:
    async with AsyncExitStack() as stack:
        nats = await stack.enter_async_context(NatsServer(NatsServerConfig(store_dir=tmp_path / "nats")))
        bus = await stack.enter_async_context(await NatsBus.connect(nats.url))
        await bus.ensure_streams()
        compiler = Compiler()
        urza = await stack.enter_async_context(UrzaService(UrzaConfig(database_url="sqlite://"), bus=bus))
        stubs: dict[str, Any] = {}

        async def serve(name: str, stub: Any, add: Any) -> None:
            server = MeshServer(ServerConfig(drain_deadline_s=1.0))
            add(server)
            await stack.enter_async_context(server)
            channel = await stack.enter_async_context(open_channel(server.address))
            stubs[name] = stub(channel)

        await serve("urza", UrzaServiceStub, lambda server: register(server, urza.servicer))
        await serve(
            "tezzeret",
            TezzeretServiceStub,
            lambda server: server.add_servicer(add_TezzeretServiceServicer_to_server, compiler),
        )
        karn = await stack.enter_async_context(await KarnNode.open(bus=bus, urza=stubs["urza"]))
        await serve("karn", KarnServiceStub, karn.add_to)
        config = TamiyoNodeConfig(policy=TamiyoConfig(race_size=1), bus_loop=BusLoopConfig(retry_delay_s=0.1))
        tamiyo = await stack.enter_async_context(
            await TamiyoNode.open(config, bus=bus, urza=stubs["urza"], karn=stubs["karn"], tezzeret=stubs["tezzeret"])
        )
        await serve("tamiyo", TamiyoServiceStub, tamiyo.add_to)
        yield Mesh(bus, tamiyo, karn, compiler, stubs, nats)


def packet(sequence: int, loss: float) -> SystemStatePacket:
    seeds = tuple(SeedStatus(seed_index=index, state=SeedLifecycleState.DORMANT) for index in range(4))
    return SystemStatePacket(
        run_id="run-1",
        sequence=sequence,
        phase=RunPhase.TRAINING,
        epoch=sequence,
        step=32 * sequence,
        train_loss=loss,
        control_loss=loss,
        control_loss_se=0.02,
        planned_epochs=40,
        layers=(LayerStatus(layer="hidden", site=SITE, seeds=seeds),),
        budget=BudgetStatus(max_added_parameters=3_000),
        created_at=datetime.now(UTC),
    )


def outcome(decision: AdaptationDecision, reward: float) -> FieldReport:
    return FieldReport(
        report_id=f"report-{decision.adaptation_id}",
        adaptation_id=decision.adaptation_id,
        run_id=decision.run_id,
        layer=decision.layer,
        seed_index=decision.seed_index or 0,
        site=decision.site,
        blueprint_id=decision.blueprint_id,
        outcome=AdaptationOutcome.KEPT,
        contribution=Contribution(estimate=reward, low=reward - 0.01, high=reward + 0.01, num_examples=400),
        decision_confidence=decision.confidence,
        created_at=datetime.now(UTC),
    )


async def run_to_plateau(mesh: Mesh) -> list[AdaptationDecision]:
    for place, loss in enumerate(LOSSES, start=1):
        await mesh.publish(packet(place, loss))
    return await mesh.decisions(len(LOSSES))


async def test_a_plateau_is_grown_compiled_and_learned_from(mesh: Mesh) -> None:
    decisions = await run_to_plateau(mesh)
    grown = [one for one in decisions if one.actionable]
    assert grown
    assert grown[0].blueprint is not None
    await mesh.publish(outcome(grown[0], 0.08))
    await mesh.publish(packet(len(LOSSES) + 1, 0.3))
    assert (await mesh.decisions(1))[0].epoch == len(LOSSES) + 1  # events are handled in order: all before is done
    assert [request.adaptation_id for request in mesh.compiler.requests] == [one.adaptation_id for one in grown]
    assert mesh.compiler.requests[0].spec.ir == to_wire(grown[0].blueprint.ir)
    arms = (await mesh.stubs["tamiyo"].GetPosterior(tamiyo_service_pb2.GetPosteriorRequest())).arms
    assert [(arm.blueprint_id, arm.reports) for arm in arms] == [(grown[0].blueprint_id, 1)]
    assert arms[0].blueprint_name == grown[0].blueprint.name
    assert arms[0].mean > 0.04


async def test_what_karn_designed_stands_among_the_candidates(mesh: Mesh) -> None:
    candidates = await mesh.tamiyo.tamiyo.candidates.candidates(packet(1, 1.0))
    designed = [one.blueprint for one in candidates if one.blueprint.lineage.author == "karn"]
    assert len(designed) == 4
    assert {one.blueprint.name for one in candidates} > {"lora", "glu"}


async def test_karn_designs_and_the_library_offers_what_the_run_allows(mesh: Mesh) -> None:
    asked = replace(packet(1, 1.0), allowed_blueprints="dense & !widening")
    found = [one.blueprint for one in await mesh.tamiyo.tamiyo.candidates.candidates(asked)]
    assert len([one for one in found if one.lineage.author == "karn"]) == 4
    templates = {one.name for one in found if one.lineage.author != "karn"}
    assert templates == {"bottleneck_adapter", "deepen", "gated_mlp", "glu", "lora", "norm_shift"}
    assert not any(node.op in ("conv", "depthwise_conv", "attention") for one in found for node in one.ir.nodes)


async def test_karn_learns_the_same_report(mesh: Mesh) -> None:
    grown = next(one for one in await run_to_plateau(mesh) if one.actionable)
    report = outcome(grown, 0.08)
    await mesh.publish(report)
    submit = karn_service_pb2.KarnServiceSubmitFieldReportRequest(report=to_wire(report))
    first = await mesh.stubs["karn"].SubmitFieldReport(submit)
    second = await mesh.stubs["karn"].SubmitFieldReport(submit)
    assert not second.learned
    assert await mesh.karn.karn.store.num_reports() == 1, f"learned by call: {first.learned}"


async def test_a_refused_compile_ends_the_runs_waiting(mesh: Mesh) -> None:
    mesh.compiler.refuses = True
    grown = next(one for one in await run_to_plateau(mesh) if one.actionable)
    (failure,) = (await mesh.published("kernel", kernel_pb2.KernelReady, KernelReady, 1))[:1]
    assert failure.adaptation_id == grown.adaptation_id
    assert "no worker is left" in failure.error


async def test_analyze_over_a_socket_gives_what_the_bus_gives(mesh: Mesh) -> None:
    decisions = await run_to_plateau(mesh)
    request = tamiyo_service_pb2.AnalyzeRequest(state=to_wire(packet(9, LOSSES[8])))
    answer = await mesh.stubs["tamiyo"].Analyze(request)
    assert from_wire(answer.decision, AdaptationDecision) == decisions[8]
    listed = await mesh.stubs["tamiyo"].ListDecisions(tamiyo_service_pb2.ListDecisionsRequest(run_id="run-1"))
    assert len(listed.decisions) == len(LOSSES)


async def test_after_the_bus_was_gone_decisions_come_again(mesh: Mesh) -> None:
    await mesh.publish(packet(1, 2.0))
    assert (await mesh.decisions(1))[0].epoch == 1
    await asyncio.to_thread(mesh.nats.kill)
    await asyncio.to_thread(mesh.nats.start)
    await mesh.bus.wait_connected(20.0)
    await mesh.publish(packet(2, 1.2))
    found = (await mesh.decisions(1))[0]
    if found.epoch == 1:  # a killed server forgets its newest acknowledgement, so the first decision may come again
        found = (await mesh.decisions(1))[0]
    assert found.epoch == 2
    request = tamiyo_service_pb2.ListDecisionsRequest(run_id="run-1")
    assert len((await mesh.stubs["tamiyo"].ListDecisions(request)).decisions) == 2

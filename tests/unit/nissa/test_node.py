"""Nissa end to end over the in-process bus and channel: what goes in on the bus comes out over gRPC."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from esper.contracts.decision import ControlAction, ControlCommand, ControlResult
from esper.contracts.errors import ConfigError, InvalidInputError, NotFoundError
from esper.contracts.lifecycle import SeedLifecycleState
from esper.contracts.metrics import SystemHealth
from esper.contracts.run import LayerStatus, RunPhase
from esper.contracts.wire import to_message, to_wire
from esper.mesh import InProcessChannel
from esper.services.nissa.server import NissaNode, NissaNodeConfig
from esper.telemetry import Kind, MemoryBroker, MemoryBus, build_subject
from esper.telemetry.bus import CONTENT_TYPE_HEADER
from esper.telemetry.consumer import content_type
from esper.telemetry.health_wire import encode_health
from esper.v1 import decision_pb2
from esper.v1 import nissa_service_pb2 as pb
from esper.v1.nissa_service_pb2_grpc import NissaServiceStub
from esper.v1.telemetry_pb2 import HealthBatch, LayerIndexEntry


@pytest.fixture
async def bus() -> AsyncIterator[MemoryBus]:
    opened = MemoryBus(MemoryBroker())
    await opened.ensure_streams()
    yield opened
    await opened.close()


@pytest.fixture
async def node(bus: MemoryBus) -> AsyncIterator[NissaNode]:
    async with await NissaNode.open(bus=bus) as opened:
        yield opened


@pytest.fixture
async def stub(node: NissaNode) -> AsyncIterator[Any]:
    channel = InProcessChannel()
    node.add_to(channel)
    yield NissaServiceStub(channel)
    await channel.close()


async def send(bus: MemoryBus, kind: Kind, value: Any, *, msg_id: str | None = None) -> None:
    message = value if hasattr(value, "DESCRIPTOR") else to_wire(value)
    run_id = value.run_id if hasattr(value, "run_id") else "run-1"
    headers = {CONTENT_TYPE_HEADER: content_type(type(message))}
    subject = build_subject(run_id, kind)
    await bus.publish(subject, message.SerializeToString(), headers=headers, msg_id=msg_id, durable=True)


async def send_health(bus: MemoryBus, sequence: int, **columns: float) -> None:
    names = ["mean", "variance", "entropy", "dead_share", "nonfinite_share", "gradient_variance", "latency_ms"]
    rows: dict[str, Any] = {name: np.full(4, columns.get(name, 0.25), np.float32) for name in names}
    rows["nonfinite_share"] = np.full(4, columns.get("nonfinite_share", 0.0), np.float32)
    rows |= {"layer_id": np.zeros(4, np.uint32), "seed": np.full(4, -1, np.int32)}
    rows |= {"step": np.arange(4, dtype=np.uint64), "time_ns": np.arange(4, dtype=np.uint64)}
    envelope = HealthBatch(run_id="run-1", sequence=sequence, layer_index=[LayerIndexEntry(layer_id=0, layer="hidden")])
    headers = {CONTENT_TYPE_HEADER: content_type(HealthBatch)}
    await bus.publish(build_subject("run-1", Kind.HEALTH), encode_health(envelope, rows), headers=headers)


async def until(check: Callable[[], Awaitable[bool]]) -> None:
    """Return once a condition holds."""
    async with asyncio.timeout(10):
        while not await check():
            continue


async def taken(node: NissaNode, count: int) -> None:
    """Return once so many events of the run are in the chain."""

    async def enough() -> bool:
        return len(await node.nissa.store.events("run-1")) >= count

    await until(enough)


async def grown_run(bus: MemoryBus, make: Any) -> int:
    """Publish a run that grows one seed and ends well; give the number of its events."""
    await send(bus, Kind.STATE, make.packet(1))
    await send(bus, Kind.STATE, make.packet(2))
    await send(bus, Kind.DECISION, make.decision())
    await send(bus, Kind.PLAN, make.plan())
    await send(bus, Kind.SEED, make.event(SeedLifecycleState.FOSSILIZED))
    await send(bus, Kind.FIELD_REPORT, make.report())
    standing = make.seed(0, SeedLifecycleState.FOSSILIZED)
    layers = (make.packet(1).layers[0].__class__(layer="hidden", seeds=(standing, make.seed(1))),)
    await send(bus, Kind.STATE, make.packet(4, layers=layers, phase=RunPhase.FINISHED, current_parameters=1200))
    return 7


async def test_metrics_and_health_after_a_run_that_grew(node: NissaNode, bus: MemoryBus, make: Any) -> None:
    await taken(node, await grown_run(bus, make))
    metrics = await node.get_current_metrics()
    assert metrics.training.loss is not None
    assert metrics.training.loss > 0
    assert metrics.morphogenetic.active_seeds_total == 1
    assert metrics.morphogenetic.performance_improvement == pytest.approx(0.05)
    health = await node.get_system_health()
    assert health.overall_status is SystemHealth.HEALTHY
    assert health.active_kernels > 0
    assert [one.component for one in health.components] == ["bus", "nissa", "store", "tamiyo"]


async def test_metrics_over_grpc_are_those_of_the_newest_run(
    stub: Any, node: NissaNode, bus: MemoryBus, make: Any
) -> None:
    await taken(node, await grown_run(bus, make))
    named = await stub.GetCurrentMetrics(pb.GetCurrentMetricsRequest(run_id="run-1"))
    newest = await stub.GetCurrentMetrics(pb.GetCurrentMetricsRequest())
    assert named.metrics.run_id == newest.metrics.run_id == "run-1"
    assert newest.metrics.morphogenetic.seeds_by_state == {"fossilized": 1, "dormant": 1}
    assert newest.metrics.bus.events == 7
    assert not newest.metrics.training.HasField("accuracy")
    assert newest.metrics.process.resident_bytes > 0


async def test_a_repeated_event_changes_nothing(node: NissaNode, bus: MemoryBus, make: Any) -> None:
    await send(bus, Kind.FIELD_REPORT, make.report(), msg_id="one")
    await taken(node, 1)
    [event] = await node.nissa.store.events("run-1")
    from esper.services.nissa.store import NewEvent, moment_of

    again = NewEvent(
        run_id="run-1",
        key=event.key,
        kind=event.kind,
        recorded_at=moment_of(event.recorded_us),
        payload=event.payload,
    )
    assert not await node.nissa.take(again)
    assert (await node.get_current_metrics()).bus.events == 1


async def test_an_event_of_another_run_than_its_subject_is_refused(node: NissaNode, bus: MemoryBus, make: Any) -> None:
    headers = {CONTENT_TYPE_HEADER: content_type(type(to_wire(make.packet(1))))}
    payload = to_wire(make.packet(1)).SerializeToString()
    await bus.publish(build_subject("run-2", Kind.STATE), payload, headers=headers, durable=True)
    await send(bus, Kind.STATE, make.packet(1))
    await taken(node, 1)
    assert not await node.nissa.store.knows_run("run-2")
    assert bus.stats().dead_letters == 1


async def test_a_message_under_the_wrong_subject_is_refused(node: NissaNode, bus: MemoryBus, make: Any) -> None:
    await send(bus, Kind.SEED, make.packet(1))
    await send(bus, Kind.STATE, make.packet(1))
    await taken(node, 1)
    [event] = await node.nissa.store.events("run-1")
    assert event.kind == "state"
    assert bus.stats().dead_letters == 1


async def test_health_batches_are_counted_and_watched(stub: Any, node: NissaNode, bus: MemoryBus, make: Any) -> None:
    await send(bus, Kind.STATE, make.packet(1))
    await taken(node, 1)
    for sequence in range(1, 7):
        await send_health(bus, sequence, dead_share=1.0)
    await until(lambda: _has_anomaly(stub, "dead_units"))
    metrics = (await stub.GetCurrentMetrics(pb.GetCurrentMetricsRequest())).metrics
    assert metrics.bus.health_signals == 4 * metrics.bus.health_batches > 0
    [found] = (await stub.ListAnomalies(pb.ListAnomaliesRequest(run_id="run-1", open_only=True))).anomalies
    assert (found.subject, found.run_id) == ("hidden", "run-1")


async def _has_anomaly(stub: Any, detector: str) -> bool:
    found = (await stub.ListAnomalies(pb.ListAnomaliesRequest())).anomalies
    return any(one.detector == detector for one in found)


async def test_an_anomaly_is_announced_once_acknowledged_and_resolved_at_the_end(
    stub: Any, node: NissaNode, bus: MemoryBus, make: Any
) -> None:
    alerts = await bus.subscribe("esper.v1.*.alert")
    await send(bus, Kind.STATE, make.packet(1, train_loss=float("nan")))
    async with asyncio.timeout(10):
        alert = decision_pb2.Anomaly.FromString((await anext(alerts)).payload)
    assert (alert.detector, alert.severity) == ("non_finite", decision_pb2.ANOMALY_SEVERITY_CRITICAL)
    request = pb.AcknowledgeAnomalyRequest(anomaly_id=alert.anomaly_id, actor="ann")
    assert (await stub.AcknowledgeAnomaly(request)).anomaly.acknowledged_by == "ann"
    health = await node.get_system_health()
    [training] = [one for one in health.components if one.component == "training/run-1"]
    assert training.health is SystemHealth.DEGRADED
    assert health.overall_status is SystemHealth.HEALTHY
    await send(bus, Kind.STATE, make.packet(2, phase=RunPhase.STOPPED))
    await taken(node, 3)  # two packets, and the alert itself
    [kept] = (await stub.ListAnomalies(pb.ListAnomaliesRequest())).anomalies
    assert (kept.resolved, kept.acknowledged_by) == (True, "ann")
    await alerts.close()


async def test_the_report_has_every_step_and_an_intact_seal(
    stub: Any, node: NissaNode, bus: MemoryBus, make: Any
) -> None:
    count = await grown_run(bus, make)
    command = ControlCommand(
        request_id="q1", run_id="run-1", action=ControlAction.PAUSE, actor="ann", created_at=make.at(9)
    )
    await send(bus, Kind.CONTROL, decision_pb2.ControlMessage(command=to_message(command, decision_pb2.ControlCommand)))
    result = ControlResult(request_id="q1", run_id="run-1", accepted=True, detail="held")
    await send(bus, Kind.CONTROL, decision_pb2.ControlMessage(result=to_message(result, decision_pb2.ControlResult)))
    await taken(node, count + 2)
    report = await _report(stub)
    [adaptation] = report["adaptations"]
    assert adaptation["decision"]["evidence"][0]["name"] == "page_hinkley"
    assert [one["to_state"] for one in adaptation["seed_events"]] == ["fossilized"]
    assert adaptation["field_report"]["outcome"] == "kept"
    assert report["architecture"]["initial_parameters"] == 1000
    assert report["architecture"]["final_parameters"] == 1200
    assert report["interventions"][0]["command"]["actor"] == "ann"
    assert report["interventions"][0]["result"]["detail"] == "held"
    assert report["audit"]["intact"] is True
    assert report["audit"]["head"] == (await node.nissa.store.verify_chain("run-1")).head.hex()


async def _report(stub: Any) -> Any:
    request = pb.GetRunReportRequest(run_id="run-1", format=pb.REPORT_FORMAT_JSON)
    return json.loads((await stub.GetRunReport(request)).document)


async def test_the_markdown_report_keeps_foreign_text_in_its_cells(
    stub: Any, node: NissaNode, bus: MemoryBus, make: Any
) -> None:
    await send(bus, Kind.SEED, make.event(SeedLifecycleState.CULLED, reason="a | b\n# <script>"))
    await taken(node, await grown_run(bus, make) + 1)
    request = pb.GetRunReportRequest(run_id="run-1", format=pb.REPORT_FORMAT_MARKDOWN)
    document = (await stub.GetRunReport(request)).document
    assert document.startswith("# Run run-1\n")
    assert "a \\| b \\# \\<script\\>" in document
    assert "chain intact" in document
    assert "contribution 0.05 [0.03, 0.06]" in document


async def test_the_report_says_what_might_stand_and_what_a_seed_reads(
    stub: Any, node: NissaNode, bus: MemoryBus, make: Any
) -> None:
    standing = replace(make.seed(0, SeedLifecycleState.FOSSILIZED), source="body")
    layers = (LayerStatus(layer="head", seeds=(standing,)),)
    await send(bus, Kind.STATE, make.packet(1, layers=layers, allowed_blueprints="dense & !widening"))
    await taken(node, 1)
    report = await _report(stub)
    assert report["configuration"]["allowed_blueprints"] == "dense & !widening"
    assert report["architecture"]["seeds"][0]["source"] == "body"
    request = pb.GetRunReportRequest(run_id="run-1", format=pb.REPORT_FORMAT_MARKDOWN)
    document = (await stub.GetRunReport(request)).document
    assert "| allowed_blueprints | dense & !widening |" in document
    assert "| head | body | 0 | fossilized |" in document


async def test_a_nan_in_the_figures_still_gives_valid_json(
    stub: Any, node: NissaNode, bus: MemoryBus, make: Any
) -> None:
    await send(bus, Kind.STATE, make.packet(1, train_loss=float("nan")))
    await taken(node, 1)
    assert (await _report(stub))["figures"]["training"]["loss"] == "nan"


async def test_a_report_says_when_its_events_were_edited(stub: Any, node: NissaNode, bus: MemoryBus, make: Any) -> None:
    from sqlalchemy import text

    await taken(node, await grown_run(bus, make))
    async with node.nissa.store.database.session() as session:
        await session.execute(text("UPDATE nissa_events SET recorded_us = 1 WHERE position = 2"))
    audit = (await _report(stub))["audit"]
    assert (audit["intact"], audit["events_verified"]) == (False, 1)


async def test_watching_gives_metrics_until_the_node_closes(
    stub: Any, node: NissaNode, bus: MemoryBus, make: Any
) -> None:
    await taken(node, await grown_run(bus, make))
    request = pb.WatchMetricsRequest()
    request.interval.FromMilliseconds(100)
    seen = 0
    async for response in stub.WatchMetrics(request):
        assert response.metrics.run_id == "run-1"
        seen += 1
        if seen == 2:
            node.servicer.closing.set()
    assert seen == 2


async def test_unknown_runs_are_not_found(stub: Any, node: NissaNode) -> None:
    with pytest.raises(NotFoundError, match="a run must have been heard, got none so far"):
        await stub.GetCurrentMetrics(pb.GetCurrentMetricsRequest())
    with pytest.raises(NotFoundError, match="run must be known, got 'run-9'"):
        await stub.GetCurrentMetrics(pb.GetCurrentMetricsRequest(run_id="run-9"))
    with pytest.raises(NotFoundError, match="run must be known, got 'run-9'"):
        await stub.GetRunReport(pb.GetRunReportRequest(run_id="run-9", format=pb.REPORT_FORMAT_JSON))
    with pytest.raises(NotFoundError, match="anomaly must be known, got 'n9'"):
        await stub.AcknowledgeAnomaly(pb.AcknowledgeAnomalyRequest(anomaly_id="n9", actor="ann"))


@pytest.mark.parametrize(
    ("method", "request_", "message"),
    [
        ("GetCurrentMetrics", pb.GetCurrentMetricsRequest(run_id="No Run"), "run_id must match"),
        ("ListAnomalies", pb.ListAnomaliesRequest(limit=501), "limit must be finite and within .0, 500., got 501"),
        ("ListAnomalies", pb.ListAnomaliesRequest(run_id="*"), "run_id must match"),
        ("AcknowledgeAnomaly", pb.AcknowledgeAnomalyRequest(actor="ann"), "anomaly_id must be 1 to 128 characters"),
        ("AcknowledgeAnomaly", pb.AcknowledgeAnomalyRequest(anomaly_id="n1"), "actor must be 1 to 128 characters"),
        ("GetRunReport", pb.GetRunReportRequest(run_id="run-1"), "format must be one of REPORT_FORMAT_JSON"),
    ],
)
async def test_bad_requests_name_the_field(method: str, request_: Any, message: str, stub: Any) -> None:
    with pytest.raises(InvalidInputError, match=message):
        await getattr(stub, method)(request_)


@pytest.mark.parametrize("milliseconds", [0, 99, 3_600_001])
async def test_an_interval_out_of_range_is_refused(milliseconds: int, stub: Any) -> None:
    request = pb.WatchMetricsRequest()
    request.interval.FromMilliseconds(milliseconds)
    with pytest.raises(InvalidInputError, match=r"interval must be finite and within \[0.1, 3600.0\] s"):
        await anext(aiter(stub.WatchMetrics(request)))


async def test_figures_anomalies_and_detectors_survive_a_restart(bus: MemoryBus, make: Any, tmp_path: Path) -> None:
    config = NissaNodeConfig(database_url=f"sqlite:///{tmp_path}/nissa.db")
    async with await NissaNode.open(config, bus=bus) as first:
        await send(bus, Kind.STATE, make.packet(1, train_loss=float("inf")))
        await taken(first, 2)
        before = await first.get_current_metrics()
        [opened] = await first.nissa.store.anomalies()
    async with await NissaNode.open(config, bus=bus) as second:
        after = await second.get_current_metrics()
        assert (after.training, after.morphogenetic) == (before.training, before.morphogenetic)
        await send(bus, Kind.STATE, make.packet(2, train_loss=float("inf")))
        await taken(second, 3)
        [same] = await second.nissa.store.anomalies()
        assert same.anomaly_id == opened.anomaly_id


def test_a_port_out_of_range_and_an_empty_address_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"http_port must be within \[0, 65535\], got 70000"):
        NissaNodeConfig(http_port=70000)
    with pytest.raises(ConfigError, match="components must give every name an address, got 'urza': ''"):
        NissaNodeConfig(components={"urza": ""})
    with pytest.raises(ConfigError, match="database_url must name a store, got nothing"):
        NissaNodeConfig(database_url="")

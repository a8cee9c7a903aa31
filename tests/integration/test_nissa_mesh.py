"""Nissa over real NATS, a real gRPC socket and real HTTP: what operators and Prometheus meet."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from esper.contracts.lifecycle import SeedLifecycleState
from esper.contracts.run import CacheTierStatus, LayerStatus, RunPhase, SeedStatus, SystemStatePacket
from esper.contracts.wire import serialize
from esper.mesh import LOOPBACK, MeshServer, free_port, open_channel
from esper.services.nissa.server import NissaNode, NissaNodeConfig
from esper.telemetry import Kind, NatsBus, NatsServer, NatsServerConfig, build_subject
from esper.telemetry.bus import CONTENT_TYPE_HEADER
from esper.telemetry.consumer import content_type
from esper.telemetry.health_wire import encode_health
from esper.v1 import nissa_service_pb2 as pb
from esper.v1.nissa_service_pb2_grpc import NissaServiceStub
from esper.v1.telemetry_pb2 import HealthBatch, LayerIndexEntry
from esper.v1.telemetry_pb2 import SystemStatePacket as PacketMessage

FLOATS = ("mean", "variance", "entropy", "dead_share", "gradient_variance", "latency_ms")


@pytest.fixture
async def bus(tmp_path: Path) -> AsyncIterator[NatsBus]:
    async with NatsServer(NatsServerConfig(store_dir=tmp_path / "nats")) as nats:
        opened = await NatsBus.connect(nats.url)
        await opened.ensure_streams()
        yield opened
        await opened.close()


@pytest.fixture
async def server() -> AsyncIterator[MeshServer]:
    opened = MeshServer()
    yield opened
    await opened.drain()


@pytest.fixture
async def node(bus: NatsBus, server: MeshServer, tmp_path: Path) -> AsyncIterator[NissaNode]:
    config = NissaNodeConfig(
        database_url=f"sqlite:///{tmp_path}/nissa.db",
        http_port=0,
        components={"nissa": "127.0.0.1:1", "urza": f"{LOOPBACK}:{free_port()}"},
    )
    async with await NissaNode.open(config, bus=bus) as opened:
        opened.add_to(server)
        await server.start()
        yield opened


@pytest.fixture
async def stub(server: MeshServer, node: NissaNode) -> AsyncIterator[Any]:
    channel = open_channel(server.address)
    yield NissaServiceStub(channel)
    await channel.close()


def packet_of(sequence: int, **changes: Any) -> SystemStatePacket:
    seed = SeedStatus(seed_index=0, state=SeedLifecycleState.FOSSILIZED)
    values: dict[str, Any] = {
        "run_id": "run-1",
        "sequence": sequence,
        "phase": RunPhase.TRAINING,
        "epoch": sequence,
        "step": sequence,
        "train_loss": 0.5,
        "layers": (LayerStatus(layer="hidden", seeds=(seed,)),),
        "cache_tiers": (CacheTierStatus(tier="l1", hits=3, misses=1, bytes_held=10),),
        "created_at": datetime.now(UTC),
    }
    return SystemStatePacket(**(values | changes))


async def send(bus: NatsBus, packet: SystemStatePacket) -> None:
    headers = {CONTENT_TYPE_HEADER: content_type(PacketMessage)}
    await bus.publish(build_subject("run-1", Kind.STATE), serialize(packet), headers=headers, durable=True)


async def send_health(bus: NatsBus) -> None:
    rows: dict[str, Any] = {name: np.full(3, 0.5, np.float32) for name in FLOATS}
    rows |= {"nonfinite_share": np.zeros(3, np.float32), "layer_id": np.zeros(3, np.uint32)}
    rows |= {"seed": np.full(3, -1, np.int32)}
    rows |= {name: np.arange(3, dtype=np.uint64) for name in ("step", "time_ns")}
    index = [LayerIndexEntry(layer_id=0, layer="hidden")]
    body = encode_health(HealthBatch(run_id="run-1", sequence=1, layer_index=index), rows)
    await bus.publish(
        build_subject("run-1", Kind.HEALTH), body, headers={CONTENT_TYPE_HEADER: content_type(HealthBatch)}
    )


async def until_metrics(stub: Any, events: int, batches: int = 0) -> pb.SystemMetrics:
    """Give the metrics once so many events and health batches came through."""
    async with asyncio.timeout(20):
        while True:
            request = pb.ListAnomaliesRequest()
            await stub.ListAnomalies(request, timeout=5.0)
            health = await stub.GetSystemHealth(pb.GetSystemHealthRequest(), timeout=5.0)
            if any(one.component == "training/run-1" for one in health.components) or health.active_kernels:
                metrics = (await stub.GetCurrentMetrics(pb.GetCurrentMetricsRequest(), timeout=5.0)).metrics
                if metrics.bus.events >= events and metrics.bus.health_batches >= batches:
                    return metrics


async def test_what_goes_over_nats_comes_out_over_grpc_and_http(node: NissaNode, stub: Any, bus: NatsBus) -> None:
    await send(bus, packet_of(1))
    await send_health(bus)
    metrics = await until_metrics(stub, 1, 1)
    assert metrics.training.loss == 0.5
    assert metrics.bus.health_signals == 3
    async with httpx.AsyncClient(base_url=str(node.http_url)) as http:
        page = await http.get("/metrics")
        assert page.headers["content-type"].startswith("text/plain; version=")
        families = {one.name: one for one in text_string_to_metric_families(page.text)}
        assert [one.value for one in families["esper_training_loss"].samples] == [0.5]
        assert [one.value for one in families["esper_bus_health_signals"].samples] == [3]
        assert (await http.get("/healthz")).text == "ok\n"
        assert (await http.get("/readyz")).status_code == 200


async def test_a_configured_component_that_is_away_makes_the_whole_unhealthy(stub: Any) -> None:
    report = await stub.GetSystemHealth(pb.GetSystemHealthRequest(), timeout=5.0)
    by_name = {one.component: one for one in report.components}
    assert by_name["urza"].health == pb.SYSTEM_HEALTH_UNHEALTHY
    assert "must be SERVING" in by_name["urza"].reason
    assert by_name["nissa"].health == by_name["bus"].health == by_name["store"].health == pb.SYSTEM_HEALTH_HEALTHY
    assert report.overall_status == pb.SYSTEM_HEALTH_UNHEALTHY


async def test_a_watch_ends_when_the_server_drains(stub: Any, server: MeshServer, bus: NatsBus) -> None:
    await send(bus, packet_of(1))
    await until_metrics(stub, 1)
    request = pb.WatchMetricsRequest()
    request.interval.FromSeconds(3600)
    call = stub.WatchMetrics(request, timeout=60.0)
    received = aiter(call)
    assert (await anext(received)).metrics.run_id == "run-1"
    draining = asyncio.create_task(server.drain(10.0))
    with pytest.raises(StopAsyncIteration):
        await anext(received)
    await draining


async def test_a_second_node_goes_on_where_the_first_stopped(bus: NatsBus, tmp_path: Path) -> None:
    config = NissaNodeConfig(database_url=f"sqlite:///{tmp_path}/own.db")
    async with await NissaNode.open(config, bus=bus) as first:
        await send(bus, packet_of(1))
        await _until_chained(first, 1)
    await send(bus, packet_of(2, phase=RunPhase.FINISHED))
    async with await NissaNode.open(config, bus=bus) as second:
        await _until_chained(second, 2)
        verdict = await second.nissa.store.verify_chain("run-1")
        assert (verdict.intact, verdict.length) == (True, 2)
        async with asyncio.timeout(20):  # the chain comes first
            while (await second.get_current_metrics()).training.epoch != 2:
                continue


async def _until_chained(node: NissaNode, length: int) -> None:
    async with asyncio.timeout(20):
        while len(await node.nissa.store.events("run-1")) < length:
            continue


@pytest.mark.slow
async def test_promtool_finds_nothing_to_say(node: NissaNode, stub: Any, bus: NatsBus) -> None:
    promtool = shutil.which(os.environ.get("PROMTOOL", "promtool"))
    if promtool is None:
        pytest.skip("promtool is not installed; Debian has it in the package prometheus")
    await send(bus, packet_of(1, gradient_norm=1.0, control_loss=0.4, control_accuracy=0.9, learning_rate=0.1))
    await until_metrics(stub, 1)
    async with httpx.AsyncClient(base_url=str(node.http_url)) as http:
        page = (await http.get("/metrics")).content
    process = await asyncio.create_subprocess_exec(
        promtool,
        "check",
        "metrics",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said, _ = await process.communicate(page)
    assert (process.returncode, said.decode()) == (0, "")

"""A run's line over a real publisher thread: words go out and come in, and no trouble of the mesh reaches the run."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import esper
from esper.contracts.decision import AdaptationDecision, ControlAction, ControlCommand, ControlResult
from esper.contracts.errors import InvalidStateError, NotFoundError, UnavailableError
from esper.contracts.kernel import MAX_FORECAST, KernelForecast
from esper.contracts.run import CacheTierStatus
from esper.contracts.wire import to_message, to_wire
from esper.core.link import BusLink, KernelArrival, fresh_client
from esper.execution._native import KernelCache
from esper.execution.tier_directory import DirectoryTier
from esper.execution.tiers import TierConfig, TieredKernelSource
from esper.mesh.loop_thread import LoopThread
from esper.services.mesh import LoopSource
from esper.telemetry import Bus, MemoryBroker, MemoryBus, OonaClient, build_subject
from esper.telemetry.bus import CONTENT_TYPE_HEADER
from esper.telemetry.consumer import content_type, replay_run
from esper.telemetry.subjects import Kind
from esper.v1 import decision_pb2, kernel_pb2
from tests.damaged_kernels import KEY, kernel_bytes


class Source:
    """Kernels by id; what is not there raises what a test says."""

    def __init__(self) -> None:
        self.kernels: dict[str, Any] = {}
        self.warmed: list[Any] = []
        self.error: Exception = NotFoundError("no tier has it")

    async def fetch(self, artifact_id: str, *, announced: bool = False) -> Any:
        if artifact_id in self.kernels:
            return self.kernels[artifact_id]
        raise self.error

    async def warm(self, artifact_ids: Any) -> tuple[str, ...]:
        self.warmed.append(artifact_ids)
        return ()

    def stats(self) -> tuple[CacheTierStatus, ...]:
        return (CacheTierStatus(tier="l1", hits=3, misses=1),)


class Wire:
    """A line over a broker of its own, and the other end of it."""

    def __init__(self) -> None:
        self.broker = MemoryBroker()
        self.source = Source()
        self.buses: list[MemoryBus] = []
        self.client = OonaClient("r")
        self.client.connect(self.connect)
        self.link = BusLink(self.client, self.source)

    async def connect(self) -> Bus:
        self.buses.append(MemoryBus(self.broker))
        return self.buses[-1]

    def publish(self, kind: Kind, message: Any, payload: bytes | None = None, *, durable: bool = True) -> None:
        async def go() -> None:
            await MemoryBus(self.broker).publish(
                build_subject("r", kind),
                message.SerializeToString() if payload is None else payload,
                headers={CONTENT_TYPE_HEADER: content_type(type(message))},
                durable=durable,
            )

        asyncio.run(go())

    def published(self, kind: Kind) -> list[Any]:
        async def read() -> list[Any]:
            found = [received async for received in replay_run(MemoryBus(self.broker), "r")]
            return [received.message for received in found if received.subject.kind is kind]

        return asyncio.run(read())

    def arrivals(self, count: int = 1) -> list[Any]:
        """Take in until ``count`` values are here, or fail."""
        found: list[Any] = []
        deadline_s, tick = time.monotonic() + 10.0, threading.Event()
        while len(found) < count:
            found += list(self.link.arrivals())
            assert time.monotonic() < deadline_s, f"{count} arrivals must come in time, got {found}"
            tick.wait(0.005)
        return found


@pytest.fixture
def wire() -> Iterator[Wire]:
    one = Wire()
    yield one
    one.link.close()


@pytest.fixture
def model(task: Any) -> Any:
    return esper.wrap(task.host())


@pytest.fixture
def decision(decide: Any, model: Any) -> AdaptationDecision:
    with torch.no_grad():
        model(torch.zeros(2, 6))
    found: AdaptationDecision = decide(model)
    return found


def pause() -> ControlCommand:
    return ControlCommand(request_id="q", run_id="r", action=ControlAction.PAUSE, created_at=datetime.now(UTC))


def test_a_decision_arrives_whole_and_once(wire: Wire, decision: AdaptationDecision) -> None:
    wire.publish(Kind.DECISION, to_wire(decision))
    assert wire.arrivals() == [decision]
    assert list(wire.link.arrivals()) == []


def test_an_undecodable_decision_is_given_up_and_the_next_arrives(
    wire: Wire, decision: AdaptationDecision, caplog: Any
) -> None:
    wire.publish(Kind.DECISION, decision_pb2.AdaptationDecision(adaptation_id="a", confidence=7.0))
    wire.publish(Kind.DECISION, decision_pb2.AdaptationDecision(), payload=b"\xff\xff\xff")
    wire.publish(Kind.DECISION, to_wire(decision))
    assert wire.arrivals() == [decision]
    assert "arrival_refused" in caplog.text


def test_a_kernel_is_fetched_on_the_way(wire: Wire, decision: AdaptationDecision, kernel_for: Any) -> None:
    arrival = kernel_for(decision)
    wire.source.kernels[arrival.ready.artifact_id] = arrival.kernel
    wire.publish(Kind.KERNEL, to_wire(arrival.ready))
    (found,) = wire.arrivals()
    assert found.kernel is arrival.kernel
    assert found.ready == arrival.ready


def test_a_kernel_announced_right_after_it_was_missed_is_fetched(
    wire: Wire, decision: AdaptationDecision, kernel_for: Any, tmp_path: Path
) -> None:
    """Removed as damaged, rebuilt and announced within the time for which a miss is remembered."""
    ready = kernel_for(decision).ready
    artifact_id, data = kernel_bytes()
    ready = replace(ready, artifact_id=artifact_id)
    library = DirectoryTier(tmp_path)
    source = TieredKernelSource(KernelCache(1 << 20), None, library, KEY.ring(), TierConfig(negative_ttl_s=600.0))
    home = LoopThread("kernels")
    wire.link._source = LoopSource(source, home)

    async def told() -> None:
        with pytest.raises(NotFoundError):
            await source.fetch(artifact_id)
        await library.write(artifact_id, data)

    home.run(told(), 10)
    wire.publish(Kind.KERNEL, to_wire(ready))
    (found,) = wire.arrivals()
    home.close()
    assert found.error == ""
    assert found.kernel.artifact_id == artifact_id


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (NotFoundError("no tier has it"), "no tier has it"),
        (UnavailableError("the library is away"), "the library is away"),
        (OSError(5, "disk is gone"), "OSError: [Errno 5] disk is gone"),
    ],
)
def test_a_kernel_that_cannot_be_fetched_arrives_as_an_error(
    wire: Wire, decision: AdaptationDecision, kernel_for: Any, error: Exception, message: str
) -> None:
    wire.source.error = error
    wire.publish(Kind.KERNEL, to_wire(kernel_for(decision).ready))
    (found,) = wire.arrivals()
    assert (found.kernel, found.error) == (None, message)


def test_a_kernel_that_failed_to_compile_arrives_as_an_error(wire: Wire, decision: Any, kernel_for: Any) -> None:
    ready = to_wire(kernel_for(decision).ready)
    assert isinstance(ready, kernel_pb2.KernelReady)
    ready.error, ready.artifact_id = "COMPILATION: too deep", ""
    wire.publish(Kind.KERNEL, ready)
    (found,) = wire.arrivals()
    assert isinstance(found, KernelArrival)
    assert found.error == "COMPILATION: too deep"


def test_commands_arrive_and_results_go_out(wire: Wire) -> None:
    message = decision_pb2.ControlMessage(command=to_message(pause(), decision_pb2.ControlCommand))
    wire.publish(Kind.CONTROL, message)
    (found,) = wire.arrivals()
    assert (found.action, found.request_id) == (ControlAction.PAUSE, "q")
    wire.link.send(Kind.CONTROL, ControlResult(request_id="q", run_id="r", accepted=True, detail="held"))
    wire.link.close()
    assert [item.WhichOneof("body") for item in wire.published(Kind.CONTROL)] == ["command", "result"]


def test_the_kernels_of_a_forecast_are_brought_near_and_nothing_arrives(wire: Wire, tmp_path: Path) -> None:
    artifact_id, data = kernel_bytes()
    library = DirectoryTier(tmp_path)
    source = TieredKernelSource(KernelCache(1 << 20), None, library, KEY.ring())
    home = LoopThread("kernels")
    wire.link._source = LoopSource(source, home)
    home.run(library.write(artifact_id, data), 10)
    ids = ("k" + "0" * 32, "../evil", artifact_id)
    wire.publish(Kind.FORECAST, to_wire(KernelForecast(run_id="r", artifact_ids=ids)), durable=False)
    tick, deadline_s = threading.Event(), time.monotonic() + 10
    while artifact_id not in source._l1:
        assert list(wire.link.arrivals()) == []
        assert time.monotonic() < deadline_s, "a forecast must be acted on in time"
        tick.wait(0.005)
    l1, l3 = source.stats()
    home.close()
    assert (l1.hits, l1.misses, l3.hits, l3.warmed) == (0, 0, 0, 1)


def test_of_a_forecast_no_more_than_its_bound_is_brought_near(wire: Wire) -> None:
    ids = tuple(f"k{number:032x}" for number in range(MAX_FORECAST + 9))
    wire.publish(Kind.FORECAST, to_wire(KernelForecast(run_id="r", artifact_ids=ids)), durable=False)
    tick, deadline_s = threading.Event(), time.monotonic() + 10
    while not wire.source.warmed:
        assert list(wire.link.arrivals()) == []
        assert time.monotonic() < deadline_s
        tick.wait(0.005)
    assert wire.source.warmed == [ids[:MAX_FORECAST]]


def test_a_forecast_after_the_publisher_has_ended_costs_nothing(wire: Wire) -> None:
    wire.publish(Kind.FORECAST, to_wire(KernelForecast(run_id="r", artifact_ids=("k" + "0" * 32,))), durable=False)
    tick, deadline_s = threading.Event(), time.monotonic() + 10
    while not wire.link._forecasts:
        assert time.monotonic() < deadline_s
        tick.wait(0.005)
    wire.client.close()
    assert list(wire.link.arrivals()) == []
    assert wire.source.warmed == []


def test_its_own_results_do_not_come_back(wire: Wire) -> None:
    wire.link.send(Kind.CONTROL, ControlResult(request_id="q", run_id="r", accepted=True))
    wire.publish(Kind.CONTROL, decision_pb2.ControlMessage(command=to_message(pause(), decision_pb2.ControlCommand)))
    assert [type(item) for item in wire.arrivals()] == [ControlCommand]


def test_when_the_publisher_has_ended_nothing_reaches_the_caller(
    wire: Wire, decision: AdaptationDecision, kernel_for: Any
) -> None:
    wire.publish(Kind.KERNEL, to_wire(kernel_for(decision).ready))
    tick, deadline_s = threading.Event(), time.monotonic() + 10
    while not wire.link._kernels:
        assert time.monotonic() < deadline_s
        tick.wait(0.005)
    wire.client.close()
    wire.link.send(Kind.DECISION, decision)
    (found,) = wire.link.arrivals()
    assert "must run to take a coroutine" in found.error


def test_when_the_bus_dies_sending_and_looking_go_on(wire: Wire, decision: AdaptationDecision) -> None:
    asyncio.run(wire.buses[0].close())
    for _ in range(3):
        wire.link.send(Kind.DECISION, decision)
        assert list(wire.link.arrivals()) == []
    began_s = time.monotonic()
    wire.link.close(0.5)
    assert time.monotonic() - began_s < 7.0


def test_close_sends_what_waits_and_may_come_twice(wire: Wire, decision: AdaptationDecision) -> None:
    wire.link.send(Kind.DECISION, decision, msg_id="once")
    wire.link.send(Kind.DECISION, decision, msg_id="once")
    wire.link.close()
    wire.link.close()
    assert len(wire.published(Kind.DECISION)) == 1


def test_figures_of_the_cache_come_from_the_source(wire: Wire) -> None:
    assert wire.link.cache_tiers()[0].hits == 3


@pytest.fixture
def connect() -> Callable[[], Any]:
    broker = MemoryBroker()

    async def open_bus() -> Bus:
        return MemoryBus(broker)

    return open_bus


def test_a_second_run_of_a_model_speaks_through_a_client_of_its_own(model: Any, connect: Any) -> None:
    first = fresh_client(model, "first")
    assert first is model.oona_client
    first.connect(connect)
    with pytest.raises(InvalidStateError, match="must be in one run at a time, got one in run first"):
        fresh_client(model, "second")
    first.close()
    second = fresh_client(model, "second")
    assert second is model.oona_client
    assert second.run_id == "second"
    assert (second.layers, second.ring) == (first.layers, first.ring)
    assert all(layer.oona_client is second for layer in model.kasmina_layers.values())
    second.connect(connect)
    model(torch.randn(8, 6)).sum().backward()
    second.close()
    assert second.stats().signals_published > 0


def test_a_model_without_telemetry_gets_a_client_for_its_words(task: Any) -> None:
    bare = esper.wrap(nn.Sequential(nn.Linear(2, 2)), telemetry=False)
    client = fresh_client(bare, "r")
    assert (client.run_id, client.ring, bare.oona_client) == ("r", None, None)

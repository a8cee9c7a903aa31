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
from esper.blueprints import content_id
from esper.contracts.decision import AdaptationDecision, AdaptationType, ControlAction, ControlCommand, ControlResult
from esper.contracts.errors import InvalidStateError, NotFoundError, UnavailableError
from esper.contracts.kernel import MAX_FORECAST, CompileSpec, KernelForecast, KernelReady
from esper.contracts.run import CacheTierStatus
from esper.contracts.wire import from_wire, to_message, to_wire
from esper.core import link
from esper.core.link import BusLink, KernelArrival, fresh_client
from esper.execution._native import KernelCache
from esper.execution.artifact import artifact_bytes
from esper.execution.tier_directory import DirectoryTier
from esper.execution.tiers import TierConfig, TieredKernelSource
from esper.mesh.loop_thread import LoopThread
from esper.services.mesh import LoopSource
from esper.services.tezzeret.content_key import content_key, job_id_of
from esper.services.tezzeret.worker import TezzeretWorker
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
        self.answers: dict[str, str] = {}
        self.fetched: list[tuple[str, bool]] = []
        self.stuck = False
        self.near: set[str] = set()
        self.near_defect: Exception | None = None
        self.defect: Exception | None = None
        self.refused: list[str] = []
        self.error: Exception = NotFoundError("no tier has it")

    async def fetch(self, artifact_id: str, *, announced: bool = False) -> Any:
        self.fetched.append((artifact_id, announced))
        if self.stuck:
            await asyncio.Event().wait()
        if artifact_id in self.kernels:
            return self.kernels[artifact_id]
        raise self.error

    def at_hand(self, artifact_id: str) -> Any:
        if self.near_defect:
            raise self.near_defect
        return self.kernels[artifact_id] if artifact_id in self.near else None

    async def warm(self, artifact_ids: Any) -> tuple[str, ...]:
        self.warmed.append(artifact_ids)
        return ()

    def answer_to(self, spec: CompileSpec) -> str | None:
        if self.defect:
            raise self.defect
        return self.answers.get(content_id(spec.ir))

    def names(self, arrival: KernelArrival) -> None:
        """Have what a kernel answers named by the compiler, and the kernel at hand."""
        self.kernels[arrival.ready.artifact_id] = arrival.kernel
        self.answers[arrival.ready.blueprint_id] = arrival.ready.artifact_id

    def refuse(self, job_id: str) -> None:
        self.refused.append(job_id)

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


def test_a_decision_is_read_once_and_never_by_the_training_thread(
    wire: Wire, decision: AdaptationDecision, monkeypatch: pytest.MonkeyPatch
) -> None:
    readers: list[str] = []

    def noted(message: Any, cls: type[Any]) -> Any:
        readers.append(threading.current_thread().name)
        return from_wire(message, cls)

    monkeypatch.setattr(link, "from_wire", noted)
    another = replace(decision, adaptation_id="a" + "9" * 32, actionable=False)
    for one in (decision, another):
        wire.publish(Kind.DECISION, to_wire(one))
    assert wire.arrivals(2) == [decision, another]
    assert readers == ["esper-oona"] * 2
    assert not wire.link._read, "what has arrived is not kept"


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


def test_a_kernel_that_was_named_before_arrives_with_its_decision_and_is_confirmed_once(
    wire: Wire, decision: AdaptationDecision, kernel_for: Any
) -> None:
    announced = kernel_for(decision)
    wire.source.names(announced)
    wire.publish(Kind.DECISION, to_wire(decision))
    found, arrival = wire.arrivals(2)
    assert found == decision
    assert arrival.kernel is announced.kernel
    manifest = announced.kernel.manifest
    said = (arrival.ready.adaptation_id, arrival.ready.artifact_id, arrival.ready.blueprint_id, arrival.ready.site)
    assert said == (decision.adaptation_id, manifest.artifact_id, manifest.blueprint_id, manifest.site)
    assert arrival.ready.job_id == f"j{manifest.content_key[:32]}"
    assert arrival.ready.size_bytes == announced.kernel.size_bytes
    wire.publish(Kind.KERNEL, to_wire(announced.ready))
    wire.publish(Kind.KERNEL, to_wire(replace(announced.ready, adaptation_id="another's")))
    (other,) = wire.arrivals()
    assert other.ready.adaptation_id == "another's", "the confirmation itself must not arrive"
    assert wire.source.fetched == [(manifest.artifact_id, False), (manifest.artifact_id, True)]


def test_a_kernel_at_hand_is_there_before_its_decision_can_be_read(
    wire: Wire, decision: AdaptationDecision, kernel_for: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    announced = kernel_for(decision)
    wire.source.names(announced)
    wire.source.near.add(announced.ready.artifact_id)
    there: list[int] = []
    put = wire.link._decisions.put

    def noted(mail: Any) -> None:
        there.append(len(wire.link._fetched))
        put(mail)

    monkeypatch.setattr(wire.link._decisions, "put", noted)
    wire.publish(Kind.DECISION, to_wire(decision))
    found, arrival = wire.arrivals(2)
    assert (found, arrival.kernel, there) == (decision, announced.kernel, [1])
    assert arrival.ready.job_id == f"j{announced.kernel.manifest.content_key[:32]}"
    wire.publish(Kind.KERNEL, to_wire(announced.ready))
    wire.publish(Kind.KERNEL, to_wire(replace(announced.ready, adaptation_id="another's")))
    (other,) = wire.arrivals()
    assert other.ready.adaptation_id == "another's", "the confirmation itself must not arrive"
    assert wire.source.fetched == [(announced.ready.artifact_id, True)], "what is at hand is not fetched"


def test_a_defect_of_the_first_tier_costs_a_fetch_and_not_the_kernel(
    wire: Wire, decision: AdaptationDecision, kernel_for: Any, caplog: pytest.LogCaptureFixture
) -> None:
    announced = kernel_for(decision)
    wire.source.names(announced)
    wire.source.near_defect = RuntimeError("a defect of the first tier")
    wire.publish(Kind.DECISION, to_wire(decision))
    assert wire.arrivals(2)[1].kernel is announced.kernel
    assert wire.source.fetched == [(announced.ready.artifact_id, False)]
    assert "kernel_not_at_hand" in [record.message for record in caplog.records]


def test_where_the_compiler_names_another_kernel_by_now_that_one_is_fetched_too(
    wire: Wire, decision: AdaptationDecision, kernel_for: Any
) -> None:
    before = kernel_for(decision)
    wire.source.names(before)
    wire.publish(Kind.DECISION, to_wire(decision))
    assert wire.arrivals(2)[1].kernel is before.kernel
    now = replace(before.ready, artifact_id="k" + "1" * 32)
    wire.source.kernels[now.artifact_id] = before.kernel
    wire.publish(Kind.KERNEL, to_wire(now))
    (found,) = wire.arrivals()
    assert found.ready.artifact_id == now.artifact_id
    assert wire.source.fetched[-1] == (now.artifact_id, True)


def test_a_decision_that_comes_in_after_its_announcement_brings_no_second_kernel(
    wire: Wire, decision: AdaptationDecision, kernel_for: Any
) -> None:
    announced = kernel_for(decision)
    wire.source.names(announced)
    wire.publish(Kind.KERNEL, to_wire(announced.ready))
    assert wire.arrivals()[0].kernel is announced.kernel
    wire.publish(Kind.DECISION, to_wire(decision))
    wire.publish(Kind.CONTROL, decision_pb2.ControlMessage(command=to_message(pause(), decision_pb2.ControlCommand)))
    assert [type(item).__name__ for item in wire.arrivals(2)] == ["AdaptationDecision", "ControlCommand"]
    assert wire.source.fetched == [(announced.ready.artifact_id, True)]


@pytest.mark.parametrize("trouble", ["no tier has it", "a defect of a tier", "a defect of the answers"])
def test_a_named_kernel_that_cannot_be_had_is_left_to_its_announcement(
    wire: Wire, decision: AdaptationDecision, kernel_for: Any, trouble: str, caplog: Any
) -> None:
    announced = kernel_for(decision)
    caplog.set_level("INFO", "esper.core.link")
    wire.source.answers[announced.ready.blueprint_id] = announced.ready.artifact_id
    if trouble == "a defect of a tier":
        wire.source.error = OSError(5, trouble)
    if trouble == "a defect of the answers":
        wire.source.defect = RuntimeError(trouble)
    wire.publish(Kind.DECISION, to_wire(decision))
    assert wire.arrivals() == [decision]
    assert wire.source.fetched == ([] if wire.source.defect else [(announced.ready.artifact_id, False)])
    wire.source.kernels[announced.ready.artifact_id] = announced.kernel
    wire.publish(Kind.KERNEL, to_wire(announced.ready))
    (found,) = wire.arrivals()
    assert (found.kernel, found.error) == (announced.kernel, "")
    said = {record.message: record.levelname for record in caplog.records}
    assert said.get("kernel_not_near") == {"no tier has it": "INFO", "a defect of a tier": "ERROR"}.get(trouble)
    assert ("mail_watch_failed" in said) is (wire.source.defect is not None)


@pytest.mark.parametrize(
    "change", [{"adaptation_type": AdaptationType.REMOVE_SEED}, {"actionable": False}], ids=["removal", "not to act on"]
)
def test_nothing_is_looked_for_where_a_decision_grows_nothing(
    wire: Wire, decision: AdaptationDecision, kernel_for: Any, change: dict[str, Any]
) -> None:
    wire.source.names(kernel_for(decision))
    other = replace(decision, **change)
    wire.publish(Kind.DECISION, to_wire(other))
    assert wire.arrivals() == [other]
    assert wire.source.fetched == []


def test_what_the_compiler_refuses_is_taken_back_and_the_run_is_told(
    wire: Wire, decision: AdaptationDecision, kernel_for: Any
) -> None:
    announced = kernel_for(decision)
    wire.source.names(announced)
    wire.publish(Kind.DECISION, to_wire(decision))
    wire.arrivals(2)
    wire.publish(Kind.KERNEL, to_wire(replace(announced.ready, artifact_id="", size_bytes=0, error="FAILED: no")))
    (found,) = wire.arrivals()
    assert (found.kernel, found.error) == (None, "FAILED: no")
    assert wire.source.refused == [announced.ready.job_id]


def test_a_compiler_that_cannot_be_asked_takes_nothing_back(
    wire: Wire, decision: AdaptationDecision, kernel_for: Any
) -> None:
    announced = kernel_for(decision)
    wire.source.names(announced)
    unasked = replace(announced.ready, job_id="", artifact_id="", size_bytes=0, error="the kernel was not asked for")
    wire.publish(Kind.DECISION, to_wire(decision))
    assert wire.arrivals(2)[1].kernel is announced.kernel
    wire.publish(Kind.KERNEL, to_wire(unasked))
    wire.publish(Kind.KERNEL, to_wire(replace(unasked, adaptation_id="nobody's")))
    (found,) = wire.arrivals()
    assert (found.ready.adaptation_id, found.error) == ("nobody's", "the kernel was not asked for")


def test_a_refused_kernel_is_never_served_from_the_first_tier_unasked(
    wire: Wire, decision: AdaptationDecision, tmp_path: Path
) -> None:
    """The tiers as they are: named, served at once, refused, and from then on served to no decision."""
    assert decision.blueprint is not None
    assert decision.site is not None
    spec = CompileSpec(ir=decision.blueprint.ir, site=decision.site)
    kernel = TezzeretWorker(signer=KEY).compile_blueprint(decision.blueprint, site=decision.site)
    library, home = DirectoryTier(tmp_path), LoopThread("kernels")
    source = TieredKernelSource(KernelCache(1 << 20), None, library, KEY.ring())
    wire.link._source = LoopSource(source, home)
    home.run(library.write(kernel.artifact_id, artifact_bytes(kernel.artifact)), 10)
    ready = KernelReady(
        adaptation_id="a0",
        run_id="r",
        job_id=job_id_of(content_key(spec)),
        blueprint_id=decision.blueprint.id,
        site=decision.site,
        artifact_id=kernel.artifact_id,
    )
    wire.publish(Kind.DECISION, to_wire(decision))
    assert wire.arrivals() == [decision], "nothing was named before the announcement"
    wire.publish(Kind.KERNEL, to_wire(ready))
    assert wire.arrivals()[0].ready == ready
    again = [replace(decision, adaptation_id=f"a{number:032x}") for number in (101, 102)]
    wire.publish(Kind.DECISION, to_wire(again[0]))
    served = wire.arrivals(2)[1]
    assert (served.ready.adaptation_id, served.ready.artifact_id) == (again[0].adaptation_id, kernel.artifact_id)
    refusal = replace(ready, artifact_id="", error="FAILED: it does harm")
    wire.publish(Kind.KERNEL, to_wire(refusal))
    assert wire.arrivals() == [KernelArrival(ready=refusal, error="FAILED: it does harm")]
    wire.publish(Kind.DECISION, to_wire(again[1]))
    assert wire.arrivals() == [again[1]]
    wire.publish(Kind.KERNEL, to_wire(replace(refusal, adaptation_id="last")))
    assert wire.arrivals()[0].error == "FAILED: it does harm"
    assert [status.hits for status in source.stats()] == [1, 1]
    home.close()


def test_a_kernel_that_is_near_is_taken_while_the_meshs_loop_is_busy() -> None:
    artifact_id, data = kernel_bytes()
    source = TieredKernelSource(KernelCache(1 << 20), None, None, KEY.ring())
    home, busy, free = LoopThread("kernels"), threading.Event(), threading.Event()
    home.run(source.put(data), 10)

    async def work() -> None:
        busy.set()
        free.wait(10)

    async def take() -> Any:
        return await asyncio.wait_for(LoopSource(source, home).fetch(artifact_id, announced=True), 5)

    working = home.submit(work())
    assert busy.wait(10)
    kernel = asyncio.run(take())
    assert not working.done()
    free.set()
    working.result(10)
    home.close()
    assert kernel.artifact_id == artifact_id
    assert (source.stats()[0].hits, source.stats()[0].misses) == (1, 0)


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
    wire.source.stuck = True
    wire.publish(Kind.KERNEL, to_wire(kernel_for(decision).ready))
    tick, deadline_s = threading.Event(), time.monotonic() + 10
    while not wire.source.fetched:
        assert time.monotonic() < deadline_s
        tick.wait(0.005)
    wire.client.close()
    wire.link.send(Kind.DECISION, decision)
    (found,) = wire.link.arrivals()
    assert (found.kernel, found.error) == (None, "the publisher ended before the kernel was here")


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

"""Calls from a plain thread: streams and pages one by one, cancelled when left, errors of their own class."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from esper.client import AsyncEsperClient, EsperClient
from esper.client.transport import AsyncStubTransport, Transport
from esper.contracts.decision import ControlAction
from esper.contracts.errors import DeadlineExceededError, InvalidStateError, NotFoundError, UnavailableError
from esper.mesh import InProcessChannel
from esper.mesh.loop_thread import LoopThread
from esper.mesh.ports import free_port
from esper.mesh.settings import MeshSettings
from esper.v1 import telemetry_pb2
from esper.v1 import tolaria_service_pb2 as pb
from esper.v1.tolaria_service_pb2_grpc import (
    TolariaServiceServicer,
    TolariaServiceStub,
    add_TolariaServiceServicer_to_server,
)


class Runs(TolariaServiceServicer):
    """Three pages of runs; one run that changes for ever, one that is unknown, one that never answers."""

    def __init__(self) -> None:
        self.left, self.began = threading.Event(), threading.Event()
        self.pages_asked: list[str] = []
        self.commands: list[Any] = []

    async def ListRuns(self, request: Any, context: Any) -> Any:
        self.pages_asked.append(request.page_token)
        number = int(request.page_token or 0)
        runs = [pb.Run(run_id=f"run-{number}")]
        return pb.ListRunsResponse(runs=runs, next_page_token="" if number == 2 else str(number + 1))

    async def GetRun(self, request: Any, context: Any) -> Any:
        if request.run_id == "slow":
            await asyncio.Event().wait()
        raise NotFoundError(f"run must be known, got {request.run_id!r}", parameter="run_id")

    async def WatchRun(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self.began.set()
        try:
            for step in range(3 if request.run_id == "short" else 1_000_000):
                yield pb.WatchRunResponse(state=telemetry_pb2.SystemStatePacket(run_id="r", step=step))
                if request.run_id == "still":
                    await asyncio.Event().wait()
            if request.run_id == "short":
                raise UnavailableError("the run has gone")
        finally:
            self.left.set()

    async def ControlRun(self, request: Any, context: Any) -> Any:
        self.commands.append(request.command)
        return pb.ControlRunResponse(result={"request_id": request.command.request_id, "run_id": "r", "accepted": True})


class InProcess(AsyncStubTransport):
    """Calls a servicer over an in-process channel."""

    def __init__(self, servicer: Runs) -> None:
        channel = InProcessChannel()
        channel.add_servicer(add_TolariaServiceServicer_to_server, servicer)
        self._stub = TolariaServiceStub(channel)  # type: ignore[no-untyped-call]

    def stub(self, service: str) -> Any:
        assert service == "tolaria"
        return self._stub


@pytest.fixture
def runs() -> Runs:
    return Runs()


@pytest.fixture
def transport(runs: Runs) -> Iterator[Transport]:
    one = Transport(InProcess(runs))
    yield one
    one.close()


def watch(transport: Transport, run_id: str) -> Iterator[Any]:
    return transport.stream("tolaria", "WatchRun", pb.WatchRunRequest(run_id=run_id))


def test_pages_come_one_by_one_as_they_are_wanted(transport: Transport, runs: Runs) -> None:
    pages = transport.pages("tolaria", "ListRuns", pb.ListRunsRequest())
    assert next(pages).runs[0].run_id == "run-0"
    assert runs.pages_asked == [""]
    assert [page.runs[0].run_id for page in pages] == ["run-1", "run-2"]
    assert runs.pages_asked == ["", "1", "2"]


def test_a_stream_comes_one_by_one_and_leaving_it_cancels_the_call(transport: Transport, runs: Runs) -> None:
    steps = []
    for response in watch(transport, "endless"):
        steps.append(response.state.step)
        if len(steps) == 3:
            break
    assert steps == [0, 1, 2]
    assert runs.left.wait(5)


def test_a_stream_that_stands_still_is_cancelled_by_ctrl_c(transport: Transport, runs: Runs) -> None:
    stream = watch(transport, "still")
    next(stream)
    main = threading.get_ident()
    threading.Timer(0.1, lambda: signal.pthread_kill(main, signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    assert runs.left.wait(5)


def test_an_error_in_mid_stream_keeps_its_class(transport: Transport) -> None:
    stream = watch(transport, "short")
    assert [next(stream).state.step for _ in range(3)] == [0, 1, 2]
    with pytest.raises(UnavailableError, match="the run has gone"):
        next(stream)


def test_an_error_keeps_its_class_message_and_parameter(transport: Transport) -> None:
    with pytest.raises(NotFoundError, match="run must be known, got 'nobody'") as caught:
        transport.call("tolaria", "GetRun", pb.GetRunRequest(run_id="nobody"))
    assert caught.value.parameter == "run_id"


def test_a_call_ends_at_its_deadline(transport: Transport) -> None:
    with pytest.raises(DeadlineExceededError):
        transport.call("tolaria", "GetRun", pb.GetRunRequest(run_id="slow"), timeout_s=0.1)


def test_a_closed_transport_takes_no_call_and_lets_go_of_streams(transport: Transport, runs: Runs) -> None:
    stream = watch(transport, "endless")
    next(stream)
    transport.close()
    transport.close()
    assert runs.left.wait(5)
    with pytest.raises(InvalidStateError, match="the loop must be running"):
        next(stream)
    with pytest.raises(InvalidStateError, match="the loop must be running"):
        transport.call("tolaria", "ListRuns", pb.ListRunsRequest())


def test_a_loop_that_was_given_stays_its_owners(runs: Runs) -> None:
    loop = LoopThread("test-owner")
    Transport(InProcess(runs), loop).close()
    assert Transport(InProcess(runs), loop).call("tolaria", "ListRuns", pb.ListRunsRequest()).runs
    loop.close()


def test_a_loop_of_its_own_ends_with_the_transport(runs: Runs) -> None:
    before = threading.active_count()
    Transport(InProcess(runs)).close()
    assert threading.active_count() == before


def test_the_client_gives_the_same_request_id_again(runs: Runs) -> None:
    with EsperClient(transport=Transport(InProcess(runs))) as client:
        for _ in range(2):
            assert client.tolaria.control("r", ControlAction.PAUSE, request_id="mine").accepted
        client.tolaria.control("r", ControlAction.PAUSE)
    ids = [command.request_id for command in runs.commands]
    assert ids[:2] == ["mine", "mine"]
    assert ids[2] not in ("", "mine")


async def test_the_asynchronous_client_leaves_streams_too(runs: Runs) -> None:
    async with AsyncEsperClient(transport=InProcess(runs)) as client:
        stream = client._transport.stream("tolaria", "WatchRun", pb.WatchRunRequest(run_id="endless"))
        await anext(stream)
        await stream.aclose()  # type: ignore[attr-defined]
    assert await asyncio.to_thread(runs.left.wait, 5)


def test_a_service_that_is_not_there_is_unavailable() -> None:
    settings = MeshSettings(tolaria_address=f"127.0.0.1:{free_port()}")
    with EsperClient(settings) as client, pytest.raises(UnavailableError):
        client.tolaria.get_run("r")

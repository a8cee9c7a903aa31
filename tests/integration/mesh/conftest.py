"""An echo service, with the shape of generated code, served over a socket and within the process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, wrappers_pb2
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry

from esper.contracts.errors import EsperError, all_error_types
from esper.mesh import (
    ChannelConfig,
    InProcessChannel,
    MeshChannel,
    MeshServer,
    Role,
    RpcEnvelope,
    RpcMetrics,
    ServerConfig,
    current_caller,
    open_channel,
    remaining_s,
)

SERVICE = "esper.test.EchoService"
Text = wrappers_pb2.StringValue
SECRET = "the-password-is-hunter2"
_KINDS = {"Say": (False, False), "Count": (False, True), "Join": (True, False), "Chat": (True, True)}
_SINGLE = ("Fail", "Hold", "Budget", "Missing", "Abort", "Who")


def _describe() -> None:
    """Put the service into the default descriptor pool, where reflection looks."""
    pool = descriptor_pool.Default()
    file = descriptor_pb2.FileDescriptorProto(name="esper/test/echo.proto", package="esper.test", syntax="proto3")
    file.dependency.append("google/protobuf/wrappers.proto")
    service = file.service.add(name="EchoService")
    for name, (up, down) in {**_KINDS, "HoldStream": (False, True), **dict.fromkeys(_SINGLE, (False, False))}.items():
        kind = ".google.protobuf.StringValue"
        service.method.add(name=name, input_type=kind, output_type=kind, client_streaming=up, server_streaming=down)
    pool.Add(file) if hasattr(pool, "Add") else pool.AddSerializedFile(file.SerializeToString())


_describe()


@dataclass
class Echo:
    """The servicer, with what tests need to look at from outside."""

    held: asyncio.Queue[None] = field(default_factory=asyncio.Queue)
    release: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Queue[str] = field(default_factory=asyncio.Queue)
    calls: int = 0
    stream_closed: asyncio.Event = field(default_factory=asyncio.Event)
    metadata: dict[str, Any] = field(default_factory=dict)
    last_request: Any = None
    say: Callable[..., Any] | None = None
    last_response: Any = None

    async def Say(self, request: Any, context: Any) -> Any:
        self.calls += 1
        if self.say is not None:
            return await self.say(request, context)
        self.metadata = dict(context.invocation_metadata())
        context.set_trailing_metadata((("echo", "done"),))
        self.last_request, self.last_response = request, Text(value=request.value)
        return self.last_response

    async def Count(self, request: Any, context: Any) -> AsyncIterator[Any]:
        try:
            for number in range(int(request.value)):
                yield Text(value=str(number))
        finally:
            self.stream_closed.set()

    async def Join(self, request_iterator: Any, context: Any) -> Any:
        return Text(value="+".join([request.value async for request in request_iterator]))

    async def Chat(self, request_iterator: Any, context: Any) -> AsyncIterator[Any]:
        async for request in request_iterator:
            if request.value == "fail":
                raise failure("NOT_FOUND")
            yield Text(value=f"<{request.value}>")

    async def Fail(self, request: Any, context: Any) -> Any:
        self.calls += 1
        if request.value == "panic":
            raise ZeroDivisionError(SECRET)
        raise failure(request.value)

    async def Hold(self, request: Any, context: Any) -> Any:
        self.calls += 1
        self.held.put_nowait(None)
        try:
            await self.release.wait()
        except asyncio.CancelledError:
            self.ended.put_nowait("cancelled")
            raise
        self.ended.put_nowait("finished")
        return Text(value="held")

    async def HoldStream(self, request: Any, context: Any) -> AsyncIterator[Any]:
        try:
            yield Text(value="first")
            await self.release.wait()
            yield Text(value="last")
        finally:
            self.stream_closed.set()

    async def Budget(self, request: Any, context: Any) -> Any:
        left_s = remaining_s()
        return Text(value="none" if left_s is None else f"{left_s:.3f}")

    async def Who(self, request: Any, context: Any) -> Any:
        return Text(value=f"{current_caller().name} {current_caller().role.name}")

    async def Abort(self, request: Any, context: Any) -> Any:
        await context.abort(grpc.StatusCode.OUT_OF_RANGE, "by hand")

    def Missing(self, request: Any, context: Any) -> Any:
        context.set_code(grpc.StatusCode.UNIMPLEMENTED)
        context.set_details("Method not implemented!")
        raise NotImplementedError("Method not implemented!")


def failure(reason: str) -> EsperError:
    cls = next(cls for cls in all_error_types() if cls.reason == reason)
    return cls(f"count must be at least 1, got 0 ({reason} — ü)", parameter="count")


def add_echo(servicer: Any, server: Any) -> None:
    make = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }
    kinds = {**_KINDS, "HoldStream": (False, True), **dict.fromkeys(_SINGLE, (False, False))}
    handlers = {
        name: make[kind](
            getattr(servicer, name), request_deserializer=Text.FromString, response_serializer=Text.SerializeToString
        )
        for name, kind in kinds.items()
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    server.add_registered_method_handlers(SERVICE, handlers)


class EchoStub:
    def __init__(self, channel: Any) -> None:
        codecs = {
            "request_serializer": Text.SerializeToString,
            "response_deserializer": Text.FromString,
            "_registered_method": True,
        }
        self.Say = channel.unary_unary(f"/{SERVICE}/Say", **codecs)
        self.Count = channel.unary_stream(f"/{SERVICE}/Count", **codecs)
        self.HoldStream = channel.unary_stream(f"/{SERVICE}/HoldStream", **codecs)
        self.Join = channel.stream_unary(f"/{SERVICE}/Join", **codecs)
        self.Chat = channel.stream_stream(f"/{SERVICE}/Chat", **codecs)
        self.Unknown = channel.unary_unary("/esper.test.Nowhere/Nothing", **codecs)
        for name in _SINGLE:
            setattr(self, name, channel.unary_unary(f"/{SERVICE}/{name}", **codecs))


@dataclass
class Mesh:
    """One running echo service and a channel to it."""

    servicer: Echo
    channel: MeshChannel
    stub: Any
    registry: CollectorRegistry
    server: MeshServer | None = None


@pytest.fixture
def come_true() -> Callable[[Callable[[], bool]], Awaitable[None]]:
    """Wait for what a server does once it has answered: the caller may have the answer first."""

    async def wait(condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(5):
            while not condition():  # noqa: ASYNC110 - the end of a call tells nobody
                await asyncio.sleep(0)

    return wait


@pytest.fixture
def text() -> type[Any]:
    return Text


@pytest.fixture
def echo() -> Any:
    """The names tests need: the service, its registrar, its stub and its secret."""

    class Names:
        service, add, stub, servicer, secret = SERVICE, staticmethod(add_echo), EchoStub, Echo, SECRET

    return Names


@pytest.fixture
def spans() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def tracer_provider(spans: InMemorySpanExporter) -> TracerProvider:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(spans))
    return provider


@pytest.fixture
async def serve(tracer_provider: TracerProvider) -> AsyncIterator[Callable[..., Any]]:
    """Start echo services over a socket; all are closed at the end."""
    running: list[Mesh] = []

    async def start(server: ServerConfig | None = None, channel: ChannelConfig | None = None, **options: Any) -> Mesh:
        registry = CollectorRegistry()
        roles = {f"/{SERVICE}/{name}": Role.VIEWER for name in (*_KINDS, *_SINGLE, "HoldStream")}
        roles[f"/{SERVICE}/Hold"] = Role.OPERATOR
        mesh_server = MeshServer(server, registry=registry, roles=roles, tracer_provider=tracer_provider)
        servicer = Echo()
        mesh_server.add_servicer(add_echo, servicer, **options)
        await mesh_server.start()
        opened = open_channel(mesh_server.address, channel, tracer_provider=tracer_provider)
        mesh = Mesh(servicer, opened, EchoStub(opened), registry, mesh_server)
        running.append(mesh)
        return mesh

    yield start
    for mesh in running:
        await mesh.channel.close()
        assert mesh.server is not None
        await mesh.server.drain(0.1)


@pytest.fixture(params=["socket", "in_process"])
async def mesh(
    request: pytest.FixtureRequest, serve: Callable[..., Any], tracer_provider: TracerProvider
) -> AsyncIterator[Mesh]:
    """The echo service over each of the two transports."""
    if request.param == "socket":
        yield await serve(ServerConfig(max_concurrent_rpcs=8), ChannelConfig(retry_attempts=1))
        return
    registry = CollectorRegistry()
    policy = ServerConfig(max_concurrent_rpcs=8).policy()
    envelope = RpcEnvelope(policy, metrics=RpcMetrics(registry), tracer_provider=tracer_provider)
    channel = InProcessChannel(envelope=envelope, tracer_provider=tracer_provider)
    servicer = Echo()
    channel.add_servicer(add_echo, servicer)
    yield Mesh(servicer, channel, EchoStub(channel), registry)
    await channel.close()

"""A channel to servicers of this very process, for generated stubs; what ``Mesh.embedded()`` runs on.

    channel = InProcessChannel()
    channel.add_servicer(add_UrzaServiceServicer_to_server, UrzaServicer(store))
    blueprint = await UrzaServiceStub(channel).GetBlueprint(request, timeout=2.0)

Calls pass the same envelope as on a `MeshServer` and the same client wrapper as over `open_channel`: deadlines,
admission, spans and the error table behave alike; only the socket is missing.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grpc
from opentelemetry.trace import TracerProvider

from esper.mesh.calls import MeshChannel
from esper.mesh.channel import ChannelConfig
from esper.mesh.handlers import HandlerTable, Registrar
from esper.mesh.interceptors import RpcEnvelope
from esper.mesh.local_call import LocalCall, LocalMethod


class InProcessChannel(MeshChannel):
    """Holds servicers and calls them directly. Belongs to one event loop, which runs both sides."""

    def __init__(
        self,
        config: ChannelConfig | None = None,
        *,
        envelope: RpcEnvelope | None = None,
        tracer_provider: TracerProvider | None = None,
    ) -> None:
        """Make an empty channel.

        Args:
            config: Default deadlines; what concerns connections has no effect here.
            envelope: Policy and metrics of the serving side; ``None`` takes the defaults.
            tracer_provider: For spans of both sides; ``None`` takes the global one.
        """
        self._handlers = HandlerTable()
        transport = _LocalTransport(self._handlers, envelope or RpcEnvelope(tracer_provider=tracer_provider))
        super().__init__(transport, "inproc", config or ChannelConfig(), tracer_provider=tracer_provider)

    def add_servicer(self, registrar: Registrar, servicer: object) -> tuple[str, ...]:
        """Add a servicer by its generated ``add_XServicer_to_server``; give the names of the services it brought."""
        return self._handlers.add_servicer(registrar, servicer)

    def add_generic_rpc_handlers(self, generic_rpc_handlers: Sequence[Any]) -> None:
        """Take handlers as a server would, so that the generated registrar can be called on the channel itself."""
        self._handlers.add_generic_rpc_handlers(generic_rpc_handlers)

    def add_registered_method_handlers(self, service_name: str, method_handlers: Mapping[str, Any]) -> None:
        """Take handlers as a server would, so that the generated registrar can be called on the channel itself."""
        self._handlers.add_registered_method_handlers(service_name, method_handlers)

    @property
    def service_names(self) -> tuple[str, ...]:
        """Full names of the services that can be called."""
        return self._handlers.service_names


class _LocalTransport:
    """The part of a ``grpc.aio`` channel that `MeshChannel` needs, over a table of handlers."""

    def __init__(self, handlers: HandlerTable, envelope: RpcEnvelope) -> None:
        self._handlers = handlers
        self._envelope = envelope
        self._running: weakref.WeakSet[LocalCall] = weakref.WeakSet()
        self._closed = asyncio.Event()

    def unary_unary(self, method: str, *codecs: Any, **named: Any) -> Callable[..., LocalCall]:
        return self._callable(method, False, codecs, named)

    def unary_stream(self, method: str, *codecs: Any, **named: Any) -> Callable[..., LocalCall]:
        return self._callable(method, False, codecs, named)

    def stream_unary(self, method: str, *codecs: Any, **named: Any) -> Callable[..., LocalCall]:
        return self._callable(method, True, codecs, named)

    def stream_stream(self, method: str, *codecs: Any, **named: Any) -> Callable[..., LocalCall]:
        return self._callable(method, True, codecs, named)

    async def close(self, grace: float | None = None) -> None:
        self._closed.set()
        running = [call for call in self._running if not call.done()]
        if running and grace:
            await asyncio.wait([asyncio.ensure_future(call.code()) for call in running], timeout=grace)
        for call in running:
            call.cancel()
        await asyncio.gather(*(call.code() for call in running))

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:  # noqa: ARG002
        return grpc.ChannelConnectivity.SHUTDOWN if self._closed.is_set() else grpc.ChannelConnectivity.READY

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        if self.get_state() is last_observed_state:
            await self._closed.wait()

    async def channel_ready(self) -> None:
        if self._closed.is_set():
            raise grpc.aio.UsageError("Channel is closed.")

    def _callable(
        self, path: str, streams_requests: bool, codecs: tuple[Any, ...], named: dict[str, Any]
    ) -> Callable[..., LocalCall]:
        request_serializer, response_deserializer = (*codecs, None, None)[:2]
        method = LocalMethod(
            path,
            self._find,
            named.get("request_serializer", request_serializer),
            named.get("response_deserializer", response_deserializer),
        )

        def start(request: Any = None, *, timeout: float | None = None, metadata: Any = None, **_: Any) -> LocalCall:
            if self._closed.is_set():
                raise grpc.aio.UsageError("Channel is closed.")
            call = LocalCall(method, request, streams_requests, timeout, metadata)
            self._running.add(call)
            return call

        return start

    async def _find(self, details: grpc.HandlerCallDetails) -> Any:
        async def known(asked: grpc.HandlerCallDetails) -> Any:
            return self._handlers.find(asked)

        return await self._envelope.intercept_service(known, details)

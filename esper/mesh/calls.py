"""Client-side calls of the mesh: default deadline, span, circuit breaker, and Esper errors instead of ``RpcError``.

`MeshChannel` wraps any channel of ``grpc.aio``'s shape, a real one or the one within the process, so that a generated
stub built on it behaves the same over both.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Callable, Generator
from contextlib import suppress
from types import TracebackType
from typing import Any, Final, Protocol, Self

import grpc
from google.protobuf import descriptor_pool
from opentelemetry.trace import Span, TracerProvider

from esper.contracts.errors import EsperError, InvalidInputError
from esper.mesh.auth import bearer
from esper.mesh.breaker import CircuitBreaker
from esper.mesh.deadline import effective_timeout_s
from esper.mesh.rpc_tracing import client_span, inject, mesh_tracer, set_outcome, split_method
from esper.mesh.status import from_rpc_error

END_OF_STREAM: Final = grpc.aio.EOF  # type: ignore[attr-defined]
"""What `StreamCall.read` gives after the last message."""


class _Ending:
    """What is told of the end of one call, exactly once, whichever end comes first."""

    def __init__(self, span: Span, breaker: CircuitBreaker) -> None:
        self._span = span
        self._breaker = breaker
        self._ended = False

    def answered(self) -> None:
        """Let the breaker know that the other side lives, though the call goes on."""
        self._breaker.record(grpc.StatusCode.OK)

    def end(self, code: grpc.StatusCode, error: EsperError | None = None) -> None:
        """End the span with the status of the call, and let the breaker know."""
        if self._ended:
            return
        self._ended = True
        self._breaker.record(code)
        set_outcome(self._span, code, None if error is None else error.reason, server=False)
        self._span.end()


class _RequestCheck:
    """Refuses requests of the wrong type: gRPC would send an empty or foreign message in their place."""

    def __init__(self, method: str) -> None:
        service, name = split_method(method)
        self._expected: str | None = None
        with suppress(KeyError):  # hand-written services may have no descriptor; then any message passes
            self._expected = descriptor_pool.Default().FindMethodByName(f"{service}.{name}").input_type.full_name

    def __call__(self, request: Any) -> Any:
        """Give the request back when it is of the method's type."""
        descriptor = getattr(request, "DESCRIPTOR", None)
        if self._expected is not None and (descriptor is None or descriptor.full_name != self._expected):
            received = type(request).__name__ if descriptor is None else descriptor.full_name
            raise InvalidInputError(f"request must be a {self._expected}, got a {received}", parameter="request")
        return request


class _Requests:
    """The caller's own stream of requests; remembers why it broke, which gRPC would hide behind a cancellation."""

    def __init__(self, source: Any, check: _RequestCheck) -> None:
        self._source = source
        self._check = check
        self.failure: Exception | None = None

    async def __aiter__(self) -> AsyncIterator[Any]:
        try:
            if isinstance(self._source, AsyncIterable):
                async for request in self._source:
                    yield self._check(request)
            else:
                for request in self._source:
                    yield self._check(request)
        except Exception as error:
            self.failure = error
            raise


class MeshCall:
    """A running call; everything that ``grpc.aio.Call`` has, with Esper's errors."""

    def __init__(
        self, inner: Any, method: str, ending: _Ending, check: _RequestCheck, requests: _Requests | None
    ) -> None:
        self._inner = inner
        self._method = method
        self._ending = ending
        self._check = check
        self._requests = requests

    def cancel(self) -> bool:
        """Cancel the call; false when it was over already."""
        cancelled = bool(self._inner.cancel())
        if cancelled:
            self._ending.end(grpc.StatusCode.CANCELLED)
        return cancelled

    def cancelled(self) -> bool:
        """Tell whether the call was cancelled."""
        return bool(self._inner.cancelled())

    def done(self) -> bool:
        """Tell whether the call is over."""
        return bool(self._inner.done())

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        """Have ``callback`` called with this call once it is over."""
        self._inner.add_done_callback(lambda _: callback(self))

    def time_remaining(self) -> float | None:
        """Give the seconds left, ``None`` without a deadline."""
        left: float | None = self._inner.time_remaining()
        return left

    async def initial_metadata(self) -> Any:
        """Give the metadata the server sent first."""
        return await self._inner.initial_metadata()

    async def trailing_metadata(self) -> Any:
        """Wait for the end and give the metadata the server sent last."""
        return await self._inner.trailing_metadata()

    async def code(self) -> grpc.StatusCode:
        """Wait for the end and give its status code."""
        code: grpc.StatusCode = await self._inner.code()
        return code

    async def details(self) -> str:
        """Wait for the end and give its text."""
        return str(await self._inner.details())

    async def wait_for_connection(self) -> None:
        """Wait until the call is on its way to a connected server."""
        await self._guard(self._inner.wait_for_connection())

    def __del__(self) -> None:
        inner = getattr(self, "_inner", None)
        if inner is not None and not inner.done():
            inner.cancel()
        if hasattr(self, "_ending"):
            self._ending.end(grpc.StatusCode.CANCELLED)

    async def _guard(self, step: Any) -> Any:
        """Await one step of the call; an error ends the span and leaves as an Esper error."""
        try:
            return await step
        except grpc.RpcError as error:
            mapped = from_rpc_error(error, method=self._method.lstrip("/"))
            code = error.code() if isinstance(error, grpc.aio.AioRpcError) else grpc.StatusCode.UNKNOWN
            self._ending.end(code, mapped)
            raise mapped from error
        except asyncio.CancelledError:
            self._ending.end(grpc.StatusCode.CANCELLED)
            if self._requests is not None and self._requests.failure is not None:
                raise self._requests.failure from None
            raise


class UnaryCall(MeshCall):
    """A call with one response: await it."""

    def __await__(self) -> Generator[Any, None, Any]:
        return self._response().__await__()

    async def _response(self) -> Any:
        response = await self._guard(self._inner)
        self._ending.end(grpc.StatusCode.OK)
        return response


class StreamCall(MeshCall):
    """A call with a stream of responses: iterate over it, or `read` until `END_OF_STREAM`.

    Leaving the iteration early and dropping the call cancels it.
    """

    _iterator: AsyncIterator[Any] | None = None

    def __aiter__(self) -> StreamCall:
        return self

    async def __anext__(self) -> Any:
        if self._iterator is None:
            self._iterator = self._inner.__aiter__()
        try:
            message = await self._guard(self._iterator.__anext__())
        except StopAsyncIteration:
            self._ending.end(grpc.StatusCode.OK)
            raise
        self._ending.answered()
        return message

    async def read(self) -> Any:
        """Give the next response, or `END_OF_STREAM`."""
        message = await self._guard(self._inner.read())
        if message is END_OF_STREAM:
            self._ending.end(grpc.StatusCode.OK)
        else:
            self._ending.answered()
        return message


class _Writer(MeshCall):
    """The sending half of a call with a stream of requests."""

    async def write(self, request: Any) -> None:
        """Send one request; returns once there is room for the next."""
        await self._guard(self._inner.write(self._check(request)))

    async def done_writing(self) -> None:
        """Say that no more requests follow."""
        await self._guard(self._inner.done_writing())


class StreamUnaryCall(_Writer, UnaryCall):
    """A call with a stream of requests and one response."""


class StreamStreamCall(_Writer, StreamCall):
    """A call with streams both ways."""


class CallDefaults(Protocol):
    """What a channel's configuration must say about calls."""

    @property
    def default_deadline_s(self) -> float:
        """Seconds for a call with one response that names no timeout."""

    @property
    def default_stream_deadline_s(self) -> float | None:
        """Seconds for a stream of responses that names no timeout; ``None`` for no bound of the client's own."""

    @property
    def breaker_failures(self) -> int:
        """Failures in a row that open the circuit breaker; 0 for none."""

    @property
    def breaker_cooldown_s(self) -> float:
        """Seconds the breaker stays open."""

    @property
    def token(self) -> str | None:
        """Bearer token sent with every call, or ``None``."""


class MeshChannel(grpc.aio.Channel):
    """A channel for generated stubs whose calls are `MeshCall` objects. Belongs to one event loop."""

    def __init__(
        self, inner: Any, target: str, defaults: CallDefaults, *, tracer_provider: TracerProvider | None = None
    ) -> None:
        self._inner = inner
        self._target = target
        self._defaults = defaults
        self._tracer = mesh_tracer(tracer_provider)
        self._identity = () if defaults.token is None else (bearer(defaults.token),)
        self._breaker = CircuitBreaker(
            target, failures=defaults.breaker_failures, cooldown_s=defaults.breaker_cooldown_s
        )

    @property
    def target(self) -> str:
        """Where the channel leads."""
        return self._target

    async def __aenter__(self) -> Self:
        """Give the channel itself."""
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc_val: BaseException | None, exc_tb: TracebackType | None
    ) -> None:
        """Close the channel."""
        await self.close()

    async def close(self, grace: float | None = None) -> None:
        """Close the channel; calls still running after ``grace`` seconds are cancelled."""
        await self._inner.close(grace)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        """Give the state of the connection."""
        state: grpc.ChannelConnectivity = self._inner.get_state(try_to_connect)
        return state

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        """Wait until the state differs from ``last_observed_state``."""
        await self._inner.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        """Wait until the channel is connected."""
        await self._inner.channel_ready()

    def unary_unary(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Give the callable of a method with one request and one response."""
        return self._callable(self._inner.unary_unary(method, *args, **kwargs), method, UnaryCall)

    def unary_stream(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Give the callable of a method with one request and a stream of responses."""
        return self._callable(self._inner.unary_stream(method, *args, **kwargs), method, StreamCall)

    def stream_unary(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Give the callable of a method with a stream of requests and one response."""
        return self._callable(self._inner.stream_unary(method, *args, **kwargs), method, StreamUnaryCall)

    def stream_stream(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Give the callable of a method with streams both ways."""
        return self._callable(self._inner.stream_stream(method, *args, **kwargs), method, StreamStreamCall)

    def _callable(self, inner: Any, method: str, kind: type[MeshCall]) -> Callable[..., Any]:
        streams = issubclass(kind, StreamCall)
        takes_stream = issubclass(kind, _Writer)
        check = _RequestCheck(method)

        def start(
            request: Any = None, *, timeout: float | None = None, metadata: Any = None, **kwargs: Any
        ) -> MeshCall:
            if not takes_stream:
                check(request)
            self._breaker.admit()
            defaults = self._defaults
            default_s = defaults.default_stream_deadline_s if streams else defaults.default_deadline_s
            span = client_span(self._tracer, method, self._target)
            ending = _Ending(span, self._breaker)
            sent = inject(span, (*self._identity, *(metadata or ())))
            requests = _Requests(request, check) if takes_stream and request is not None else None
            try:
                call = inner(
                    requests or request, timeout=effective_timeout_s(timeout, default_s), metadata=sent, **kwargs
                )
            except BaseException:
                ending.end(grpc.StatusCode.CANCELLED)
                raise
            return kind(call, method, ending, check, requests)

        return start

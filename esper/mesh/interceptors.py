"""What surrounds every RPC on the server: span, role, admission, deadline, the error table, metrics, the access log.

One interceptor does all of it in one coroutine per call, so that each of the four kinds of RPC, an error, a
cancellation and a stream left early take the same way out. `InProcessChannel` uses the very same object.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager, aclosing, nullcontext
from dataclasses import dataclass
from typing import Any, Final

import grpc
from opentelemetry.trace import TracerProvider

from esper.contracts.errors import (
    CapacityExceededError,
    DeadlineExceededError,
    EsperError,
    InternalError,
    InvalidInputError,
)
from esper.mesh.auth import Authorizer, current_caller
from esper.mesh.deadline import deadline_scope
from esper.mesh.rpc_metrics import RpcMetrics
from esper.mesh.rpc_tracing import mesh_tracer, server_span, set_outcome, split_method
from esper.mesh.status import code_of, to_grpc_status

log = logging.getLogger(__name__)

EXEMPT_SERVICES: Final = frozenset(
    {
        "grpc.health.v1.Health",
        "grpc.reflection.v1.ServerReflection",
        "grpc.reflection.v1alpha.ServerReflection",
        "grpc.channelz.v1.Channelz",
    }
)
"""Services for operators and probes: no admission control, no default deadline, no span."""


@dataclass(frozen=True, kw_only=True)
class RpcPolicy:
    """Bounds that hold for every RPC of a server."""

    max_concurrent_rpcs: int = 256
    """RPCs running at once, streams included; one more is answered RESOURCE_EXHAUSTED with a retry hint. At least 1."""

    default_deadline_s: float = 30.0
    """Seconds given to a call with a single response whose caller set no deadline. Above 0."""

    default_stream_deadline_s: float = 3600.0
    """Seconds given to a call with a stream of responses whose caller set no deadline. Above 0."""

    def __post_init__(self) -> None:
        if self.max_concurrent_rpcs < 1:
            raise InvalidInputError.of("max_concurrent_rpcs", "be at least 1", self.max_concurrent_rpcs)
        for name in ("default_deadline_s", "default_stream_deadline_s"):
            if not getattr(self, name) > 0:
                raise InvalidInputError.of(name, "be above 0 seconds", getattr(self, name))


@dataclass(frozen=True, slots=True)
class RpcInfo:
    """What is known of an RPC before its request is read."""

    path: str
    """``/package.Service/Method``."""
    service: str
    method: str
    streams_responses: bool

    @property
    def exempt(self) -> bool:
        """Whether the call belongs to a service of `EXEMPT_SERVICES`."""
        return self.service in EXEMPT_SERVICES


@dataclass(slots=True)
class _Outcome:
    """How a call ended; filled in by `_settle`."""

    code: grpc.StatusCode = grpc.StatusCode.OK
    error: EsperError | None = None
    incident_id: str | None = None


_CODES: Final = {code.value[0]: code for code in grpc.StatusCode}
_Body = Callable[[], Awaitable[Any]]


class RpcEnvelope(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Wraps every handler of a server; the outermost and only interceptor a mesh server needs.

    Belongs to one event loop.
    """

    def __init__(
        self,
        policy: RpcPolicy | None = None,
        *,
        metrics: RpcMetrics | None = None,
        authorizer: Authorizer | None = None,
        tracer_provider: TracerProvider | None = None,
    ) -> None:
        self._policy = policy or RpcPolicy()
        self._authorizer = authorizer
        self._metrics = metrics
        self._tracer = mesh_tracer(tracer_provider)
        self._num_running = 0
        self._wrapped: dict[str, tuple[Any, Any]] = {}

    @property
    def num_running(self) -> int:
        """RPCs that hold a place of admission control now."""
        return self._num_running

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Give the wrapped handler of a method, or ``None`` for a method nobody offers."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        path = handler_call_details.method
        known = self._wrapped.get(path)
        if known is None or known[0] is not handler:
            known = self._wrapped[path] = (handler, self._wrap(path, handler))
        return known[1]

    def _wrap(self, path: str, handler: Any) -> Any:
        service, method = split_method(path)
        info = RpcInfo(path, service, method, bool(handler.response_streaming))
        codecs = {
            "request_deserializer": handler.request_deserializer,
            "response_serializer": handler.response_serializer,
        }
        behaviour = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream

        async def answer_once(request: Any, context: Any) -> Any:
            return await self._run(info, context, lambda: _call(behaviour, request, context))

        async def answer_stream(request: Any, context: Any) -> None:
            # A coroutine that writes, not a generator: a generator left early is closed in another task,
            # where neither the span nor the deadline scope can be undone.
            await self._run(info, context, lambda: _pump(behaviour, request, context))

        make = {
            (False, False): grpc.unary_unary_rpc_method_handler,
            (False, True): grpc.unary_stream_rpc_method_handler,
            (True, False): grpc.stream_unary_rpc_method_handler,
            (True, True): grpc.stream_stream_rpc_method_handler,
        }[bool(handler.request_streaming), info.streams_responses]
        return make(answer_stream if info.streams_responses else answer_once, **codecs)

    async def _run(self, info: RpcInfo, context: Any, body: _Body) -> Any:
        started_s = time.perf_counter()
        outcome = _Outcome()
        if self._metrics is not None:
            self._metrics.started(info.service)
        with self._span(info, context) as span:
            try:
                return await self._settle(info, context, body, outcome)
            finally:
                duration_s = time.perf_counter() - started_s
                reason = None if outcome.error is None else outcome.error.reason
                if span is not None:
                    set_outcome(span, outcome.code, reason, server=True)
                if self._metrics is not None:
                    self._metrics.finished(info.service, info.method, outcome.code.name, duration_s)
                _log_access(info, context, outcome, duration_s)

    def _span(self, info: RpcInfo, context: Any) -> AbstractContextManager[Any]:
        return nullcontext() if info.exempt else server_span(self._tracer, info.path, context.invocation_metadata())

    async def _settle(self, info: RpcInfo, context: Any, body: _Body, outcome: _Outcome) -> Any:
        """Run the body; turn whatever it raises into a status, and note in ``outcome`` how it ended."""
        try:
            response = await self._admitted(info, context, body)
            outcome.code = _set_code(context)
            return response
        except grpc.aio.AbortError:
            outcome.code = _set_code(context)
            raise
        except asyncio.CancelledError:
            left_s = context.time_remaining()
            expired = left_s is not None and left_s <= 0
            outcome.code = grpc.StatusCode.DEADLINE_EXCEEDED if expired else grpc.StatusCode.CANCELLED
            raise
        except EsperError as error:
            _note(info, outcome, error)
        except Exception as error:  # noqa: BLE001 -- the last border: its text must not reach the caller
            # The generated base class sets this code, then raises, for a method that the servicer lacks.
            if isinstance(error, NotImplementedError) and _set_code(context) is grpc.StatusCode.UNIMPLEMENTED:
                outcome.code = grpc.StatusCode.UNIMPLEMENTED
                await context.abort(outcome.code, f"{info.path.lstrip('/')} is not offered by this server")
            _note_defect(info, outcome, error)
        assert outcome.error is not None
        return await context.abort_with_status(to_grpc_status(outcome.error, incident_id=outcome.incident_id))

    async def _admitted(self, info: RpcInfo, context: Any, body: _Body) -> Any:
        if info.exempt:
            return await body()
        if self._authorizer is not None:
            self._authorizer.authorize(info.path, context.invocation_metadata() or (), context.auth_context())
        bound = self._policy.max_concurrent_rpcs
        if self._num_running >= bound:
            raise CapacityExceededError(
                f"the server must run at most {bound} RPCs at once, got one more; retry after the hinted delay",
                parameter="max_concurrent_rpcs",
            )
        self._num_running += 1
        try:
            return await self._within_deadline(info, context, body)
        finally:
            self._num_running -= 1

    async def _within_deadline(self, info: RpcInfo, context: Any, body: _Body) -> Any:
        left_s = context.time_remaining()
        if left_s is not None:  # the call ends at its caller's deadline by itself: this task is cancelled then
            with deadline_scope(left_s):
                return await body()
        policy = self._policy
        budget_s = policy.default_stream_deadline_s if info.streams_responses else policy.default_deadline_s
        limit = asyncio.timeout(budget_s)
        try:
            with deadline_scope(budget_s):
                async with limit:
                    return await body()
        except TimeoutError as error:
            if not limit.expired() or isinstance(error, EsperError):
                raise
            raise DeadlineExceededError(
                f"{info.path.lstrip('/')} must finish within the server's default deadline, got no result in "
                f"{budget_s:.3f} s"
            ) from error


async def _call(behaviour: Callable[..., Any], request: Any, context: Any) -> Any:
    result = behaviour(request, context)
    return await result if hasattr(result, "__await__") else result


async def _pump(behaviour: Callable[..., Any], request: Any, context: Any) -> None:
    """Write every response of a generator; a coroutine that writes by itself is only awaited."""
    result = behaviour(request, context)
    if hasattr(result, "__await__"):
        await result
        return
    responses: AsyncIterator[Any] = result.__aiter__()
    if not hasattr(responses, "aclose"):
        async for response in responses:
            await context.write(response)
        return
    async with aclosing(responses) as generator:  # type: ignore[type-var]
        async for response in generator:
            await context.write(response)


def _set_code(context: Any) -> grpc.StatusCode:
    """Give the code the servicer set by itself; OK when it set none."""
    raw = context.code()
    if isinstance(raw, grpc.StatusCode):
        return raw
    return _CODES.get(int(raw or 0), grpc.StatusCode.UNKNOWN)


def _note(info: RpcInfo, outcome: _Outcome, error: EsperError) -> None:
    outcome.error = error
    outcome.code = code_of(type(error))
    if outcome.code is grpc.StatusCode.INTERNAL:
        outcome.incident_id = _report_defect(info, error)


def _note_defect(info: RpcInfo, outcome: _Outcome, error: Exception) -> None:
    """Keep the exception in the log and hand only an incident id to the caller."""
    outcome.incident_id = _report_defect(info, error)
    outcome.code = grpc.StatusCode.INTERNAL
    outcome.error = InternalError(
        f"{info.path.lstrip('/')} hit a defect of the service; incident {outcome.incident_id}"
    )


def _report_defect(info: RpcInfo, error: Exception) -> str:
    """Log the exception with its traceback under a fresh incident id, and give the id."""
    incident_id = secrets.token_hex(8)
    log.error(
        "rpc_defect",
        exc_info=error,
        extra={"rpc_service": info.service, "rpc_method": info.method, "incident_id": incident_id},
    )
    return incident_id


def _log_access(info: RpcInfo, context: Any, outcome: _Outcome, duration_s: float) -> None:
    level = logging.DEBUG if info.exempt else logging.INFO
    if not log.isEnabledFor(level):
        return
    extra: dict[str, Any] = {
        "rpc_service": info.service,
        "rpc_method": info.method,
        "code": outcome.code.name,
        "duration_ms": round(duration_s * 1e3, 3),
        "peer": context.peer(),
        "caller": current_caller().name,
    }
    if outcome.error is not None:
        extra |= {"reason": outcome.error.reason, "error": outcome.error.message}
    if outcome.incident_id is not None:
        extra["incident_id"] = outcome.incident_id
    log.log(level, "rpc_finished", extra=extra)

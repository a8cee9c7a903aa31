"""Spans of RPCs on both sides, joined by W3C trace context in the metadata.

Only the OpenTelemetry API is used here: with no SDK configured every span is a no-op, and a context that came in is
still handed on to the calls made on its behalf.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Final

import grpc
from opentelemetry import propagate, trace
from opentelemetry.context import Context, get_current
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, TracerProvider

Metadata = tuple[tuple[str, str | bytes], ...]

_SERVER_FAULTS: Final = frozenset(
    {
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DATA_LOSS,
    }
)
"""Codes that mark a server span as failed; the others are the caller's doing (RPC semantic conventions)."""


def mesh_tracer(provider: TracerProvider | None = None) -> Tracer:
    """Give the tracer of the mesh; with no provider the global one, whenever it comes to be set."""
    return trace.get_tracer("esper.mesh", tracer_provider=provider)


def split_method(path: str) -> tuple[str, str]:
    """Split ``/package.Service/Method`` into service and method."""
    service, _, method = path.lstrip("/").partition("/")
    return service, method


@contextmanager
def server_span(tracer: Tracer, path: str, metadata: Iterable[tuple[str, str | bytes]] | None) -> Iterator[Span]:
    """Open the span of an inbound RPC, as a child of the context in ``metadata``, and make it the current one.

    REQUIRES: entered and left in the same task; whoever runs the call sets the outcome with `set_outcome`.
    """
    carrier = {key: value for key, value in metadata or () if isinstance(value, str)}
    parent = propagate.extract(carrier, context=Context())
    span = tracer.start_span(
        path.lstrip("/"),
        context=parent,
        kind=SpanKind.SERVER,
        attributes=_attributes(path),
        record_exception=False,
        set_status_on_exception=False,
    )
    if not parent and _says_nothing(span):
        yield span
        return
    with trace.use_span(span, end_on_exit=True, record_exception=False, set_status_on_exception=False):
        yield span


def client_span(tracer: Tracer, path: str, target: str) -> Span:
    """Start the span of an outbound RPC below the current one; the caller ends it."""
    attributes = {**_attributes(path), "server.address": target}
    return tracer.start_span(path.lstrip("/"), kind=SpanKind.CLIENT, attributes=attributes)


def inject(span: Span, metadata: Metadata) -> Metadata:
    """Give ``metadata`` with the span's trace context in the place of any it had."""
    if _says_nothing(span):
        return metadata
    carrier: dict[str, str] = {}
    propagate.inject(carrier, context=trace.set_span_in_context(span))
    kept = tuple((key, value) for key, value in metadata if key not in carrier)
    return kept + tuple(carrier.items())


def _says_nothing(span: Span) -> bool:
    """Tell whether a span is of no trace and nothing else is to be handed on: it need not be made the current one."""
    return not get_current() and not span.get_span_context().is_valid


def set_outcome(span: Span, code: grpc.StatusCode, reason: str | None, *, server: bool) -> None:
    """Record the status code, and the error's reason when there is one."""
    if not span.is_recording():
        return
    span.set_attribute("rpc.grpc.status_code", code.value[0])
    if reason is not None:
        span.set_attribute("error.type", reason)
    failed = code in _SERVER_FAULTS if server else code is not grpc.StatusCode.OK
    if failed:
        span.set_status(Status(StatusCode.ERROR, reason or code.name))


def _attributes(path: str) -> dict[str, str]:
    service, method = split_method(path)
    return {"rpc.system": "grpc", "rpc.service": service, "rpc.method": method}

"""Trace context through message headers, in W3C form, and spans around publishing and processing.

Uses the OpenTelemetry API alone: without an SDK set up, all of it does nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from opentelemetry import propagate, trace
from opentelemetry.context import Context
from opentelemetry.trace import Link, Span, SpanKind

from esper.telemetry.bus import MSG_ID_HEADER, BusMessage

_TRACER = trace.get_tracer("esper.telemetry")


def current_headers() -> dict[str, str]:
    """Give the headers that carry the caller's trace context; none outside a trace."""
    headers: dict[str, str] = {}
    propagate.inject(headers)
    return headers


def remote_context(headers: Mapping[str, str]) -> Context:
    """Give the trace context that a message's headers carry."""
    return propagate.extract(headers, context=Context())


@contextmanager
def publish_span(subject: str, headers: dict[str, str]) -> Iterator[dict[str, str]]:
    """Put a producer span around one publish, if the message belongs to a trace; give the headers to send."""
    parent = remote_context(headers)
    if not trace.get_current_span(parent).get_span_context().is_valid:
        yield headers
        return
    attributes = {**_messaging(subject, "send"), "messaging.message.id": headers.get(MSG_ID_HEADER, "")}
    name = f"send {_destination(subject)}"
    with _TRACER.start_as_current_span(name, parent, SpanKind.PRODUCER, attributes=attributes):
        sent = dict(headers)
        propagate.inject(sent)
        yield sent


@contextmanager
def process_span(message: BusMessage) -> Iterator[Span]:
    """Put a consumer span around the processing of one message, in the trace that it belongs to."""
    attributes = {**_messaging(message.subject, "process"), "messaging.message.id": message.msg_id or ""}
    name = f"process {_destination(message.subject)}"
    parent = remote_context(message.headers)
    with _TRACER.start_as_current_span(name, parent, SpanKind.CONSUMER, attributes=attributes) as span:
        yield span


@contextmanager
def batch_span(name: str, messages: Sequence[BusMessage]) -> Iterator[Span]:
    """Put one consumer span around a batch, linked to the trace of every message in it."""
    contexts = (trace.get_current_span(remote_context(one.headers)).get_span_context() for one in messages)
    links = [Link(context) for context in contexts if context.is_valid]
    attributes: dict[str, str | int] = {"messaging.system": "nats", "messaging.batch.message_count": len(messages)}
    with _TRACER.start_as_current_span(name, kind=SpanKind.CONSUMER, links=links, attributes=attributes) as span:
        yield span


def _messaging(subject: str, operation: str) -> dict[str, str]:
    return {
        "messaging.system": "nats",
        "messaging.destination.name": subject,
        "messaging.operation.type": operation,
        "messaging.operation.name": operation,
    }


def _destination(subject: str) -> str:
    """Give the low-cardinality part of a subject, for span names: its kind."""
    tokens = subject.split(".")
    return tokens[3] if len(tokens) > 3 else subject

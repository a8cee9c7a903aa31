"""Spans of RPCs where nothing is recorded: nothing is made current, and what came in is handed on all the same."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from opentelemetry import baggage, context, trace
from opentelemetry.trace import NonRecordingSpan, NoOpTracerProvider, SpanContext, TraceFlags

from esper.mesh.rpc_tracing import client_span, inject, mesh_tracer, server_span

PATH = "/esper.test.EchoService/Say"
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
TRACER = mesh_tracer(NoOpTracerProvider())


@pytest.fixture
def inside_a_trace() -> Iterator[SpanContext]:
    """Make a span of somebody else the current one."""
    theirs = SpanContext(1, 2, is_remote=False, trace_flags=TraceFlags(TraceFlags.SAMPLED))
    with trace.use_span(NonRecordingSpan(theirs)):
        yield theirs


def sent() -> dict[str, str | bytes]:
    """Give the metadata of a call made now."""
    return dict(inject(client_span(TRACER, PATH, "there"), (("x", "1"),)))


def test_a_call_of_no_trace_leaves_the_context_as_it_is() -> None:
    with server_span(TRACER, PATH, (("user-agent", "test"),)) as span:
        assert not span.get_span_context().is_valid
        assert context.get_current() == {}
        assert sent() == {"x": "1"}


def test_a_trace_that_came_in_is_handed_on_though_nothing_is_recorded() -> None:
    with server_span(TRACER, PATH, (("traceparent", TRACEPARENT),)):
        assert sent() == {"x": "1", "traceparent": TRACEPARENT}
    assert context.get_current() == {}


def test_the_trace_in_which_a_server_was_started_is_not_that_of_its_calls(inside_a_trace: SpanContext) -> None:
    assert trace.get_current_span().get_span_context() == inside_a_trace
    with server_span(TRACER, PATH, ()):
        assert not trace.get_current_span().get_span_context().is_valid
        assert sent() == {"x": "1"}


def test_what_else_a_context_carries_is_handed_on_without_a_trace() -> None:
    token = context.attach(baggage.set_baggage("run", "r1"))
    try:
        assert sent() == {"x": "1", "baggage": "run=r1"}
    finally:
        context.detach(token)

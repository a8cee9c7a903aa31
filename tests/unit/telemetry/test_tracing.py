"""Tracing set-up: off by default, bounded at the end, joined through headers."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from esper.contracts.errors import InvalidInputError, InvalidStateError, NotFoundError
from esper.telemetry.tracing import (
    ENDPOINT_VARIABLES,
    Tracing,
    adaptation_span,
    configure_tracing,
    current_trace_id,
    extract_context,
    inject_headers,
    join_tracing,
    link_to,
    make_provider,
)

HEADERS = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}


class StuckExporter(SpanExporter):
    """Never gets rid of a span until released, like an exporter with a dead collector."""

    def __init__(self) -> None:
        self.released = threading.Event()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.released.wait(30)
        return SpanExportResult.FAILURE


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    """Spans of this test alone: the global tracer is replaced for its time."""
    exporter = InMemorySpanExporter()
    provider = make_provider("test", exporter)
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    monkeypatch.setattr(exporter, "flush", provider.force_flush, raising=False)
    return exporter


def finished(exporter: InMemorySpanExporter) -> tuple[ReadableSpan, ...]:
    exporter.flush()  # type: ignore[attr-defined]
    return exporter.get_finished_spans()


def test_off_without_an_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ENDPOINT_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    tracing = configure_tracing("urza")
    assert not tracing.enabled
    assert tracing.shutdown()
    with adaptation_span("compile", "a1") as span:
        assert not span.is_recording()
        assert inject_headers({}) == {}
        assert current_trace_id() is None


@pytest.mark.parametrize("endpoint", ["127.0.0.1:4317", "grpc://collector"])
def test_endpoint_must_be_a_url(endpoint: str) -> None:
    with pytest.raises(InvalidInputError, match="endpoint must be an http:// or https:// URL"):
        configure_tracing("urza", endpoint)


def test_service_must_have_a_name() -> None:
    with pytest.raises(InvalidInputError, match="service_name must not be empty"):
        configure_tracing("")


def test_second_set_up_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: TracerProvider(shutdown_on_exit=False))
    with pytest.raises(InvalidStateError, match="configure_tracing must be called once"):
        configure_tracing("urza", exporter=InMemorySpanExporter())


def test_shutdown_is_bounded_and_says_what_was_lost(caplog: pytest.LogCaptureFixture) -> None:
    exporter = StuckExporter()
    provider = make_provider("urza", exporter)
    provider.get_tracer("t").start_span("s").end()
    assert not Tracing(provider).shutdown(0.05)
    assert [record.message for record in caplog.records] == ["tracing_shutdown_timed_out"]
    exporter.released.set()


def test_shutdown_hands_over_what_is_buffered() -> None:
    exporter = InMemorySpanExporter()
    provider = make_provider("urza", exporter)
    provider.get_tracer("t").start_span("s").end()
    assert Tracing(provider).shutdown(10)
    (span,) = exporter.get_finished_spans()
    assert span.resource.attributes["service.name"] == "urza"


def test_joining_takes_what_was_set_up(monkeypatch: pytest.MonkeyPatch) -> None:
    provider = TracerProvider(shutdown_on_exit=False)
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    assert join_tracing("esper-training", "http://127.0.0.1:4317").provider is provider


def test_joining_without_an_endpoint_leaves_tracing_off(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ENDPOINT_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert not join_tracing("esper-training").enabled
    assert join_tracing("esper-training").flush()


def test_flush_is_bounded_and_recording_goes_on() -> None:
    exporter = InMemorySpanExporter()
    provider = make_provider("urza", exporter)
    for name in ("first", "second"):
        provider.get_tracer("t").start_span(name).end()
        assert Tracing(provider).flush(10)
    assert [span.name for span in exporter.get_finished_spans()] == ["first", "second"]
    stuck = StuckExporter()
    provider = make_provider("urza", stuck)
    provider.get_tracer("t").start_span("s").end()
    assert not Tracing(provider).flush(0.05)
    stuck.released.set()


def test_adaptation_span_carries_its_id_and_facts(spans: InMemorySpanExporter) -> None:
    with adaptation_span("compile", "a1", device="cpu", attempts=2):
        pass
    (span,) = finished(spans)
    assert span.name == "esper.adaptation.compile"
    assert dict(span.attributes or {}) == {"esper.adaptation_id": "a1", "esper.device": "cpu", "esper.attempts": 2}


def test_failed_phase_is_marked_and_its_error_rises(spans: InMemorySpanExporter) -> None:
    with pytest.raises(NotFoundError, match="gone"), adaptation_span("load", "a1"):
        raise NotFoundError("gone")
    (span,) = finished(spans)
    assert (span.status.status_code, span.status.description) == (StatusCode.ERROR, "gone")
    assert (span.attributes or {})["error.type"] == "NOT_FOUND"


def test_headers_join_two_processes(spans: InMemorySpanExporter) -> None:
    with adaptation_span("decide", "a1") as decided:
        headers = inject_headers({"Nats-Msg-Id": "m1"})
        assert current_trace_id() == format(decided.get_span_context().trace_id, "032x")
    with adaptation_span("compile", "a1", parent=extract_context(headers)):
        pass
    first, second = finished(spans)
    assert second.parent is not None
    assert (second.parent.span_id, second.context.trace_id) == (first.context.span_id, first.context.trace_id)
    assert headers["Nats-Msg-Id"] == "m1"


def test_given_span_can_be_injected(spans: InMemorySpanExporter) -> None:
    span = trace.get_tracer("t").start_span("other")
    assert format(span.get_span_context().span_id, "016x") in inject_headers({}, span=span)["traceparent"]


def test_links_of_batches() -> None:
    link = link_to(HEADERS)
    assert link is not None
    assert format(link.context.trace_id, "032x") == "0af7651916cd43dd8448eb211c80319c"
    assert link_to(None) is None
    assert link_to({"traceparent": "garbage"}) is None

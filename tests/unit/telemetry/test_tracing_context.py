from __future__ import annotations

from collections.abc import Iterator

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from esper.telemetry import tracing_context
from esper.telemetry.bus import BusMessage
from esper.telemetry.tracing_context import batch_span, current_headers, process_span, publish_span

SUBJECT = "esper.v1.run-1.seed.layer1"


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(tracing_context, "_TRACER", provider.get_tracer("test"))
    yield exporter
    provider.shutdown()


def in_trace() -> dict[str, str]:
    with tracing_context._TRACER.start_as_current_span("decision"):
        return current_headers()


def test_outside_a_trace_nothing_is_added_and_no_span_made(spans: InMemorySpanExporter) -> None:
    assert current_headers() == {}
    with publish_span(SUBJECT, {"a": "b"}) as headers:
        assert headers == {"a": "b"}
    assert spans.get_finished_spans() == ()


def test_one_trace_goes_from_decision_through_the_bus_to_processing(spans: InMemorySpanExporter) -> None:
    headers = in_trace()
    with publish_span(SUBJECT, headers) as sent:
        pass
    with process_span(BusMessage(subject=SUBJECT, payload=b"", headers=sent)):
        pass
    decision, send, process = spans.get_finished_spans()
    assert [span.name for span in (send, process)] == ["send seed", "process seed"]
    assert len({span.context.trace_id for span in (decision, send, process)}) == 1
    assert send.parent is not None
    assert process.parent is not None
    assert (send.parent.span_id, process.parent.span_id) == (decision.context.span_id, send.context.span_id)
    assert send.attributes is not None
    assert send.attributes["messaging.destination.name"] == SUBJECT
    assert (send.kind, process.kind) == (trace.SpanKind.PRODUCER, trace.SpanKind.CONSUMER)


def test_a_batch_is_linked_to_every_trace_in_it(spans: InMemorySpanExporter) -> None:
    first, second = (BusMessage(subject=SUBJECT, payload=b"", headers=in_trace()) for _ in range(2))
    with batch_span("aggregate", [first, second, BusMessage(subject=SUBJECT, payload=b"")]):
        pass
    one, other, batch = spans.get_finished_spans()
    assert {link.context.trace_id for link in batch.links} == {one.context.trace_id, other.context.trace_id}
    assert batch.parent is None
    assert batch.attributes is not None
    assert batch.attributes["messaging.batch.message_count"] == 3

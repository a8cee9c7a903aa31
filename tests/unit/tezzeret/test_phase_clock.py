"""Phases leave one span and one wall time each."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from opentelemetry.context import Context
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from esper.contracts.kernel import CompileJob, CompileSpec, JobPhase
from esper.services.tezzeret import phase_clock
from esper.services.tezzeret.phase_clock import PhaseClock


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(phase_clock, "_TRACER", provider.get_tracer("test"))
    return exporter


def test_each_phase_is_a_span_of_its_adaptation(spans: InMemorySpanExporter, spec: CompileSpec) -> None:
    job = CompileJob(
        job_id="j1",
        content_key="k",
        blueprint_id="b",
        spec=spec,
        phase=JobPhase.QUEUED,
        adaptation_id="a1",
        run_id="run-1",
        created_at=datetime.now(UTC),
    )
    moments = iter([0.0, 1.0, 1.0, 3.0, 3.0, 3.5])
    clock = PhaseClock(job, Context(), clock=lambda: next(moments))
    clock.enter(JobPhase.COMPILING)
    clock.enter(JobPhase.VALIDATING)
    clock.enter(JobPhase.COMPILING)
    clock.end(RuntimeError("fell over"))
    clock.end()
    assert clock.times == {"compiling": timedelta(seconds=1.5), "validating": timedelta(seconds=2)}
    finished = spans.get_finished_spans()
    assert [span.name for span in finished] == ["tezzeret.compiling", "tezzeret.validating", "tezzeret.compiling"]
    assert all((span.attributes or {})["esper.adaptation_id"] == "a1" for span in finished)
    assert not finished[2].status.is_ok
    assert finished[2].status.description == "fell over"

"""OpenTelemetry set-up: spans go to an OTLP collector when one is named, and nothing happens otherwise.

tracing = configure_tracing("urza")            # OTEL_EXPORTER_OTLP_ENDPOINT, or off
with adaptation_span("compile", adaptation_id="a1", blueprint_id="b1"):
    headers = inject_headers({})
tracing.shutdown()
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from opentelemetry import propagate, trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import Link, Span, SpanKind, Status, StatusCode

from esper.contracts.errors import EsperError, InvalidInputError, InvalidStateError

log = logging.getLogger(__name__)

ENDPOINT_VARIABLES: Final = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
"""Variables that turn tracing on, the more specific one first."""

_EXPORT_DEADLINE_S: Final = 5.0
_TRACER: Final = "esper"

Attribute = str | bool | int | float


@dataclass(frozen=True)
class Tracing:
    """The tracing of this process; ``enabled`` is false when nothing is collected."""

    provider: TracerProvider | None = None

    @property
    def enabled(self) -> bool:
        """Whether spans are recorded."""
        return self.provider is not None

    def shutdown(self, deadline_s: float = 2.0) -> bool:
        """Send what is buffered and stop, within ``deadline_s`` seconds even when the collector is dead.

        Returns:
            Whether everything was handed over in time; what was not is lost.
        """
        if self.provider is None:
            return True
        # The SDK's own flush may wait 20 s for a dead collector: leave it behind in a thread that holds nobody up.
        worker = threading.Thread(target=self.provider.shutdown, name="esper-tracing-shutdown", daemon=True)
        worker.start()
        worker.join(deadline_s)
        if worker.is_alive():
            log.warning("tracing_shutdown_timed_out", extra={"deadline_s": deadline_s})
            return False
        return True

    def flush(self, deadline_s: float = 2.0) -> bool:
        """Send what is buffered within ``deadline_s`` seconds and go on recording.

        Returns:
            Whether everything was handed over in time; what was not goes with a later batch.
        """
        provider = self.provider
        if provider is None:
            return True
        worker = threading.Thread(target=provider.force_flush, name="esper-tracing-flush", daemon=True)
        worker.start()
        worker.join(deadline_s)
        return not worker.is_alive()


def configure_tracing(
    service_name: str, endpoint: str | None = None, *, exporter: SpanExporter | None = None
) -> Tracing:
    """Set up the tracing of this process, once, at its entry point.

    Args:
        service_name: ``service.name`` of every span, e.g. ``"urza"``.
        endpoint: OTLP/gRPC collector, e.g. ``"http://127.0.0.1:4317"``; ``None`` takes the ``OTEL_*`` variables,
            and without those tracing stays off.
        exporter: Where spans go instead of an OTLP collector.

    Raises:
        InvalidInputError: the service name is empty, or the endpoint is not an http(s) URL.
        InvalidStateError: tracing was set up already.
    """
    if not service_name:
        raise InvalidInputError.of("service_name", "not be empty", service_name)
    chosen = endpoint or next((os.environ[name] for name in ENDPOINT_VARIABLES if os.environ.get(name)), None)
    if exporter is None and chosen is None:
        return Tracing()
    if isinstance(trace.get_tracer_provider(), TracerProvider):
        raise InvalidStateError("configure_tracing must be called once per process, got a second call")
    provider = make_provider(service_name, exporter or _otlp(chosen or ""))
    trace.set_tracer_provider(provider)
    log.info("tracing_configured", extra={"service": service_name, "endpoint": chosen})
    return Tracing(provider)


def join_tracing(service_name: str, endpoint: str | None = None) -> Tracing:
    """Give the tracing of this process, set up as by :func:`configure_tracing` unless it was before, by whomever.

    Raises:
        InvalidInputError: the service name is empty, or the endpoint is not an http(s) URL.
    """
    provider = trace.get_tracer_provider()
    if isinstance(provider, TracerProvider):
        return Tracing(provider)
    return configure_tracing(service_name, endpoint)


def make_provider(service_name: str, exporter: SpanExporter) -> TracerProvider:
    """Build a provider that batches spans to ``exporter``, without making it the global one."""
    resource = Resource.create({"service.name": service_name, "service.namespace": "esper"})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider


def inject_headers(headers: dict[str, str], *, span: Span | None = None) -> dict[str, str]:
    """Put the W3C context of ``span`` (the current one by default) into ``headers``, and give them back."""
    context = None if span is None else trace.set_span_in_context(span)
    propagate.inject(headers, context=context)
    return headers


def extract_context(headers: Mapping[str, str] | None) -> Context:
    """Give the W3C context in ``headers``; an empty one, which starts a new trace, when there is none."""
    return propagate.extract(dict(headers or {}), context=Context())


def link_to(headers: Mapping[str, str] | None) -> Link | None:
    """Give a link to the span that ``headers`` name, for consumers of batches; ``None`` when they name none."""
    context = trace.get_current_span(extract_context(headers)).get_span_context()
    return Link(context) if context.is_valid else None


@contextmanager
def adaptation_span(
    name: str,
    adaptation_id: str,
    *,
    parent: Context | None = None,
    kind: SpanKind = SpanKind.INTERNAL,
    **attributes: Attribute,
) -> Iterator[Span]:
    """Open the span of one phase of an adaptation and make it the current one; an exception marks it failed.

    Args:
        name: Phase, e.g. ``"compile"``; the span is called ``esper.adaptation.<name>``.
        adaptation_id: What joins all phases, as ``esper.adaptation_id``.
        parent: Context to hang it below, e.g. from message headers; ``None`` takes the current span.
        kind: Side of a border the span stands for.
        attributes: Further facts, each as ``esper.<key>``.
    """
    named = {f"esper.{key}": value for key, value in attributes.items()}
    with trace.get_tracer(_TRACER).start_as_current_span(
        f"esper.adaptation.{name}",
        context=parent,
        kind=kind,
        attributes={"esper.adaptation_id": adaptation_id, **named},
        record_exception=False,
        set_status_on_exception=False,
    ) as span:
        try:
            yield span
        except Exception as error:
            reason = error.reason if isinstance(error, EsperError) else type(error).__name__
            span.set_attribute("error.type", reason)
            span.set_status(Status(StatusCode.ERROR, str(error)[:500]))
            raise


def current_trace_id() -> str | None:
    """Give the current trace's id as 32 hexadecimal digits, or ``None`` outside of any trace."""
    context = trace.get_current_span().get_span_context()
    return format(context.trace_id, "032x") if context.is_valid else None


def _otlp(endpoint: str) -> OTLPSpanExporter:
    if not endpoint.startswith(("http://", "https://")):
        raise InvalidInputError.of("endpoint", "be an http:// or https:// URL", endpoint)
    return OTLPSpanExporter(endpoint=endpoint, insecure=endpoint.startswith("http://"), timeout=_EXPORT_DEADLINE_S)

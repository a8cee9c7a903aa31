"""Rate, errors and duration of RPCs as Prometheus metrics."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class RpcMetrics:
    """The three families ``esper_rpc_requests_total``, ``esper_rpc_latency_seconds`` and ``esper_rpc_in_flight``.

    One instance per registry; thread-safe. Label sets are bounded: only methods that the server offers are counted.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._requests = Counter(
            "esper_rpc_requests", "RPCs finished, by status code.", ("service", "method", "code"), registry=registry
        )
        self._latency = Histogram(
            "esper_rpc_latency_seconds",
            "Time from the arrival of an RPC to its status.",
            ("service", "method"),
            buckets=_BUCKETS_S,
            registry=registry,
        )
        self._in_flight = Gauge("esper_rpc_in_flight", "RPCs running now.", ("service",), registry=registry)

    def started(self, service: str) -> None:
        """Count one RPC in."""
        self._in_flight.labels(service).inc()

    def finished(self, service: str, method: str, code: str, duration_s: float) -> None:
        """Count one RPC out with its status code's name and its duration."""
        self._in_flight.labels(service).dec()
        self._requests.labels(service, method, code).inc()
        self._latency.labels(service, method).observe(duration_s)

# Generated from ../_async by esper.client.generate; edit that.
"""Nissa: metrics, health, anomalies, reports."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Literal

from google.protobuf.duration_pb2 import Duration

from esper.client.paging import decoded
from esper.client.transport import Transport
from esper.contracts.decision import Anomaly
from esper.contracts.metrics import HealthReport, SystemMetrics
from esper.contracts.wire import from_wire
from esper.v1 import nissa_service_pb2


class NissaClient:
    """Calls of ``NissaService``."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def get_current_metrics(self, run_id: str = "") -> SystemMetrics:
        """Give the metrics of a run, by default of the newest."""
        request = nissa_service_pb2.GetCurrentMetricsRequest(run_id=run_id)
        return from_wire((self._transport.call("nissa", "GetCurrentMetrics", request)).metrics, SystemMetrics)

    def watch_metrics(
        self, run_id: str = "", *, interval: timedelta = timedelta(seconds=1)
    ) -> Iterator[SystemMetrics]:
        """Give the metrics now and at every interval."""
        period = Duration()
        period.FromTimedelta(interval)
        request = nissa_service_pb2.WatchMetricsRequest(run_id=run_id, interval=period)
        for response in self._transport.stream("nissa", "WatchMetrics", request):
            yield from_wire(response.metrics, SystemMetrics)

    def get_system_health(self) -> HealthReport:
        """Give the health of every component."""
        request = nissa_service_pb2.GetSystemHealthRequest()
        return from_wire(self._transport.call("nissa", "GetSystemHealth", request), HealthReport)

    def list_anomalies(self, run_id: str = "", *, open_only: bool = False) -> Sequence[Anomaly]:
        """Give anomalies, newest first, of one run or all."""
        request = nissa_service_pb2.ListAnomaliesRequest(run_id=run_id, open_only=open_only)
        return tuple(decoded((self._transport.call("nissa", "ListAnomalies", request)).anomalies, Anomaly))

    def acknowledge_anomaly(self, anomaly_id: str, *, actor: str) -> Anomaly:
        """Mark an anomaly as seen."""
        request = nissa_service_pb2.AcknowledgeAnomalyRequest(anomaly_id=anomaly_id, actor=actor)
        return from_wire((self._transport.call("nissa", "AcknowledgeAnomaly", request)).anomaly, Anomaly)

    def get_run_report(self, run_id: str, form: Literal["json", "markdown"] = "markdown") -> str:
        """Give the report of a run as text."""
        number = nissa_service_pb2.ReportFormat.Value(f"REPORT_FORMAT_{form.upper()}")
        request = nissa_service_pb2.GetRunReportRequest(run_id=run_id, format=number)
        return str((self._transport.call("nissa", "GetRunReport", request)).document)

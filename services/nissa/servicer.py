"""The gRPC face of Nissa: checks requests, asks the service."""

# ruff: noqa: N802 - rpc methods carry the schema's names
from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Final

from esper.contracts.errors import InvalidInputError
from esper.contracts.wire import to_message
from esper.mesh.validation import require_enum, require_id, require_range
from esper.services.nissa.health import HealthBoard
from esper.services.nissa.report import to_json
from esper.services.nissa.report_markdown import to_markdown
from esper.services.nissa.service import Nissa
from esper.services.nissa.store import MAX_ANOMALIES
from esper.telemetry.subjects import check_run_id
from esper.v1 import decision_pb2
from esper.v1 import nissa_service_pb2 as pb
from esper.v1.nissa_service_pb2_grpc import NissaServiceServicer

_DEFAULT_INTERVAL_S: Final = 1.0
_DEFAULT_ANOMALIES: Final = 100
_MAX_ACTOR: Final = 128


class NissaServicer(NissaServiceServicer):
    """Answers ``NissaService``."""

    def __init__(self, nissa: Nissa, board: HealthBoard) -> None:
        self._nissa = nissa
        self._board = board
        self.closing = asyncio.Event()
        """Set when the node closes; ends every stream."""
        self._endings = [self.closing]

    def end_with(self, draining: asyncio.Event) -> None:
        """Let streams end when a server drains."""
        self._endings.append(draining)

    async def GetCurrentMetrics(
        self, request: pb.GetCurrentMetricsRequest, context: Any
    ) -> pb.GetCurrentMetricsResponse:
        """Give the metrics of a run, or of the newest."""
        del context
        return pb.GetCurrentMetricsResponse(metrics=await self._metrics(request.run_id))

    async def WatchMetrics(
        self, request: pb.WatchMetricsRequest, context: Any
    ) -> AsyncIterator[pb.WatchMetricsResponse]:
        """Give the metrics now and at every interval, until the caller leaves or the server drains."""
        del context
        interval_s = _interval_s(request)
        while not any(ending.is_set() for ending in self._endings):
            yield pb.WatchMetricsResponse(metrics=await self._metrics(request.run_id))
            await self._pause(interval_s)

    async def GetSystemHealth(self, request: pb.GetSystemHealthRequest, context: Any) -> pb.GetSystemHealthResponse:
        """Give the health of every component."""
        del request, context
        return to_message(await self._board.report(), pb.GetSystemHealthResponse)

    async def ListAnomalies(self, request: pb.ListAnomaliesRequest, context: Any) -> pb.ListAnomaliesResponse:
        """Give anomalies, newest first."""
        del context
        run_id = check_run_id(request.run_id) if request.run_id else None
        limit = require_range("limit", request.limit, low=0, high=MAX_ANOMALIES) or _DEFAULT_ANOMALIES
        found = await self._nissa.store.anomalies(run_id=run_id, open_only=request.open_only, limit=limit)
        return pb.ListAnomaliesResponse(anomalies=[to_message(one, decision_pb2.Anomaly) for one in found])

    async def AcknowledgeAnomaly(
        self, request: pb.AcknowledgeAnomalyRequest, context: Any
    ) -> pb.AcknowledgeAnomalyResponse:
        """Note who has seen an anomaly; the first stays."""
        del context
        require_id("anomaly_id", request.anomaly_id)
        if not 0 < len(request.actor) <= _MAX_ACTOR:
            raise InvalidInputError.of("actor", f"be 1 to {_MAX_ACTOR} characters long", request.actor)
        found = await self._nissa.store.acknowledge(request.anomaly_id, request.actor)
        return pb.AcknowledgeAnomalyResponse(anomaly=to_message(found, decision_pb2.Anomaly))

    async def GetRunReport(self, request: pb.GetRunReportRequest, context: Any) -> pb.GetRunReportResponse:
        """Give the report of a run."""
        del context
        check_run_id(request.run_id)
        require_enum("format", pb.ReportFormat, request.format)
        report = await self._nissa.get_run_report(request.run_id)
        as_json = request.format == pb.REPORT_FORMAT_JSON
        return pb.GetRunReportResponse(document=to_json(report) if as_json else to_markdown(report))

    async def _pause(self, seconds: float) -> None:
        waits = [asyncio.create_task(ending.wait()) for ending in self._endings]
        try:
            await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    async def _metrics(self, run_id: str) -> pb.SystemMetrics:
        if run_id:
            check_run_id(run_id)
        return to_message(await self._nissa.get_current_metrics(run_id), pb.SystemMetrics)


def _interval_s(request: pb.WatchMetricsRequest) -> float:
    if not request.HasField("interval"):
        return _DEFAULT_INTERVAL_S
    seconds = request.interval.seconds + request.interval.nanos / 1e9
    return require_range("interval", seconds, low=0.1, high=3600.0, unit="s")

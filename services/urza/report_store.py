"""Field reports at rest: each counted once, and what they add up to by blueprint and by kernel.

A report says nothing of latency. What stands for it is the latency that the kernel's validation measured, looked up in
the kernel's manifest as the report comes in: one example, one way of measuring, the same for every run.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from esper.contracts import wire
from esper.contracts.blueprint import BlueprintStatistics, KernelStatistics
from esper.contracts.errors import InvalidInputError
from esper.contracts.run import AdaptationOutcome, FieldReport
from esper.mesh.database import Database
from esper.mesh.driver_reads import ReadScript, Statement
from esper.mesh.validation import require_id, require_size
from esper.services.urza.blueprint_records import mean
from esper.services.urza.clock import now_us
from esper.services.urza.kernel_rows import is_sound
from esper.services.urza.models import FieldReportRow, KernelRow, KernelStatisticsRow, StatisticsRow
from esper.services.urza.rules import ARTIFACT_ID, require_artifact_id, require_content_id
from esper.v1 import kernel_pb2

log = logging.getLogger(__name__)

MAX_REPORT_BYTES: Final = 64 * 1024
"""Largest report taken, in bytes."""
LATENCY_CHECK: Final = "latency"
"""Row of a kernel's validation that says how long one example takes, in milliseconds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recorded:
    """What became of a field report."""

    recorded: bool
    """Whether it was counted now; false when it had been before."""
    statistics: BlueprintStatistics | None
    """What the reports of its blueprint add up to; ``None`` where it names none."""


class ReportStore:
    """The field reports of the library. Safe for many tasks of one event loop."""

    def __init__(self, database: Database, *, clock: Callable[[], int] = now_us) -> None:
        self._database = database
        self._clock = clock

    async def record(self, report: FieldReport) -> Recorded:
        """Count a report in the statistics of its blueprint and kernel; one with a known id changes nothing.

        A kernel counts if its id is one that the library gives; any other name is kept with the report alone.

        Raises:
            InvalidInputError: The id, the blueprint's id or a figure breaks its rule.
        """
        data = _checked(report)
        async with self._database.session() as session:
            recorded = await self._keep(session, report, data)
            if recorded:
                await self._count(session, report)
            statistics = await _statistics(session, report.blueprint_id)
        if recorded:
            log.info("field_report", extra={"report_id": report.report_id, "blueprint_id": report.blueprint_id})
        return Recorded(recorded=recorded, statistics=statistics)

    async def statistics(self, blueprint_id: str) -> BlueprintStatistics | None:
        """Give what the reports of a blueprint add up to; ``None`` while none came."""
        require_content_id("blueprint_id", blueprint_id)
        async with self._database.reading() as session:
            return await _statistics(session, blueprint_id)

    async def kernel_statistics(self, artifact_id: str) -> KernelStatistics | None:
        """Give what the reports of a kernel add up to; ``None`` while none came."""
        require_artifact_id("artifact_id", artifact_id)
        return await self._database.read(read_kernel_statistics(artifact_id))

    async def _keep(self, session: AsyncSession, report: FieldReport, data: bytes) -> bool:
        fresh = self._database.insert(FieldReportRow).values(
            report_id=report.report_id,
            blueprint_id=report.blueprint_id,
            artifact_id=report.artifact_id if ARTIFACT_ID.fullmatch(report.artifact_id) else "",
            outcome=int(report.outcome),
            contribution=None if report.contribution is None else report.contribution.estimate,
            report=data,
            recorded_at_us=self._clock(),
        )
        result = await session.execute(fresh.on_conflict_do_nothing().returning(FieldReportRow.report_id))
        return result.first() is not None

    async def _count(self, session: AsyncSession, report: FieldReport) -> None:
        """Add a report to what there is; blueprints first, so that no two writers wait for each other."""
        known = ARTIFACT_ID.fullmatch(report.artifact_id) is not None
        values = _counted(report, await _latency_ms(session, report.artifact_id) if known else None)
        if report.blueprint_id:
            await self._add(session, StatisticsRow, "blueprint_id", report.blueprint_id, values)
        if known:
            await self._add(session, KernelStatisticsRow, "artifact_id", report.artifact_id, values)

    async def _add(
        self,
        session: AsyncSession,
        table: type[StatisticsRow | KernelStatisticsRow],
        key: str,
        identity: str,
        values: Mapping[str, float],
    ) -> None:
        fresh = self._database.insert(table).values(**{key: identity}, **values)
        added = {name: getattr(table, name) + value for name, value in values.items()}
        await session.execute(fresh.on_conflict_do_update(index_elements=[key], set_=added))


def latency_ms_of(manifest: bytes) -> float | None:
    """Give the latency that a kernel's validation measured; ``None`` where its manifest has no such row."""
    rows = kernel_pb2.KernelManifest.FromString(manifest).checks
    return next((row.figure for row in rows if row.name == LATENCY_CHECK and row.HasField("figure")), None)


async def _latency_ms(session: AsyncSession, artifact_id: str) -> float | None:
    row = await session.scalar(select(KernelRow).where(KernelRow.artifact_id == artifact_id))
    return latency_ms_of(row.manifest) if row is not None and is_sound(row) else None


def _counted(report: FieldReport, latency_ms: float | None) -> Mapping[str, float]:
    """Give what a report adds to every sum."""
    return {
        "trials": 1,
        "kept": int(report.outcome is AdaptationOutcome.KEPT),
        "contribution_sum": 0.0 if report.contribution is None else report.contribution.estimate,
        "contribution_count": int(report.contribution is not None),
        "latency_ms_sum": latency_ms or 0.0,
        "latency_count": int(latency_ms is not None),
    }


def read_kernel_statistics(artifact_id: str) -> ReadScript[KernelStatistics | None]:
    """Give what the reports of a kernel add up to; by the driver, since it goes with every look at a kernel."""
    rows = yield Statement(
        "SELECT trials, kept, contribution_sum, contribution_count, latency_ms_sum, latency_count "
        "FROM urza_kernel_statistics WHERE artifact_id = $1",
        (artifact_id,),
    )
    if not rows:
        return None
    trials, kept, contribution_sum, contribution_count, latency_ms_sum, latency_count = rows[0]
    return KernelStatistics(
        trials=trials,
        kept=kept,
        mean_contribution=mean(contribution_sum, contribution_count),
        mean_latency_ms=mean(latency_ms_sum, latency_count),
    )


async def _statistics(session: AsyncSession, blueprint_id: str) -> BlueprintStatistics | None:
    row = await session.scalar(select(StatisticsRow).where(StatisticsRow.blueprint_id == blueprint_id))
    if row is None:
        return None
    return BlueprintStatistics(
        trials=row.trials,
        kept=row.kept,
        mean_contribution=mean(row.contribution_sum, row.contribution_count),
        mean_latency_ms=mean(row.latency_ms_sum, row.latency_count),
    )


def _checked(report: FieldReport) -> bytes:
    """Give the report's wire bytes once its fields keep their rules."""
    require_id("report.report_id", report.report_id)
    if report.blueprint_id:
        require_content_id("report.blueprint_id", report.blueprint_id)
    if report.contribution is not None:
        for name in ("estimate", "low", "high"):
            value = getattr(report.contribution, name)
            if not math.isfinite(value):
                raise InvalidInputError.of(f"report.contribution.{name}", "be finite", value)
    data = wire.serialize(report)
    require_size("report", data, max_bytes=MAX_REPORT_BYTES)
    return data

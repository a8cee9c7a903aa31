"""Field reports at rest: each counted once, and what they add up to by blueprint."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Final

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from esper.contracts import wire
from esper.contracts.blueprint import BlueprintStatistics
from esper.contracts.errors import InvalidInputError
from esper.contracts.run import AdaptationOutcome, FieldReport
from esper.mesh.database import Database
from esper.mesh.validation import require_id, require_size
from esper.services.urza.blueprint_store import statistics_of
from esper.services.urza.clock import now_us
from esper.services.urza.models import FieldReportRow, StatisticsRow
from esper.services.urza.rules import require_content_id

log = logging.getLogger(__name__)

MAX_REPORT_BYTES: Final = 64 * 1024
"""Largest report taken, in bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recorded:
    """What became of a field report."""

    recorded: bool
    """Whether it was counted now; false when it had been before."""
    statistics: BlueprintStatistics | None
    """What the reports of its blueprint add up to; ``None`` where it names none."""


class ReportStore:
    """The field reports of the library. Safe for many tasks of one event loop."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def record(self, report: FieldReport) -> Recorded:
        """Count a report in the statistics of its blueprint; one with a known id changes nothing.

        Raises:
            InvalidInputError: The id, the blueprint's id or a figure breaks its rule.
        """
        data = _checked(report)
        async with self._database.session() as session:
            recorded = await self._keep(session, report, data)
            if recorded and report.blueprint_id:
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

    async def _keep(self, session: AsyncSession, report: FieldReport, data: bytes) -> bool:
        fresh = self._database.insert(FieldReportRow).values(
            report_id=report.report_id,
            blueprint_id=report.blueprint_id,
            outcome=int(report.outcome),
            contribution=None if report.contribution is None else report.contribution.estimate,
            report=data,
            recorded_at_us=now_us(),
        )
        result = await session.execute(fresh.on_conflict_do_nothing().returning(FieldReportRow.report_id))
        return result.first() is not None

    async def _count(self, session: AsyncSession, report: FieldReport) -> None:
        measured = report.contribution is not None
        values = {
            "trials": 1,
            "kept": int(report.outcome is AdaptationOutcome.KEPT),
            "contribution_sum": report.contribution.estimate if report.contribution is not None else 0.0,
            "contribution_count": int(measured),
        }
        fresh = self._database.insert(StatisticsRow).values(blueprint_id=report.blueprint_id, **values)
        added = {name: getattr(StatisticsRow, name) + value for name, value in values.items()}
        await session.execute(fresh.on_conflict_do_update(index_elements=["blueprint_id"], set_=added))


async def _statistics(session: AsyncSession, blueprint_id: str) -> BlueprintStatistics | None:
    row = await session.scalar(select(StatisticsRow).where(StatisticsRow.blueprint_id == blueprint_id))
    return None if row is None else statistics_of(row)


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

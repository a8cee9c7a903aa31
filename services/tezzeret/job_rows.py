"""Rows of one job, read and written inside a transaction that somebody else opened; `JobStore` and `AttemptStore` do.

Whatever moves a job goes through `put_job`, so that no phase goes unrecorded and every move counts as a sign of life.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Final

from sqlalchemy import delete, func, insert, select
from sqlalchemy.ext.asyncio import AsyncSession

from esper.contracts.errors import NotFoundError
from esper.contracts.kernel import CompileJob, JobPhase
from esper.contracts.wire import parse, serialize
from esper.mesh.database import Database
from esper.services.tezzeret.lanes import lane_of
from esper.services.tezzeret.models import JobRow, OutboxRow, PhaseRow, RefusalRow, WorkRow

WORKING_PHASES: Final = (JobPhase.COMPILING, JobPhase.VALIDATING, JobPhase.PACKAGING)
"""Phases of one delivery, in the one order in which they follow each other."""

_MAX_PHASES: Final = 64
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


async def job_row(session: AsyncSession, job_id: str, *, lock: bool = False) -> JobRow:
    """Give the row of a job.

    Raises:
        NotFoundError: There is none of this id.
    """
    row = await session.get(JobRow, job_id, with_for_update=lock)
    if row is None:
        raise NotFoundError(f"no compile job has id {job_id}", parameter="job_id")
    return row


def job_of(row: JobRow) -> CompileJob:
    """Give the job of a row; its generation is that of the column, which every version of Tezzeret keeps."""
    return replace(parse(row.body, CompileJob), generation=row.generation)


async def put_job(
    database: Database, session: AsyncSession, row: JobRow, job: CompileJob, through: Sequence[JobPhase] = ()
) -> None:
    """Write a job as it stands now, its phase, the phases it went through on the way there, and the sign of life."""
    before = JobPhase(row.phase)
    row.body = serialize(job)
    row.phase = int(job.phase)
    phases = [*through, job.phase] if job.phase is not before or through else []
    await record_phases(session, job, phases)
    await mark_seen(database, session, job, queued=job.phase is JobPhase.QUEUED)


async def record_phases(session: AsyncSession, job: CompileJob, phases: Sequence[JobPhase]) -> None:
    """Add phases to what is recorded of a job; of a job with a long history the oldest go."""
    if not phases:
        return
    query = select(func.max(PhaseRow.number)).where(PhaseRow.job_id == job.job_id)
    last: int = await session.scalar(query) or 0
    entered_us = now_us()
    rows = [
        {
            "job_id": job.job_id,
            "number": last + place,
            "phase": int(phase),
            "deliveries": job.deliveries if phase is job.phase or phase is not JobPhase.QUEUED else job.deliveries - 1,
            "entered_us": entered_us,
        }
        for place, phase in enumerate(phases, start=1)
    ]
    await session.execute(insert(PhaseRow), rows)
    if (old := last + len(rows) - _MAX_PHASES) > 0:
        await session.execute(delete(PhaseRow).where(PhaseRow.job_id == job.job_id, PhaseRow.number <= old))


async def mark_seen(database: Database, session: AsyncSession, job: CompileJob, *, queued: bool = False) -> None:
    """Note that somebody has the job; with ``queued``, that it goes on the queue now."""
    now = now_us()
    values = {"job_id": job.job_id, "lane": lane_of(job), "put_us": now, "seen_us": now}
    changed = {"lane": values["lane"], "put_us": now, "seen_us": now} if queued else {"seen_us": now}
    noted = database.insert(WorkRow).values(values)
    await session.execute(noted.on_conflict_do_update(index_elements=["job_id"], set_=changed))


async def has_kept(session: AsyncSession, job_id: str) -> bool:
    """Say whether a kernel is kept for a job."""
    return await session.scalar(select(OutboxRow.job_id).where(OutboxRow.job_id == job_id)) is not None


async def drop_kept(session: AsyncSession, job_id: str) -> None:
    """Let the kernel go that is kept for a job."""
    await session.execute(delete(OutboxRow).where(OutboxRow.job_id == job_id))
    await session.execute(delete(RefusalRow).where(RefusalRow.job_id == job_id))


def ended(job: CompileJob, phase: JobPhase, error: tuple[str, str]) -> CompileJob:
    """Give a job as it is when it ended without a kernel, for the text and reason of an error."""
    text, reason = error
    return replace(job, phase=phase, error=text, error_reason=reason, finished_at=datetime.now(UTC))


def queued(job: CompileJob) -> CompileJob:
    """Give a job as it is when it waits for a worker again."""
    return replace(
        job, phase=JobPhase.QUEUED, error="", error_reason="", finished_at=None, artifact_id="", size_bytes=0
    )


def put_anew(row: JobRow, job: CompileJob) -> CompileJob:
    """Begin another generation of a job; messages and attempts of the one before are void from now on."""
    row.generation += 1
    return replace(job, generation=row.generation)


def at_phase(job: CompileJob, row: PhaseRow) -> CompileJob:
    """Give a job as it stood when it entered a phase that it has left."""
    return replace(queued(job), phase=JobPhase(row.phase), deliveries=row.deliveries, phase_times={})


def now_us() -> int:
    """Give the time, in whole microseconds since 1970."""
    return microseconds(datetime.now(UTC))


def microseconds(moment: datetime) -> int:
    """Give a moment in whole microseconds since 1970."""
    return (moment - _EPOCH) // timedelta(microseconds=1)

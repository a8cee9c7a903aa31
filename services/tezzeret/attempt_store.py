"""Attempts at jobs, at rest: who may work on a job, and what came of it.

A delivery off the queue begins an attempt, and only the newest attempt of a job may move it. An attempt that was
overtaken (its service fell silent, somebody cancelled the job, the work item was put on the queue anew) finds that it
no longer holds the job, and changes nothing: so phases of one attempt follow each other in one order, and no job ends
twice. How often a job was attempted is counted here and not by the queue, which counts what reached no worker too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta

from sqlalchemy import and_, false, or_, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from esper.contracts.errors import InvalidInputError, InvalidStateError, UnavailableError
from esper.contracts.kernel import ENDED_PHASES, CompileJob, JobPhase
from esper.mesh.database import Database
from esper.services.tezzeret.job_rows import (
    WORKING_PHASES,
    ended,
    has_kept,
    job_of,
    job_row,
    now_us,
    put_anew,
    put_job,
    queued,
)
from esper.services.tezzeret.models import JobRow, OutboxRow, WorkRow


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """The right to move a job."""

    job_id: str
    """The job."""
    generation: int
    """Times it had been put on the queue anew when the attempt began."""
    number: int
    """Which attempt it is since, from 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Begun:
    """What a delivery finds."""

    job: CompileJob
    """The job as it stands."""
    attempt: Attempt | None = None
    """The right to work on it; ``None`` when there is nothing to do."""
    busy: bool = False
    """Whether somebody else works on it now, so that the delivery must come again in case they die."""


class AttemptStore:
    """Attempts over one database. Safe for many tasks of one event loop and for replicas that share the database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def begin(self, job_id: str, generation: int, *, max_deliver: int, lease_s: float) -> Begun:
        """Take up a job that waits, or whose last attempt gave no sign for ``lease_s`` seconds.

        A job that was attempted ``max_deliver`` times, none of which could say how it ended, is DEAD.

        Raises:
            NotFoundError: There is none of this id.
        """
        async with self._database.session() as session:
            row = await job_row(session, job_id, lock=True)
            job = job_of(row)
            if row.generation != generation or job.phase in ENDED_PHASES or await has_kept(session, job_id):
                return Begun(job=job)
            again = job.phase is not JobPhase.QUEUED
            if again and await _seen_since(session, job_id, now_us() - int(lease_s * 1e6)):
                return Begun(job=job, busy=True)
            if job.deliveries >= max_deliver:
                job = await self._give_up(session, row, job)
                return Begun(job=job)
            job = replace(job, phase=JobPhase.COMPILING, deliveries=job.deliveries + 1)
            await put_job(self._database, session, row, job, [JobPhase.QUEUED] if again else [])
            attempt = Attempt(job_id=job_id, generation=generation, number=job.deliveries)
            return Begun(job=job, attempt=attempt)

    async def advance(self, attempt: Attempt, phases: Sequence[JobPhase]) -> CompileJob | None:
        """Move a job through the next phases of its attempt; ``None`` when the attempt no longer holds the job.

        Raises:
            InvalidInputError: One is no phase that a worker goes through.
            InvalidStateError: They do not follow each other and the one the job is in.
        """
        for phase in phases:
            if phase not in WORKING_PHASES:
                raise InvalidInputError.of("phase", "be one that a worker goes through", phase.name)
        async with self._database.session() as session:
            row = await _held(session, attempt)
            if row is None:
                return None
            job = job_of(row)
            path = [job.phase, *phases]
            if any(later <= earlier for earlier, later in zip(path, phases, strict=False)):
                names = [phase.name for phase in phases]
                raise InvalidStateError(f"phases must come after {job.phase.name} and each other, got {names}")
            if phases:
                job = replace(job, phase=phases[-1])
                await put_job(self._database, session, row, job, phases[:-1])
            return job

    async def touch(self, attempt: Attempt) -> bool:
        """Say that an attempt is being worked on; gives whether it still holds the job."""
        async with self._database.session() as session:
            if await _held(session, attempt) is None:
                return False
            await session.execute(update(WorkRow).where(WorkRow.job_id == attempt.job_id).values(seen_us=now_us()))
            return True

    async def keep_artifact(
        self, attempt: Attempt, phases: Sequence[JobPhase], artifact: bytes, phase_times: Mapping[str, timedelta]
    ) -> CompileJob | None:
        """Keep a signed kernel until the library has it; the job is PACKAGING until then.

        Args:
            attempt: Who made it.
            phases: Phases the job went through that are not recorded yet, in order.
            artifact: The kernel.
            phase_times: Wall time by phase, added to what is known.

        Returns:
            The job; ``None``, and nothing is kept, when the attempt no longer holds it.
        """
        async with self._database.session() as session:
            row = await _held(session, attempt)
            if row is None:
                return None
            job = job_of(row)
            values = {"job_id": job.job_id, "artifact": artifact}
            await session.execute(self._database.insert(OutboxRow).values(values).on_conflict_do_nothing())
            through = [phase for phase in phases if job.phase < phase < JobPhase.PACKAGING]
            job = replace(job, phase=JobPhase.PACKAGING, phase_times={**job.phase_times, **phase_times})
            await put_job(self._database, session, row, job, through)
            return job

    async def end(
        self, attempt: Attempt, phase: JobPhase, error: tuple[str, str], phase_times: Mapping[str, timedelta]
    ) -> CompileJob | None:
        """End an attempt that gave no kernel; ``None`` when it no longer holds the job.

        Args:
            attempt: The attempt.
            phase: FAILED or DEAD, or QUEUED for another attempt.
            error: Text and reason of what went wrong; kept with a job that has ended.
            phase_times: Wall time by phase, added to what is known.
        """
        async with self._database.session() as session:
            row = await _held(session, attempt)
            if row is None:
                return None
            job = job_of(row)
            job = replace(job, phase_times={**job.phase_times, **phase_times})
            job = queued(job) if phase is JobPhase.QUEUED else ended(job, phase, error)
            await put_job(self._database, session, row, job)
            return job

    async def bury(self, job_id: str, generation: int, error: tuple[str, str]) -> CompileJob:
        """Mark a job DEAD whose message the queue gave up; one that has ended, or was put on it anew, stays.

        Raises:
            NotFoundError: There is none of this id.
        """
        async with self._database.session() as session:
            row = await job_row(session, job_id, lock=True)
            job = job_of(row)
            if row.generation == generation and job.phase not in ENDED_PHASES:
                job = ended(job, JobPhase.DEAD, error)
                await put_job(self._database, session, row, job)
            return job

    async def lost(self, reached_us: Mapping[str, int], quiet_since_us: int, limit: int) -> list[str]:
        """Give unfinished jobs whose work item is gone, oldest first.

        A job that is worked on is lost when nobody gave a sign of it since ``quiet_since_us``. One that waits is
        lost when, beyond that, its lane gave out everything that was put there until long after it: so a long queue
        loses nothing. One whose kernel is kept needs no work item.

        Args:
            reached_us: By lane, until when everything that was put there has been given out.
            quiet_since_us: Moment in microseconds since 1970.
            limit: Jobs at most.
        """
        passed = [and_(WorkRow.lane == lane, WorkRow.put_us < moment_us) for lane, moment_us in reached_us.items()]
        unknown = WorkRow.job_id.is_(None)  # of before there was a table of work items
        query = (
            select(JobRow.job_id)
            .outerjoin(WorkRow, WorkRow.job_id == JobRow.job_id)
            .where(
                JobRow.phase.not_in([int(phase) for phase in ENDED_PHASES]),
                JobRow.job_id.not_in(select(OutboxRow.job_id)),
                or_(unknown, WorkRow.seen_us < quiet_since_us),
                or_(unknown, JobRow.phase != int(JobPhase.QUEUED), or_(false(), *passed)),
            )
            .order_by(JobRow.created_us)
            .limit(limit)
        )
        async with self._database.reading() as session:
            return list((await session.scalars(query)).all())

    async def put_again(self, job_id: str, quiet_since_us: int, *, max_deliver: int) -> CompileJob | None:
        """Give up a lost job that was attempted ``max_deliver`` times, else make it wait anew.

        Returns:
            The job, DEAD, or QUEUED in a new generation; ``None`` when it is not lost any more.

        Raises:
            NotFoundError: There is none of this id.
        """
        async with self._database.session() as session:
            row = await job_row(session, job_id, lock=True)
            job = job_of(row)
            if job.phase in ENDED_PHASES or await has_kept(session, job_id):
                return None
            if await _seen_since(session, job_id, quiet_since_us):
                return None
            if job.deliveries >= max_deliver:
                return await self._give_up(session, row, job)
            job = put_anew(row, queued(job))
            await put_job(self._database, session, row, job)
            return job

    async def _give_up(self, session: AsyncSession, row: JobRow, job: CompileJob) -> CompileJob:
        reason = UnavailableError.reason
        text = f"given up after {job.deliveries} deliveries, none of which could say how it ended"
        job = ended(job, JobPhase.DEAD, (text, reason))
        await put_job(self._database, session, row, job)
        return job


async def _held(session: AsyncSession, attempt: Attempt) -> JobRow | None:
    """Give the locked row of an attempt's job while the attempt holds it."""
    row = await session.get(JobRow, attempt.job_id, with_for_update=True)
    if row is None or row.generation != attempt.generation or JobPhase(row.phase) not in WORKING_PHASES:
        return None
    if job_of(row).deliveries != attempt.number or await has_kept(session, attempt.job_id):
        return None
    return row


async def _seen_since(session: AsyncSession, job_id: str, moment_us: int) -> bool:
    """Say whether anybody gave a sign of a job since a moment."""
    seen_us = await session.scalar(select(WorkRow.seen_us).where(WorkRow.job_id == job_id))
    return seen_us is not None and seen_us >= moment_us

"""Jobs at rest: what was asked, by whom, how it stands, and the kernels that still have to reach the library.

The store, not the queue, is the truth: a message only says that a job may need work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Final

from sqlalchemy import delete, func, select, tuple_, update

from esper.contracts.errors import InvalidStateError, NotFoundError
from esper.contracts.kernel import ENDED_PHASES, CompileJob, JobPhase, JobPriority
from esper.contracts.wire import serialize
from esper.mesh.database import Database
from esper.services.tezzeret.attempt_store import AttemptStore
from esper.services.tezzeret.job_rows import (
    at_phase,
    drop_kept,
    ended,
    has_kept,
    job_of,
    job_row,
    mark_seen,
    microseconds,
    put_anew,
    put_job,
    queued,
    record_phases,
)
from esper.services.tezzeret.lanes import priority_of
from esper.services.tezzeret.models import AskerRow, Base, JobRow, OutboxRow, PhaseRow, RefusalRow, WorkRow

_MAX_UNFINISHED: Final = 10_000
_MAX_FORGOTTEN: Final = 500

_GIVEN_UP: Final = frozenset({JobPhase.DEAD, JobPhase.FAILED, JobPhase.CANCELLED})
"""Phases out of which an operator may put a job back on the queue."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Asker:
    """Who wants to know how a job ends."""

    run_id: str
    """Run."""
    adaptation_id: str
    """Adaptation; may be empty."""


class JobStore:
    """Jobs over one database. Safe for many tasks of one event loop and for replicas that share the database."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.attempts = AttemptStore(database)
        """Who may work on a job, and what came of it."""

    async def open(self) -> None:
        """Make the tables that are not there."""
        await self._database.create_all(Base.metadata)

    async def ping(self) -> None:
        """Return when the store answers."""
        await self._database.ping()

    async def add(self, job: CompileJob, asker: Asker | None) -> tuple[CompileJob, bool]:
        """Store a job unless one of its key is there, and note who asks; give what is stored and whether it is new."""
        async with self._database.session() as session:
            values = {
                "job_id": job.job_id,
                "content_key": job.content_key,
                "phase": int(job.phase),
                "created_us": microseconds(job.created_at),
                "generation": 0,
                "body": serialize(job),
            }
            insert = self._database.insert(JobRow).values(values).on_conflict_do_nothing()
            result: Any = await session.execute(insert)
            created = bool(result.rowcount)
            if created:
                await record_phases(session, job, [job.phase])
                await mark_seen(self._database, session, job)
            if asker is not None and asker.run_id:
                await session.execute(self._asked(job.job_id, asker))
            return job if created else job_of(await job_row(session, job.job_id)), created

    async def ask(self, job_id: str, asker: Asker) -> None:
        """Note who asks for a job that is there."""
        async with self._database.session() as session:
            await session.execute(self._asked(job_id, asker))

    async def get(self, job_id: str) -> CompileJob:
        """Give a job.

        Raises:
            NotFoundError: There is none of this id.
        """
        async with self._database.reading() as session:
            return job_of(await job_row(session, job_id))

    async def find(self, job_id: str) -> CompileJob | None:
        """Give a job, ``None`` when there is none of this id."""
        async with self._database.reading() as session:
            row = await session.get(JobRow, job_id)
            return None if row is None else job_of(row)

    async def page(
        self, phases: Sequence[JobPhase], limit: int, after: tuple[int, str] | None, *, oldest_first: bool = False
    ) -> list[CompileJob]:
        """Give jobs in these phases (all when empty), newest first unless told otherwise, after a place."""
        place = tuple_(JobRow.created_us, JobRow.job_id)
        query = select(JobRow)
        if phases:
            query = query.where(JobRow.phase.in_([int(phase) for phase in phases]))
        if after is not None:
            query = query.where(place > tuple_(*after) if oldest_first else place < tuple_(*after))
        order = (JobRow.created_us, JobRow.job_id) if oldest_first else (JobRow.created_us.desc(), JobRow.job_id.desc())
        async with self._database.reading() as session:
            rows = (await session.scalars(query.order_by(*order).limit(limit))).all()
        return [job_of(row) for row in rows]

    async def unfinished(self) -> list[CompileJob]:
        """Give the jobs that need a worker, oldest first."""
        kept = select(OutboxRow.job_id)
        ended = [int(phase) for phase in ENDED_PHASES]
        query = select(JobRow).where(JobRow.phase.not_in(ended), JobRow.job_id.not_in(kept))
        async with self._database.reading() as session:
            rows = (await session.scalars(query.order_by(JobRow.created_us).limit(_MAX_UNFINISHED))).all()
        return [job_of(row) for row in rows]

    async def history(self, job_id: str, after: int) -> tuple[list[CompileJob], int]:
        """Give a job at each phase it entered after a place among them, in order, and the place of the last.

        From place 0, they begin where the job was last put on the queue. The last is the job as it stands.

        Raises:
            NotFoundError: There is none of this id.
        """
        async with self._database.reading() as session:
            job = job_of(await job_row(session, job_id))
            if after == 0:
                waited = (PhaseRow.job_id == job_id, PhaseRow.phase == int(JobPhase.QUEUED))
                first = await session.scalar(select(func.max(PhaseRow.number)).where(*waited))
                after = (first or 1) - 1
            query = select(PhaseRow).where(PhaseRow.job_id == job_id, PhaseRow.number > after)
            rows = (await session.scalars(query.order_by(PhaseRow.number))).all()
        if not rows:  # nothing new, or a job of before phases were recorded
            return ([job] if after == 0 else []), after
        return [*(at_phase(job, row) for row in rows[:-1]), job], rows[-1].number

    async def outbox(self) -> list[str]:
        """Give the jobs whose kernels the library does not have yet."""
        async with self._database.reading() as session:
            return list((await session.scalars(select(OutboxRow.job_id).order_by(OutboxRow.job_id))).all())

    async def artifact(self, job_id: str) -> bytes | None:
        """Give the kernel kept for a job, ``None`` when there is none."""
        async with self._database.reading() as session:
            row = await session.get(OutboxRow, job_id)
            return None if row is None else row.artifact

    async def has_artifact(self, job_id: str) -> bool:
        """Say whether a kernel is kept for a job."""
        async with self._database.reading() as session:
            return await has_kept(session, job_id)

    async def succeed(self, job_id: str, artifact_id: str, size_bytes: int, *, kept_only: bool = False) -> CompileJob:
        """Note that the library has the kernel; what was kept for it goes.

        With ``kept_only``, nothing happens where no kernel is kept for the job any more: it was cancelled meanwhile.
        """
        async with self._database.session() as session:
            row = await job_row(session, job_id, lock=True)
            if kept_only and not await has_kept(session, job_id):
                return job_of(row)
            job = replace(
                job_of(row),
                phase=JobPhase.SUCCEEDED,
                artifact_id=artifact_id,
                size_bytes=size_bytes,
                error="",
                error_reason="",
                finished_at=datetime.now(UTC),
            )
            await put_job(self._database, session, row, job)
            await drop_kept(session, job_id)
            return job

    async def refuse_upload(self, job_id: str, error: tuple[str, str], *, max_refusals: int) -> CompileJob:
        """Count that a kept kernel was refused; at the last refusal it goes, and a job that has not ended is DEAD.

        Args:
            job_id: The job; nothing happens where no kernel is kept for it any more.
            error: Text and reason of the refusal.
            max_refusals: Refusals that end it.

        Raises:
            NotFoundError: There is none of this id.
        """
        async with self._database.session() as session:
            row = await job_row(session, job_id, lock=True)
            job = job_of(row)
            if not await has_kept(session, job_id):
                return job
            known = await session.scalar(select(RefusalRow.refusals).where(RefusalRow.job_id == job_id))
            refusals = (known or 0) + 1
            if refusals < max_refusals:
                await session.merge(RefusalRow(job_id=job_id, refusals=refusals))
                return job
            await drop_kept(session, job_id)
            if job.phase not in ENDED_PHASES:
                job = ended(job, JobPhase.DEAD, error)
                await put_job(self._database, session, row, job)
            return job

    async def requeue(self, job_id: str, generation: int, *, given_up_only: bool = True) -> CompileJob:
        """Put an ended job back to QUEUED, in a new generation.

        Args:
            job_id: The job.
            generation: Generation that the caller saw end: of callers who saw the same end, one starts the job.
            given_up_only: Whether it must be dead, failed or cancelled.

        Raises:
            NotFoundError: There is none of this id, or it is neither dead nor failed nor cancelled.
            InvalidStateError: It has not ended, or is of another generation: somebody else has put it back.
        """
        async with self._database.session() as session:
            row = await job_row(session, job_id, lock=True)
            job = job_of(row)
            if job.generation != generation:
                raise InvalidStateError(
                    f"job {job_id} must be of generation {generation} to be requeued, it is {job.phase.name} of "
                    f"generation {job.generation}: somebody else has put it back"
                )
            if given_up_only and job.phase not in _GIVEN_UP:
                raise NotFoundError(
                    f"job {job_id} must be dead, failed or cancelled to be requeued, it is {job.phase.name}"
                )
            if job.phase not in ENDED_PHASES:
                raise InvalidStateError(f"job {job_id} must have ended to be requeued, it is {job.phase.name}")
            job = put_anew(row, replace(queued(job), deliveries=0))
            await put_job(self._database, session, row, job)
            await session.execute(update(AskerRow).where(AskerRow.job_id == job_id).values(announced=False))
            return job

    async def hurry(self, job_id: str, priority: JobPriority) -> CompileJob | None:
        """Raise the priority of a job that waits, in a new generation; ``None`` where that changes nothing.

        Raises:
            NotFoundError: There is none of this id.
        """
        async with self._database.session() as session:
            row = await job_row(session, job_id, lock=True)
            job = job_of(row)
            if job.phase is not JobPhase.QUEUED or priority_of(job) >= priority:
                return None
            job = put_anew(row, replace(job, priority=priority))
            await put_job(self._database, session, row, job)
            return job

    async def cancel(self, job_id: str, why: str) -> CompileJob:
        """End a job that has not ended, and let the kernel go that is kept for it; one cancelled before stays as it is.

        Raises:
            NotFoundError: There is none of this id.
            InvalidStateError: It has ended otherwise.
        """
        async with self._database.session() as session:
            row = await job_row(session, job_id, lock=True)
            job = job_of(row)
            if job.phase is JobPhase.CANCELLED:
                return job
            if job.phase in ENDED_PHASES:
                raise InvalidStateError(f"job {job_id} must not have ended to be cancelled, it is {job.phase.name}")
            await drop_kept(session, job_id)
            job = ended(job, JobPhase.CANCELLED, (why, ""))
            await put_job(self._database, session, row, job)
            return job

    async def unannounced(self) -> list[tuple[CompileJob, Asker]]:
        """Give the ended jobs with the askers who were not told yet."""
        ended = [int(phase) for phase in ENDED_PHASES]
        query = select(JobRow, AskerRow).join(AskerRow, AskerRow.job_id == JobRow.job_id)
        query = query.where(JobRow.phase.in_(ended), AskerRow.announced.is_(False)).limit(1000)
        async with self._database.reading() as session:
            rows = (await session.execute(query)).all()
        return [(job_of(job), Asker(run_id=row.run_id, adaptation_id=row.adaptation_id)) for job, row in rows]

    async def forget_ended(self, before: datetime) -> int:
        """Drop the jobs that were asked for before a moment, have ended and are announced; give their number."""
        waiting = select(AskerRow.job_id).where(AskerRow.announced.is_(False))
        ended = [int(phase) for phase in ENDED_PHASES - {JobPhase.DEAD}]
        old = (JobRow.phase.in_(ended), JobRow.created_us < microseconds(before), JobRow.job_id.not_in(waiting))
        async with self._database.session() as session:
            found = (await session.scalars(select(JobRow.job_id).where(*old).limit(_MAX_FORGOTTEN))).all()
            for table in (AskerRow, WorkRow, PhaseRow):
                await session.execute(delete(table).where(table.job_id.in_(found)))
            await session.execute(delete(JobRow).where(JobRow.job_id.in_(found)))
        return len(found)

    async def mark_announced(self, job_id: str, asker: Asker) -> None:
        """Note that an asker was told."""
        found = (
            AskerRow.job_id == job_id,
            AskerRow.run_id == asker.run_id,
            AskerRow.adaptation_id == asker.adaptation_id,
        )
        async with self._database.session() as session:
            await session.execute(update(AskerRow).where(*found).values(announced=True))

    def _asked(self, job_id: str, asker: Asker) -> Any:
        row = {"job_id": job_id, "run_id": asker.run_id, "adaptation_id": asker.adaptation_id, "announced": False}
        return self._database.insert(AskerRow).values(row).on_conflict_do_nothing()


def place_of(job: CompileJob) -> tuple[int, str]:
    """Give the sort columns of a job in listings."""
    return microseconds(job.created_at), job.job_id

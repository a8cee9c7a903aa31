"""Jobs at rest: what was asked, by whom, how it stands, and the kernels that still have to reach the library.

The store, not the queue, is the truth: a message only says that a job may need work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from sqlalchemy import delete, select, tuple_, update
from sqlalchemy.ext.asyncio import AsyncSession

from esper.contracts.errors import InvalidStateError, NotFoundError
from esper.contracts.kernel import ENDED_PHASES, CompileJob, JobPhase
from esper.contracts.wire import parse, serialize
from esper.mesh.database import Database
from esper.services.tezzeret.models import AskerRow, Base, JobRow, OutboxRow, RefusalRow

_MAX_UNFINISHED: Final = 10_000
_MAX_FORGOTTEN: Final = 500
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)

_GIVEN_UP: Final = frozenset({JobPhase.DEAD, JobPhase.FAILED})
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
                "created_us": _us(job.created_at),
                "generation": 0,
                "body": serialize(job),
            }
            insert = self._database.insert(JobRow).values(values).on_conflict_do_nothing()
            result: Any = await session.execute(insert)
            if asker is not None and asker.run_id:
                row = {"job_id": job.job_id, "run_id": asker.run_id, "adaptation_id": asker.adaptation_id}
                asked = self._database.insert(AskerRow).values({**row, "announced": False})
                await session.execute(asked.on_conflict_do_nothing())
            return _job(await _row(session, job.job_id)), bool(result.rowcount)

    async def get(self, job_id: str) -> CompileJob:
        """Give a job.

        Raises:
            NotFoundError: There is none of this id.
        """
        async with self._database.reading() as session:
            return _job(await _row(session, job_id))

    async def find(self, job_id: str) -> CompileJob | None:
        """Give a job, ``None`` when there is none of this id."""
        async with self._database.reading() as session:
            row = await session.get(JobRow, job_id)
            return None if row is None else _job(row)

    async def generation(self, job_id: str) -> int:
        """Give how often an operator put the job back on the queue."""
        async with self._database.reading() as session:
            return (await _row(session, job_id)).generation

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
        return [_job(row) for row in rows]

    async def unfinished(self) -> list[CompileJob]:
        """Give the jobs that need a worker, oldest first."""
        kept = select(OutboxRow.job_id)
        ended = [int(phase) for phase in ENDED_PHASES]
        query = select(JobRow).where(JobRow.phase.not_in(ended), JobRow.job_id.not_in(kept))
        async with self._database.reading() as session:
            rows = (await session.scalars(query.order_by(JobRow.created_us).limit(_MAX_UNFINISHED))).all()
        return [_job(row) for row in rows]

    async def advance(
        self,
        job_id: str,
        phase: JobPhase,
        *,
        deliveries: int | None = None,
        phase_times: Mapping[str, timedelta] | None = None,
        error: tuple[str, str] | None = None,
    ) -> CompileJob:
        """Move a job that has not ended to a phase; give it as it stands. One that has ended stays as it is.

        Args:
            job_id: The job.
            phase: Where it stands now.
            deliveries: Times it was handed to a worker.
            phase_times: Wall time by phase, added to what is known.
            error: Text and reason of a failure.

        Raises:
            NotFoundError: There is none of this id.
        """
        async with self._database.session() as session:
            row = await _row(session, job_id, lock=True)
            job = _job(row)
            if job.phase in ENDED_PHASES:
                return job
            job = replace(
                job,
                phase=phase,
                deliveries=job.deliveries if deliveries is None else max(deliveries, job.deliveries),
                phase_times={**job.phase_times, **(phase_times or {})},
                error="" if error is None else error[0],
                error_reason="" if error is None else error[1],
                finished_at=datetime.now(UTC) if phase in ENDED_PHASES else None,
            )
            _put(row, job)
            return job

    async def keep_artifact(self, job_id: str, artifact: bytes, phase_times: Mapping[str, timedelta]) -> CompileJob:
        """Keep a signed kernel until the library has it; the job is PACKAGING until then."""
        async with self._database.session() as session:
            row = await _row(session, job_id, lock=True)
            job = _job(row)
            if job.phase in ENDED_PHASES:
                return job
            values = {"job_id": job_id, "artifact": artifact}
            await session.execute(self._database.insert(OutboxRow).values(values).on_conflict_do_nothing())
            job = replace(job, phase=JobPhase.PACKAGING, phase_times={**job.phase_times, **phase_times})
            _put(row, job)
            return job

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
            query = select(OutboxRow.job_id).where(OutboxRow.job_id == job_id)
            return (await session.scalar(query)) is not None

    async def succeed(self, job_id: str, artifact_id: str, size_bytes: int) -> CompileJob:
        """Note that the library has the kernel; what was kept for it goes."""
        async with self._database.session() as session:
            row = await _row(session, job_id, lock=True)
            job = replace(
                _job(row),
                phase=JobPhase.SUCCEEDED,
                artifact_id=artifact_id,
                size_bytes=size_bytes,
                error="",
                error_reason="",
                finished_at=datetime.now(UTC),
            )
            _put(row, job)
            await _drop_kept(session, job_id)
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
            row = await _row(session, job_id, lock=True)
            job = _job(row)
            if await session.scalar(select(OutboxRow.job_id).where(OutboxRow.job_id == job_id)) is None:
                return job
            known = await session.scalar(select(RefusalRow.refusals).where(RefusalRow.job_id == job_id))
            refusals = (known or 0) + 1
            if refusals < max_refusals:
                await session.merge(RefusalRow(job_id=job_id, refusals=refusals))
                return job
            await _drop_kept(session, job_id)
            if job.phase not in ENDED_PHASES:
                text, reason = error
                job = replace(job, phase=JobPhase.DEAD, error=text, error_reason=reason, finished_at=datetime.now(UTC))
                _put(row, job)
            return job

    async def requeue(self, job_id: str, *, given_up_only: bool = True) -> tuple[CompileJob, int]:
        """Put an ended job back to QUEUED; give it with its new generation.

        Raises:
            NotFoundError: There is none of this id, or it is neither dead nor failed.
            InvalidStateError: It has not ended.
        """
        async with self._database.session() as session:
            row = await _row(session, job_id, lock=True)
            job = _job(row)
            if given_up_only and job.phase not in _GIVEN_UP:
                raise NotFoundError(f"job {job_id} must be dead or failed to be requeued, it is {job.phase.name}")
            if job.phase not in ENDED_PHASES:
                raise InvalidStateError(f"job {job_id} must have ended to be requeued, it is {job.phase.name}")
            row.generation += 1
            job = replace(
                job,
                phase=JobPhase.QUEUED,
                deliveries=0,
                error="",
                error_reason="",
                finished_at=None,
                artifact_id="",
                size_bytes=0,
            )
            _put(row, job)
            await session.execute(update(AskerRow).where(AskerRow.job_id == job_id).values(announced=False))
            return job, row.generation

    async def unannounced(self) -> list[tuple[CompileJob, Asker]]:
        """Give the ended jobs with the askers who were not told yet."""
        ended = [int(phase) for phase in ENDED_PHASES]
        query = select(JobRow, AskerRow).join(AskerRow, AskerRow.job_id == JobRow.job_id)
        query = query.where(JobRow.phase.in_(ended), AskerRow.announced.is_(False)).limit(1000)
        async with self._database.reading() as session:
            rows = (await session.execute(query)).all()
        return [(_job(job), Asker(run_id=row.run_id, adaptation_id=row.adaptation_id)) for job, row in rows]

    async def forget_ended(self, before: datetime) -> int:
        """Drop the jobs that were asked for before a moment, have ended and are announced; give their number."""
        waiting = select(AskerRow.job_id).where(AskerRow.announced.is_(False))
        ended = [int(phase) for phase in ENDED_PHASES - {JobPhase.DEAD}]
        old = (JobRow.phase.in_(ended), JobRow.created_us < _us(before), JobRow.job_id.not_in(waiting))
        async with self._database.session() as session:
            found = (await session.scalars(select(JobRow.job_id).where(*old).limit(_MAX_FORGOTTEN))).all()
            await session.execute(delete(AskerRow).where(AskerRow.job_id.in_(found)))
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


def place_of(job: CompileJob) -> tuple[int, str]:
    """Give the sort columns of a job in listings."""
    return _us(job.created_at), job.job_id


async def _row(session: AsyncSession, job_id: str, *, lock: bool = False) -> JobRow:
    row = await session.get(JobRow, job_id, with_for_update=lock)
    if row is None:
        raise NotFoundError(f"no compile job has id {job_id}", parameter="job_id")
    return row


def _job(row: JobRow) -> CompileJob:
    return parse(row.body, CompileJob)


async def _drop_kept(session: AsyncSession, job_id: str) -> None:
    await session.execute(delete(OutboxRow).where(OutboxRow.job_id == job_id))
    await session.execute(delete(RefusalRow).where(RefusalRow.job_id == job_id))


def _put(row: JobRow, job: CompileJob) -> None:
    row.body = serialize(job)
    row.phase = int(job.phase)


def _us(moment: datetime) -> int:
    return (moment - _EPOCH) // timedelta(microseconds=1)

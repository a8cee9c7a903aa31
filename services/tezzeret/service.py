"""Tezzeret: one job per distinct request, whoever asks and however often; compiled once, kept until the library has it.

The service owns no resource that it is given: store, bus, pool and stub are opened and closed by whoever made them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from esper.contracts.errors import (
    CapacityExceededError,
    CorruptDataError,
    EsperError,
    InvalidInputError,
    InvalidStateError,
    NotFoundError,
    SignatureError,
    UnavailableError,
)
from esper.contracts.kernel import ENDED_PHASES, CompileJob, CompileSpec, JobPhase, JobPriority, ValidationCheck
from esper.contracts.wire import serialize
from esper.execution.keys import SigningKey
from esper.mesh import remaining_s
from esper.mesh.periodic import Periodic
from esper.services.tezzeret.config import TezzeretConfig
from esper.services.tezzeret.content_key import job_id_of
from esper.services.tezzeret.job_changes import JobChanges
from esper.services.tezzeret.job_runner import GENERATION_HEADER, JobRunner
from esper.services.tezzeret.job_store import Asker, JobStore
from esper.services.tezzeret.known_specs import CheckedSpec, check_spec
from esper.services.tezzeret.lanes import lane_of, priority_of
from esper.services.tezzeret.library import KernelLookup, StoredKernel
from esper.services.tezzeret.outbox import Outbox
from esper.services.tezzeret.pool import WorkerPool
from esper.services.tezzeret.sweeper import Sweeper
from esper.telemetry.bus import Bus
from esper.telemetry.subjects import check_run_id, compile_job_subject
from esper.telemetry.tracing import inject_headers

log = logging.getLogger(__name__)

_ANSWER_MARGIN_S: Final = 0.25
_MAX_ADAPTATION_CHARS: Final = 128
_MAX_REMEMBERED: Final = 1024
_CANCELLED: Final = "cancelled on request"

_Lost = NotFoundError | SignatureError
"""How the library says that it has no kernel of a key that it would give to anybody."""


class TezzeretService:
    """What the gRPC face and embedded callers use. Belongs to one event loop."""

    def __init__(
        self,
        store: JobStore,
        bus: Bus,
        pool: WorkerPool,
        urza_stub: Any,
        signer: SigningKey,
        config: TezzeretConfig | None = None,
    ) -> None:
        """Join the parts.

        Args:
            store: Where jobs rest.
            bus: Work queue and announcements; its streams must exist.
            pool: Workers; started with the service, closed by its owner.
            urza_stub: ``UrzaServiceStub`` on an async channel or an `InProcessChannel`.
            signer: Key that kernels are signed with; the library and the runs must trust it.
            config: How jobs are treated.
        """
        self._store = store
        self._bus = bus
        self._pool = pool
        self._library = KernelLookup(urza_stub)
        self._done: OrderedDict[str, CompileJob] = OrderedDict()
        self._config = config or TezzeretConfig()
        self._changes = JobChanges(store, self._config.poll_interval_s)
        self._outbox = Outbox(store, bus, urza_stub, self._library, self._config, self._tell)
        self._runner = JobRunner(store, bus, pool, signer, self._config, self._changed)
        sweeper = Sweeper(store.attempts, self._config, self._runner.reached_us, self._publish, self._changed)
        self._sweeping = Periodic("tezzeret-sweep", sweeper.sweep, interval_s=self._config.sweep_interval_s)
        self._starting: asyncio.Task[None] | None = None
        self._trouble = "they are warming up"

    async def start(self) -> None:
        """Open the store's tables, put unfinished jobs back on the queue, begin to work; workers warm up meanwhile.

        Raises:
            UnavailableError: Store or bus cannot be reached.
        """
        await self._store.open()
        self._outbox.start()
        for job in await self._store.unfinished():
            await self._publish(job)
        self._sweeping.start()
        self._starting = asyncio.create_task(self._start_workers())

    async def _start_workers(self) -> None:
        """Start what takes jobs, as often as it takes; until then the service is not ready and says why."""
        pause_s = self._config.min_backoff_s
        while True:
            try:
                if not self._pool.started:
                    await self._pool.start()
                await self._runner.start()
            except (EsperError, OSError) as error:
                self._trouble = str(error)
                log.error("compile_workers_not_started", extra={"error": str(error), "retry_s": pause_s})
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, self._config.max_backoff_s)
            else:
                return

    async def warm(self) -> None:
        """Return when every worker is warm and jobs are taken."""
        if self._starting is None:
            raise InvalidStateError("service must be started to be warm, it is not")
        await asyncio.shield(self._starting)

    async def ready(self) -> bool:
        """Say whether jobs are stored and worked on; a readiness probe.

        Raises:
            UnavailableError: The store is away, or workers do not start; the message says why.
        """
        if self._starting is None or not self._starting.done():
            raise UnavailableError(f"compile workers are not ready: {self._trouble}")
        await self._store.ping()
        if not self._pool.ready() and self._pool.start_trouble:
            raise UnavailableError(f"compile workers are not ready: {self._pool.start_trouble}")
        return self._pool.ready()

    def sandbox(self) -> tuple[ValidationCheck, ...]:
        """Give a row for each protection of the workers; one that did not pass is not enforced here.

        Raises:
            UnavailableError: No worker has come up to say.
        """
        if not self._pool.sandbox:
            trouble = self._pool.start_trouble or self._trouble
            raise UnavailableError(f"a compile worker must have come up to say what holds it, none has: {trouble}")
        return self._pool.sandbox

    async def close(self) -> None:
        """Stop working; what is unfinished stays in store and queue. Idempotent."""
        if self._starting is not None and not self._starting.done():
            self._starting.cancel()
        if self._starting is not None:
            await asyncio.gather(self._starting, return_exceptions=True)
        await self._sweeping.close()
        await self._runner.close()
        await self._outbox.close()

    async def compile(
        self,
        spec: CompileSpec,
        *,
        run_id: str = "",
        adaptation_id: str = "",
        priority: JobPriority | None = None,
        wait: bool = False,
    ) -> tuple[CompileJob, bool]:
        """Give the job of a request, and whether its kernel was there already; see `compile_checked`.

        Raises:
            InvalidBlueprintError: The blueprint is not legal at the site.
            EsperError: As `compile_checked`.
        """
        return await self.compile_checked(
            check_spec(spec), run_id=run_id, adaptation_id=adaptation_id, priority=priority, wait=wait
        )

    async def compile_checked(
        self,
        asked: CheckedSpec,
        *,
        run_id: str = "",
        adaptation_id: str = "",
        priority: JobPriority | None = None,
        wait: bool = False,
    ) -> tuple[CompileJob, bool]:
        """Give the job of a request, and whether its kernel was there already.

        Args:
            asked: What is to be compiled.
            run_id: Run that asks; it is told on ``<run>.kernel`` how the job ended. May be empty.
            adaptation_id: Adaptation that asks; may be empty.
            priority: How urgent it is; ``None`` means INTERACTIVE when a run asks, NORMAL else. It never lowers what
                an equal request that still waits was given.
            wait: Return when the job has ended, or just before the call's deadline with the job as it stands.

        Raises:
            InvalidInputError: A field breaks its rule.
            UnavailableError: Store or queue cannot be reached.
            CapacityExceededError: The queue is full, or the blueprint larger than a kernel may be.
        """
        self._check(asked, run_id, adaptation_id)
        job_id = job_id_of(asked.content_key)
        asker = Asker(run_id=run_id, adaptation_id=adaptation_id) if run_id else None
        self._outbox.join_trace(job_id, adaptation_id)
        fresh = CompileJob(
            job_id=job_id,
            content_key=asked.content_key,
            blueprint_id=asked.blueprint_id,
            spec=asked.spec,
            phase=JobPhase.QUEUED,
            adaptation_id=adaptation_id,
            run_id=run_id,
            created_at=datetime.now(UTC),
            priority=priority or (JobPriority.INTERACTIVE if run_id else JobPriority.NORMAL),
        )
        job, cached = await self._job_of(fresh, asker)
        if asker is not None and job.phase is not JobPhase.QUEUED:  # it may have ended before the asker was noted
            self._outbox.wake()
        if wait and job.phase not in ENDED_PHASES:
            job = await self._ended(job)
        return job, cached

    async def job(self, job_id: str) -> CompileJob:
        """Give one job.

        Raises:
            NotFoundError: There is none of this id.
        """
        return await self._store.get(job_id)

    async def watch(self, job_id: str) -> AsyncIterator[CompileJob]:
        """Give a job at each phase recorded since it was last put on the queue, then at each as it comes, to its end.

        Raises:
            NotFoundError: There is none of this id.
        """
        async for job in self._changes.follow(job_id):
            yield job

    async def jobs(self, phases: Sequence[JobPhase], limit: int, after: tuple[int, str] | None) -> list[CompileJob]:
        """Give jobs in these phases (all when empty), newest first, after a place."""
        return await self._store.page(phases, limit, after)

    async def dead_letters(self, limit: int, after: tuple[int, str] | None) -> list[CompileJob]:
        """Give the dead jobs, oldest first, after a place."""
        return await self._store.page([JobPhase.DEAD], limit, after, oldest_first=True)

    async def requeue(self, job_id: str, generation: int | None = None) -> CompileJob:
        """Put a dead, failed or cancelled job back on the queue; all who asked for it are told again how it ends.

        Args:
            job_id: The job.
            generation: Generation that the caller saw end; ``None`` means the one there is now.

        Raises:
            NotFoundError: It is unknown, or none of these.
            InvalidStateError: Somebody else has put it back since the caller looked at it.
            UnavailableError: The queue cannot be reached; the job goes there once it can.
        """
        seen = (await self._store.get(job_id)).generation if generation is None else generation
        job = await self._store.requeue(job_id, seen)
        self._changed(job)
        await self._publish(job)
        log.info("job_requeued", extra={"job_id": job_id, "generation": job.generation})
        return job

    async def cancel(self, job_id: str) -> CompileJob:
        """Stop a job for all who asked for it; they are told. One that was cancelled before stays as it is.

        Raises:
            NotFoundError: There is none of this id.
            InvalidStateError: It has ended otherwise.
        """
        job = await self._store.cancel(job_id, _CANCELLED)
        self._runner.stop(job_id)
        self._changed(job)
        log.info("job_cancelled", extra={"job_id": job_id})
        return job

    def _check(self, asked: CheckedSpec, run_id: str, adaptation_id: str) -> None:
        if run_id:
            check_run_id(run_id)
        if len(adaptation_id) > _MAX_ADAPTATION_CHARS:
            raise InvalidInputError.of("adaptation_id", f"be at most {_MAX_ADAPTATION_CHARS} characters", adaptation_id)
        limit = self._pool.config.compiler.max_parameters
        if asked.parameters > limit:
            raise CapacityExceededError(f"kernel must have at most {limit} parameters, got {asked.parameters}")

    async def _job_of(self, fresh: CompileJob, asker: Asker | None) -> tuple[CompileJob, bool]:
        """Find the job or make it; a kernel that the library has needs none of the work.

        Nothing is read or written for a repeated request of nobody: the library's word and what was answered before
        are enough.
        """
        done = self._done.get(fresh.job_id) if asker is None else None
        known = done or await self._store.find(fresh.job_id)
        stored = await self._in_library(fresh) if known is None or known.phase in ENDED_PHASES else None
        if known is not None and isinstance(stored, StoredKernel) and _names(known, stored):
            if asker is not None:
                await self._store.ask(known.job_id, asker)
            self._remember(known)
            return known, True
        if known is not None and not isinstance(stored, StoredKernel) and self._begins_anew(known, stored, asker):
            return await self._begin_anew(known, fresh, asker), False
        job, created = await self._store.add(fresh, asker)
        if isinstance(stored, StoredKernel):
            if not _names(job, stored):
                job = await self._store.succeed(job.job_id, stored.artifact_id, stored.size_bytes)
                self._changed(job)
            self._remember(job)
            return job, True
        if created:
            await self._publish(job)
        elif job.phase is JobPhase.QUEUED:
            job = await self._hurried(job, fresh)
        return job, job.phase is JobPhase.SUCCEEDED

    def _begins_anew(self, job: CompileJob, stored: _Lost | None, asker: Asker | None) -> bool:
        """Say whether a request starts an ended job again.

        What a job died of may have passed; runs share kernels, so one that stayed dead would be missing to all of them.
        """
        if job.phase is JobPhase.DEAD:
            rest = timedelta(seconds=self._config.rest_dead_s)
            return asker is not None and job.finished_at is not None and datetime.now(UTC) - job.finished_at >= rest
        lost = job.phase is JobPhase.SUCCEEDED and stored is not None
        return lost or job.phase is JobPhase.CANCELLED

    async def _begin_anew(self, ended: CompileJob, asked: CompileJob, asker: Asker | None) -> CompileJob:
        """Put an ended job back on the queue; only then is it noted who asks, who would be told of the old end else."""
        log.warning("job_started_anew", extra={"job_id": ended.job_id, "phase": ended.phase.name})
        self._done.pop(ended.job_id, None)
        given_up = ended.phase is not JobPhase.SUCCEEDED
        try:
            job = await self._store.requeue(ended.job_id, ended.generation, given_up_only=given_up)
        except (NotFoundError, InvalidStateError) as error:  # an equal request was faster, here or at a replica
            log.info("job_started_already", extra={"job_id": ended.job_id, "reason": str(error)})
            job = await self._store.get(ended.job_id)
        if asker is not None:
            await self._store.ask(job.job_id, asker)
        return await self._hurried(job, asked) if job.phase is JobPhase.QUEUED else job

    async def _hurried(self, job: CompileJob, asked: CompileJob) -> CompileJob:
        """See that a job that waits is on the queue, no less urgent than it is asked for now."""
        if priority_of(asked) > priority_of(job):
            job = await self._store.hurry(job.job_id, priority_of(asked)) or job
        await self._publish(job)
        return job

    async def _in_library(self, asked: CompileJob) -> StoredKernel | _Lost | None:
        """Ask the library for the kernel of a content key; an error that says nothing about it is ``None``.

        A library that found its copy damaged has removed it, and says so when it is asked once more. One whose copy
        is signed by a key that is no longer trusted gives it to nobody, and takes a new one in its place.
        """
        spec, key = asked.spec, asked.content_key
        try:
            try:
                return await self._library.find(spec, key)
            except SignatureError:
                raise
            except CorruptDataError as error:
                log.warning("library_asked_again", extra={"content_key": key, "error": str(error)})
                return await self._library.find(spec, key)
        except (NotFoundError, SignatureError) as error:
            return error
        except CorruptDataError as error:
            log.error("library_not_believed", extra={"content_key": key, "error": str(error)})
            return None
        except EsperError as error:
            log.warning("library_not_asked", extra={"content_key": key, "error": str(error)})
            return None

    async def _publish(self, job: CompileJob) -> None:
        """Put a job on the queue; one that is there already is not doubled, and one of an old generation is void."""
        headers = inject_headers({GENERATION_HEADER: str(job.generation)})
        await self._bus.publish(
            compile_job_subject(lane_of(job)),
            serialize(job),
            headers=headers,
            msg_id=f"{job.job_id}.{job.generation}",
            durable=True,
        )

    async def _ended(self, job: CompileJob) -> CompileJob:
        """Wait for the end of a job, or until just before the deadline of the call."""
        left_s = remaining_s()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(None if left_s is None else max(0.0, left_s - _ANSWER_MARGIN_S)):
                async for changed in self._changes.follow(job.job_id):
                    job = changed
        if job.phase is JobPhase.SUCCEEDED:
            self._remember(job)  # the next answer is of this very object, whose message is made by then
        return job

    def _remember(self, job: CompileJob) -> None:
        self._done[job.job_id] = job
        while len(self._done) > _MAX_REMEMBERED:
            self._done.popitem(last=False)

    def _changed(self, job: CompileJob) -> None:
        """Tell of a change that the outbox did not make itself: it may have something to send now."""
        self._tell(job)
        if job.phase in ENDED_PHASES or job.phase is JobPhase.PACKAGING:
            self._outbox.wake()

    def _tell(self, job: CompileJob) -> None:
        if job.phase is JobPhase.SUCCEEDED:
            self._remember(job)
        else:
            self._done.pop(job.job_id, None)
        self._changes.tell(job)


def _names(job: CompileJob, stored: StoredKernel) -> bool:
    """Say whether a job ended with the kernel that the library has."""
    return job.phase is JobPhase.SUCCEEDED and job.artifact_id == stored.artifact_id

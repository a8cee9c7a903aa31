"""Jobs off the work queue: each delivery is compiled by the pool, signed, and kept for the library.

fault of the job      (does not validate or compile)        FAILED, acknowledged: another worker would find the same
fault of the worker   (died, killed, out of time, lied,     attempted again; after ``max_deliver`` of them DEAD
                       none came up)
fault of the way out  (see ``outbox``)                      tried again there; never FAILED
fault of the store    (cannot be written)                   redelivered for as long as it takes
nobody's fault        (cancelled, or taken up elsewhere)    the worker is ended, what it made is dropped

While services of two versions share a queue, a job of another toolchain is left to those of that toolchain for
``ack_wait_s`` seconds. A kernel of this one would not answer the request: the next equal one would begin it anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

from opentelemetry import propagate, trace
from opentelemetry.context import Context
from opentelemetry.trace import SpanKind

from esper.contracts.errors import (
    CorruptDataError,
    DeadlineExceededError,
    EsperError,
    InvalidInputError,
    NotFoundError,
    StorageFullError,
    UnavailableError,
)
from esper.contracts.kernel import ENDED_PHASES, CompileJob, JobPhase, KernelArtifact, KernelManifest
from esper.contracts.wire import parse
from esper.execution.keys import SigningKey
from esper.services.tezzeret.approval import approve
from esper.services.tezzeret.attempt_store import Attempt, Begun
from esper.services.tezzeret.config import TezzeretConfig
from esper.services.tezzeret.content_key import content_key
from esper.services.tezzeret.job_queue import JobQueue
from esper.services.tezzeret.job_store import Asker, JobStore
from esper.services.tezzeret.phase_clock import PhaseClock
from esper.services.tezzeret.phase_log import PhaseLog
from esper.services.tezzeret.pool import WorkerPool
from esper.services.tezzeret.worker_process import OnPhase
from esper.telemetry.bus import Bus, Consumer, Delivery
from esper.telemetry.streams import COMPILE, DEAD
from esper.telemetry.subjects import dead_subject

log = logging.getLogger(__name__)

GENERATION_HEADER: Final = "Esper-Job-Generation"
"""Header of a queue message: how often the job had been put on the queue anew by then."""

_TRACER: Final = trace.get_tracer("esper.tezzeret")
_PASS_ON_S: Final = 0.05
_MAX_PASS_ON_S: Final = 1.0
_OUTAGE: Final = (UnavailableError, DeadlineExceededError, StorageFullError)


_Signed = tuple[KernelManifest, bytes]
"""Manifest and serialised artefact of a kernel that was proven."""


@dataclass(eq=False, slots=True)
class _Run:
    """One attempt under way."""

    attempt: Attempt
    compiling: asyncio.Task[_Signed] | None = None
    stopped: bool = False

    def stop(self) -> None:
        """End the worker; what was made is dropped."""
        self.stopped = True
        if self.compiling is not None:
            self.compiling.cancel()


class JobRunner:
    """Takes as many jobs at once as the pool has workers. Belongs to one event loop."""

    def __init__(
        self,
        store: JobStore,
        bus: Bus,
        pool: WorkerPool,
        signer: SigningKey,
        config: TezzeretConfig,
        on_change: Callable[[CompileJob], None],
    ) -> None:
        self._store = store
        self._bus = bus
        self._pool = pool
        self._signer = signer
        self._config = config
        self._on_change = on_change
        self._queue = JobQueue(bus, config)
        self._buried: Consumer | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._runs: dict[str, _Run] = {}

    async def start(self) -> None:
        """Begin to take jobs.

        Raises:
            UnavailableError: The bus cannot be reached; nothing was begun.
        """
        try:
            await self._begin()
        except BaseException:
            await self.close()
            raise

    async def _begin(self) -> None:
        self._queue = JobQueue(self._bus, self._config)
        await self._queue.open()
        dead_name = f"{self._config.durable_name}-dead"
        self._buried = await self._bus.consume(DEAD.name, dead_name, dead_subject(COMPILE.name))
        self._tasks += [asyncio.create_task(self._work()) for _ in range(self._pool.num_workers)]
        self._tasks.append(asyncio.create_task(self._note_dead(self._buried)))

    def reached_us(self) -> Mapping[str, int]:
        """Give, by lane, until when everything that was put there has been given out; see `JobQueue`."""
        return self._queue.reached_us()

    def stop(self, job_id: str) -> None:
        """End the worker that this service has on a job, if any."""
        run = self._runs.get(job_id)
        if run is not None:
            run.stop()

    async def close(self) -> None:
        """Stop taking jobs; those that don't end within ``drain_s`` are left to another delivery. Idempotent."""
        await self._queue.close()
        if self._buried is not None:
            await self._buried.close()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=self._config.drain_s)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()

    async def _work(self) -> None:
        while (delivery := await self._queue.next()) is not None:
            try:
                await self._handle(delivery)
            except EsperError as error:  # store or broker could not be told
                log.warning("compile_delivery_unsettled", extra={"error": str(error)})
                await self._put_off(delivery)
            except Exception:  # a defect may cost its delivery, never the queue's consumer
                log.exception("compile_delivery_defect", extra={"deliveries": delivery.num_delivered})

    async def _put_off(self, delivery: Delivery) -> None:
        """Have a delivery come again, later each time; untold, it comes once its clock ran out."""
        if delivery.settled:
            return
        pause_s = min(self._config.retry_delay_s * 2 ** min(delivery.num_delivered - 1, 16), self._config.ack_wait_s)
        with contextlib.suppress(*_OUTAGE):
            await delivery.nak(pause_s)

    async def _handle(self, delivery: Delivery) -> None:
        try:
            sent = parse(delivery.message.payload, CompileJob)
            generation = int(delivery.message.headers.get(GENERATION_HEADER, "0"))
        except (CorruptDataError, InvalidInputError, ValueError) as error:
            await delivery.term(f"no compile job: {error}")
            return
        if self._left_to_others(sent, delivery):
            await delivery.nak(min(_PASS_ON_S * 2 ** min(delivery.num_delivered - 1, 16), _MAX_PASS_ON_S))
            return
        begun = await self._taken_up(sent, generation)
        if begun.attempt is None:
            self._on_change(begun.job)
            if begun.busy:
                await delivery.nak(self._lease_s)
            else:
                await delivery.ack()
            return
        self._on_change(begun.job)
        context = propagate.extract(dict(delivery.message.headers), context=Context())
        with _TRACER.start_as_current_span(
            "tezzeret.compile",
            context=context,
            kind=SpanKind.CONSUMER,
            attributes={"esper.adaptation_id": begun.job.adaptation_id, "esper.job_id": begun.job.job_id},
        ) as span:
            run = self._runs[begun.job.job_id] = _Run(begun.attempt)
            try:
                async with self._kept_in_progress(delivery, run):
                    outcome = await self._attempt(begun.job, run, trace.set_span_in_context(span))
            finally:
                if self._runs.get(begun.job.job_id) is run:
                    del self._runs[begun.job.job_id]
            await self._settle(delivery, begun.attempt, outcome)

    def _left_to_others(self, sent: CompileJob, delivery: Delivery) -> bool:
        """Say whether a job is of another toolchain, and so fresh that a service of that one may take it yet."""
        stored_at = delivery.message.stored_at
        if stored_at is None or datetime.now(UTC) - stored_at >= timedelta(seconds=self._config.ack_wait_s):
            return False
        return sent.content_key != content_key(sent.spec, blueprint_id=sent.blueprint_id)

    @property
    def _lease_s(self) -> float:
        """Time after which an attempt that gave no sign is over: two of three signs went missing."""
        return self._config.ack_wait_s * 2 / 3

    async def _taken_up(self, sent: CompileJob, generation: int) -> Begun:
        """Begin an attempt; a store that lost the job learns it again from the queue."""
        max_deliver, lease_s = self._config.max_deliver, self._lease_s
        begin = self._store.attempts.begin
        try:
            return await begin(sent.job_id, generation, max_deliver=max_deliver, lease_s=lease_s)
        except NotFoundError:
            await self._store.add(sent, Asker(run_id=sent.run_id, adaptation_id=sent.adaptation_id))
            return await begin(sent.job_id, 0, max_deliver=max_deliver, lease_s=lease_s)

    async def _attempt(self, job: CompileJob, run: _Run, context: Context) -> EsperError | None:
        """Compile, sign and keep; give what went wrong with the worker, ``None`` when there is nothing left to do."""
        clock = PhaseClock(job, context)
        phases = PhaseLog(self._store.attempts, run.attempt, self._on_change)

        def on_phase(phase: JobPhase) -> None:
            phases.enter(phase)
            clock.enter(phase)

        try:
            signed = await self._compiled(job, run, on_phase)
            clock.end()
            if signed is None:
                return None
            manifest, data = signed
            unwritten = await phases.finish()
            kept = await self._store.attempts.keep_artifact(run.attempt, unwritten, data, clock.times)
        except _OUTAGE as error:
            clock.end(error)
            return error
        except EsperError as error:
            clock.end(error)
            await phases.finish()
            await self._end(run.attempt, JobPhase.FAILED, error, clock)
            return None
        finally:
            await phases.finish()
        if kept is None:
            log.info("compile_dropped", extra={"job_id": job.job_id})
            return None
        log.info("kernel_compiled", extra={"job_id": job.job_id, "artifact_id": manifest.artifact_id})
        self._on_change(kept)
        return None

    async def _compiled(self, job: CompileJob, run: _Run, on_phase: OnPhase) -> _Signed | None:
        """Give the signed kernel; ``None`` when its worker was ended because the attempt no longer holds the job."""
        run.compiling = asyncio.create_task(self._signed(job, on_phase))
        if run.stopped:
            run.compiling.cancel()
        try:
            return await run.compiling
        except asyncio.CancelledError:
            if not run.stopped:
                raise
            log.info("compile_stopped", extra={"job_id": job.job_id})
            return None

    async def _signed(self, job: CompileJob, on_phase: OnPhase) -> _Signed:
        """Have a worker compile, and prove what it made while the pool still holds it, which ends one that lied."""
        approved: list[_Signed] = []

        def check(artifact: KernelArtifact) -> None:
            approved.append(approve(artifact, job.spec, self._signer, processes=self._pool.processes))

        await self._pool.compile(job.spec, on_phase, check)
        return approved[0]

    async def _settle(self, delivery: Delivery, attempt: Attempt, trouble: EsperError | None) -> None:
        if trouble is None:
            await delivery.ack()
            return
        extra = {"job_id": attempt.job_id, "deliveries": attempt.number, "error": str(trouble)}
        log.warning("compile_attempt_lost", extra=extra)
        if attempt.number >= self._config.max_deliver:
            await self._end(attempt, JobPhase.DEAD, trouble, None)
            await delivery.term(f"gave up after {attempt.number} deliveries: {trouble}")
        else:
            await self._end(attempt, JobPhase.QUEUED, trouble, None)
            await delivery.nak(self._config.retry_delay_s, reason=str(trouble))

    async def _end(self, attempt: Attempt, phase: JobPhase, error: EsperError, clock: PhaseClock | None) -> None:
        text = str(error)[: self._config.max_error_chars]
        times = {} if clock is None else clock.times
        job = await self._store.attempts.end(attempt, phase, (text, error.reason), times)
        if job is None:
            return
        if job.phase in ENDED_PHASES:
            log.warning("compile_job_ended", extra={"job_id": job.job_id, "phase": phase.name, "error": text})
        self._on_change(job)

    @asynccontextmanager
    async def _kept_in_progress(self, delivery: Delivery, run: _Run) -> AsyncIterator[None]:
        """Tell broker and store three times per clock that work goes on, and end it when the job is no longer held.

        Each hears of it whatever the other does: a service that has lost its broker holds its job in the store, and
        one that has lost its store keeps the delivery.
        """

        async def touch() -> None:
            if not await self._store.attempts.touch(run.attempt):
                run.stop()

        telling = [asyncio.create_task(self._tell_again_and_again(word)) for word in (delivery.in_progress, touch)]
        try:
            yield
        finally:
            for task in telling:
                task.cancel()
            for ended in await asyncio.gather(*telling, return_exceptions=True):
                if isinstance(ended, Exception):
                    log.error("compile_in_progress_defect", exc_info=ended)

    async def _tell_again_and_again(self, word: Callable[[], Awaitable[None]]) -> None:
        while True:
            await asyncio.sleep(self._config.ack_wait_s / 3)
            try:
                await word()
            except _OUTAGE as error:
                log.warning("compile_in_progress_lost", extra={"error": str(error)})

    async def _note_dead(self, buried: Consumer) -> None:
        """Mark jobs dead whose deliveries the broker gave up, e.g. because the whole service died under them."""
        async for delivery in buried:
            try:
                await self._bury(delivery)
            except EsperError as error:
                log.warning("dead_letter_unsettled", extra={"error": str(error)})
            except Exception:  # as above
                log.exception("dead_letter_defect")

    async def _bury(self, delivery: Delivery) -> None:
        try:
            job = parse(delivery.message.payload, CompileJob)
            generation = int(delivery.message.headers.get(GENERATION_HEADER, "0"))
            reason = delivery.message.headers.get("Esper-Dead-Reason", "given up by the queue")
            text = reason[: self._config.max_error_chars]
            self._on_change(await self._store.attempts.bury(job.job_id, generation, (text, UnavailableError.reason)))
        except (CorruptDataError, InvalidInputError, NotFoundError, ValueError) as error:
            log.warning("dead_letter_unknown", extra={"error": str(error)})
        await delivery.ack()

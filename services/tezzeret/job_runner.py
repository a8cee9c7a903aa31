"""Jobs off the work queue: each delivery is compiled by the pool, signed, and kept for the library.

fault of the job      (does not validate or compile)        FAILED, acknowledged: another worker would find the same
fault of the worker   (died, killed, out of time)           redelivered; after ``max_deliver`` of them DEAD
fault of the way out  (see ``outbox``)                      tried again there; never FAILED
fault of the store    (cannot be written)                   redelivered, the job stays as it is
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
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
from esper.contracts.kernel import ENDED_PHASES, CompileJob, JobPhase
from esper.contracts.wire import parse
from esper.execution.keys import SigningKey
from esper.services.tezzeret.approval import approve
from esper.services.tezzeret.config import TezzeretConfig
from esper.services.tezzeret.job_store import Asker, JobStore
from esper.services.tezzeret.phase_clock import PhaseClock
from esper.services.tezzeret.pool import WorkerPool
from esper.telemetry.bus import Bus, Consumer, Delivery
from esper.telemetry.streams import COMPILE, DEAD
from esper.telemetry.subjects import dead_subject

log = logging.getLogger(__name__)

GENERATION_HEADER: Final = "Esper-Job-Generation"
"""Header of a queue message: how often an operator had put the job back by then."""

_TRACER: Final = trace.get_tracer("esper.tezzeret")
_OUTAGE: Final = (UnavailableError, DeadlineExceededError, StorageFullError)


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
        self._consumers: list[Consumer] = []
        self._tasks: list[asyncio.Task[None]] = []

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
        config = self._config
        for _ in range(self._pool.num_workers):
            consumer = await self._bus.consume(
                COMPILE.name,
                config.durable_name,
                ack_wait_s=config.ack_wait_s,
                max_deliver=config.max_deliver,
                batch=1,
            )
            self._consumers.append(consumer)
            self._tasks.append(asyncio.create_task(self._work(consumer)))
        buried = await self._bus.consume(DEAD.name, f"{config.durable_name}-dead", dead_subject(COMPILE.name))
        self._consumers.append(buried)
        self._tasks.append(asyncio.create_task(self._note_dead(buried)))

    async def close(self) -> None:
        """Stop taking jobs; those that don't end within ``drain_s`` are left to another delivery. Idempotent."""
        for consumer in self._consumers:
            await consumer.close()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=self._config.drain_s)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        self._consumers.clear()

    async def _work(self, consumer: Consumer) -> None:
        async for delivery in consumer:
            try:
                await self._handle(delivery)
            except EsperError as error:  # neither store nor broker could be told: the delivery comes again by itself
                log.warning("compile_delivery_unsettled", extra={"error": str(error)})
            except Exception:  # a defect may cost its delivery, never the queue's consumer
                log.exception("compile_delivery_defect", extra={"deliveries": delivery.num_delivered})

    async def _handle(self, delivery: Delivery) -> None:
        try:
            sent = parse(delivery.message.payload, CompileJob)
        except (CorruptDataError, InvalidInputError) as error:
            await delivery.term(f"no compile job: {error}")
            return
        job = await self._stored(sent)
        if job.phase in ENDED_PHASES or await self._store.has_artifact(job.job_id):
            await delivery.ack()
            return
        context = propagate.extract(dict(delivery.message.headers), context=Context())
        with _TRACER.start_as_current_span(
            "tezzeret.compile",
            context=context,
            kind=SpanKind.CONSUMER,
            attributes={"esper.adaptation_id": job.adaptation_id, "esper.job_id": job.job_id},
        ) as span:
            async with self._kept_in_progress(delivery):
                outcome = await self._attempt(job, delivery, trace.set_span_in_context(span))
            await self._settle(delivery, job, outcome)

    async def _stored(self, sent: CompileJob) -> CompileJob:
        """Give the job as the store has it; a store that lost it learns it again from the queue."""
        found = await self._store.find(sent.job_id)
        if found is not None:
            return found
        asker = Asker(run_id=sent.run_id, adaptation_id=sent.adaptation_id)
        job, _ = await self._store.add(sent, asker)
        return job

    async def _attempt(self, job: CompileJob, delivery: Delivery, context: Context) -> EsperError | None:
        """Compile, sign and keep; give what went wrong with the worker, ``None`` when the job is settled for good."""
        clock = PhaseClock(job, context)
        advancing: set[asyncio.Task[None]] = set()

        def on_phase(phase: JobPhase) -> None:
            clock.enter(phase)
            task = asyncio.create_task(self._advance(job, phase, delivery.num_delivered))
            advancing.add(task)

        try:
            artifact = await self._pool.compile(job.spec, on_phase)
            await asyncio.gather(*advancing)
            manifest, data = await asyncio.to_thread(approve, artifact, job.spec, self._signer)
            clock.end()
            kept = await self._store.keep_artifact(job.job_id, data, clock.times)
        except _OUTAGE as error:
            clock.end(error)
            return error
        except EsperError as error:
            clock.end(error)
            await self._end(job, JobPhase.FAILED, error, delivery, clock)
            return None
        finally:
            await asyncio.gather(*advancing, return_exceptions=True)
        log.info("kernel_compiled", extra={"job_id": job.job_id, "artifact_id": manifest.artifact_id})
        self._on_change(kept)
        return None

    async def _advance(self, job: CompileJob, phase: JobPhase, deliveries: int) -> None:
        self._on_change(await self._store.advance(job.job_id, phase, deliveries=deliveries))

    async def _settle(self, delivery: Delivery, job: CompileJob, trouble: EsperError | None) -> None:
        if trouble is None:
            await delivery.ack()
            return
        extra = {"job_id": job.job_id, "deliveries": delivery.num_delivered, "error": str(trouble)}
        log.warning("compile_attempt_lost", extra=extra)
        if delivery.last_attempt:
            await self._end(job, JobPhase.DEAD, trouble, delivery, None)
        else:
            await self._advance(job, JobPhase.QUEUED, delivery.num_delivered)
        await delivery.nak(self._config.retry_delay_s, reason=str(trouble))

    async def _end(
        self, job: CompileJob, phase: JobPhase, error: EsperError, delivery: Delivery, clock: PhaseClock | None
    ) -> None:
        text = str(error)[: self._config.max_error_chars]
        ended = await self._store.advance(
            job.job_id,
            phase,
            deliveries=delivery.num_delivered,
            phase_times=None if clock is None else clock.times,
            error=(text, error.reason),
        )
        log.warning("compile_job_ended", extra={"job_id": job.job_id, "phase": phase.name, "error": text})
        self._on_change(ended)

    @asynccontextmanager
    async def _kept_in_progress(self, delivery: Delivery) -> AsyncIterator[None]:
        """Tell the broker three times per clock that work goes on."""

        async def tell() -> None:
            while True:
                await asyncio.sleep(self._config.ack_wait_s / 3)
                try:
                    await delivery.in_progress()
                except _OUTAGE as error:
                    log.warning("compile_in_progress_lost", extra={"error": str(error)})

        telling = asyncio.create_task(tell())
        try:
            yield
        finally:
            telling.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await telling

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
            generation = await self._store.generation(job.job_id)
            if delivery.message.headers.get(GENERATION_HEADER, "0") == str(generation):
                reason = delivery.message.headers.get("Esper-Dead-Reason", "given up by the queue")
                error = UnavailableError(reason)
                await self._end(job, JobPhase.DEAD, error, delivery, None)
        except (CorruptDataError, InvalidInputError, NotFoundError) as error:
            log.warning("dead_letter_unknown", extra={"error": str(error)})
        await delivery.ack()

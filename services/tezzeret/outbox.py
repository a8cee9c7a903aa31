"""What has to leave the house and may not be lost: signed kernels to the library, announcements to the runs.

Both rest in the store until they are through, so that neither an outage nor a restart loses one; both are harmless to
repeat. While the library or the bus is away, the pauses between attempts grow.

    the library is away, full or slow    tried again for as long as it takes
    the library refuses the kernel       (damaged on the way, not trusted, not allowed) tried again, ``max_refusals``
                                         times in all; then the kernel goes and the job is DEAD
    the kernel was damaged in the store  not sent; the job is DEAD at once

A DEAD job is listed and can be requeued, and is then compiled anew. None of this is the blueprint's fault, so none of
it makes a job FAILED.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from opentelemetry.context import Context

from esper.contracts.errors import (
    CapacityExceededError,
    CorruptDataError,
    EsperError,
    InvalidInputError,
    NotFoundError,
    PermissionDeniedError,
)
from esper.contracts.kernel import ENDED_PHASES, CompileJob, JobPhase, KernelManifest, KernelReady
from esper.contracts.wire import serialize
from esper.execution.tier_urza import upload_kernel
from esper.services.tezzeret.config import TezzeretConfig
from esper.services.tezzeret.job_store import Asker, JobStore
from esper.services.tezzeret.library import KernelLookup, StoredKernel, check_kept, find_kernel
from esper.telemetry.bus import CONTENT_TYPE_HEADER, Bus
from esper.telemetry.consumer import content_type
from esper.telemetry.subjects import Kind, build_subject
from esper.telemetry.tracing import adaptation_span, extract_context, inject_headers
from esper.v1 import kernel_pb2

log = logging.getLogger(__name__)

_MAX_TRACES: Final = 4096

_REFUSED = (CorruptDataError, InvalidInputError, PermissionDeniedError)
"""What the library says of a kernel that it does not take; waiting alone does not mend it."""


class Outbox:
    """Empties the store's outbox in the background. Belongs to one event loop."""

    def __init__(
        self,
        store: JobStore,
        bus: Bus,
        urza: Any,
        library: KernelLookup,
        config: TezzeretConfig,
        on_change: Callable[[CompileJob], None],
    ) -> None:
        self._store = store
        self._bus = bus
        self._urza = urza
        self._library = library
        self._config = config
        self._on_change = on_change
        self._wake = asyncio.Event()
        self._closing = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._forget_at_s = 0.0
        self._traces: dict[tuple[str, str], dict[str, str]] = {}

    def start(self) -> None:
        """Begin to empty it."""
        self._task = asyncio.create_task(self._run())

    def wake(self) -> None:
        """Say that there is something to do."""
        self._wake.set()

    def join_trace(self, job_id: str, adaptation_id: str) -> None:
        """Let what leaves the house for an adaptation join the caller's trace; forgotten with the process."""
        headers = inject_headers({})
        if headers:
            self._traces[(job_id, adaptation_id)] = headers
            while len(self._traces) > _MAX_TRACES:
                del self._traces[next(iter(self._traces))]

    def _trace_of(self, job_id: str, adaptation_id: str) -> Context:
        return extract_context(self._traces.get((job_id, adaptation_id)))

    async def close(self) -> None:
        """Stop; what is left stays in the store. Idempotent."""
        if self._task is not None:
            self._closing.set()
            self._wake.set()
            await asyncio.wait({self._task}, timeout=self._config.drain_s)
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def _run(self) -> None:
        pause_s = self._config.min_backoff_s
        while not self._closing.is_set():
            self._wake.clear()
            try:
                await self._empty()
            except Exception as error:
                if isinstance(error, EsperError):
                    log.warning("outbox_delayed", extra={"error": str(error), "retry_s": pause_s})
                else:  # a defect may hold up what it meets, never end the outbox
                    log.exception("outbox_defect", extra={"retry_s": pause_s})
                await _either(self._closing, pause_s)
                pause_s = min(pause_s * 2, self._config.max_backoff_s)
                continue
            pause_s = self._config.min_backoff_s
            # Look now and then without being woken, for what a replica left behind.
            await _either(self._wake, self._config.max_backoff_s)

    async def _empty(self) -> None:
        """Upload, then announce; an upload that fails holds no announcement back. Old jobs go now and then."""
        trouble: EsperError | None = None
        for job_id in await self._store.outbox():
            try:
                await self._upload(job_id)
            except EsperError as error:
                trouble = error
        for job, asker in await self._store.unannounced():
            await self._announce(job, asker)
        await self._forget()
        if trouble is not None:
            raise trouble

    async def _forget(self) -> None:
        """Let old jobs go, now and then: with every job, it would cost each more than its upload."""
        if time.monotonic() >= self._forget_at_s:
            await self._store.forget_ended(datetime.now(UTC) - timedelta(seconds=self._config.keep_jobs_s))
            self._forget_at_s = time.monotonic() + self._config.sweep_interval_s

    async def _upload(self, job_id: str) -> None:
        data = await self._store.artifact(job_id)
        if data is None:  # a replica was faster
            return
        job = await self._store.get(job_id)
        try:
            manifest = await asyncio.to_thread(check_kept, data)
        except (CorruptDataError, CapacityExceededError) as error:
            await self._refused(job_id, CorruptDataError(f"kernel was damaged in the store: {error}"), max_refusals=1)
            return
        try:
            parent = self._trace_of(job_id, job.adaptation_id)
            with adaptation_span("store", job.adaptation_id, parent=parent, job_id=job_id, size_bytes=len(data)):
                stored = await self._send(job, manifest, data)
        except _REFUSED as error:
            if await self._refused(job_id, error, max_refusals=self._config.max_refusals):
                return
            raise
        done = await self._store.succeed(job_id, stored.artifact_id, stored.size_bytes, kept_only=True)
        self._on_change(done)
        extra = {"job_id": job_id, "artifact_id": stored.artifact_id, "size_bytes": stored.size_bytes}
        log.info("kernel_stored", extra=extra)

    async def _send(self, job: CompileJob, manifest: KernelManifest, data: bytes) -> StoredKernel:
        """Upload; give what the library has now: this kernel, or the one it had for the request before."""
        named, _ = await upload_kernel(self._urza, data, timeout_s=self._config.upload_timeout_s)
        if named == manifest.artifact_id:
            return self._library.learn(manifest, len(data), job.spec)
        try:
            found = await find_kernel(self._urza, job.spec, manifest.content_key)
        except NotFoundError as error:
            raise CorruptDataError(f"library must have the kernel it names, got {named}: {error}") from error
        if found.artifact_id != named:
            raise CorruptDataError(f"library must name one kernel of the request, got {named} and {found.artifact_id}")
        return found

    async def _refused(self, job_id: str, error: EsperError, *, max_refusals: int) -> bool:
        """Count a refusal; say whether it was the last."""
        text = str(error)[: self._config.max_error_chars]
        job = await self._store.refuse_upload(job_id, (text, error.reason), max_refusals=max_refusals)
        given_up = job.phase in ENDED_PHASES
        extra = {"job_id": job_id, "error": text, "given_up": given_up}
        log.error("kernel_refused_by_library", extra=extra)
        if given_up:
            self._on_change(job)
        return given_up

    async def _announce(self, job: CompileJob, asker: Asker) -> None:
        ready = KernelReady(
            adaptation_id=asker.adaptation_id,
            run_id=asker.run_id,
            job_id=job.job_id,
            blueprint_id=job.blueprint_id,
            site=job.spec.site,
            artifact_id=job.artifact_id,
            size_bytes=job.size_bytes,
            error=None if job.phase is JobPhase.SUCCEEDED else job.error or job.phase.name,
        )
        headers = {CONTENT_TYPE_HEADER: content_type(kernel_pb2.KernelReady)}
        ended_us = 0 if job.finished_at is None else int(job.finished_at.timestamp() * 1e6)
        parent = self._trace_of(job.job_id, asker.adaptation_id)
        with adaptation_span("announce", asker.adaptation_id, parent=parent, job_id=job.job_id):
            try:
                await self._bus.publish(
                    build_subject(asker.run_id, Kind.KERNEL),
                    serialize(ready),
                    headers=inject_headers(headers),
                    msg_id=f"kernel:{job.job_id}:{asker.run_id}:{asker.adaptation_id}:{ended_us}",
                    durable=True,
                )
            except CapacityExceededError as error:
                log.error("kernel_announcement_refused", extra={"job_id": job.job_id, "error": str(error)})
                raise
        await self._store.mark_announced(job.job_id, asker)
        self._traces.pop((job.job_id, asker.adaptation_id), None)


async def _either(event: asyncio.Event, timeout_s: float) -> None:
    """Wait for an event or the end of a time, whichever comes first."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await event.wait()

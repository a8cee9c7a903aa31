"""Compile workers ready to take jobs: sandboxed processes, or threads of this process for small set-ups."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

from esper.contracts.errors import DeadlineExceededError, EsperError, InvalidStateError, UnavailableError
from esper.contracts.kernel import CompileSpec, JobPhase, KernelArtifact, ValidationCheck
from esper.services.tezzeret.config import WorkerPoolConfig
from esper.services.tezzeret.worker_process import OnPhase, WorkerProcess

log = logging.getLogger(__name__)


class WorkerPool:
    """A fixed number of workers; a worker that dies is replaced by a fresh one. Belongs to one event loop."""

    def __init__(self, config: WorkerPoolConfig | None = None) -> None:
        self.config = config or WorkerPoolConfig()
        self._idle: asyncio.Queue[WorkerProcess] = asyncio.Queue()
        self._workers: set[WorkerProcess] = set()
        self._refills: set[asyncio.Task[None]] = set()
        self._threads: ThreadPoolExecutor | None = None
        self._sandbox: tuple[ValidationCheck, ...] = ()
        self._closed = False
        self._started = False

    @property
    def num_workers(self) -> int:
        """Jobs that run at once."""
        return self.config.num_workers

    @property
    def sandbox(self) -> tuple[ValidationCheck, ...]:
        """One row per protection of the workers, as the newest worker reported them."""
        return self._sandbox

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids of the living workers."""
        return tuple(sorted(worker.pid for worker in self._workers if worker.pid is not None and worker.alive))

    def ready(self) -> bool:
        """Say whether a job would find a worker that lives or comes up."""
        return self._started and not self._closed and (self._threads is not None or bool(self._workers))

    async def start(self) -> None:
        """Start every worker and return when all are warm; after a failure it may be called again.

        Raises:
            UnavailableError: A worker ended before it was ready.
            DeadlineExceededError: A worker was not ready in time.
        """
        if self._started:
            raise InvalidStateError("pool must be started once, got a second start")
        if self.config.mode == "inline":
            self._threads = ThreadPoolExecutor(self.config.num_workers, thread_name_prefix="esper-compile")
            detail = "NOT ENFORCED: inline workers are threads of this process"
            self._sandbox = (ValidationCheck(name="sandbox", passed=False, detail=detail),)
            log.warning("compile_pool_inline", extra={"num_workers": self.config.num_workers})
            await asyncio.get_running_loop().run_in_executor(self._threads, _warm_up_inline)
        else:
            missing = self.config.num_workers - len(self._workers)
            await asyncio.gather(*(self._add_worker() for _ in range(missing)))
        self._started = True

    async def compile(self, spec: CompileSpec, on_phase: OnPhase = lambda _: None) -> KernelArtifact:
        """Have one kernel compiled, waiting for a free worker; it comes without a signature and unproven.

        Raises:
            EsperError: What the compile raised.
            UnavailableError: The worker died under the job, or the pool is closed.
            DeadlineExceededError: The job took too long.
        """
        if self._closed or not self._started:
            raise UnavailableError("compile pool must be started and open, it is not")
        if self._threads is not None:
            return await self._compile_inline(self._threads, spec, on_phase)
        async with self._borrowed() as worker:
            return await worker.run(spec, on_phase)

    async def close(self) -> None:
        """End every worker. Idempotent."""
        self._closed = True
        for refill in self._refills:
            refill.cancel()
        await asyncio.gather(*self._refills, return_exceptions=True)
        await asyncio.gather(*(worker.end() for worker in self._workers))
        self._workers.clear()
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)

    @asynccontextmanager
    async def _borrowed(self) -> AsyncIterator[WorkerProcess]:
        worker = await self._next_idle()
        try:
            yield worker
        finally:
            if worker.alive and not worker.worn:
                self._idle.put_nowait(worker)
            else:
                self._replace(worker)

    async def _next_idle(self) -> WorkerProcess:
        """Wait for a worker; one that died while nobody looked is replaced."""
        while True:
            worker = await self._idle.get()
            if worker.alive:
                return worker
            self._replace(worker)

    def _replace(self, worker: WorkerProcess) -> None:
        self._workers.discard(worker)
        if self._closed:
            return
        refill = asyncio.create_task(self._refill(worker))
        self._refills.add(refill)
        refill.add_done_callback(self._refills.discard)

    async def _refill(self, worn: WorkerProcess) -> None:
        """Put a fresh worker in the place of one that is gone, as long as it takes."""
        await worn.end()
        pause_s = 0.1
        while not self._closed:
            try:
                await self._add_worker()
            except (EsperError, OSError) as error:
                log.error("compile_worker_not_started", extra={"error": str(error), "retry_s": pause_s})
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, 10.0)
            else:
                return

    async def _add_worker(self) -> None:
        config = self.config
        worker = WorkerProcess(config.limits, config.compiler, config.scratch_dir)
        self._workers.add(worker)
        try:
            await worker.start()
        except BaseException:
            self._workers.discard(worker)
            raise
        self._sandbox = worker.sandbox
        open_doors = [f"{row.name}: {row.detail}" for row in worker.sandbox if not row.passed]
        extra = {"pid": worker.pid, "not_enforced": open_doors}
        log.log(logging.WARNING if open_doors else logging.INFO, "compile_worker_ready", extra=extra)
        self._idle.put_nowait(worker)

    async def _compile_inline(
        self, threads: ThreadPoolExecutor, spec: CompileSpec, on_phase: OnPhase
    ) -> KernelArtifact:
        """Compile in a thread. One that takes too long is given up, not ended: a thread cannot be."""
        from esper.services.tezzeret.worker import TezzeretWorker

        loop = asyncio.get_running_loop()

        def tell(phase: JobPhase) -> None:
            loop.call_soon_threadsafe(on_phase, phase)

        worker = TezzeretWorker(self.config.compiler)
        limit_s = self.config.limits.job_timeout_s
        running = loop.run_in_executor(threads, lambda: worker.compile_spec(spec, tell).artifact)
        try:
            return await asyncio.wait_for(running, limit_s)
        except TimeoutError as error:
            raise DeadlineExceededError(f"compile must end within {limit_s} s, it did not") from error


def _warm_up_inline() -> None:
    from esper.contracts.kernel import CompileTarget
    from esper.services.tezzeret.warm_up import warm_up

    warm_up(CompileTarget.TORCHSCRIPT)

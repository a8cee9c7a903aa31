"""Compile workers ready to take jobs: sandboxed processes, or threads of this process for small set-ups."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

from esper.contracts.errors import (
    CompilationError,
    DeadlineExceededError,
    EsperError,
    InvalidStateError,
    UnavailableError,
)
from esper.contracts.kernel import CompileSpec, JobPhase, KernelArtifact, ValidationCheck
from esper.services.tezzeret.config import WorkerPoolConfig
from esper.services.tezzeret.worker_process import OnPhase, WorkerProcess

log = logging.getLogger(__name__)

_MIN_PAUSE_S = 0.1
_MAX_PAUSE_S = 10.0


class _Abandoned(Exception):  # noqa: N818 - no error: it ends a thread whose job nobody waits for
    """The job of an inline worker was given up."""


class WorkerPool:
    """A fixed number of workers; a worker that dies is replaced by a fresh one. Belongs to one event loop."""

    def __init__(self, config: WorkerPoolConfig | None = None) -> None:
        self.config = config or WorkerPoolConfig()
        self._idle: asyncio.Queue[WorkerProcess] = asyncio.Queue()
        self._waiting: deque[asyncio.Timeout] = deque()
        self._workers: set[WorkerProcess] = set()
        self._refills: set[asyncio.Task[None]] = set()
        self._start_trouble = ""
        self._failed_starts = 0
        self._threads: ThreadPoolExecutor | None = None
        self._abandoned: set[threading.Event] = set()
        self._sandbox: tuple[ValidationCheck, ...] = ()
        self._closed = False
        self._started = False

    @property
    def started(self) -> bool:
        """Whether `start` has returned; it may not be called again then."""
        return self._started

    @property
    def num_workers(self) -> int:
        """Jobs that run at once."""
        return self.config.num_workers

    @property
    def processes(self) -> bool:
        """Whether the workers are processes; else they are threads of this one."""
        return self.config.mode == "process"

    @property
    def sandbox(self) -> tuple[ValidationCheck, ...]:
        """One row per protection of the workers, as the newest worker reported them."""
        return self._sandbox

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids of the living workers."""
        return tuple(sorted(worker.pid for worker in self._workers if worker.pid is not None and worker.alive))

    @property
    def start_trouble(self) -> str:
        """Why the last start of a worker failed; empty once one has come up."""
        return self._start_trouble

    def ready(self) -> bool:
        """Say whether a job would find a worker that lives or comes up."""
        if not self._started or self._closed:
            return False
        return self._threads is not None or any(one.warm or not self._start_trouble for one in self._workers)

    async def start(self) -> None:
        """Start every worker and return when all are warm; after a failure it may be called again.

        The ``max_failed_starts``-th failure is no error: those that did not come up are started from then on as those
        that die are replaced, so that jobs are taken, and lost where no worker comes up for them.

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
            await self._start_missing()
        self._started = True

    async def _start_missing(self) -> None:
        """Start the workers that are not there; after so many failures, go on with that in the background."""
        starts = (self._add_worker() for _ in range(self._num_missing()))
        failures = [error for error in await asyncio.gather(*starts, return_exceptions=True) if error is not None]
        if not failures:
            return
        self._failed_starts += 1
        if self._failed_starts < self.config.max_failed_starts or not isinstance(failures[0], EsperError | OSError):
            raise failures[0]
        self._start_trouble = str(failures[0])
        log.error("compile_workers_not_started", extra={"error": self._start_trouble, "starts": self._failed_starts})
        for _ in range(self._num_missing()):
            self._begin_refill(None)

    def _num_missing(self) -> int:
        return self.config.num_workers - len(self._workers)

    async def compile(
        self,
        spec: CompileSpec,
        on_phase: OnPhase = lambda _: None,
        check: Callable[[KernelArtifact], None] = lambda _: None,
    ) -> KernelArtifact:
        """Have one kernel compiled, waiting for a free worker; it comes without a signature.

        Args:
            spec: What is to be compiled.
            on_phase: Told of each phase as it begins.
            check: Raises ``CompilationError`` for a kernel that is not what was asked for. Blocking; called in a
                thread. A process whose kernel is refused is not trusted with another job.

        Raises:
            EsperError: What the compile raised; inline, what the check raised, too.
            UnavailableError: The worker died under the job, or its kernel was refused and it was ended; no worker
                came up in ``max_failed_starts`` starts; or the pool is closed.
            DeadlineExceededError: The job took too long.
        """
        if self._closed or not self._started:
            raise UnavailableError("compile pool must be started and open, it is not")
        if self._threads is not None:
            artifact = await self._compile_inline(self._threads, spec, on_phase)
            await asyncio.to_thread(check, artifact)
            return artifact
        async with self._borrowed() as worker:
            artifact = await worker.run(spec, on_phase)
            try:
                await asyncio.to_thread(check, artifact)
            except CompilationError as error:
                log.error("compile_worker_not_believed", extra={"pid": worker.pid, "error": str(error)})
                await worker.end()
                raise UnavailableError(f"compile worker was ended, since its kernel was refused: {error}") from error
            return artifact

    async def close(self) -> None:
        """End every worker. Idempotent."""
        self._closed = True
        for refill in self._refills:
            refill.cancel()
        await asyncio.gather(*self._refills, return_exceptions=True)
        await asyncio.gather(*(worker.end() for worker in self._workers))
        self._workers.clear()
        for abandoned in self._abandoned:
            abandoned.set()
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
        """Wait for a worker; one that died while nobody looked is replaced.

        Raises:
            UnavailableError: None came up in ``max_failed_starts`` starts.
        """
        try:
            async with asyncio.timeout(None) as patience:
                self._waiting.append(patience)
                try:
                    while True:
                        worker = await self._idle.get()
                        if worker.alive:
                            return worker
                        self._replace(worker)
                finally:
                    with contextlib.suppress(ValueError):  # it was this one's turn to give up
                        self._waiting.remove(patience)
        except TimeoutError as error:
            tries = self.config.max_failed_starts
            raise UnavailableError(
                f"a compile worker must come up within {tries} starts, none did: {self._start_trouble}"
            ) from error

    def _replace(self, worker: WorkerProcess) -> None:
        self._workers.discard(worker)
        if not self._closed:
            self._begin_refill(worker)

    def _begin_refill(self, worn: WorkerProcess | None) -> None:
        refill = asyncio.create_task(self._refill(worn))
        self._refills.add(refill)
        refill.add_done_callback(self._refills.discard)

    async def _refill(self, worn: WorkerProcess | None) -> None:
        """Put a fresh worker in the place of one that is gone, or never came up, as long as it takes.

        Where no worker is left, so many starts that fail in a row end the patience of the job that has waited
        longest: another replica may have a worker for it, and where none has, it is listed as dead in the end.
        """
        if worn is not None:
            await worn.end()
        pause_s, failed = _MIN_PAUSE_S, 0
        while not self._closed:
            try:
                await self._add_worker()
            except (EsperError, OSError) as error:
                self._start_trouble, failed = str(error), failed + 1
                log.error("compile_worker_not_started", extra={"error": str(error), "retry_s": pause_s})
                if failed % self.config.max_failed_starts == 0:
                    self._end_patience()
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, _MAX_PAUSE_S)
            else:
                return

    def _end_patience(self) -> None:
        """Have the job that has waited longest wait no more, unless a worker lives that will be free for it."""
        if self._waiting and not any(worker.warm for worker in self._workers):
            self._waiting.popleft().reschedule(asyncio.get_running_loop().time())

    async def _add_worker(self) -> None:
        config = self.config
        worker = WorkerProcess(config.limits, config.compiler, config.scratch_dir)
        self._workers.add(worker)
        try:
            await worker.start()
        except BaseException:
            self._workers.discard(worker)
            raise
        self._sandbox, self._start_trouble = worker.sandbox, ""
        open_doors = [f"{row.name}: {row.detail}" for row in worker.sandbox if not row.passed]
        extra = {"pid": worker.pid, "not_enforced": open_doors}
        log.log(logging.WARNING if open_doors else logging.INFO, "compile_worker_ready", extra=extra)
        self._idle.put_nowait(worker)

    async def _compile_inline(
        self, threads: ThreadPoolExecutor, spec: CompileSpec, on_phase: OnPhase
    ) -> KernelArtifact:
        """Compile in a thread.

        A thread cannot be ended from outside. One whose job was cancelled, or took too long, ends itself at its next
        phase and is heard no more; until then the next job waits for it, within that job's own time. There are never
        more threads than workers.
        """
        from esper.services.tezzeret.worker import TezzeretWorker

        loop = asyncio.get_running_loop()
        abandoned = threading.Event()

        def tell(phase: JobPhase) -> None:
            if abandoned.is_set():
                raise _Abandoned
            loop.call_soon_threadsafe(hear, phase)

        def hear(phase: JobPhase) -> None:
            if not abandoned.is_set():
                on_phase(phase)

        def work() -> KernelArtifact:
            with contextlib.closing(TezzeretWorker(self.config.compiler)) as worker:
                return worker.compile_spec(spec, tell).artifact

        limit_s = self.config.limits.job_timeout_s
        running = loop.run_in_executor(threads, work)
        self._abandoned.add(abandoned)
        try:
            return await asyncio.wait_for(running, limit_s)
        except TimeoutError as error:
            raise DeadlineExceededError(f"compile must end within {limit_s} s, it did not") from error
        except _Abandoned as error:
            raise UnavailableError("compile pool must stay open under a job, it was closed") from error
        finally:
            abandoned.set()
            self._abandoned.discard(abandoned)


def _warm_up_inline() -> None:
    from esper.contracts.kernel import CompileTarget
    from esper.services.tezzeret.warm_up import warm_up

    warm_up(CompileTarget.TORCHSCRIPT)

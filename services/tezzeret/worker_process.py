"""The pool's side of one worker process: start it, hand it a job, read what it sends, end it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

from google.protobuf.message import DecodeError

from esper.contracts.errors import (
    CorruptDataError,
    DeadlineExceededError,
    EsperError,
    InternalError,
    InvalidStateError,
    UnavailableError,
    all_error_types,
)
from esper.contracts.kernel import CompileSpec, JobPhase, KernelArtifact, ValidationCheck
from esper.contracts.wire import parse, serialize
from esper.services.tezzeret.config import CompilerConfig, WorkerLimits
from esper.services.tezzeret.frames import HEADER, FrameKind, pack_frame, parse_header
from esper.services.tezzeret.worker_main import settings_json
from esper.v1 import tezzeret_service_pb2 as pb

log = logging.getLogger(__name__)

OnPhase = Callable[[JobPhase], None]
"""Told of each phase as it begins."""

_MODULE: Final = "esper.services.tezzeret.worker_main"
_KEPT_ENVIRONMENT: Final = ("PATH", "LANG", "LC_ALL", "PYTHONPATH", "LD_LIBRARY_PATH")
_MAX_SAID_BYTES: Final = 4096
_END_DEADLINE_S: Final = 5.0


class WorkerProcess:
    """One child process; runs one job at a time. Belongs to one event loop."""

    def __init__(self, limits: WorkerLimits, compiler: CompilerConfig, scratch_dir: Path | None) -> None:
        self._limits = limits
        self._compiler = compiler
        self._scratch_dir = scratch_dir
        self._scratch: Path | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._listening: asyncio.Task[None] | None = None
        self._said = bytearray()
        self.sandbox: tuple[ValidationCheck, ...] = ()
        self.num_jobs = 0

    @property
    def pid(self) -> int | None:
        """Process id; ``None`` before the start."""
        return None if self._process is None else self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process is not None and self._process.returncode is None

    @property
    def warm(self) -> bool:
        """Whether it runs and has come up."""
        return self.alive and bool(self.sandbox)

    @property
    def worn(self) -> bool:
        """Whether it has done as many jobs as one process may."""
        return self.num_jobs >= self._limits.jobs_per_worker

    async def start(self) -> None:
        """Start the process and return when it is warm.

        Raises:
            UnavailableError: It ended before it was ready.
            DeadlineExceededError: It was not ready in time.
        """
        self._scratch = Path(tempfile.mkdtemp(prefix="esper-worker-", dir=self._scratch_dir))
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",
            "-m",
            _MODULE,
            settings_json(self._limits, self._compiler, self._scratch),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            cwd=self._scratch,
            env=self._environment(self._scratch),
            start_new_session=True,
        )
        self._listening = asyncio.create_task(self._listen())
        try:
            async with asyncio.timeout(self._limits.start_timeout_s):
                await self._wait_ready()
        except TimeoutError as error:
            await self.end()
            raise DeadlineExceededError(
                f"compile worker must be ready within {self._limits.start_timeout_s} s, it was not"
            ) from error
        except BaseException:
            await self.end()
            raise

    async def run(self, spec: CompileSpec, on_phase: OnPhase) -> KernelArtifact:
        """Have one kernel compiled; it comes without a signature and unproven.

        Raises:
            EsperError: What the compile raised, by its reason.
            UnavailableError: The process died under the job.
            DeadlineExceededError: The job took too long; the process was killed.
        """
        process = self._running()
        self.num_jobs += 1
        assert process.stdin is not None
        try:
            async with asyncio.timeout(self._limits.job_timeout_s):
                process.stdin.write(pack_frame(FrameKind.JOB, serialize(spec)))
                await process.stdin.drain()
                return await self._result(on_phase)
        except TimeoutError as error:
            await self.end()
            raise DeadlineExceededError(
                f"compile must end within {self._limits.job_timeout_s} s, it did not"
            ) from error
        except (ConnectionError, CorruptDataError, DecodeError) as error:
            raise await self._death(error) from error
        except asyncio.CancelledError:
            await self.end()
            raise

    async def end(self) -> None:
        """Kill the process and everything it started, and remove its files. Idempotent."""
        process = self._process
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
        if self._listening is not None:
            await asyncio.wait({self._listening}, timeout=_END_DEADLINE_S)
            self._listening.cancel()
        if self._scratch is not None:
            await asyncio.to_thread(shutil.rmtree, self._scratch, ignore_errors=True)
            self._scratch = None

    def _running(self) -> asyncio.subprocess.Process:
        if self._process is None or self._process.returncode is not None:
            raise InvalidStateError("compile worker must run to take a job, it does not")
        return self._process

    async def _wait_ready(self) -> None:
        rows: list[ValidationCheck] = []
        while True:
            try:
                kind, payload = await self._frame()
            except (ConnectionError, CorruptDataError) as error:
                raise await self._death(error) from error
            if kind is FrameKind.READY:
                break
            rows.append(parse(payload, ValidationCheck))
        self.sandbox = tuple(rows)

    async def _result(self, on_phase: OnPhase) -> KernelArtifact:
        while True:
            kind, payload = await self._frame()
            if kind is FrameKind.ARTIFACT:
                return parse(payload, KernelArtifact)
            if kind is FrameKind.PHASE:
                on_phase(_phase_of(pb.CompileJob.FromString(payload)))
            elif kind is FrameKind.ERROR:
                raise _error_of(pb.CompileJob.FromString(payload))
            else:
                raise CorruptDataError(f"compile worker must answer a job, it sent {kind.name}")

    async def _frame(self) -> tuple[FrameKind, bytes]:
        process = self._running()
        assert process.stdout is not None
        try:
            kind, size = parse_header(await process.stdout.readexactly(HEADER.size))
            return kind, await process.stdout.readexactly(size)
        except asyncio.IncompleteReadError as error:
            raise ConnectionResetError("the worker's stream ended") from error

    async def _death(self, error: BaseException) -> UnavailableError:
        """End what is left of the process and say how it died, with its last words."""
        process = self._process
        assert process is not None
        if isinstance(error, ConnectionError):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), _END_DEADLINE_S)
        code = process.returncode
        await self.end()
        how = "sent garbage" if code is None else f"ended with code {code}"
        if code is not None and code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
        said = bytes(self._said).decode(errors="replace").strip()[-300:]
        return UnavailableError(f"compile worker {how}" + (f": {said}" if said else ""))

    async def _listen(self) -> None:
        """Keep the last words of the process's standard error."""
        assert self._process is not None
        assert self._process.stderr is not None
        while data := await self._process.stderr.read(_MAX_SAID_BYTES):
            self._said += data
            del self._said[:-_MAX_SAID_BYTES]

    def _environment(self, scratch: Path) -> dict[str, str]:
        kept = {name: os.environ[name] for name in _KEPT_ENVIRONMENT if name in os.environ}
        here = {name: str(scratch) for name in ("HOME", "TMPDIR", "TORCHINDUCTOR_CACHE_DIR", "XDG_CACHE_HOME")}
        one = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        return {**kept, **here, **one, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONWARNINGS": "ignore"}


def _phase_of(message: pb.CompileJob) -> JobPhase:
    """Give the phase a worker names."""
    try:
        return JobPhase(message.phase)
    except ValueError as error:
        raise CorruptDataError(f"compile worker must name a phase of a job, got {message.phase}") from error


def _error_of(message: pb.CompileJob) -> EsperError:
    """Give the error a worker names by its reason."""
    by_reason = {cls.reason: cls for cls in all_error_types()}
    return by_reason.get(message.error_reason, InternalError)(message.error)

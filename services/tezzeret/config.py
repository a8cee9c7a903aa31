"""Settings of Tezzeret: what a compile may cost, how workers are run, how jobs are treated."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from esper.contracts.errors import InvalidInputError

if TYPE_CHECKING:  # a worker process imports this file, and needs nothing of the mesh
    from esper.mesh.settings import MeshSettings

_AOT_TIMEOUT_S: Final = 600.0
_AOT_CPU_S: Final = 900


def _positive(owner: object, *names: str) -> None:
    for name in names:
        if not getattr(owner, name) > 0:
            raise InvalidInputError.of(name, "be > 0", getattr(owner, name))


@dataclass(frozen=True, kw_only=True, slots=True)
class CompilerConfig:
    """Limits that a kernel is held against, and what a compile may try."""

    max_parameters: int = 16_777_216
    """Most parameters of a kernel."""
    max_memory_bytes: int = 1024**3
    """Most bytes of parameters and activations of one example."""
    max_latency_ms: float = 250.0
    """Longest forward pass of one example on this CPU, in milliseconds."""
    equality_limit: float = 1e-5
    """Largest difference of compiled and eager delta, relative to the largest element of the eager one."""
    inference_equality_limit: float = 1e-3
    """The same for forms optimised for inference in floating point."""
    int8_equality_limit: float = 0.1
    """The same for forms with int8 weights."""
    aot_inductor: bool = False
    """Whether AOT_INDUCTOR is tried: one kernel takes tens of seconds, so the job's time must allow it."""
    cuda: bool = False
    """Whether worker processes reach this machine's CUDA devices, where it has any, to try and time forms for them."""
    check_processes: bool = False
    """Whether determinism is checked in a forked process too; worker processes must, threads must not."""

    def __post_init__(self) -> None:
        _positive(self, "max_parameters", "max_memory_bytes", "max_latency_ms")
        _positive(self, "equality_limit", "inference_equality_limit", "int8_equality_limit")


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerLimits:
    """What the system lets one worker process have."""

    job_timeout_s: float = 60.0
    """Wall time of one job, in seconds; a worker that takes longer is killed."""
    start_timeout_s: float = 120.0
    """Wall time from the start of a worker to its being ready, in seconds."""
    cpu_s: int = 120
    """Processor time of one job, in seconds."""
    address_space_bytes: int = 12 * 1024**3
    """Virtual memory."""
    file_bytes: int = 512 * 1024**2
    """Size of any file it writes."""
    open_files: int = 256
    """Open files."""
    jobs_per_worker: int = 200
    """Jobs after which a worker is replaced by a fresh one."""

    def __post_init__(self) -> None:
        _positive(self, "job_timeout_s", "start_timeout_s", "cpu_s", "address_space_bytes")
        _positive(self, "file_bytes", "open_files", "jobs_per_worker")


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerPoolConfig:
    """How many workers there are, and where they run."""

    mode: Literal["process", "inline"] = "process"
    """``process``: sandboxed child processes. ``inline``: threads of this process, with neither sandbox nor kill; one
    that is given up ends at its next phase."""
    num_workers: int = 1
    """Jobs that run at once."""
    limits: WorkerLimits = field(default_factory=WorkerLimits)
    """Limits of each worker; inline workers keep the wall time alone."""
    compiler: CompilerConfig = field(default_factory=CompilerConfig)
    """What kernels are held against."""
    max_failed_starts: int = 5
    """Starts in a row that may fail in the place of one worker before a job that waits there loses its attempt."""
    scratch_dir: Path | None = None
    """Directory below which each worker gets a private one; ``None`` takes the system's temporary directory."""

    def __post_init__(self) -> None:
        if self.mode not in ("process", "inline"):
            raise InvalidInputError.of("mode", "be process or inline", self.mode)
        _positive(self, "num_workers", "max_failed_starts")


def worker_pool_config(settings: MeshSettings, *, embedded: bool) -> WorkerPoolConfig:
    """Give how a mesh's settings have workers run; threads of the process where the mesh is embedded in it."""
    aot = settings.tezzeret_aot_inductor
    return WorkerPoolConfig(
        mode="inline" if embedded else "process",
        num_workers=settings.tezzeret_workers,
        limits=WorkerLimits(job_timeout_s=_AOT_TIMEOUT_S, cpu_s=_AOT_CPU_S) if aot else WorkerLimits(),
        compiler=CompilerConfig(aot_inductor=aot, cuda=settings.tezzeret_cuda),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class TezzeretConfig:
    """How jobs are treated."""

    durable_name: str = "tezzeret"
    """Name of the work queue's consumers, one per priority; services that share a queue share it."""
    max_deliver: int = 3
    """Attempts at a job that may be lost with their worker before it is dead; counted in the store."""
    rest_dead_s: float = 900.0
    """Time after which a run's request starts a dead job anew, in seconds; the request of anybody else never does."""
    ack_wait_s: float = 30.0
    """Time after which a job of a service that fell silent goes to another, in seconds."""
    retry_delay_s: float = 1.0
    """Pause before a job goes to another worker, in seconds; doubles up to ``ack_wait_s`` while the store is away."""
    max_passed_over: int = 8
    """Times in a row that more urgent jobs may go before one that waits."""
    sweep_interval_s: float = 15.0
    """How often unfinished jobs are looked for whose work item is gone, in seconds."""
    sweep_after_s: float = 60.0
    """How long nobody gave a sign of such a job, in seconds; more than ``ack_wait_s``."""
    upload_timeout_s: float = 60.0
    """Wall time of one upload, in seconds."""
    max_refusals: int = 6
    """Uploads of one kernel that the library may refuse before its job is dead; an outage does not count."""
    min_backoff_s: float = 0.2
    """First pause after an upload or announcement failed, in seconds; doubles."""
    max_backoff_s: float = 30.0
    """Longest such pause, in seconds."""
    drain_s: float = 5.0
    """Time that running jobs and uploads have when the service closes, in seconds."""
    keep_jobs_s: float = 30 * 86_400.0
    """How long an ended job is kept, in seconds; its kernel stays in the library."""
    poll_interval_s: float = 0.5
    """How often a waiting caller looks for what another replica did, in seconds."""
    max_error_chars: int = 500
    """Longest error text kept with a job."""

    def __post_init__(self) -> None:
        if not self.durable_name:
            raise InvalidInputError.of("durable_name", "not be empty", self.durable_name)
        _positive(self, "max_deliver", "ack_wait_s", "retry_delay_s", "upload_timeout_s", "max_error_chars")
        _positive(self, "max_refusals", "max_passed_over", "sweep_interval_s", "rest_dead_s")
        if not self.sweep_after_s > self.ack_wait_s:
            raise InvalidInputError.of("sweep_after_s", f"be > ack_wait_s ({self.ack_wait_s})", self.sweep_after_s)
        _positive(self, "min_backoff_s", "max_backoff_s", "poll_interval_s", "drain_s", "keep_jobs_s")

"""Kernels: compiled, validated, signed forms of a blueprint at a site."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import IntEnum
from typing import Final

from esper.contracts.blueprint import BlueprintCost, BlueprintIR, Site


class CompileTarget(IntEnum):
    """What the compile stage yields."""

    TORCHSCRIPT = 1
    EXPORTED_PROGRAM = 2
    AOT_INDUCTOR = 3
    EAGER = 4


class DeviceKind(IntEnum):
    """Device family a kernel is optimised for."""

    CPU = 1
    CUDA = 2
    MOBILE = 3


class JobPhase(IntEnum):
    """Phase of a compile job."""

    QUEUED = 1
    COMPILING = 2
    VALIDATING = 3
    PACKAGING = 4
    SUCCEEDED = 5
    FAILED = 6
    DEAD = 7
    CANCELLED = 8


class JobPriority(IntEnum):
    """What a compile job is taken for; of waiting jobs the higher class goes first, and no class waits for ever."""

    BULK = 1
    NORMAL = 2
    INTERACTIVE = 3


ENDED_PHASES = frozenset({JobPhase.SUCCEEDED, JobPhase.FAILED, JobPhase.DEAD, JobPhase.CANCELLED})
"""Phases after which a job no longer changes by itself."""

MAX_FORECAST: Final = 64
"""Kernels of one forecast that are brought nearer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationCheck:
    """One row of a kernel's validation."""

    name: str
    """Name of the check."""
    figure: float | None = None
    """Figure measured; ``None`` where the check yields none."""
    limit: float | None = None
    """Limit the figure was held against; ``None`` where there is none."""
    unit: str = ""
    """Unit of figure and limit."""
    passed: bool
    """Whether it passed."""
    detail: str = ""
    """What was seen, in words."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CompileFallback:
    """One target that was tried and given up."""

    target: CompileTarget
    """Target given up."""
    reason: str
    """Why, in words."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PartDigest:
    """Digest and size of one part of a kernel."""

    name: str
    """``ir``, ``weights`` or ``binary``."""
    sha256: bytes
    """SHA-256, 32 bytes."""
    size_bytes: int
    """Size, in bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelManifest:
    """Everything that is said of a kernel; the signature covers its serialised bytes."""

    artifact_id: str
    """``k`` and 32 hex digits."""
    content_key: str
    """SHA-256 of the compile request, 64 hex digits."""
    blueprint_id: str
    """Content id of the blueprint."""
    site: Site
    """Site it was compiled for."""
    target: CompileTarget
    """Target that was reached."""
    fallbacks: tuple[CompileFallback, ...] = ()
    """Targets given up before."""
    device: DeviceKind
    """Device it was optimised for."""
    optimizations: tuple[str, ...] = ()
    """Names of the optimisations applied; empty for the trainable form."""
    parts: tuple[PartDigest, ...]
    """Parts with their digests, sorted by name."""
    checks: tuple[ValidationCheck, ...]
    """Validation rows, in the order they ran."""
    cost: BlueprintCost
    """Exact cost at the site."""
    compilation_time: timedelta
    """Wall time of compile, validate and package."""
    toolchain: Mapping[str, str] = field(default_factory=dict)
    """Versions that made it."""
    created_at: datetime
    """When it was made."""

    @property
    def validated(self) -> bool:
        """Whether there are checks and all of them passed."""
        return bool(self.checks) and all(check.passed for check in self.checks)


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelArtifact:
    """A kernel as it travels and rests; verify it before use (``esper.execution.artifact``)."""

    manifest: bytes
    """Serialised manifest, as signed."""
    signature: bytes
    """Ed25519 signature, 64 bytes."""
    key_id: str
    """Id of the signing key."""
    ir: bytes
    """Canonical bytes of the IR."""
    weights: bytes
    """Initial weights in safetensors format; empty without parameters."""
    binary: bytes
    """Compiled bytes; empty for the EAGER target."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelForecast:
    """Kernels that a run is likely to want next; a hint."""

    run_id: str
    """Run."""
    artifact_ids: tuple[str, ...]
    """Ids of kernels that the library has, likeliest first; readers take ``MAX_FORECAST`` at most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelReady:
    """Announcement that a kernel can be fetched, or that it never will be."""

    adaptation_id: str = ""
    """Adaptation that asked for it; empty when none did."""
    run_id: str = ""
    """Run that asked for it; empty when none did."""
    job_id: str
    """Compile job."""
    blueprint_id: str
    """Content id of the blueprint."""
    site: Site
    """Site it was compiled for."""
    artifact_id: str = ""
    """Id of the kernel; empty when it failed."""
    size_bytes: int = 0
    """Size of the artefact; 0 when it failed."""
    error: str | None = None
    """Reason of the failure; ``None`` on success."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CompileSpec:
    """What is to be compiled; equal values share one kernel."""

    ir: BlueprintIR
    """The graph."""
    site: Site
    """Site it is for."""
    target: CompileTarget = CompileTarget.TORCHSCRIPT
    """Target wanted."""
    device: DeviceKind = DeviceKind.CPU
    """Device wanted."""
    random_seed: int = 0
    """Seed of the weights that the kernel ships; runs leave it 0 and draw their own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CompileJob:
    """One compile job."""

    job_id: str
    """``j`` and 32 hex digits."""
    content_key: str
    """Content key of the request."""
    blueprint_id: str
    """Content id of the blueprint."""
    spec: CompileSpec
    """What is to be compiled."""
    phase: JobPhase
    """Where it stands."""
    deliveries: int = 0
    """Times it was handed to a worker."""
    artifact_id: str = ""
    """The kernel; empty until SUCCEEDED."""
    error: str = ""
    """Why it FAILED or died."""
    error_reason: str = ""
    """Stable reason of the failure."""
    adaptation_id: str = ""
    """Adaptation that asked first."""
    run_id: str = ""
    """Run that asked first."""
    created_at: datetime
    """When it was asked for."""
    finished_at: datetime | None = None
    """When it ended."""
    phase_times: Mapping[str, timedelta] = field(default_factory=dict)
    """Wall time by phase."""
    size_bytes: int = 0
    """Size of the artefact; 0 until SUCCEEDED."""
    priority: JobPriority | None = None
    """How urgent it is; ``None``, of before there were priorities, counts as NORMAL."""
    generation: int = 0
    """Times it was put on the queue anew; tells one end of it from the next."""

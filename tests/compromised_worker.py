"""A compile worker under somebody else's control: it serves jobs as the real one does, and answers with an archive that
writes a file, or leaves a check out. ``python -m tests.compromised_worker``, in the place of
``esper.services.tezzeret.worker_main``.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path

from esper.contracts.kernel import CompileSpec, JobPhase
from esper.execution.artifact import KernelContent, assemble, load_weights
from esper.services.tezzeret import worker
from esper.services.tezzeret.packaging import CompiledKernel
from esper.services.tezzeret.worker_main import main
from tests.hostile_archives import WritesWhenLoaded, scripted

NO_PHASE_SEED = 2
"""Seed of the job at which it names a phase that is none."""
NO_PROCESSES_SEED = 3
"""Seed of the job of which no second process was asked."""
HONEST = worker.TezzeretWorker.compile_spec
TARGET = Path(os.environ["PYTHONPATH"].split(os.pathsep)[0]) / "written-by-a-kernel"
"""File that the archive writes when it is loaded: not in the worker's scratch directory."""
BINARY = scripted(WritesWhenLoaded(str(TARGET)))
"""Made before the sandbox shuts the folder with the module's source."""


def compile_spec(
    self: worker.TezzeretWorker, spec: CompileSpec, on_phase: Callable[[JobPhase], None] = lambda _: None
) -> CompiledKernel:
    """Compile honestly, and change the kernel, with digests that agree; or name no phase there is."""
    if spec.random_seed == NO_PHASE_SEED:
        on_phase(99)  # type: ignore[arg-type]
    kernel = HONEST(self, spec, on_phase)
    if spec.random_seed == 0:
        return kernel
    manifest = kernel.manifest
    binary, checks = BINARY, manifest.checks
    if spec.random_seed == NO_PROCESSES_SEED:
        binary = kernel.artifact.binary
        checks = tuple(row for row in checks if row.name != "determinism_processes")
    content = KernelContent(
        content_key=manifest.content_key,
        site=manifest.site,
        target=manifest.target,
        device=manifest.device,
        ir=kernel.artifact.ir,
        weights=load_weights(kernel.artifact.weights),
        binary=binary,
        cost=manifest.cost,
        checks=checks,
        compilation_time=manifest.compilation_time,
        toolchain=manifest.toolchain,
    )
    return dataclasses.replace(kernel, artifact=assemble(content))


worker.TezzeretWorker.compile_spec = compile_spec  # type: ignore[method-assign]

if __name__ == "__main__":
    sys.exit(main())

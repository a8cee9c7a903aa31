"""A compile worker as a process of its own: job frames on standard input, result frames on standard output.

``python -m esper.services.tezzeret.worker_main <settings as JSON>``, started by the pool. It holds no key, reaches no
network, and gives up every other right before it imports torch. Whatever compiled code prints goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from esper.contracts.errors import CapacityExceededError, EsperError
from esper.contracts.kernel import CompileSpec, JobPhase, ValidationCheck
from esper.contracts.memory import MEMORY, raise_if_out_of_memory
from esper.contracts.wire import parse, serialize
from esper.services.tezzeret.config import CompilerConfig, WorkerLimits
from esper.services.tezzeret.frames import FrameKind, pack_frame, read_frame
from esper.services.tezzeret.sandbox import allow_cpu, cuda_devices, enter
from esper.v1 import tezzeret_service_pb2 as pb

if TYPE_CHECKING:  # torch comes only once the sandbox is entered
    from esper.services.tezzeret.worker import TezzeretWorker

MAX_ERROR_CHARS = 500
"""Longest error text sent."""


def settings_json(limits: WorkerLimits, compiler: CompilerConfig, scratch: Path) -> str:
    """Give the argument a worker is started with."""
    return json.dumps({"limits": asdict(limits), "compiler": asdict(compiler), "scratch": str(scratch)})


def main(arguments: list[str] | None = None) -> int:
    """Enter the sandbox, warm up, and serve jobs until standard input ends."""
    [text] = sys.argv[1:] if arguments is None else arguments
    settings = json.loads(text)
    limits = WorkerLimits(**settings["limits"])
    compiler = replace(CompilerConfig(**settings["compiler"]), check_processes=True)
    scratch = Path(settings["scratch"])
    with os.fdopen(_take_stdout(), "wb", buffering=0) as out, os.fdopen(0, "rb", closefd=False) as jobs:
        rows = enter(limits, scratch, cuda_devices() if compiler.cuda else ())
        _serve(jobs, out, rows, limits, compiler)
    return 0


def _take_stdout() -> int:
    """Keep standard output for frames alone; what is printed goes to standard error."""
    frames = os.dup(1)
    os.dup2(2, 1)
    return frames


def _serve(
    jobs: BinaryIO, out: BinaryIO, rows: tuple[ValidationCheck, ...], limits: WorkerLimits, compiler: CompilerConfig
) -> None:
    import torch

    from esper.contracts.kernel import CompileTarget
    from esper.services.tezzeret.warm_up import warm_up
    from esper.services.tezzeret.worker import TezzeretWorker

    torch.set_num_threads(1)
    warm_up(CompileTarget.TORCHSCRIPT, CompileTarget.EXPORTED_PROGRAM)
    for row in rows:
        _send(out, FrameKind.SANDBOX, serialize(row))
    with closing(TezzeretWorker(compiler)) as worker:
        _send(out, FrameKind.READY)
        _serve_jobs(worker, jobs, out, limits)


def _serve_jobs(worker: TezzeretWorker, jobs: BinaryIO, out: BinaryIO, limits: WorkerLimits) -> None:
    def on_phase(phase: JobPhase) -> None:
        _send(out, FrameKind.PHASE, pb.CompileJob(phase=int(phase)).SerializeToString())  # type: ignore[arg-type]

    while (frame := read_frame(jobs)) is not None:
        kind, payload = frame
        assert kind is FrameKind.JOB
        allow_cpu(limits)
        try:
            kernel = worker.compile_spec(parse(payload, CompileSpec), on_phase)
            artifact = serialize(kernel.artifact)
        except Exception as error:  # noqa: BLE001 - a defect fails its job, and the worker serves the next one
            _send_error(out, *_reason_and_text(error, limits))
        else:
            _send(out, FrameKind.ARTIFACT, artifact)


def _reason_and_text(error: Exception, limits: WorkerLimits) -> tuple[str, str]:
    try:
        raise_if_out_of_memory(error)
    except CapacityExceededError as shortage:
        error = shortage
    if isinstance(error, CapacityExceededError) and error.parameter == MEMORY:
        return error.reason, f"{error}; a compile may use at most {limits.address_space_bytes} bytes of address space"
    if isinstance(error, EsperError):
        return error.reason, str(error)
    return "INTERNAL", f"{type(error).__name__}: {error}"


def _send_error(out: BinaryIO, reason: str, text: str) -> None:
    message = pb.CompileJob(error=" ".join(text.split())[:MAX_ERROR_CHARS], error_reason=reason)
    _send(out, FrameKind.ERROR, message.SerializeToString())


def _send(out: BinaryIO, kind: FrameKind, payload: bytes = b"") -> None:
    view = memoryview(pack_frame(kind, payload))
    while view:
        view = view[out.write(view) :]


if __name__ == "__main__":
    sys.exit(main())

"""The gRPC face of Tezzeret: requests to domain values, domain values to responses, and nothing else."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import AsyncIterator
from typing import Any, Final

from esper.contracts.errors import InvalidInputError
from esper.contracts.kernel import (
    ENDED_PHASES,
    CompileJob,
    CompileSpec,
    CompileTarget,
    DeviceKind,
    JobPhase,
    JobPriority,
)
from esper.contracts.wire import enum_from_wire, from_wire, to_message, to_wire
from esper.mesh import InProcessChannel, MeshServer
from esper.mesh.page_token import decode_page_token, encode_page_token
from esper.mesh.validation import require_name, require_page_size, require_size
from esper.services.tezzeret.job_store import place_of
from esper.services.tezzeret.known_specs import CheckedSpec, KnownSpecs, check_spec
from esper.services.tezzeret.service import TezzeretService
from esper.v1 import kernel_pb2
from esper.v1 import tezzeret_service_pb2 as pb
from esper.v1.tezzeret_service_pb2_grpc import TezzeretServiceServicer, add_TezzeretServiceServicer_to_server

REGISTRAR: Final = add_TezzeretServiceServicer_to_server
"""Registers the servicer with a `MeshServer` or an `InProcessChannel`."""

DEFAULT_PAGE: Final = 50
"""Entries a page when the caller names no number."""
MAX_PAGE: Final = 500
"""Most entries a page."""

_MAX_SPEC_BYTES: Final = 128 * 1024
_MAX_ADAPTATION_BYTES: Final = 128
_MAX_ANSWERS: Final = 1024


def register(server: MeshServer | InProcessChannel, service: TezzeretService) -> tuple[str, ...]:
    """Register with a server (which serves it only while it is ready) or a channel; give the names of the services."""
    servicer = TezzeretServicer(service)
    if isinstance(server, MeshServer):
        return server.add_servicer(REGISTRAR, servicer, ready=[service.ready])
    return server.add_servicer(REGISTRAR, servicer)


class TezzeretServicer(TezzeretServiceServicer):
    """Serves ``esper.v1.TezzeretService``; errors leave as Esper's and become statuses in the envelope."""

    def __init__(self, service: TezzeretService) -> None:
        self._service = service
        self._specs = KnownSpecs()
        self._answers: OrderedDict[str, tuple[CompileJob, pb.CompileJob]] = OrderedDict()

    async def Compile(self, request: pb.CompileRequest, context: Any) -> pb.CompileResponse:  # noqa: N802
        """Give the job of a request, at once or when it has ended."""
        del context
        require_size("adaptation_id", request.adaptation_id, max_bytes=_MAX_ADAPTATION_BYTES)
        job, cached = await self._service.compile_checked(
            self._checked(request),
            run_id=request.run_id,
            adaptation_id=request.adaptation_id,
            priority=_priority(request.priority),
            wait=request.wait,
        )
        return pb.CompileResponse(job=self._answer(job), cached=cached)

    async def GetJob(self, request: pb.GetJobRequest, context: Any) -> pb.GetJobResponse:  # noqa: N802
        """Give one job."""
        del context
        return pb.GetJobResponse(job=_wire(await self._service.job(_job_id(request.job_id))))

    async def WatchJob(self, request: pb.WatchJobRequest, context: Any) -> AsyncIterator[pb.WatchJobResponse]:  # noqa: N802
        """Give a job at each phase since it was last put on the queue, until it has ended."""
        del context
        async for job in self._service.watch(_job_id(request.job_id)):
            yield pb.WatchJobResponse(job=_wire(job))

    async def ListJobs(self, request: pb.ListJobsRequest, context: Any) -> pb.ListJobsResponse:  # noqa: N802
        """Give jobs, newest first."""
        del context
        descriptor = pb.JobPhase.DESCRIPTOR
        phases = [JobPhase[enum_from_wire(phase, JobPhase, descriptor, "phases").name] for phase in request.phases]
        scope = f"ListJobs|{','.join(sorted(phase.name for phase in set(phases)))}"
        size = require_page_size(request.page_size, default=DEFAULT_PAGE, maximum=MAX_PAGE)
        found = await self._service.jobs(phases, size + 1, _after(request.page_token, scope))
        jobs, token = _page(found, size, scope)
        return pb.ListJobsResponse(jobs=jobs, next_page_token=token)

    async def ListDeadLetters(  # noqa: N802
        self, request: pb.ListDeadLettersRequest, context: Any
    ) -> pb.ListDeadLettersResponse:
        """Give dead jobs, oldest first."""
        del context
        size = require_page_size(request.page_size, default=DEFAULT_PAGE, maximum=MAX_PAGE)
        found = await self._service.dead_letters(size + 1, _after(request.page_token, "ListDeadLetters"))
        jobs, token = _page(found, size, "ListDeadLetters")
        return pb.ListDeadLettersResponse(jobs=jobs, next_page_token=token)

    async def RequeueDeadLetter(  # noqa: N802
        self, request: pb.RequeueDeadLetterRequest, context: Any
    ) -> pb.RequeueDeadLetterResponse:
        """Put a job that was given up back on the queue."""
        del context
        generation = request.generation if request.HasField("generation") else None
        job = await self._service.requeue(_job_id(request.job_id), generation)
        return pb.RequeueDeadLetterResponse(job=_wire(job))

    async def CancelJob(self, request: pb.CancelJobRequest, context: Any) -> pb.CancelJobResponse:  # noqa: N802
        """Stop a job."""
        del context
        return pb.CancelJobResponse(job=_wire(await self._service.cancel(_job_id(request.job_id))))

    async def GetSandbox(self, request: pb.GetSandboxRequest, context: Any) -> pb.GetSandboxResponse:  # noqa: N802
        """Say what holds the workers, and what this system could not enforce."""
        del request, context
        rows = [to_message(row, kernel_pb2.ValidationCheck) for row in self._service.sandbox()]
        return pb.GetSandboxResponse(protections=rows)

    def _checked(self, request: pb.CompileRequest) -> CheckedSpec:
        """Give the spec of a request; one that was read before is known by its bytes."""
        if not request.HasField("spec"):
            raise InvalidInputError.of("spec", "be set", "nothing")
        said = request.spec.SerializeToString(deterministic=True)
        require_size("spec", said, max_bytes=_MAX_SPEC_BYTES)
        known = self._specs.find(said)
        if known is None:
            known = check_spec(_filled(request.spec))
            self._specs.learn(said, known)
        return known

    def _answer(self, job: CompileJob) -> pb.CompileJob:
        """Give a job as a message; that of an ended one, which stays as it is, is made once."""
        if job.phase not in ENDED_PHASES:
            return _wire(job)
        known = self._answers.get(job.job_id)
        if known is not None and known[0] is job:
            return known[1]
        message = _wire(job)
        self._answers[job.job_id] = (job, message)
        while len(self._answers) > _MAX_ANSWERS:
            self._answers.popitem(last=False)
        return message


def _filled(asked: pb.CompileSpec) -> CompileSpec:
    """Give a spec with what was left unspecified filled in."""
    filled = pb.CompileSpec()
    filled.CopyFrom(asked)
    filled.target = filled.target or int(CompileTarget.TORCHSCRIPT)  # type: ignore[assignment]
    filled.device = filled.device or int(DeviceKind.CPU)  # type: ignore[assignment]
    return from_wire(filled, CompileSpec)


def _priority(value: int) -> JobPriority | None:
    """Give the priority asked for, ``None`` when none was."""
    if not value:
        return None
    return JobPriority[enum_from_wire(value, JobPriority, pb.JobPriority.DESCRIPTOR, "priority").name]


def _job_id(value: str) -> str:
    return require_name("job_id", value, max_len=33)


def _after(token: str, scope: str) -> tuple[int, str] | None:
    place = decode_page_token(token, scope=scope, arity=2)
    if place is None:
        return None
    created_us, job_id = place
    assert isinstance(created_us, int)
    assert isinstance(job_id, str)
    return created_us, job_id


def _page(found: list[CompileJob], size: int, scope: str) -> tuple[list[pb.CompileJob], str]:
    """Give one page of ``size`` and the token of the next; ``found`` holds one more where there is more."""
    jobs = found[:size]
    token = encode_page_token(place_of(jobs[-1]), scope=scope) if len(found) > size else ""
    return [_wire(job) for job in jobs], token


def _wire(job: CompileJob) -> pb.CompileJob:
    message = to_wire(job)
    assert isinstance(message, pb.CompileJob)
    return message

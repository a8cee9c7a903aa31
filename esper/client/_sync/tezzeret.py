# Generated from ../_async by esper.client.generate; edit that.
"""Tezzeret: compile jobs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from esper.client.paging import decoded
from esper.client.transport import Transport
from esper.contracts.kernel import CompileJob, CompileSpec, JobPhase, JobPriority, ValidationCheck
from esper.contracts.wire import enum_to_wire, from_wire, to_message
from esper.v1 import tezzeret_service_pb2


class TezzeretClient:
    """Calls of ``TezzeretService``."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def compile(
        self,
        spec: CompileSpec,
        *,
        wait: bool = True,
        run_id: str = "",
        adaptation_id: str = "",
        priority: JobPriority | None = None,
    ) -> CompileJob:
        """Ask for a kernel; equal requests share one job. With ``wait``, give the job when it has ended.

        Of waiting jobs the higher priority goes first; ``None`` means INTERACTIVE when a run asks, NORMAL else. It
        raises what an equal request that still waits was given, and never lowers it.
        """
        request = tezzeret_service_pb2.CompileRequest(
            spec=to_message(spec, tezzeret_service_pb2.CompileSpec),
            wait=wait,
            run_id=run_id,
            adaptation_id=adaptation_id,
        )
        if priority is not None:
            descriptor = tezzeret_service_pb2.JobPriority.DESCRIPTOR
            request.priority = tezzeret_service_pb2.JobPriority.ValueType(enum_to_wire(priority, descriptor))
        return from_wire((self._transport.call("tezzeret", "Compile", request, timeout_s=60.0)).job, CompileJob)

    def get_job(self, job_id: str) -> CompileJob:
        """Give one job."""
        request = tezzeret_service_pb2.GetJobRequest(job_id=job_id)
        return from_wire((self._transport.call("tezzeret", "GetJob", request)).job, CompileJob)

    def watch_job(self, job_id: str) -> Iterator[CompileJob]:
        """Give a job at each phase since it was last put on the queue, then at each as it comes, until it has ended."""
        request = tezzeret_service_pb2.WatchJobRequest(job_id=job_id)
        for response in self._transport.stream("tezzeret", "WatchJob", request):
            yield from_wire(response.job, CompileJob)

    def list_jobs(self, phases: Sequence[JobPhase] = ()) -> Iterator[CompileJob]:
        """Give jobs in any of the phases (all by default), newest first."""
        descriptor = tezzeret_service_pb2.JobPhase.DESCRIPTOR
        numbers = [tezzeret_service_pb2.JobPhase.ValueType(enum_to_wire(phase, descriptor)) for phase in phases]
        request = tezzeret_service_pb2.ListJobsRequest(phases=numbers)
        for page in self._transport.pages("tezzeret", "ListJobs", request):
            for job in decoded(page.jobs, CompileJob):
                yield job

    def list_dead_letters(self) -> Iterator[CompileJob]:
        """Give jobs that failed every delivery, oldest first."""
        request = tezzeret_service_pb2.ListDeadLettersRequest()
        for page in self._transport.pages("tezzeret", "ListDeadLetters", request):
            for job in decoded(page.jobs, CompileJob):
                yield job

    def requeue_dead_letter(self, job_id: str, *, generation: int | None = None) -> CompileJob:
        """Put a dead, failed or cancelled job back on the queue.

        Args:
            job_id: The job.
            generation: That of the job as you saw it, so that it is not started twice where somebody else puts it back
                too; ``None`` means the one there is now.

        Raises:
            NotFoundError: There is none of this id, or it is none of these.
            InvalidStateError: Somebody else has put it back.
        """
        request = tezzeret_service_pb2.RequeueDeadLetterRequest(job_id=job_id, generation=generation)
        return from_wire((self._transport.call("tezzeret", "RequeueDeadLetter", request)).job, CompileJob)

    def cancel_job(self, job_id: str) -> CompileJob:
        """Stop a job for all who asked for it; one that was cancelled before stays as it is.

        Raises:
            NotFoundError: There is none of this id.
            InvalidStateError: It has ended otherwise.
        """
        request = tezzeret_service_pb2.CancelJobRequest(job_id=job_id)
        return from_wire((self._transport.call("tezzeret", "CancelJob", request)).job, CompileJob)

    def get_sandbox(self) -> tuple[ValidationCheck, ...]:
        """Give a row for each protection of the compile workers; one that did not pass is not enforced there.

        Of several replicas it is the one that answers.

        Raises:
            UnavailableError: No worker has come up yet.
        """
        request = tezzeret_service_pb2.GetSandboxRequest()
        response = self._transport.call("tezzeret", "GetSandbox", request)
        return tuple(decoded(response.protections, ValidationCheck))

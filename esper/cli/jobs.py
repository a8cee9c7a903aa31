"""``esper jobs`` and ``esper dead-letters``: what the compiler does, and what it gave up."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated, Any

import typer

from esper.cli.compile_jobs import follow, job_facts, require_success
from esper.cli.connection import call, pages
from esper.cli.output import Json, Timeout, console, plain, print_json, print_rows
from esper.cli.sites import site_text
from esper.contracts.errors import InvalidInputError, NotFoundError
from esper.contracts.kernel import CompileJob, JobPhase, JobPriority
from esper.contracts.wire import from_wire
from esper.v1 import tezzeret_service_pb2 as pb

app = typer.Typer(help="Compile jobs: look, follow, cancel.", no_args_is_help=True)
dead_letters_app = typer.Typer(
    help="Compile jobs that failed every delivery: look, put back on the queue.", no_args_is_help=True
)

PhaseName = StrEnum("PhaseName", {phase.name: phase.name.lower() for phase in JobPhase})  # type: ignore[misc]
"""Names of the phases of a job, as they are typed."""

JobId = Annotated[str, typer.Argument(help="Job: j and 32 hex digits.")]
Limit = Annotated[int, typer.Option("--limit", "-n", help="Jobs at most.", min=1)]


@app.command("list")
def list_jobs(
    phase: Annotated[list[PhaseName] | None, typer.Option("--phase", help="Phase it is in; may repeat.")] = None,
    limit: Limit = 100,
    as_json: Json = False,
) -> None:
    """List compile jobs, newest first."""
    request = pb.ListJobsRequest(phases=[pb.JobPhase.ValueType(JobPhase[one.name]) for one in phase or []])
    _print_jobs("jobs", _first("ListJobs", request, limit), ("job", "phase", "site"), as_json=as_json)


@app.command("show")
def show(job_id: JobId, as_json: Json = False, timeout: Timeout = 10.0) -> None:
    """Print one job: what was asked for, where it stands, what each phase took, why it failed."""
    _print_job(_job(job_id, timeout), as_json=as_json)


@app.command("watch")
def watch_job(job_id: JobId, as_json: Json = False) -> None:
    """Follow a job to its end. Exit code 1 when it comes to no kernel.

    Phases go to standard error, the kernel's id to standard output; with --json every change goes there instead.
    Ctrl-C ends the watching, not the job.
    """

    def show_change(response: Any) -> None:
        if as_json:
            print_json(plain(response))

    job = from_wire(follow(job_id, show_change), CompileJob)
    require_success(job)
    if not as_json:
        console.print(job.artifact_id, highlight=False)


@app.command("cancel")
def cancel(
    job_ids: Annotated[list[str], typer.Argument(help="Jobs that have not ended.")],
    as_json: Json = False,
    timeout: Timeout = 10.0,
) -> None:
    """Stop compile jobs, for all who asked for them. Exit code 1 when one has ended otherwise.

    Ends at the first that cannot be cancelled; those before it have been. A job that was cancelled before stays so.
    """
    done: list[CompileJob] = []
    try:
        for job_id in job_ids:
            response = call("tezzeret", "CancelJob", pb.CancelJobRequest(job_id=job_id), timeout)
            done.append(from_wire(response.job, CompileJob))
    finally:
        rows = [(job.job_id, job.phase.name.lower()) for job in done]
        if rows or as_json:
            print_rows("cancelled", ("job", "phase"), rows, as_json=as_json)


@dead_letters_app.command("list")
def list_dead(limit: Limit = 100, as_json: Json = False) -> None:
    """List dead jobs, oldest first."""
    found = _first("ListDeadLetters", pb.ListDeadLettersRequest(), limit)
    _print_jobs("dead letters", found, ("job", "site", "deliveries", "error"), as_json=as_json)


@dead_letters_app.command("show")
def show_dead(job_id: JobId, as_json: Json = False, timeout: Timeout = 10.0) -> None:
    """Print one dead job, and why its last delivery failed. Exit code 1 when it is not dead."""
    response = _job(job_id, timeout)
    phase = JobPhase(response.job.phase)
    if phase is not JobPhase.DEAD:
        raise NotFoundError(f"job_id must be a dead job's, got {job_id}, which is {phase.name.lower()}")
    _print_job(response, as_json=as_json)


@dead_letters_app.command("requeue")
def requeue(
    job_ids: Annotated[list[str] | None, typer.Argument(help="Dead, failed or cancelled jobs.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every dead job there is.")] = False,
    as_json: Json = False,
    timeout: Timeout = 10.0,
) -> None:
    """Put dead, failed or cancelled jobs back on the queue, to be delivered as if for the first time.

    Ends at the first that cannot be put back; those before it have been.
    """
    if bool(job_ids) == everything:
        raise InvalidInputError.of("job_ids", "be given, or --all in their place", list(job_ids or []))
    requests = [pb.RequeueDeadLetterRequest(job_id=job_id) for job_id in job_ids or []]
    if everything:
        dead = _first("ListDeadLetters", pb.ListDeadLettersRequest(), None)
        requests = [pb.RequeueDeadLetterRequest(job_id=job.job_id, generation=job.generation) for job in dead]
    done: list[CompileJob] = []
    try:
        for request in requests:
            response = call("tezzeret", "RequeueDeadLetter", request, timeout)
            done.append(from_wire(response.job, CompileJob))
    finally:
        rows = [(job.job_id, job.phase.name.lower()) for job in done]
        if rows or everything or as_json:
            print_rows("requeued", ("job", "phase"), rows, as_json=as_json)


def _first(method: str, request: Any, limit: int | None) -> list[CompileJob]:
    """Give the first jobs of a listing (all for ``None``); standard error says when there are more."""
    listed = (job for page in pages("tezzeret", method, request) for job in page.jobs)
    found = [from_wire(job, CompileJob) for job in itertools.islice(listed, limit)]
    if limit is not None and next(listed, None) is not None:
        sys.stderr.write(f"there are more than {limit}: --limit shows them\n")
    return found


def _print_jobs(title: str, jobs: Sequence[CompileJob], shown: Sequence[str], *, as_json: bool) -> None:
    """Print jobs: for programs all that a row can hold, for people the columns that fit a terminal."""
    rows = [_row(job) for job in jobs]
    if as_json:
        print_json(rows)
        return
    print_rows(title, shown, [[row[column] for column in shown] for row in rows], as_json=False)


def _row(job: CompileJob) -> dict[str, Any]:
    return {
        "job": job.job_id,
        "phase": job.phase.name.lower(),
        "blueprint": job.blueprint_id,
        "site": site_text(job.spec.site),
        "target": job.spec.target.name.lower(),
        "device": job.spec.device.name.lower(),
        "priority": (job.priority or JobPriority.NORMAL).name.lower(),
        "deliveries": job.deliveries,
        "kernel": job.artifact_id or None,
        "error": job.error or None,
        "created": job.created_at.isoformat(),
    }


def _job(job_id: str, timeout_s: float) -> pb.GetJobResponse:
    found: pb.GetJobResponse = call("tezzeret", "GetJob", pb.GetJobRequest(job_id=job_id), timeout_s)
    return found


def _print_job(response: pb.GetJobResponse, *, as_json: bool) -> None:
    if as_json:
        print_json(plain(response))
        return
    print_rows("job", ("field", "value"), job_facts(from_wire(response.job, CompileJob)), as_json=False)

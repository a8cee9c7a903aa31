"""The gRPC face: requests in, responses out, pages, and errors with their reasons."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from esper.contracts.errors import (
    InvalidBlueprintError,
    InvalidInputError,
    InvalidStateError,
    NotFoundError,
    UnavailableError,
)
from esper.contracts.kernel import CompileSpec, JobPhase
from esper.contracts.wire import to_wire
from esper.mesh import InProcessChannel
from esper.services.tezzeret.server import REGISTRAR, TezzeretServicer
from esper.v1 import tezzeret_service_pb2 as pb
from esper.v1.tezzeret_service_pb2_grpc import TezzeretServiceStub

Mill = Any


@pytest.fixture
async def stub(mill: Mill) -> AsyncIterator[TezzeretServiceStub]:
    channel = InProcessChannel()
    channel.add_servicer(REGISTRAR, TezzeretServicer(mill.service))
    yield TezzeretServiceStub(channel)
    await channel.close()


def request(spec: CompileSpec, **fields: Any) -> pb.CompileRequest:
    return pb.CompileRequest(spec=to_wire(spec), **fields)  # type: ignore[arg-type]


async def test_a_kernel_is_asked_for_and_waited_for(stub: Any, spec: CompileSpec) -> None:
    response = await stub.Compile(request(spec, wait=True, run_id="run-1", adaptation_id="a1"), timeout=30)
    assert response.job.phase == pb.JOB_PHASE_SUCCEEDED
    assert not response.cached
    again = await stub.Compile(request(spec), timeout=30)
    assert again.cached
    assert (await stub.GetJob(pb.GetJobRequest(job_id=response.job.job_id))).job == again.job


async def test_target_and_device_have_defaults(stub: Any, spec: CompileSpec) -> None:
    bare = request(spec)
    bare.spec.target, bare.spec.device = 0, 0
    first = await stub.Compile(bare, timeout=30)
    second = await stub.Compile(request(spec), timeout=30)
    assert first.job.job_id == second.job.job_id


async def test_a_short_deadline_gives_the_job_as_it_stands(mill: Mill, stub: Any, spec: CompileSpec) -> None:
    mill.pool.gate.clear()
    response = await stub.Compile(request(spec, wait=True), timeout=0.8)
    assert response.job.phase in (pb.JOB_PHASE_QUEUED, pb.JOB_PHASE_COMPILING)
    mill.pool.gate.set()


async def test_a_job_is_watched_to_its_end(stub: Any, spec: CompileSpec) -> None:
    job = (await stub.Compile(request(spec), timeout=30)).job
    phases = [change.job.phase async for change in stub.WatchJob(pb.WatchJobRequest(job_id=job.job_id), timeout=30)]
    assert phases == [
        pb.JOB_PHASE_QUEUED,
        pb.JOB_PHASE_COMPILING,
        pb.JOB_PHASE_VALIDATING,
        pb.JOB_PHASE_PACKAGING,
        pb.JOB_PHASE_SUCCEEDED,
    ]


async def test_jobs_are_listed_newest_first_page_by_page(stub: Any, spec: CompileSpec) -> None:
    made = [
        (await stub.Compile(request(replace(spec, random_seed=seed), wait=True), timeout=30)).job.job_id
        for seed in range(5)
    ]
    found: list[str] = []
    token = ""
    while True:
        page = await stub.ListJobs(pb.ListJobsRequest(page_size=2, page_token=token))
        found += [job.job_id for job in page.jobs]
        token = page.next_page_token
        if not token:
            break
        assert len(page.jobs) == 2
    assert found == made[::-1]
    empty = await stub.ListJobs(pb.ListJobsRequest(phases=[pb.JOB_PHASE_FAILED]))
    assert list(empty.jobs) == []
    with pytest.raises(InvalidInputError, match="page_token must be empty or one this listing gave"):
        await stub.ListJobs(pb.ListJobsRequest(page_token="forged"))


async def test_dead_jobs_are_listed_and_requeued(mill: Mill, stub: Any, spec: CompileSpec) -> None:
    mill.pool.script = [UnavailableError("killed")] * 3
    job = (await stub.Compile(request(spec, wait=True), timeout=30)).job
    dead = await stub.ListDeadLetters(pb.ListDeadLettersRequest())
    assert [entry.job_id for entry in dead.jobs] == [job.job_id]
    assert dead.jobs[0].error_reason == "UNAVAILABLE"
    again = await stub.RequeueDeadLetter(pb.RequeueDeadLetterRequest(job_id=job.job_id))
    assert again.job.phase == pb.JOB_PHASE_QUEUED
    await mill.phase(job.job_id, JobPhase.SUCCEEDED)


async def test_a_job_is_cancelled_for_good_and_once(mill: Mill, stub: Any, spec: CompileSpec) -> None:
    mill.pool.gate.clear()
    job = (await stub.Compile(request(spec), timeout=30)).job
    await mill.phase(job.job_id, JobPhase.COMPILING)
    cancelled = (await stub.CancelJob(pb.CancelJobRequest(job_id=job.job_id))).job
    assert (cancelled.phase, cancelled.error) == (pb.JOB_PHASE_CANCELLED, "cancelled on request")
    assert (await stub.CancelJob(pb.CancelJobRequest(job_id=job.job_id))).job == cancelled
    phases = [change.job.phase async for change in stub.WatchJob(pb.WatchJobRequest(job_id=job.job_id), timeout=30)]
    assert phases == [pb.JOB_PHASE_QUEUED, pb.JOB_PHASE_COMPILING, pb.JOB_PHASE_CANCELLED]
    mill.pool.gate.set()
    done = (await stub.Compile(request(spec, wait=True), timeout=30)).job
    assert done.phase == pb.JOB_PHASE_SUCCEEDED
    with pytest.raises(InvalidStateError, match="must not have ended to be cancelled, it is SUCCEEDED"):
        await stub.CancelJob(pb.CancelJobRequest(job_id=job.job_id))
    with pytest.raises(NotFoundError, match="no compile job has id j123"):
        await stub.CancelJob(pb.CancelJobRequest(job_id="j123"))


async def test_a_priority_is_taken_as_given_or_from_who_asks(mill: Mill, stub: Any, spec: CompileSpec) -> None:
    mill.pool.gate.clear()
    bulk = request(replace(spec, random_seed=1), run_id="run-1", priority=pb.JOB_PRIORITY_BULK)
    assert (await stub.Compile(bulk, timeout=30)).job.priority == pb.JOB_PRIORITY_BULK
    assert (await stub.Compile(request(spec), timeout=30)).job.priority == pb.JOB_PRIORITY_NORMAL
    live = request(replace(spec, random_seed=2), run_id="run-1")
    assert (await stub.Compile(live, timeout=30)).job.priority == pb.JOB_PRIORITY_INTERACTIVE
    bulk.priority = 9  # type: ignore[assignment]
    with pytest.raises(InvalidInputError, match="priority must be one of BULK, NORMAL, INTERACTIVE, got 9"):
        await stub.Compile(bulk, timeout=30)
    mill.pool.gate.set()


async def test_bad_requests_are_answered_with_their_reason(stub: Any, spec: CompileSpec) -> None:
    with pytest.raises(InvalidInputError, match="spec must be set, got 'nothing'"):
        await stub.Compile(pb.CompileRequest())
    broken = request(spec)
    broken.spec.ir.ClearField("nodes")
    with pytest.raises(InvalidBlueprintError, match="nodes must be 1 to 64, got 0"):
        await stub.Compile(broken)
    with pytest.raises(InvalidInputError, match="phases must be one of"):
        await stub.ListJobs(pb.ListJobsRequest(phases=[pb.JOB_PHASE_UNSPECIFIED]))
    with pytest.raises(NotFoundError, match="no compile job has id j123"):
        await stub.GetJob(pb.GetJobRequest(job_id="j123"))
    with pytest.raises(NotFoundError, match="no compile job has id j123"):
        _ = [change async for change in stub.WatchJob(pb.WatchJobRequest(job_id="j123"))]
    with pytest.raises(InvalidInputError, match="job_id must match"):
        await stub.GetJob(pb.GetJobRequest(job_id="../j"))


async def test_what_does_not_hold_the_workers_is_told_to_who_asks(mill: Mill, stub: Any) -> None:
    """Inline workers are held by nothing, which is a row of its own."""
    [row] = (await stub.GetSandbox(pb.GetSandboxRequest())).protections
    assert (row.name, row.passed) == ("sandbox", False)
    assert row.detail == mill.pool.sandbox[0].detail == "NOT ENFORCED: inline workers are threads of this process"


async def test_no_worker_no_word_on_what_holds_it(mill: Mill) -> None:
    channel = InProcessChannel()
    mill.pool = type(mill.pool)()
    channel.add_servicer(REGISTRAR, TezzeretServicer(mill.make_service()))
    with pytest.raises(UnavailableError, match="must have come up to say what holds it, none has: they are warming up"):
        await TezzeretServiceStub(channel).GetSandbox(pb.GetSandboxRequest())
    await channel.close()

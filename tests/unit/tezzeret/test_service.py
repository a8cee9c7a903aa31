"""One job per distinct request, compiled once, kept until the library has it, announced to everyone who asked."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from esper.contracts.blueprint import BlueprintIR, IRNode, Site, SiteKind
from esper.contracts.errors import (
    CapacityExceededError,
    CompilationError,
    CorruptDataError,
    InvalidBlueprintError,
    InvalidInputError,
    NotFoundError,
    UnavailableError,
)
from esper.contracts.kernel import CompileSpec, CompileTarget, DeviceKind, JobPhase, KernelArtifact
from esper.execution.artifact import verify
from esper.mesh import deadline_scope
from esper.services.tezzeret import job_runner, phase_clock
from esper.services.tezzeret.config import CompilerConfig
from esper.services.tezzeret.content_key import content_key
from esper.telemetry import COMPILE

Mill = Any


async def test_a_request_becomes_a_signed_kernel_in_the_library(mill: Mill, spec: CompileSpec) -> None:
    job, cached = await mill.service.compile(spec, run_id="run-1", adaptation_id="a1", wait=True)
    assert (job.phase, cached, job.deliveries) == (JobPhase.SUCCEEDED, False, 1)
    manifest, data = mill.library.kernels[job.artifact_id]
    kernel = verify(data, mill.key.ring(), artifact_id=job.artifact_id)
    assert kernel.manifest.validated
    assert (manifest.content_key, kernel.ir) == (content_key(spec), spec.ir)
    assert job.size_bytes == len(data)
    assert set(job.phase_times) == {"compiling", "validating", "packaging"}
    assert job.finished_at is not None


async def test_the_run_is_told(mill: Mill, spec: CompileSpec) -> None:
    job, _ = await mill.service.compile(spec, run_id="run-1", adaptation_id="a1", wait=True)
    [ready] = await mill.announced("run-1")
    assert (ready.adaptation_id, ready.run_id, ready.artifact_id) == ("a1", "run-1", job.artifact_id)
    assert (ready.job_id, ready.size_bytes, ready.error) == (job.job_id, job.size_bytes, None)
    assert ready.site == spec.site


async def test_the_same_request_twice_compiles_once(mill: Mill, spec: CompileSpec) -> None:
    mill.pool.gate.clear()
    asking = [
        asyncio.create_task(mill.service.compile(spec, run_id=f"run-{number}", adaptation_id="a", wait=True))
        for number in range(5)
    ]
    await mill.phase(f"j{content_key(spec)[:32]}", JobPhase.COMPILING)
    mill.pool.gate.set()
    jobs = [job for job, _ in await asyncio.gather(*asking)]
    assert len({job.artifact_id for job in jobs}) == len(mill.pool.specs) == mill.library.uploads == 1
    for number in range(5):
        assert (await mill.announced(f"run-{number}"))[0].artifact_id == jobs[0].artifact_id


async def test_a_later_asker_gets_the_kernel_at_once_and_is_told_too(mill: Mill, spec: CompileSpec) -> None:
    first, _ = await mill.service.compile(spec, wait=True)
    again, cached = await mill.service.compile(spec, run_id="late", adaptation_id="a9")
    assert (again.artifact_id, cached) == (first.artifact_id, True)
    assert (await mill.announced("late"))[0].adaptation_id == "a9"


async def test_a_kernel_the_library_has_needs_no_worker(mill: Mill, spec: CompileSpec) -> None:
    job, _ = await mill.service.compile(spec, wait=True)
    other = type(mill)()
    other.library.kernels = mill.library.kernels
    await other.open()
    found, cached = await other.service.compile(spec, run_id="run-1", adaptation_id="a1")
    assert (found.artifact_id, found.phase, cached) == (job.artifact_id, JobPhase.SUCCEEDED, True)
    assert other.pool.specs == []
    await other.announced("run-1")
    await other.close()


async def test_a_kernel_the_library_lost_is_made_anew(mill: Mill, spec: CompileSpec) -> None:
    job, _ = await mill.service.compile(spec, wait=True)
    mill.library.kernels.clear()
    again, cached = await mill.service.compile(spec, wait=True)
    assert not cached
    assert again.phase is JobPhase.SUCCEEDED
    assert again.artifact_id in mill.library.kernels
    assert len(mill.pool.specs) == 2
    assert again.job_id == job.job_id


async def test_other_requests_have_other_jobs(mill: Mill, spec: CompileSpec) -> None:
    others = [
        replace(spec, random_seed=1),
        replace(spec, target=CompileTarget.EAGER),
        replace(spec, device=DeviceKind.MOBILE),
        replace(spec, site=Site(kind=SiteKind.LINEAR, input_shape=(9,), output_shape=(6,))),
    ]
    assert len({content_key(each) for each in [spec, *others]}) == 5
    job, _ = await mill.service.compile(others[2], wait=True)
    manifest, _ = mill.library.kernels[job.artifact_id]
    assert (manifest.device, manifest.optimizations) == (DeviceKind.MOBILE, ("int8_dynamic", "freeze"))


async def test_a_blueprint_that_fails_its_checks_fails_for_good(mill: Mill, spec: CompileSpec) -> None:
    mill.pool.script = [CompilationError("kernel must pass every check, failed identity: 3 > 0")]
    job, _ = await mill.service.compile(spec, run_id="run-1", adaptation_id="a1", wait=True)
    assert (job.phase, job.error_reason, job.deliveries) == (JobPhase.FAILED, "COMPILATION", 1)
    [ready] = await mill.announced("run-1")
    assert ready.error == "kernel must pass every check, failed identity: 3 > 0"
    assert ready.artifact_id == ""


async def test_the_death_of_a_worker_costs_one_delivery(mill: Mill, spec: CompileSpec) -> None:
    mill.pool.script = [UnavailableError("compile worker was killed by SIGKILL")]
    job, _ = await mill.service.compile(spec, wait=True)
    assert (job.phase, job.deliveries) == (JobPhase.SUCCEEDED, 2)


async def test_a_job_that_kills_every_worker_is_dead_and_can_be_requeued(mill: Mill, spec: CompileSpec) -> None:
    mill.pool.script = [UnavailableError("compile worker was killed by SIGSEGV")] * 3
    job, _ = await mill.service.compile(spec, run_id="run-1", adaptation_id="a1", wait=True)
    assert (job.phase, job.deliveries, job.error_reason) == (JobPhase.DEAD, 3, "UNAVAILABLE")
    assert [dead.job_id for dead in await mill.service.dead_letters(10, None)] == [job.job_id]
    assert (await mill.announced("run-1"))[0].error == "compile worker was killed by SIGSEGV"
    again = await mill.service.requeue(job.job_id)
    assert (again.phase, again.deliveries, again.error) == (JobPhase.QUEUED, 0, "")
    done = await mill.phase(job.job_id, JobPhase.SUCCEEDED)
    ready = await mill.announced("run-1", 2)
    assert ready[1].artifact_id == done.artifact_id
    assert await mill.service.dead_letters(10, None) == []


async def test_only_dead_jobs_can_be_requeued(mill: Mill, spec: CompileSpec) -> None:
    job, _ = await mill.service.compile(spec, wait=True)
    with pytest.raises(NotFoundError, match="must be dead to be requeued, it is SUCCEEDED"):
        await mill.service.requeue(job.job_id)
    with pytest.raises(NotFoundError, match="no compile job has id j0"):
        await mill.service.requeue("j0")


async def test_a_library_that_is_away_loses_no_kernel(mill: Mill, spec: CompileSpec) -> None:
    mill.library.lookup_failure = UnavailableError("away")
    mill.library.upload_failures = [UnavailableError("away")] * 4
    job, _ = await mill.service.compile(spec, run_id="run-1", adaptation_id="a1", wait=True)
    assert (job.phase, job.deliveries) == (JobPhase.SUCCEEDED, 1)
    assert (mill.library.uploads, len(mill.pool.specs)) == (5, 1)
    assert await mill.store.outbox() == []
    await mill.announced("run-1")


async def test_a_kernel_waits_through_a_restart_for_the_library(mill: Mill, spec: CompileSpec) -> None:
    mill.library.upload_failures = [UnavailableError("away")] * 10_000
    job, _ = await mill.service.compile(spec, run_id="run-1", adaptation_id="a1")
    await mill.library.upload_attempted.wait()
    await mill.phase(job.job_id, JobPhase.PACKAGING)
    await mill.service.close()
    mill.library.upload_failures.clear()
    mill.pool.script = [CompilationError("must not be compiled again")]
    mill.pool = type(mill.pool)()
    mill.service = mill.make_service()
    await mill.service.start()
    await mill.service.warm()
    done = await mill.phase(job.job_id, JobPhase.SUCCEEDED)
    assert done.artifact_id in mill.library.kernels
    assert mill.pool.specs == []


async def test_a_kernel_the_library_refuses_fails_the_job(mill: Mill, spec: CompileSpec) -> None:
    mill.library.upload_failures = [CorruptDataError("signed by a stranger")]
    job, _ = await mill.service.compile(spec, run_id="run-1", adaptation_id="a1", wait=True)
    assert (job.phase, job.error, job.error_reason) == (JobPhase.FAILED, "signed by a stranger", "CORRUPT_DATA")
    assert await mill.store.outbox() == []


async def test_an_unfinished_job_is_taken_up_at_the_next_start(mill: Mill, spec: CompileSpec) -> None:
    mill.pool.gate.clear()
    job, _ = await mill.service.compile(spec)
    await mill.phase(job.job_id, JobPhase.COMPILING)
    await mill.service.close()
    await mill.bus.forget(COMPILE.name, "tezzeret")
    mill.pool = type(mill.pool)()
    mill.service = mill.make_service()
    await mill.service.start()
    await mill.service.warm()
    assert (await mill.phase(job.job_id, JobPhase.SUCCEEDED)).artifact_id in mill.library.kernels


async def test_a_worker_that_gives_another_kernel_is_not_signed(mill: Mill, spec: CompileSpec) -> None:
    """A worker that was taken over cannot have its own kernel signed under somebody's request."""

    async def other(_: CompileSpec) -> KernelArtifact:
        return await super(type(mill.pool), mill.pool).compile(replace(spec, random_seed=7))

    mill.pool.script = [other]
    job, _ = await mill.service.compile(spec, wait=True)
    assert (job.phase, job.error_reason) == (JobPhase.FAILED, "COMPILATION")
    assert "it differs in content_key" in job.error
    assert mill.library.uploads == 0


async def test_a_worker_that_gives_garbage_is_not_signed(mill: Mill, spec: CompileSpec) -> None:
    async def garbage(_: CompileSpec) -> KernelArtifact:
        return KernelArtifact(manifest=b"\xff", signature=b"", key_id="", ir=b"", weights=b"", binary=b"")

    mill.pool.script = [garbage]
    job, _ = await mill.service.compile(spec, wait=True)
    assert job.phase is JobPhase.FAILED
    assert "worker must give a sound kernel" in job.error


async def test_waiting_ends_before_the_deadline_with_the_job_as_it_stands(mill: Mill, spec: CompileSpec) -> None:
    mill.pool.gate.clear()
    with deadline_scope(0.6):
        job, _ = await mill.service.compile(spec, wait=True)
    assert job.phase in (JobPhase.QUEUED, JobPhase.COMPILING)
    mill.pool.gate.set()
    await mill.phase(job.job_id, JobPhase.SUCCEEDED)


async def test_watching_shows_every_change_and_ends(mill: Mill, spec: CompileSpec) -> None:
    mill.pool.gate.clear()
    job, _ = await mill.service.compile(spec)
    seen = []
    async with asyncio.timeout(20):
        async for change in mill.service.watch(job.job_id):
            seen.append(change.phase)
            mill.pool.gate.set()
    assert seen[-1] is JobPhase.SUCCEEDED
    assert seen == sorted(seen)
    assert seen[0] <= JobPhase.COMPILING


async def test_a_defect_costs_its_delivery_and_not_the_queue(mill: Mill, spec: CompileSpec) -> None:
    mill.config = replace(mill.config, ack_wait_s=0.2)
    await mill.service.close()
    mill.service = mill.make_service()
    mill.pool.script = [ZeroDivisionError("a defect")]
    await mill.service.start()
    await mill.service.warm()
    job, _ = await mill.service.compile(spec, wait=True)
    assert (job.phase, job.deliveries) == (JobPhase.SUCCEEDED, 2)


async def test_the_trace_of_the_asker_goes_on_in_the_queue(
    mill: Mill, spec: CompileSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracer = provider.get_tracer("test")
    monkeypatch.setattr(job_runner, "_TRACER", tracer)
    monkeypatch.setattr(phase_clock, "_TRACER", tracer)
    with tracer.start_as_current_span("decision") as asking:
        await mill.service.compile(spec, run_id="run-1", adaptation_id="a1", wait=True)
    spans = {span.name: span for span in exporter.get_finished_spans()}
    expected = {"tezzeret.compile", "tezzeret.compiling", "tezzeret.validating", "tezzeret.packaging"}
    assert set(spans) >= expected
    for name in expected:
        assert spans[name].context.trace_id == asking.get_span_context().trace_id
        assert (spans[name].attributes or {})["esper.adaptation_id"] == "a1"


async def test_what_is_no_job_on_the_queue_is_buried(mill: Mill, spec: CompileSpec) -> None:
    await mill.bus.publish("esper.v1.jobs.compile.cpu", b"\xff\xff", durable=True)
    job, _ = await mill.service.compile(spec, wait=True)
    assert job.phase is JobPhase.SUCCEEDED
    assert mill.bus.stats().dead_letters == 1


async def test_bad_requests_are_refused_before_any_work(mill: Mill, spec: CompileSpec) -> None:
    broken = BlueprintIR(nodes=(IRNode(name="a", op="nope", inputs=("h",)),), output="a")
    with pytest.raises(InvalidBlueprintError, match="node 'a' operator must be one of"):
        await mill.service.compile(replace(spec, ir=broken))
    with pytest.raises(InvalidInputError, match=r"spec.random_seed must be within \[0, 2\*\*63\), got -1"):
        await mill.service.compile(replace(spec, random_seed=-1))
    with pytest.raises(InvalidInputError, match="run_id must match"):
        await mill.service.compile(spec, run_id="Not a run")
    with pytest.raises(InvalidInputError, match="adaptation_id must be at most 128 characters"):
        await mill.service.compile(spec, adaptation_id="a" * 129)
    assert mill.pool.specs == []


async def test_a_blueprint_larger_than_a_kernel_may_be_is_refused(mill: Mill, spec: CompileSpec) -> None:
    mill.pool.config = replace(mill.pool.config, compiler=CompilerConfig(max_parameters=10))
    with pytest.raises(CapacityExceededError, match="at most 10 parameters, got"):
        await mill.service.compile(spec)

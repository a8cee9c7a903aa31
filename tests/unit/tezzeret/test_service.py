"""One job per distinct request, compiled once, kept until the library has it, announced to everyone who asked."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from sqlalchemy import text, update

from esper.blueprints.ir import canonical_bytes
from esper.contracts.blueprint import BlueprintIR, IRNode, Site, SiteKind
from esper.contracts.errors import (
    CapacityExceededError,
    CompilationError,
    CorruptDataError,
    EsperError,
    InvalidBlueprintError,
    InvalidInputError,
    NotFoundError,
    PermissionDeniedError,
    SignatureError,
    UnavailableError,
)
from esper.contracts.kernel import CompileSpec, CompileTarget, DeviceKind, JobPhase, KernelArtifact
from esper.contracts.wire import to_wire
from esper.execution.artifact import KernelContent, artifact_bytes, pack, verify
from esper.mesh import deadline_scope
from esper.services.tezzeret import job_runner, library, phase_clock
from esper.services.tezzeret.config import CompilerConfig
from esper.services.tezzeret.content_key import content_key
from esper.services.tezzeret.models import OutboxRow
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


async def test_a_kernel_the_library_found_damaged_and_removed_is_made_anew(mill: Mill, spec: CompileSpec) -> None:
    await mill.service.compile(spec, wait=True)

    def damaged(_: Any) -> None:
        mill.library.kernels.clear()
        raise CorruptDataError("what is said of it is damaged; the kernel was removed")

    mill.library.alter_answer = damaged
    again, cached = await mill.service.compile(spec, wait=True)
    assert (again.phase, cached, len(mill.pool.specs)) == (JobPhase.SUCCEEDED, False, 2)
    assert again.artifact_id in mill.library.kernels


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


async def test_a_full_store_is_never_the_blueprints_fault(mill: Mill, spec: CompileSpec) -> None:
    async with mill.database.session() as session:
        pages = await session.scalar(text("PRAGMA page_count"))
        await session.execute(text(f"PRAGMA max_page_count = {pages + 2}"))  # room for the job, none for its kernel
    job, _ = await mill.service.compile(spec, wait=True)
    assert (job.phase, job.deliveries, job.error_reason) == (JobPhase.DEAD, 3, "STORAGE_FULL")
    assert [dead.job_id for dead in await mill.service.dead_letters(10, None)] == [job.job_id]
    async with mill.database.session() as session:
        await session.execute(text(f"PRAGMA max_page_count = {pages + 10_000}"))
    await mill.service.requeue(job.job_id)
    assert (await mill.phase(job.job_id, JobPhase.SUCCEEDED)).artifact_id


async def test_a_failed_job_is_made_again_when_that_is_asked_for(mill: Mill, spec: CompileSpec) -> None:
    """Asking for the kernel again is not: the same blueprint would fail the same way."""
    mill.pool.script = [CompilationError("kernel must pass every check, failed latency: 300 > 250")]
    job, _ = await mill.service.compile(spec, run_id="run-1", adaptation_id="a1", wait=True)
    again, cached = await mill.service.compile(spec, wait=True)
    assert (again.phase, cached, len(mill.pool.specs)) == (JobPhase.FAILED, False, 1)
    await mill.announced("run-1")
    queued = await mill.service.requeue(job.job_id)
    assert (queued.phase, queued.error, queued.error_reason) == (JobPhase.QUEUED, "", "")
    done = await mill.phase(job.job_id, JobPhase.SUCCEEDED)
    assert [ready.artifact_id for ready in await mill.announced("run-1", 2)] == ["", done.artifact_id]


async def test_only_jobs_that_were_given_up_can_be_requeued(mill: Mill, spec: CompileSpec) -> None:
    job, _ = await mill.service.compile(spec, wait=True)
    with pytest.raises(NotFoundError, match="must be dead, failed or cancelled to be requeued, it is SUCCEEDED"):
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


async def test_bits_changed_on_the_way_to_the_library_cost_an_upload_each(mill: Mill, spec: CompileSpec) -> None:
    mill.library.flips_in_transit = 3
    job, _ = await mill.service.compile(spec, run_id="run-1", adaptation_id="a1", wait=True)
    assert (job.phase, job.error, mill.library.uploads, len(mill.pool.specs)) == (JobPhase.SUCCEEDED, "", 4, 1)
    verify(mill.library.kernels[job.artifact_id][1], mill.key.ring(), artifact_id=job.artifact_id)
    assert (await mill.announced("run-1"))[0].artifact_id == job.artifact_id


@pytest.mark.parametrize("refusal", [SignatureError("signed by a stranger"), PermissionDeniedError("not a compiler")])
async def test_a_kernel_the_library_refuses_again_and_again_is_dead_and_can_be_requeued(
    mill: Mill, spec: CompileSpec, refusal: EsperError
) -> None:
    mill.library.upload_failures = [refusal] * mill.config.max_refusals
    job, _ = await mill.service.compile(spec, run_id="run-1", adaptation_id="a1", wait=True)
    assert (job.phase, job.error, job.error_reason) == (JobPhase.DEAD, str(refusal), refusal.reason)
    assert mill.library.uploads == mill.config.max_refusals
    assert await mill.store.outbox() == []
    assert [dead.job_id for dead in await mill.service.dead_letters(10, None)] == [job.job_id]
    assert (await mill.announced("run-1"))[0].error == str(refusal)
    await mill.service.requeue(job.job_id)
    done = await mill.phase(job.job_id, JobPhase.SUCCEEDED)
    assert (await mill.announced("run-1", 2))[1].artifact_id == done.artifact_id
    assert len(mill.pool.specs) == 2


async def test_refusals_are_counted_through_a_restart(mill: Mill, spec: CompileSpec) -> None:
    mill.config = replace(mill.config, min_backoff_s=600.0, max_backoff_s=600.0)
    await mill.service.close()
    mill.library.upload_failures = [SignatureError("signed by a stranger")] * 99
    for attempt in range(mill.config.max_refusals):
        mill.library.upload_attempted.clear()
        mill.service = mill.make_service()
        await mill.service.start()
        await mill.service.warm()
        if attempt == 0:
            job, _ = await mill.service.compile(spec)
        await mill.library.upload_attempted.wait()
        if attempt < mill.config.max_refusals - 1:
            await mill.service.close()
            mill.pool = type(mill.pool)()
    await mill.phase(job.job_id, JobPhase.DEAD)
    assert mill.library.uploads == mill.config.max_refusals


async def test_a_kernel_damaged_while_it_waits_is_not_sent_and_is_made_anew_on_request(
    mill: Mill, spec: CompileSpec
) -> None:
    mill.library.upload_failures = [UnavailableError("away")] * 10_000
    job, _ = await mill.service.compile(spec)
    await mill.phase(job.job_id, JobPhase.PACKAGING)
    await mill.library.upload_attempted.wait()
    kept = await mill.store.artifact(job.job_id)
    async with mill.database.session() as session:
        changed = {"artifact": kept[:-40] + bytes([kept[-40] ^ 1]) + kept[-39:]}
        await session.execute(update(OutboxRow).values(changed))
    mill.library.upload_failures.clear()
    dead = await mill.phase(job.job_id, JobPhase.DEAD)
    assert dead.error.startswith("kernel was damaged in the store: part binary must match its digest")
    assert dead.error_reason == "CORRUPT_DATA"
    assert mill.library.kernels == {}
    await mill.service.requeue(job.job_id)
    assert (await mill.phase(job.job_id, JobPhase.SUCCEEDED)).artifact_id in mill.library.kernels


async def test_a_job_that_was_given_up_is_answered_by_a_kernel_that_the_library_got_since(
    mill: Mill, spec: CompileSpec
) -> None:
    other = type(mill)()
    await other.open()
    made, _ = await other.service.compile(spec, wait=True)
    await other.close()
    mill.library.upload_failures = [SignatureError("signed by a stranger")] * mill.config.max_refusals
    job, _ = await mill.service.compile(spec, wait=True)
    assert job.phase is JobPhase.DEAD
    mill.library.kernels = other.library.kernels
    found, cached = await mill.service.compile(spec, wait=True)
    assert (found.phase, found.artifact_id, found.error, cached) == (JobPhase.SUCCEEDED, made.artifact_id, "", True)


async def test_the_kernel_that_the_library_had_before_is_the_jobs(mill: Mill, spec: CompileSpec) -> None:
    """Another replica was faster with a kernel of other bytes for the same request."""
    mill.library.lookup_failure = UnavailableError("away")
    mill.library.upload_failures = [UnavailableError("away")] * 10_000
    job, _ = await mill.service.compile(spec)
    await mill.library.upload_attempted.wait()
    kept = verify(await mill.store.artifact(job.job_id), mill.key.ring())
    parts = {name: getattr(kept, name) for name in ("binary", "weights")}
    content = KernelContent(
        **{name: getattr(kept.manifest, name) for name in ("content_key", "site", "device", "cost", "checks")},
        **{**parts, "binary": b"other bytes"},
        target=kept.manifest.target,
        ir=canonical_bytes(kept.ir),
        compilation_time=kept.manifest.compilation_time,
    )
    data = artifact_bytes(pack(content, mill.key))
    manifest = verify(data, mill.key.ring()).manifest
    mill.library.kernels[manifest.artifact_id] = (manifest, data)
    mill.library.lookup_failure = None
    mill.library.upload_failures.clear()
    done = await mill.phase(job.job_id, JobPhase.SUCCEEDED)
    assert (done.artifact_id, done.size_bytes) == (manifest.artifact_id, len(data))
    assert done.artifact_id != kept.artifact_id


async def test_a_receipt_for_a_kernel_that_the_library_does_not_have_is_not_believed(
    mill: Mill, spec: CompileSpec
) -> None:
    lies = [2]

    def alter(receipt: Any) -> None:
        if lies[0] > 0:
            lies[0] -= 1
            receipt.artifact_id = "k" + "0" * 32

    mill.library.alter_receipt = alter
    job, _ = await mill.service.compile(spec, wait=True)
    assert (job.phase, mill.library.uploads) == (JobPhase.SUCCEEDED, 3)
    assert job.artifact_id in mill.library.kernels


def _set(path: str, value: Any) -> Any:
    def alter(answer: Any) -> None:
        *owners, name = path.split(".")
        for owner in owners:
            answer = answer.parts[int(owner)] if owner.isdigit() else getattr(answer, owner)
        if hasattr(value, "DESCRIPTOR"):
            getattr(answer, name).CopyFrom(value)
        else:
            setattr(answer, name, value)

    return alter


@pytest.mark.parametrize(
    ("alter", "differs"),
    [
        (_set("manifest.artifact_id", "k" + "0" * 32), "artifact_id"),
        (_set("manifest.content_key", "0" * 64), "content_key"),
        (_set("manifest.blueprint_id", "0" * 64), "blueprint_id"),
        (_set("manifest.2.sha256", bytes(32)), "artifact_id"),
        (_set("manifest.1.sha256", bytes(32)), "parts, artifact_id"),
        (_set("manifest.1.name", "other"), "parts, artifact_id"),
        (_set("manifest.device", 3), "device"),
        (_set("manifest.site", to_wire(Site(kind=SiteKind.LINEAR, input_shape=(9,), output_shape=(6,)))), "site"),
        (lambda answer: answer.manifest.ClearField("checks"), "checks"),
        (_set("size_bytes", 0), "size_bytes"),
        (lambda answer: answer.manifest.site.ClearField("kind"), "legal manifest"),
    ],
)
async def test_what_the_library_says_of_a_kernel_is_held_against_the_request(
    mill: Mill, spec: CompileSpec, caplog: pytest.LogCaptureFixture, alter: Any, differs: str
) -> None:
    job, _ = await mill.service.compile(spec, wait=True)
    mill.library.alter_answer = alter
    again, cached = await mill.service.compile(spec, wait=True)
    assert (again, cached) == (job, True)
    [refused] = [record.error for record in caplog.records if record.message == "library_not_believed"]
    assert differs in refused
    other = type(mill)()
    other.library.kernels, other.library.alter_answer = dict(mill.library.kernels), alter
    await other.open()
    other.pool.gate.clear()
    asked, cached = await other.service.compile(spec)
    assert (asked.phase in (JobPhase.QUEUED, JobPhase.COMPILING), asked.artifact_id, cached) == (True, "", False)
    await other.close()


async def test_a_kernel_that_went_to_the_library_from_here_is_known_in_its_answer(
    mill: Mill, spec: CompileSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, _ = await mill.service.compile(spec, wait=True)
    looked_through: list[str] = []
    honest = library.check_answer

    def noted(response: Any, spec: CompileSpec, key: str) -> Any:
        looked_through.append(key)
        return honest(response, spec, key)

    monkeypatch.setattr(library, "check_answer", noted)
    assert await mill.service.compile(spec, wait=True) == (job, True)
    assert looked_through == []
    mill.library.alter_answer = _set("size_bytes", job.size_bytes + 1)
    await mill.service.compile(spec, wait=True)
    assert looked_through == [job.content_key], "an answer that says anything else is looked through"
    mill.library.kernels.clear()
    again, cached = await mill.service.compile(spec, wait=True)
    assert (again.artifact_id in mill.library.kernels, cached) == (True, False), (
        "what is known is asked for all the same"
    )


async def test_a_kernel_is_known_only_if_it_answers_its_request(mill: Mill, spec: CompileSpec) -> None:
    job, _ = await mill.service.compile(spec, wait=True)
    manifest, data = mill.library.kernels[job.artifact_id]
    lookup = library.KernelLookup(None)
    assert lookup.learn(manifest, len(data), spec).artifact_id == job.artifact_id
    with pytest.raises(CorruptDataError, match="it differs in site"):
        lookup.learn(replace(manifest, site=replace(spec.site, input_shape=(9,))), len(data), spec)
    with pytest.raises(CorruptDataError, match="it differs in artifact_id"):
        lookup.learn(replace(manifest, content_key="0" * 64), len(data), spec)


async def test_an_upload_is_one_pass_of_the_outbox_and_old_jobs_go_now_and_then(mill: Mill, spec: CompileSpec) -> None:
    mill = type(mill)()
    mill.config = replace(mill.config, max_backoff_s=60.0)
    mill.service = mill.make_service()
    passes: list[str] = []
    for name in ("succeed", "outbox", "unannounced", "forget_ended"):
        _note_calls(mill.store, name, passes)
    await mill.open()
    await mill.service.compile(spec, run_id="run-1", adaptation_id="a1", wait=True)
    await mill.announced("run-1")
    await mill.service.compile(spec, run_id="run-2", adaptation_id="a2", wait=True)
    await mill.announced("run-2")
    await mill.close()
    assert passes[passes.index("succeed") :] == ["succeed", "unannounced", "outbox", "unannounced"]
    assert passes.count("forget_ended") == 1


def _note_calls(owner: Any, name: str, calls: list[str]) -> None:
    honest = getattr(owner, name)

    async def noted(*args: Any, **named: Any) -> Any:
        calls.append(name)
        return await honest(*args, **named)

    setattr(owner, name, noted)


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
    assert "must be what graph and seed give" in job.error
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

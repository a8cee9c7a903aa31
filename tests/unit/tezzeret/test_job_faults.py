"""What is lost is found, what is watched is shown whole, what is cancelled stops, and the urgent goes first."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from esper.blueprints.ir import content_id
from esper.contracts.errors import (
    CompilationError,
    CorruptDataError,
    InvalidInputError,
    InvalidStateError,
    NotFoundError,
    UnavailableError,
)
from esper.contracts.kernel import CompileJob, CompileSpec, JobPhase, JobPriority
from esper.contracts.wire import serialize
from esper.mesh.database import Database
from esper.services.tezzeret.config import TezzeretConfig
from esper.services.tezzeret.content_key import content_key, job_id_of
from esper.services.tezzeret.job_store import JobStore
from esper.services.tezzeret.phase_log import PhaseLog
from esper.telemetry import COMPILE

Mill = Any

WHOLE = [JobPhase.QUEUED, JobPhase.COMPILING, JobPhase.VALIDATING, JobPhase.PACKAGING, JobPhase.SUCCEEDED]


def job_of(spec: CompileSpec) -> CompileJob:
    key = content_key(spec)
    return CompileJob(
        job_id=job_id_of(key),
        content_key=key,
        blueprint_id=content_id(spec.ir),
        spec=spec,
        phase=JobPhase.QUEUED,
        created_at=datetime.now(UTC),
    )


async def restart(mill: Mill, **changes: Any) -> None:
    await mill.service.close()
    mill.config = replace(mill.config, **changes)
    mill.service = mill.make_service()
    await mill.service.start()
    await mill.service.warm()


async def watched(mill: Mill, job_id: str) -> list[tuple[JobPhase, int]]:
    async with asyncio.timeout(20):
        return [(job.phase, job.deliveries) async for job in mill.service.watch(job_id)]


def fresh(spec: CompileSpec, count: int) -> Iterator[CompileSpec]:
    return (replace(spec, random_seed=number) for number in range(100, 100 + count))


SWEPT = {"ack_wait_s": 0.3, "sweep_after_s": 0.6, "sweep_interval_s": 0.1}


async def test_a_job_whose_message_never_reached_the_queue_is_found(mill: Mill, spec: CompileSpec) -> None:
    """A service died between its store and the queue."""
    await restart(mill, **SWEPT)
    job, _ = await mill.store.add(job_of(spec), None)
    done = await mill.phase(job.job_id, JobPhase.SUCCEEDED)
    assert (done.deliveries, done.generation) == (1, 1)


async def test_a_job_whose_service_and_message_are_gone_is_found(mill: Mill, spec: CompileSpec) -> None:
    await restart(mill, **SWEPT)
    job, _ = await mill.store.add(job_of(spec), None)
    begun = await mill.store.attempts.begin(job.job_id, 0, max_deliver=3, lease_s=1.0)
    assert begun.attempt is not None
    done = await mill.phase(job.job_id, JobPhase.SUCCEEDED)
    assert done.deliveries == 2
    assert await mill.store.attempts.keep_artifact(begun.attempt, (), b"of the dead", {}) is None


async def test_a_lost_job_without_attempts_left_is_listed_as_dead(mill: Mill, spec: CompileSpec) -> None:
    await restart(mill, **SWEPT)
    job, _ = await mill.store.add(job_of(spec), None)
    for _ in range(3):
        await mill.store.attempts.begin(job.job_id, 0, max_deliver=3, lease_s=0.0)
    await mill.phase(job.job_id, JobPhase.DEAD)
    assert [dead.job_id for dead in await mill.service.dead_letters(10, None)] == [job.job_id]
    assert mill.pool.specs == []


async def test_a_job_that_waits_behind_others_is_not_lost(mill: Mill, spec: CompileSpec) -> None:
    await restart(mill, **SWEPT)
    mill.pool.gate.clear()
    jobs = [(await mill.service.compile(one))[0] for one in fresh(spec, 3)]
    gone, _ = await mill.store.add(replace(job_of(spec), priority=JobPriority.BULK), None)
    await asyncio.sleep(4 * mill.config.sweep_after_s)  # nothing happens, and that is what is looked for
    assert [(await mill.store.get(job.job_id)).generation for job in jobs] == [0, 0, 0]
    mill.pool.gate.set()
    for job in (*jobs, gone):
        assert (await mill.phase(job.job_id, JobPhase.SUCCEEDED)).deliveries == 1
    assert len(mill.pool.specs) == 4


async def test_a_store_that_is_full_for_longer_than_the_queue_delivers_loses_no_job(
    mill: Mill, spec: CompileSpec
) -> None:
    """Deliveries that reach no worker are no attempts, however many there are."""
    mill.pool.gate.clear()
    first, _ = await mill.service.compile(replace(spec, random_seed=1))
    await mill.phase(first.job_id, JobPhase.COMPILING)
    job, _ = await mill.service.compile(spec)
    mill.pool.script = [CompilationError("no matter")]
    async with mill.database.session() as session:
        pages = await session.scalar(text("PRAGMA page_count"))
        free = await session.scalar(text("PRAGMA freelist_count"))
        await session.execute(text("CREATE TABLE stuffing (x)"))
        await session.execute(text("INSERT INTO stuffing VALUES (zeroblob(200))"))
        await session.execute(text(f"PRAGMA max_page_count = {pages - free + 1}"))
        await session.execute(
            text(
                "CREATE TRIGGER full AFTER INSERT ON tezzeret_phases BEGIN "
                "INSERT INTO stuffing SELECT zeroblob(9000000); END"
            )
        )
    received = mill.bus.stats().received
    mill.pool.gate.set()
    async with asyncio.timeout(20):
        while mill.bus.stats().received < received + 8:  # noqa: ASYNC110 - the bus tells nobody
            await asyncio.sleep(0.02)
    async with mill.database.session() as session:
        await session.execute(text("PRAGMA max_page_count = 100000"))
        await session.execute(text("DROP TRIGGER full"))
    done = await mill.phase(job.job_id, JobPhase.SUCCEEDED)
    assert done.deliveries == 1


async def test_settings_that_would_sweep_what_is_alive_are_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"sweep_after_s must be > ack_wait_s \(30.0\), got 30.0"):
        TezzeretConfig(sweep_after_s=30.0)


async def test_watching_gives_every_phase_of_every_delivery_once(mill: Mill, spec: CompileSpec) -> None:
    mill.pool.script = [UnavailableError("compile worker was killed by SIGKILL")]
    mill.pool.gate.clear()
    job, _ = await mill.service.compile(spec)
    await mill.phase(job.job_id, JobPhase.COMPILING)
    early, late = (asyncio.create_task(watched(mill, job.job_id)) for _ in range(2))
    await asyncio.sleep(0)
    mill.pool.gate.set()
    first = [(JobPhase.QUEUED, 0), (JobPhase.COMPILING, 1)]
    second = [(JobPhase.QUEUED, 1), *((phase, 2) for phase in WHOLE[1:])]
    assert await early == await late == [*first, *second]
    assert await watched(mill, job.job_id) == second


async def test_a_watcher_in_another_replica_misses_no_phase(mill: Mill, spec: CompileSpec) -> None:
    """It looks seldom, and a job goes through its phases in between."""
    mill.pool.gate.clear()
    other = replace(mill.config, poll_interval_s=0.2)
    mill.config, kept = other, mill.service
    replica = mill.make_service()
    job, _ = await kept.compile(spec)
    watching = replica.watch(job.job_id)
    assert (await anext(watching)).phase is JobPhase.QUEUED
    mill.pool.gate.set()
    assert [JobPhase.QUEUED, *[one.phase async for one in watching]] == WHOLE


async def test_phases_are_written_in_the_order_in_which_they_began(mill: Mill, spec: CompileSpec) -> None:
    job, _ = await mill.store.add(job_of(spec), None)
    begun = await mill.store.attempts.begin(job.job_id, 0, max_deliver=3, lease_s=60.0)
    assert begun.attempt is not None
    told: list[CompileJob] = []
    phases = PhaseLog(mill.store.attempts, begun.attempt, told.append)
    for phase in (JobPhase.COMPILING, JobPhase.VALIDATING, JobPhase.VALIDATING, JobPhase.PACKAGING):
        phases.enter(phase)
    assert await phases.finish() == ()
    entered, _ = await mill.store.history(job.job_id, 0)
    assert [one.phase for one in entered] == WHOLE[:4]
    assert told[-1].phase is JobPhase.PACKAGING
    for lie in (JobPhase.COMPILING, JobPhase.SUCCEEDED, JobPhase.QUEUED):
        with pytest.raises(CorruptDataError, match=f"worker must go on from PACKAGING, it says {lie.name}"):
            phases.enter(lie)


async def test_phases_that_a_store_could_not_take_are_given_back(tmp_path: Path, spec: CompileSpec) -> None:
    async with Database.open(f"sqlite:///{tmp_path}/jobs.db", busy_timeout_ms=50) as database:
        store = JobStore(database)
        await store.open()
        job, _ = await store.add(job_of(spec), None)
        begun = await store.attempts.begin(job.job_id, 0, max_deliver=3, lease_s=60.0)
        assert begun.attempt is not None
        phases = PhaseLog(store.attempts, begun.attempt, lambda _: None)
        async with Database.open(f"sqlite:///{tmp_path}/jobs.db") as other, other.session():
            phases.enter(JobPhase.VALIDATING)
            assert await phases.finish() == (JobPhase.VALIDATING,)
        phases.enter(JobPhase.PACKAGING)
        assert await phases.finish() == ()
        assert [one.phase for one in (await store.history(job.job_id, 0))[0]] == WHOLE[:4]


async def test_a_job_cancelled_while_it_waits_never_starts(mill: Mill, spec: CompileSpec) -> None:
    mill.pool.gate.clear()
    first, second = [(await mill.service.compile(one, run_id="run-1"))[0] for one in fresh(spec, 2)]
    await mill.phase(first.job_id, JobPhase.COMPILING)
    cancelled = await mill.service.cancel(second.job_id)
    assert (cancelled.phase, cancelled.deliveries) == (JobPhase.CANCELLED, 0)
    assert await mill.service.cancel(second.job_id) == cancelled
    mill.pool.gate.set()
    third, _ = await mill.service.compile(spec, wait=True)
    assert third.phase is JobPhase.SUCCEEDED
    assert {one.random_seed for one in mill.pool.specs} == {first.spec.random_seed, third.spec.random_seed}
    told = {ready.job_id: ready.error for ready in await mill.announced("run-1", 2)}
    assert told == {first.job_id: None, second.job_id: "cancelled on request"}


async def test_a_job_cancelled_while_it_is_compiled_frees_its_worker_at_once(mill: Mill, spec: CompileSpec) -> None:
    mill.pool.gate.clear()
    job, _ = await mill.service.compile(spec)
    await mill.phase(job.job_id, JobPhase.COMPILING)
    cancelled = await mill.service.cancel(job.job_id)
    other, _ = await mill.service.compile(replace(spec, random_seed=1))
    await mill.phase(other.job_id, JobPhase.COMPILING)  # by the one worker there is, while the gate is shut
    mill.pool.gate.set()
    await mill.phase(other.job_id, JobPhase.SUCCEEDED)
    assert await mill.service.job(job.job_id) == cancelled
    assert (mill.library.uploads, len(mill.library.kernels)) == (1, 1)
    assert (await watched(mill, job.job_id))[-1] == (JobPhase.CANCELLED, 1)


async def test_a_job_cancelled_by_another_replica_is_dropped_by_the_one_that_compiles(
    mill: Mill, spec: CompileSpec
) -> None:
    await restart(mill, ack_wait_s=0.3)
    mill.pool.gate.clear()
    job, _ = await mill.service.compile(spec)
    await mill.phase(job.job_id, JobPhase.COMPILING)
    await mill.make_service().cancel(job.job_id)
    other, _ = await mill.service.compile(replace(spec, random_seed=1))
    await mill.phase(other.job_id, JobPhase.COMPILING)
    mill.pool.gate.set()
    await mill.phase(other.job_id, JobPhase.SUCCEEDED)
    assert (await mill.service.job(job.job_id)).phase is JobPhase.CANCELLED
    assert mill.library.uploads == 1


async def test_a_cancelled_job_is_made_for_who_asks_anew(mill: Mill, spec: CompileSpec) -> None:
    mill.library.upload_failures = [UnavailableError("away")] * 10_000
    job, _ = await mill.service.compile(spec)
    await mill.library.upload_attempted.wait()
    assert (await mill.service.cancel(job.job_id)).phase is JobPhase.CANCELLED
    assert await mill.store.outbox() == []
    mill.library.upload_failures.clear()
    again, cached = await mill.service.compile(spec, wait=True)
    assert (again.phase, again.job_id, cached, len(mill.pool.specs)) == (JobPhase.SUCCEEDED, job.job_id, False, 2)
    with pytest.raises(InvalidStateError, match="must not have ended to be cancelled, it is SUCCEEDED"):
        await mill.service.cancel(job.job_id)
    with pytest.raises(NotFoundError, match="no compile job has id j0"):
        await mill.service.cancel("j0")


async def ordered(mill: Mill, spec: CompileSpec, asked: str) -> str:
    """Ask for one job a letter while the one worker is busy; give the letters in the order in which they are taken."""
    letters = {"b": JobPriority.BULK, "n": JobPriority.NORMAL, "i": JobPriority.INTERACTIVE}
    mill.pool.gate.clear()
    busy, _ = await mill.service.compile(replace(spec, random_seed=99))
    await mill.phase(busy.job_id, JobPhase.COMPILING)
    mill.pool.script = [CompilationError("no matter")] * (len(asked) + 1)
    jobs = [
        (await mill.service.compile(one, priority=letters[letter]))[0]
        for letter, one in zip(asked, fresh(spec, len(asked)), strict=True)
    ]
    mill.pool.gate.set()
    for job in jobs:
        await mill.phase(job.job_id, JobPhase.FAILED)
    taken = [one.random_seed - 100 for one in mill.pool.specs[1:]]
    return "".join(asked[number] for number in taken)


async def test_of_a_full_queue_the_urgent_goes_first(mill: Mill, spec: CompileSpec) -> None:
    assert await ordered(mill, spec, "bbbbnnniiii") == "iiiinnnbbbb"


async def test_no_priority_waits_for_ever(mill: Mill, spec: CompileSpec) -> None:
    await restart(mill, max_passed_over=2)
    assert await ordered(mill, spec, "bbb" + 6 * "i") == "iibiibiib"


async def test_an_urgent_request_hurries_an_equal_one_that_waits(mill: Mill, spec: CompileSpec) -> None:
    mill.pool.gate.clear()
    busy, _ = await mill.service.compile(replace(spec, random_seed=1))
    await mill.phase(busy.job_id, JobPhase.COMPILING)
    bulk = [await mill.service.compile(one, priority=JobPriority.BULK) for one in fresh(spec, 3)]
    hurried, _ = await mill.service.compile(bulk[2][0].spec, run_id="run-1", adaptation_id="a1")
    assert (hurried.job_id, hurried.priority) == (bulk[2][0].job_id, JobPriority.INTERACTIVE)
    lowered, _ = await mill.service.compile(hurried.spec, priority=JobPriority.BULK)
    assert lowered.priority is JobPriority.INTERACTIVE
    mill.pool.gate.set()
    for job, _ in bulk:
        assert (await mill.phase(job.job_id, JobPhase.SUCCEEDED)).deliveries == 1
    assert [one.random_seed for one in mill.pool.specs] == [1, 102, 100, 101]


async def test_who_asks_decides_the_priority_that_nobody_gave(mill: Mill, spec: CompileSpec) -> None:
    mill.pool.gate.clear()
    alone, run = fresh(spec, 2)
    assert (await mill.service.compile(alone))[0].priority is JobPriority.NORMAL
    assert (await mill.service.compile(run, run_id="run-1"))[0].priority is JobPriority.INTERACTIVE
    mill.pool.gate.set()


async def test_a_message_of_before_there_were_priorities_is_worked_on(mill: Mill, spec: CompileSpec) -> None:
    job = job_of(spec)
    await mill.bus.publish("esper.v1.jobs.compile.cpu", serialize(job), msg_id=f"{job.job_id}.0", durable=True)
    assert (await mill.phase(job.job_id, JobPhase.SUCCEEDED)).deliveries == 1


async def test_the_queue_of_before_there_were_priorities_is_taken_over(mill: Mill, spec: CompileSpec) -> None:
    await mill.service.close()
    for name in ("tezzeret", "tezzeret-interactive", "tezzeret-bulk"):
        await mill.bus.forget(COMPILE.name, name)
    old = await mill.bus.consume(COMPILE.name, "tezzeret")
    await old.close()
    mill.pool = type(mill.pool)()
    mill.service = mill.make_service()
    await mill.service.start()
    await mill.service.warm()
    assert (await mill.service.compile(spec, run_id="run-1", wait=True))[0].phase is JobPhase.SUCCEEDED

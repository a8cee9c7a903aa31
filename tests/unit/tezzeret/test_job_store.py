"""Jobs at rest, on SQLite; ``tests/integration/test_tezzeret_postgres.py`` runs the same over PostgreSQL."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from esper.contracts.errors import InvalidStateError, NotFoundError
from esper.contracts.kernel import CompileJob, CompileSpec, JobPhase
from esper.mesh.database import Database
from esper.services.tezzeret.content_key import content_key, job_id_of
from esper.services.tezzeret.job_store import Asker, JobStore, place_of

ASKER = Asker(run_id="run-1", adaptation_id="a1")
START = datetime(2026, 1, 1, tzinfo=UTC)


def job_of(spec: CompileSpec, number: int = 0) -> CompileJob:
    numbered = replace(spec, random_seed=number)
    key = content_key(numbered)
    return CompileJob(
        job_id=job_id_of(key),
        content_key=key,
        blueprint_id="b" * 64,
        spec=numbered,
        phase=JobPhase.QUEUED,
        created_at=START + timedelta(microseconds=number // 2),
    )


@pytest.fixture
async def database() -> AsyncIterator[Database]:
    async with Database.open("sqlite://") as opened:
        yield opened


@pytest.fixture
async def store(database: Database) -> JobStore:
    made = JobStore(database)
    await made.open()
    await made.open()
    return made


async def test_the_first_of_equal_jobs_stays(store: JobStore, spec: CompileSpec) -> None:
    first, created = await store.add(job_of(spec), ASKER)
    later = replace(job_of(spec), adaptation_id="a2", created_at=START + timedelta(days=1))
    again, created_again = await store.add(later, Asker(run_id="run-2", adaptation_id="a2"))
    assert (created, created_again) == (True, False)
    assert again == first == await store.get(first.job_id) == await store.find(first.job_id)


async def test_an_unknown_job_is_named(store: JobStore) -> None:
    assert await store.find("j1") is None
    for call in (store.get("j1"), store.advance("j1", JobPhase.COMPILING), store.requeue("j1")):
        with pytest.raises(NotFoundError, match="no compile job has id j1"):
            await call


async def test_a_job_advances_until_it_has_ended(store: JobStore, spec: CompileSpec) -> None:
    job, _ = await store.add(job_of(spec), None)
    times = {"compiling": timedelta(milliseconds=5)}
    moved = await store.advance(job.job_id, JobPhase.COMPILING, deliveries=2, phase_times=times)
    assert (moved.phase, moved.deliveries, moved.phase_times, moved.finished_at) == (JobPhase.COMPILING, 2, times, None)
    failed = await store.advance(job.job_id, JobPhase.FAILED, error=("text", "COMPILATION"))
    assert (failed.error, failed.error_reason, failed.deliveries) == ("text", "COMPILATION", 2)
    assert failed.finished_at is not None
    assert await store.advance(job.job_id, JobPhase.COMPILING) == failed


async def test_a_kernel_is_kept_until_the_library_has_it(store: JobStore, spec: CompileSpec) -> None:
    job, _ = await store.add(job_of(spec), None)
    assert [each.job_id for each in await store.unfinished()] == [job.job_id]
    kept = await store.keep_artifact(job.job_id, b"kernel", {})
    await store.keep_artifact(job.job_id, b"a repeat", {})
    assert kept.phase is JobPhase.PACKAGING
    assert (await store.outbox(), await store.artifact(job.job_id)) == ([job.job_id], b"kernel")
    assert await store.has_artifact(job.job_id)
    assert await store.unfinished() == []
    done = await store.succeed(job.job_id, "k" + "0" * 32, 6)
    assert (done.phase, done.artifact_id, done.size_bytes) == (JobPhase.SUCCEEDED, "k" + "0" * 32, 6)
    assert (await store.outbox(), await store.artifact(job.job_id)) == ([], None)
    assert (await store.keep_artifact(job.job_id, b"late", {})).phase is JobPhase.SUCCEEDED
    assert await store.outbox() == []


async def test_a_kernel_that_is_refused_too_often_goes_and_its_job_is_dead(store: JobStore, spec: CompileSpec) -> None:
    job, _ = await store.add(job_of(spec), None)
    await store.keep_artifact(job.job_id, b"kernel", {})
    for _ in range(2):
        kept = await store.refuse_upload(job.job_id, ("refused", "SIGNATURE"), max_refusals=3)
        assert (kept.phase, kept.error, await store.outbox()) == (JobPhase.PACKAGING, "", [job.job_id])
    dead = await store.refuse_upload(job.job_id, ("refused", "SIGNATURE"), max_refusals=3)
    assert (dead.phase, dead.error, dead.error_reason) == (JobPhase.DEAD, "refused", "SIGNATURE")
    assert dead.finished_at is not None
    assert await store.outbox() == []


async def test_refusals_are_counted_anew_for_another_kernel(store: JobStore, spec: CompileSpec) -> None:
    job, _ = await store.add(job_of(spec), None)
    for _ in range(2):
        await store.keep_artifact(job.job_id, b"kernel", {})
        assert (await store.refuse_upload(job.job_id, ("", ""), max_refusals=2)).phase is JobPhase.PACKAGING
        assert (await store.refuse_upload(job.job_id, ("", ""), max_refusals=2)).phase is JobPhase.DEAD
        await store.requeue(job.job_id)


async def test_a_late_refusal_changes_nothing(store: JobStore, spec: CompileSpec) -> None:
    """A replica was told that its upload was damaged after another one had got through."""
    job, _ = await store.add(job_of(spec), None)
    await store.keep_artifact(job.job_id, b"kernel", {})
    await store.refuse_upload(job.job_id, ("refused", "CORRUPT_DATA"), max_refusals=9)
    done = await store.succeed(job.job_id, "k" + "0" * 32, 6)
    assert await store.refuse_upload(job.job_id, ("refused", "CORRUPT_DATA"), max_refusals=1) == done
    assert await store.forget_ended(done.created_at + timedelta(days=1)) == 1


async def test_a_job_that_the_queue_buried_stays_dead_when_its_kernel_is_refused(
    store: JobStore, spec: CompileSpec
) -> None:
    job, _ = await store.add(job_of(spec), None)
    await store.keep_artifact(job.job_id, b"kernel", {})
    dead = await store.advance(job.job_id, JobPhase.DEAD, error=("given up by the queue", "UNAVAILABLE"))
    assert await store.refuse_upload(job.job_id, ("refused", "CORRUPT_DATA"), max_refusals=1) == dead
    assert await store.outbox() == []


@pytest.mark.parametrize("phase", [JobPhase.DEAD, JobPhase.FAILED])
async def test_a_job_that_was_given_up_is_requeued(store: JobStore, spec: CompileSpec, phase: JobPhase) -> None:
    job, _ = await store.add(job_of(spec), None)
    with pytest.raises(InvalidStateError, match="must have ended to be requeued, it is QUEUED"):
        await store.requeue(job.job_id, given_up_only=False)
    await store.advance(job.job_id, phase, deliveries=3, error=("killed", "UNAVAILABLE"))
    again, generation = await store.requeue(job.job_id)
    assert (again.phase, again.deliveries, again.error, generation) == (JobPhase.QUEUED, 0, "", 1)
    assert await store.generation(job.job_id) == 1


async def test_a_job_that_succeeded_is_requeued_only_where_that_is_said(store: JobStore, spec: CompileSpec) -> None:
    job, _ = await store.add(job_of(spec), None)
    await store.succeed(job.job_id, "k" + "0" * 32, 6)
    with pytest.raises(NotFoundError, match="must be dead or failed to be requeued, it is SUCCEEDED"):
        await store.requeue(job.job_id)
    again, _ = await store.requeue(job.job_id, given_up_only=False)
    assert (again.phase, again.artifact_id, again.size_bytes) == (JobPhase.QUEUED, "", 0)


async def test_each_asker_is_told_once_of_each_end(store: JobStore, spec: CompileSpec) -> None:
    job, _ = await store.add(job_of(spec), ASKER)
    other = Asker(run_id="run-2", adaptation_id="")
    for asker in (ASKER, other, other):
        await store.add(job_of(spec), asker)
    assert await store.unannounced() == []
    await store.succeed(job.job_id, "k" + "0" * 32, 6)
    waiting = await store.unannounced()
    assert {asker.run_id for _, asker in waiting} == {"run-1", "run-2"}
    await store.mark_announced(job.job_id, ASKER)
    assert [asker for _, asker in await store.unannounced()] == [other]
    await store.requeue(job.job_id, given_up_only=False)
    await store.succeed(job.job_id, "k" + "0" * 32, 6)
    assert len(await store.unannounced()) == 2


async def test_old_jobs_that_have_ended_are_forgotten(store: JobStore, spec: CompileSpec) -> None:
    """Not one that runs, is dead (an operator may want it), has an asker in wait, or is young."""
    ended, running, dead, asked, young = [
        (await store.add(job_of(spec, 2 * number), ASKER if number == 3 else None))[0] for number in range(5)
    ]
    for job in (ended, asked, young):
        await store.succeed(job.job_id, "k" + "0" * 32, 6)
    await store.advance(dead.job_id, JobPhase.DEAD)
    assert await store.forget_ended(young.created_at) == 1
    assert await store.find(ended.job_id) is None
    for job in (running, dead, asked, young):
        assert await store.find(job.job_id) is not None
    await store.mark_announced(asked.job_id, ASKER)
    assert await store.forget_ended(young.created_at) == 1


async def test_pages_meet_without_gap_or_repeat(store: JobStore, spec: CompileSpec) -> None:
    """Pairs share a moment, so the id decides among them."""
    jobs = [(await store.add(job_of(spec, number), None))[0] for number in range(7)]
    await store.advance(jobs[3].job_id, JobPhase.DEAD)
    for oldest_first in (False, True):
        found: list[CompileJob] = []
        after = None
        while page := await store.page([], 2, after, oldest_first=oldest_first):
            found += page
            after = place_of(page[-1])
        places = [place_of(job) for job in found]
        assert places == sorted(places, reverse=not oldest_first)
        assert len(found) == 7
    assert [job.job_id for job in await store.page([JobPhase.DEAD], 9, None)] == [jobs[3].job_id]

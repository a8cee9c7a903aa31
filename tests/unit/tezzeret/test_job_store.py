"""Jobs at rest, on SQLite; ``tests/integration/test_tezzeret_postgres.py`` runs the same over PostgreSQL."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import delete

from esper.contracts.errors import InvalidInputError, InvalidStateError, NotFoundError
from esper.contracts.kernel import CompileJob, CompileSpec, JobPhase, JobPriority
from esper.mesh.database import Database
from esper.services.tezzeret.attempt_store import Attempt
from esper.services.tezzeret.content_key import content_key, job_id_of
from esper.services.tezzeret.job_store import Asker, JobStore, place_of
from esper.services.tezzeret.models import PhaseRow, WorkRow

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


async def begun(store: JobStore, job_id: str, *, generation: int = 0, lease_s: float = 60.0) -> Attempt:
    found = await store.attempts.begin(job_id, generation, max_deliver=3, lease_s=lease_s)
    assert found.attempt is not None
    return found.attempt


async def keep(store: JobStore, job_id: str, artifact: bytes = b"kernel", *, generation: int = 0) -> CompileJob:
    attempt = await begun(store, job_id, generation=generation)
    kept = await store.attempts.keep_artifact(attempt, (), artifact, {})
    assert kept is not None
    return kept


async def phases(store: JobStore, job_id: str, after: int = 0) -> list[tuple[JobPhase, int]]:
    entered, _ = await store.history(job_id, after)
    return [(job.phase, job.deliveries) for job in entered]


async def die(store: JobStore, job_id: str, phase: JobPhase = JobPhase.DEAD) -> CompileJob:
    dead = await store.attempts.end(await begun(store, job_id), phase, ("killed", "UNAVAILABLE"), {})
    assert dead is not None
    return dead


async def test_an_unknown_job_is_named(store: JobStore) -> None:
    assert await store.find("j1") is None
    begin = store.attempts.begin("j1", 0, max_deliver=3, lease_s=1.0)
    for call in (store.get("j1"), begin, store.requeue("j1", 0), store.cancel("j1", "why"), store.history("j1", 0)):
        with pytest.raises(NotFoundError, match="no compile job has id j1"):
            await call


async def test_an_attempt_goes_through_its_phases_in_order(store: JobStore, spec: CompileSpec) -> None:
    job, _ = await store.add(job_of(spec), None)
    attempt = await begun(store, job.job_id)
    for backwards in ([JobPhase.COMPILING], [JobPhase.PACKAGING, JobPhase.VALIDATING]):
        with pytest.raises(InvalidStateError, match="phases must come after COMPILING and each other, got"):
            await store.attempts.advance(attempt, backwards)
    for foreign in (JobPhase.SUCCEEDED, JobPhase.QUEUED):
        with pytest.raises(InvalidInputError, match="phase must be one that a worker goes through"):
            await store.attempts.advance(attempt, [foreign])
    assert await store.get(job.job_id) == replace(job, phase=JobPhase.COMPILING, deliveries=1)
    moved = await store.attempts.advance(attempt, [JobPhase.VALIDATING, JobPhase.PACKAGING])
    assert moved == replace(job, phase=JobPhase.PACKAGING, deliveries=1)
    with pytest.raises(InvalidStateError, match="phases must come after PACKAGING"):
        await store.attempts.advance(attempt, [JobPhase.VALIDATING])
    names = [phase.name for phase, _ in await phases(store, job.job_id)]
    assert names == ["QUEUED", "COMPILING", "VALIDATING", "PACKAGING"]


async def test_an_attempt_that_ends_is_the_last_word(store: JobStore, spec: CompileSpec) -> None:
    job, _ = await store.add(job_of(spec), None)
    attempt = await begun(store, job.job_id)
    times = {"compiling": timedelta(milliseconds=5)}
    failed = await store.attempts.end(attempt, JobPhase.FAILED, ("text", "COMPILATION"), times)
    assert failed is not None
    assert (failed.error, failed.error_reason, failed.deliveries) == ("text", "COMPILATION", 1)
    assert (failed.phase_times, failed.phase) == (times, JobPhase.FAILED)
    assert failed.finished_at is not None
    assert await store.attempts.advance(attempt, [JobPhase.VALIDATING]) is None
    assert await store.attempts.keep_artifact(attempt, (), b"late", {}) is None
    assert await store.attempts.end(attempt, JobPhase.QUEUED, ("", ""), {}) is None
    assert not await store.attempts.touch(attempt)
    assert await store.get(job.job_id) == failed


async def test_an_attempt_that_fell_silent_is_overtaken_and_changes_nothing(store: JobStore, spec: CompileSpec) -> None:
    job, _ = await store.add(job_of(spec), None)
    silent = await begun(store, job.job_id)
    busy = await store.attempts.begin(job.job_id, 0, max_deliver=3, lease_s=60.0)
    assert (busy.attempt, busy.busy) == (None, True)
    newer = await begun(store, job.job_id, lease_s=0.0)
    assert (silent.number, newer.number) == (1, 2)
    assert await store.attempts.advance(silent, [JobPhase.PACKAGING]) is None
    assert await store.attempts.keep_artifact(silent, (), b"kernel", {}) is None
    assert not await store.attempts.touch(silent)
    assert await store.attempts.touch(newer)
    assert await store.outbox() == []
    assert await phases(store, job.job_id) == [(JobPhase.QUEUED, 1), (JobPhase.COMPILING, 2)]


async def test_a_job_that_is_attempted_too_often_without_a_word_is_dead(store: JobStore, spec: CompileSpec) -> None:
    job, _ = await store.add(job_of(spec), None)
    for _ in range(3):
        await begun(store, job.job_id, lease_s=0.0)
    found = await store.attempts.begin(job.job_id, 0, max_deliver=3, lease_s=0.0)
    assert (found.attempt, found.busy, found.job.phase) == (None, False, JobPhase.DEAD)
    assert found.job.error == "given up after 3 deliveries, none of which could say how it ended"


async def test_a_message_of_an_earlier_generation_is_void(store: JobStore, spec: CompileSpec) -> None:
    job, _ = await store.add(job_of(spec), None)
    await die(store, job.job_id)
    await store.requeue(job.job_id, 0)
    stale = await store.attempts.begin(job.job_id, 0, max_deliver=3, lease_s=0.0)
    assert (stale.attempt, stale.busy, stale.job.phase) == (None, False, JobPhase.QUEUED)
    await begun(store, job.job_id, generation=1)


async def test_a_kernel_is_kept_until_the_library_has_it(store: JobStore, spec: CompileSpec) -> None:
    job, _ = await store.add(job_of(spec), None)
    assert [each.job_id for each in await store.unfinished()] == [job.job_id]
    attempt = await begun(store, job.job_id)
    unwritten = (JobPhase.VALIDATING, JobPhase.PACKAGING)
    kept = await store.attempts.keep_artifact(attempt, unwritten, b"kernel", {})
    assert kept is not None
    assert kept.phase is JobPhase.PACKAGING
    assert [phase for phase, _ in await phases(store, job.job_id)] == [
        JobPhase.QUEUED,
        JobPhase.COMPILING,
        JobPhase.VALIDATING,
        JobPhase.PACKAGING,
    ]
    assert await store.attempts.keep_artifact(attempt, (), b"a repeat", {}) is None
    assert (await store.attempts.begin(job.job_id, 0, max_deliver=3, lease_s=0.0)).attempt is None
    assert (await store.outbox(), await store.artifact(job.job_id)) == ([job.job_id], b"kernel")
    assert await store.unfinished() == []
    done = await store.succeed(job.job_id, "k" + "0" * 32, 6, kept_only=True)
    assert (done.phase, done.artifact_id, done.size_bytes) == (JobPhase.SUCCEEDED, "k" + "0" * 32, 6)
    assert (await store.outbox(), await store.artifact(job.job_id)) == ([], None)


async def test_history_begins_where_the_job_was_queued_and_goes_on_from_a_place(
    store: JobStore, spec: CompileSpec
) -> None:
    job, _ = await store.add(job_of(spec), None)
    for _ in range(2):
        attempt = await begun(store, job.job_id)
        await store.attempts.end(attempt, JobPhase.QUEUED, ("killed", "UNAVAILABLE"), {})
    entered, place = await store.history(job.job_id, 0)
    assert [(one.phase, one.deliveries) for one in entered] == [(JobPhase.QUEUED, 2)]
    attempt = await begun(store, job.job_id)
    await store.attempts.end(attempt, JobPhase.DEAD, ("killed", "UNAVAILABLE"), {})
    later, end = await store.history(job.job_id, place)
    assert [(one.phase, one.deliveries, one.error) for one in later] == [
        (JobPhase.COMPILING, 3, ""),
        (JobPhase.DEAD, 3, "killed"),
    ]
    assert later[-1] == await store.get(job.job_id)
    assert await store.history(job.job_id, end) == ([], end)


async def test_a_long_history_loses_its_oldest_phases_alone(store: JobStore, spec: CompileSpec) -> None:
    job, _ = await store.add(job_of(spec), None)
    for generation in range(30):
        await store.cancel(job.job_id, "cancelled on request")
        await store.requeue(job.job_id, generation)
        await begun(store, job.job_id, generation=generation + 1)
    entered, place = await store.history(job.job_id, 0)
    assert ([one.phase for one in entered], place) == ([JobPhase.QUEUED, JobPhase.COMPILING], 91)
    assert len((await store.history(job.job_id, 1))[0]) == 64


async def test_a_cancelled_job_stays_so_until_it_is_requeued(store: JobStore, spec: CompileSpec) -> None:
    job, _ = await store.add(job_of(spec), ASKER)
    attempt = await begun(store, job.job_id)
    cancelled = await store.cancel(job.job_id, "cancelled on request")
    assert (cancelled.phase, cancelled.error) == (JobPhase.CANCELLED, "cancelled on request")
    assert await store.cancel(job.job_id, "again") == cancelled
    assert await store.attempts.keep_artifact(attempt, (), b"kernel", {}) is None
    assert [asker for _, asker in await store.unannounced()] == [ASKER]
    again = await store.requeue(job.job_id, 0)
    assert (again.phase, again.error, again.deliveries, again.generation) == (JobPhase.QUEUED, "", 0, 1)


async def test_a_kernel_on_its_way_is_dropped_with_its_cancelled_job(store: JobStore, spec: CompileSpec) -> None:
    job, _ = await store.add(job_of(spec), None)
    await keep(store, job.job_id)
    cancelled = await store.cancel(job.job_id, "cancelled on request")
    assert await store.outbox() == []
    assert await store.succeed(job.job_id, "k" + "0" * 32, 6, kept_only=True) == cancelled


@pytest.mark.parametrize("phase", [JobPhase.DEAD, JobPhase.FAILED, JobPhase.SUCCEEDED])
async def test_a_job_that_has_ended_cannot_be_cancelled(store: JobStore, spec: CompileSpec, phase: JobPhase) -> None:
    job, _ = await store.add(job_of(spec), None)
    if phase is JobPhase.SUCCEEDED:
        await store.succeed(job.job_id, "k" + "0" * 32, 6)
    else:
        await die(store, job.job_id, phase)
    with pytest.raises(InvalidStateError, match=f"must not have ended to be cancelled, it is {phase.name}"):
        await store.cancel(job.job_id, "why")


async def test_priority_is_raised_while_a_job_waits_and_never_lowered(store: JobStore, spec: CompileSpec) -> None:
    job, _ = await store.add(replace(job_of(spec), priority=JobPriority.BULK), None)
    assert await store.hurry(job.job_id, JobPriority.BULK) is None
    raised = await store.hurry(job.job_id, JobPriority.INTERACTIVE)
    assert raised == replace(job, priority=JobPriority.INTERACTIVE, generation=1)
    assert await store.hurry(job.job_id, JobPriority.NORMAL) is None
    await begun(store, job.job_id, generation=1)
    assert (await store.get(job.job_id)).priority is JobPriority.INTERACTIVE
    older, _ = await store.add(job_of(spec, 1), None)
    assert older.priority is None
    assert await store.hurry(older.job_id, JobPriority.NORMAL) is None


FAR_US = 2**62


async def test_a_job_that_is_worked_on_is_lost_once_nobody_gives_a_sign(store: JobStore, spec: CompileSpec) -> None:
    job, _ = await store.add(job_of(spec), None)
    attempt = await begun(store, job.job_id)
    assert await store.attempts.lost({}, 0, 10) == []
    assert await store.attempts.put_again(job.job_id, 0, max_deliver=3) is None
    assert await store.attempts.lost({}, FAR_US, 10) == [job.job_id]
    again = await store.attempts.put_again(job.job_id, FAR_US, max_deliver=3)
    assert again == replace(job, deliveries=1, generation=1)
    assert await store.attempts.keep_artifact(attempt, (), b"kernel", {}) is None
    assert (await begun(store, job.job_id, generation=1)).number == 2


async def test_a_job_that_waits_is_lost_once_its_lane_has_passed_it(store: JobStore, spec: CompileSpec) -> None:
    job, _ = await store.add(job_of(spec), None)
    assert await store.attempts.lost({"cpu": 0, "cpu-bulk": FAR_US}, FAR_US, 10) == []
    assert await store.attempts.lost({"cpu": FAR_US}, 0, 10) == []
    assert await store.attempts.lost({"cpu": FAR_US}, FAR_US, 10) == [job.job_id]


async def test_what_has_ended_or_is_on_its_way_to_the_library_is_not_lost(store: JobStore, spec: CompileSpec) -> None:
    ended, kept = [(await store.add(job_of(spec, number), None))[0] for number in range(2)]
    await store.succeed(ended.job_id, "k" + "0" * 32, 6)
    await keep(store, kept.job_id)
    assert await store.attempts.lost({"cpu": FAR_US}, FAR_US, 10) == []
    for job in (ended, kept):
        assert await store.attempts.put_again(job.job_id, FAR_US, max_deliver=1) is None


async def test_a_lost_job_without_attempts_left_is_dead(store: JobStore, spec: CompileSpec) -> None:
    job, _ = await store.add(job_of(spec), None)
    for _ in range(3):
        await begun(store, job.job_id, lease_s=0.0)
    found = await store.attempts.put_again(job.job_id, FAR_US, max_deliver=3)
    assert found is not None
    assert (found.phase, found.generation) == (JobPhase.DEAD, 0)
    assert [dead.job_id for dead in await store.page([JobPhase.DEAD], 9, None)] == [job.job_id]


async def test_a_job_of_an_older_store_is_swept_and_watched(
    store: JobStore, database: Database, spec: CompileSpec
) -> None:
    job, _ = await store.add(job_of(spec), None)
    async with database.session() as session:
        await session.execute(delete(WorkRow))
        await session.execute(delete(PhaseRow))
    assert await store.history(job.job_id, 0) == ([job], 0)
    assert await store.attempts.lost({}, 0, 10) == [job.job_id]
    await store.attempts.put_again(job.job_id, 0, max_deliver=3)
    assert await store.attempts.lost({}, 0, 10) == []


async def test_a_kernel_that_is_refused_too_often_goes_and_its_job_is_dead(store: JobStore, spec: CompileSpec) -> None:
    job, _ = await store.add(job_of(spec), None)
    await keep(store, job.job_id)
    for _ in range(2):
        kept = await store.refuse_upload(job.job_id, ("refused", "SIGNATURE"), max_refusals=3)
        assert (kept.phase, kept.error, await store.outbox()) == (JobPhase.PACKAGING, "", [job.job_id])
    dead = await store.refuse_upload(job.job_id, ("refused", "SIGNATURE"), max_refusals=3)
    assert (dead.phase, dead.error, dead.error_reason) == (JobPhase.DEAD, "refused", "SIGNATURE")
    assert dead.finished_at is not None
    assert await store.outbox() == []


async def test_refusals_are_counted_anew_for_another_kernel(store: JobStore, spec: CompileSpec) -> None:
    job, _ = await store.add(job_of(spec), None)
    for generation in range(2):
        await keep(store, job.job_id, generation=generation)
        assert (await store.refuse_upload(job.job_id, ("", ""), max_refusals=2)).phase is JobPhase.PACKAGING
        assert (await store.refuse_upload(job.job_id, ("", ""), max_refusals=2)).phase is JobPhase.DEAD
        await store.requeue(job.job_id, generation)


async def test_a_late_refusal_changes_nothing(store: JobStore, spec: CompileSpec) -> None:
    """A replica was told that its upload was damaged after another one had got through."""
    job, _ = await store.add(job_of(spec), None)
    await keep(store, job.job_id)
    await store.refuse_upload(job.job_id, ("refused", "CORRUPT_DATA"), max_refusals=9)
    done = await store.succeed(job.job_id, "k" + "0" * 32, 6)
    assert await store.refuse_upload(job.job_id, ("refused", "CORRUPT_DATA"), max_refusals=1) == done
    assert await store.forget_ended(done.created_at + timedelta(days=1)) == 1


async def test_a_job_that_the_queue_buried_stays_dead_when_its_kernel_is_refused(
    store: JobStore, spec: CompileSpec
) -> None:
    job, _ = await store.add(job_of(spec), None)
    await keep(store, job.job_id)
    dead = await store.attempts.bury(job.job_id, 0, ("given up by the queue", "UNAVAILABLE"))
    assert dead.phase is JobPhase.DEAD
    assert await store.attempts.bury(job.job_id, 0, ("again", "UNAVAILABLE")) == dead
    assert await store.refuse_upload(job.job_id, ("refused", "CORRUPT_DATA"), max_refusals=1) == dead
    assert await store.outbox() == []


@pytest.mark.parametrize("phase", [JobPhase.DEAD, JobPhase.FAILED])
async def test_a_job_that_was_given_up_is_requeued(store: JobStore, spec: CompileSpec, phase: JobPhase) -> None:
    job, _ = await store.add(job_of(spec), None)
    with pytest.raises(InvalidStateError, match="must have ended to be requeued, it is QUEUED"):
        await store.requeue(job.job_id, 0, given_up_only=False)
    await die(store, job.job_id, phase)
    again = await store.requeue(job.job_id, 0)
    assert (again.phase, again.deliveries, again.error, again.generation) == (JobPhase.QUEUED, 0, "", 1)
    assert await store.get(job.job_id) == again


async def test_of_callers_that_requeue_one_end_at_once_one_starts_the_job(store: JobStore, spec: CompileSpec) -> None:
    job, _ = await store.add(job_of(spec), None)
    dead = await die(store, job.job_id)
    calls = (store.requeue(job.job_id, dead.generation) for _ in range(4))
    found = await asyncio.gather(*calls, return_exceptions=True)
    [again] = [one for one in found if isinstance(one, CompileJob)]
    assert again == await store.get(job.job_id)
    assert again.generation == 1
    losers = [one for one in found if one is not again]
    assert {type(one) for one in losers} == {InvalidStateError}
    rule = f"job {job.job_id} must be of generation 0 to be requeued, it is QUEUED of generation 1"
    assert {str(one) for one in losers} == {f"{rule}: somebody else has put it back"}


@pytest.mark.parametrize("given_up_only", [True, False])
async def test_an_end_that_another_has_renewed_is_not_started_again(
    store: JobStore, spec: CompileSpec, given_up_only: bool
) -> None:
    """The caller is late: the job was put back, worked on and given up once more since it looked."""
    job, _ = await store.add(job_of(spec), None)
    seen = await die(store, job.job_id)
    await store.requeue(job.job_id, seen.generation)
    ended = await store.attempts.end(await begun(store, job.job_id, generation=1), JobPhase.DEAD, ("", ""), {})
    with pytest.raises(InvalidStateError, match="must be of generation 0 to be requeued, it is DEAD of generation 1"):
        await store.requeue(job.job_id, seen.generation, given_up_only=given_up_only)
    assert await store.get(job.job_id) == ended
    assert (await store.requeue(job.job_id, 1, given_up_only=given_up_only)).generation == 2


async def test_a_job_that_succeeded_is_requeued_only_where_that_is_said(store: JobStore, spec: CompileSpec) -> None:
    job, _ = await store.add(job_of(spec), None)
    await store.succeed(job.job_id, "k" + "0" * 32, 6)
    with pytest.raises(NotFoundError, match="must be dead, failed or cancelled to be requeued, it is SUCCEEDED"):
        await store.requeue(job.job_id, 0)
    again = await store.requeue(job.job_id, 0, given_up_only=False)
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
    await store.requeue(job.job_id, 0, given_up_only=False)
    await store.succeed(job.job_id, "k" + "0" * 32, 6)
    assert len(await store.unannounced()) == 2


async def test_old_jobs_that_have_ended_are_forgotten(store: JobStore, spec: CompileSpec) -> None:
    """Not one that runs, is dead (an operator may want it), has an asker in wait, or is young."""
    ended, running, dead, asked, young = [
        (await store.add(job_of(spec, 2 * number), ASKER if number == 3 else None))[0] for number in range(5)
    ]
    for job in (ended, asked, young):
        await store.succeed(job.job_id, "k" + "0" * 32, 6)
    await die(store, dead.job_id)
    assert await store.forget_ended(young.created_at) == 1
    assert await store.find(ended.job_id) is None
    for job in (running, dead, asked, young):
        assert await store.find(job.job_id) is not None
    await store.mark_announced(asked.job_id, ASKER)
    assert await store.forget_ended(young.created_at) == 1


async def test_pages_meet_without_gap_or_repeat(store: JobStore, spec: CompileSpec) -> None:
    """Pairs share a moment, so the id decides among them."""
    jobs = [(await store.add(job_of(spec, number), None))[0] for number in range(7)]
    await die(store, jobs[3].job_id)
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

"""The compile plane at its full size: a thousand blueprints from twenty clients, and workers killed amid them.

Every kernel is compiled once, and once more for each time that its own worker was killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from sqlalchemy import func, select

from esper.blueprints.text import parse_text
from esper.client import AsyncEsperClient
from esper.contracts.blueprint import BlueprintIR
from esper.contracts.kernel import ENDED_PHASES, CompileJob, CompileSpec, JobPhase
from esper.mesh.settings import MeshSettings
from esper.services.tezzeret.models import JobRow
from tests.chaos.compile_processes import AWAY, QUICK, SITE, TICK_S, Plane

pytestmark = [pytest.mark.chaos, pytest.mark.slow, pytest.mark.timeout(900)]

NUM_BLUEPRINTS = 1_000
NUM_CLIENTS = 20
NUM_WORKERS = 2
KILLED_AT = (100, 250, 400, 600, 800)
"""Jobs done by which every worker is killed."""
PATIENT = replace(QUICK, ack_wait_s=30.0, sweep_after_s=60.0)
"""A job goes to another because its worker died, and not because this machine is slow."""
LIMIT_S = 600.0
IN_HAND = (JobPhase.COMPILING, JobPhase.VALIDATING)
NUM_LOOKS = 20


def blueprint(number: int) -> BlueprintIR:
    """Give a small graph, another one for every number."""
    gain, width = divmod(number, 50)
    return parse_text(f"""blueprint 1
        down = linear(h, features={4 + width})
        act = activation(down, fn=tanh)
        eased = scale(act, value={1 + gain / 64})
        up = linear(eased, init=zero)
        return up
    """)


async def test_each_of_a_thousand_kernels_is_compiled_once_but_for_workers_that_were_killed(tmp_path: Path) -> None:
    asked = [CompileSpec(ir=blueprint(number), site=SITE) for number in range(NUM_BLUEPRINTS)]
    killed: Counter[str] = Counter()
    async with Plane(tmp_path, config=PATIENT, num_workers=NUM_WORKERS) as plane:
        async with asyncio.TaskGroup() as group:
            asking = group.create_task(_ask(plane, asked))
            for count in KILLED_AT:
                await _until_ended(plane, count)
                killed.update(await _kill_at_work(plane))
        askers = asking.result()
        await _until_ended(plane, NUM_BLUEPRINTS)
        counted = await plane.account(asked, askers)
        jobs = [await _job(plane, job_id) for job_id in askers]
    assert counted.total() == len({job.content_key for job in jobs}) == NUM_BLUEPRINTS
    assert {len(runs) for runs in askers.values()} == {2}
    assert killed.total() == NUM_WORKERS * len(KILLED_AT)
    assert killed.keys() <= askers.keys()
    for job in jobs:
        dead = job.phase is JobPhase.DEAD
        assert dead == (killed[job.job_id] == PATIENT.max_deliver), job
        assert job.deliveries == killed[job.job_id] + (not dead), job


async def _ask(plane: Plane, asked: Sequence[CompileSpec]) -> dict[str, set[str]]:
    """Have every client ask for its part and that of the next one; gives the runs that asked for each job."""
    askers: defaultdict[str, set[str]] = defaultdict(set)
    share = len(asked) // NUM_CLIENTS

    async def client(number: int) -> None:
        settings = MeshSettings(tezzeret_address=f"127.0.0.1:{plane.tezzeret.port}", state_dir=plane.directory)
        run_id = f"scale-{number}"
        async with AsyncEsperClient(settings) as esper:
            for place in range(number * share, (number + 2) * share):
                job = await _answered(esper, asked[place % len(asked)], run_id)
                askers[job.job_id].add(run_id)

    async with asyncio.TaskGroup() as clients:
        for number in range(NUM_CLIENTS):
            clients.create_task(client(number))
    return askers


async def _answered(esper: AsyncEsperClient, spec: CompileSpec, run_id: str) -> CompileJob:
    end_s = time.monotonic() + LIMIT_S
    while True:
        try:
            return await esper.tezzeret.compile(spec, wait=False, run_id=run_id)
        except AWAY:
            if time.monotonic() > end_s:
                raise
        await asyncio.sleep(TICK_S)


async def _job(plane: Plane, job_id: str) -> CompileJob:
    [job] = await plane.ended([job_id])
    return job


async def _until_ended(plane: Plane, count: int) -> None:
    """Return when so many of the jobs that were asked for have ended."""
    ended = select(func.count()).where(
        JobRow.phase.in_([int(phase) for phase in ENDED_PHASES]), JobRow.job_id.not_in(plane.warmed)
    )
    end_s = time.monotonic() + LIMIT_S
    while True:
        async with plane.database.reading() as session:
            found = await session.scalar(ended) or 0
        if found >= count:
            return
        assert time.monotonic() < end_s, f"{found} of {count} have ended\n{plane.tezzeret.words()}"
        await asyncio.sleep(4 * TICK_S)


async def _kill_at_work(plane: Plane) -> set[str]:
    """Kill every worker in the midst of a job, and give the jobs."""
    end_s = time.monotonic() + LIMIT_S
    while True:
        assert time.monotonic() < end_s, f"workers do not work\n{plane.tezzeret.words()}"
        with _standing_still(plane) as workers:
            held = await _held(plane) if len(workers) == NUM_WORKERS else set()
            if len(held) == NUM_WORKERS:
                for worker in workers:
                    worker.kill()
                return held
        await asyncio.sleep(TICK_S)


@contextlib.contextmanager
def _standing_still(plane: Plane) -> Iterator[list[psutil.Process]]:
    """Stop the workers that have compiled something, which is known by the process that each then has beside it."""
    with contextlib.ExitStack() as stopped:
        workers: list[psutil.Process] = []
        for worker in plane.workers():
            with contextlib.suppress(psutil.NoSuchProcess):  # worn out, and replaced at this moment
                if worker.children():
                    worker.suspend()
                    stopped.callback(_resume, worker)
                    workers.append(worker)
        yield workers


def _resume(worker: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        worker.resume()


async def _held(plane: Plane) -> set[str]:
    """Give the jobs that are with workers which stand still: those that no more change, once one more look says so."""
    query = select(JobRow.job_id).where(JobRow.phase.in_([int(phase) for phase in IN_HAND]))
    last: set[str] = set()
    for _ in range(NUM_LOOKS):
        await asyncio.sleep(8 * TICK_S)
        async with plane.database.reading() as session:
            held = set((await session.scalars(query)).all())
        if held == last:
            return held
        last = held
    return set()

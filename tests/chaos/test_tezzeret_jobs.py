"""Compile jobs through every fault: done exactly once or listed as dead, and nothing half-written is ever served."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio

from esper.contracts.blueprint import Site, SiteKind
from esper.contracts.kernel import CompileJob, CompileSpec, JobPhase
from esper.v1 import tezzeret_service_pb2 as pb
from tests.chaos.compile_processes import TICK_S, Plane, specs
from tests.chaos.postgres_process import postgres_process

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.asyncio(loop_scope="module"),
]

AWAY_S = 5.0
"""Time for which something is gone: longer than a delivery's clock, and than the sweep waits for a sign."""
STORE_AWAY_S = 60.0
"""Time for which a store is gone."""
NUM_CLIENTS = 20
NUM_KERNELS = 12


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def plane(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Plane]:
    """One plane for the tests that leave it whole: a start of its processes takes seconds."""
    async with Plane(tmp_path_factory.mktemp("plane")) as running:
        yield running


@pytest.mark.parametrize(
    "phase", [JobPhase.COMPILING, JobPhase.VALIDATING, JobPhase.PACKAGING], ids=lambda one: one.name
)
async def test_a_worker_killed_in_any_phase_costs_one_delivery(plane: Plane, phase: JobPhase) -> None:
    for attempt in range(5):  # packaging takes milliseconds: a worker may be through before it is hit, and is not meant
        [spec] = specs(1_000 + 10 * int(phase) + attempt, 1)
        await plane.ready()  # a worker that was hit too late is dead all the same: its successor is up
        seen = await _killed_at(plane, spec, phase)
        steps = [(job.phase, job.deliveries) for job in seen]
        if steps[-1] != (JobPhase.SUCCEEDED, 1):
            break
    assert steps[steps.index((phase, 1)) + 1] == (JobPhase.QUEUED, 1)
    assert steps[-1] == (JobPhase.SUCCEEDED, 2)
    assert await plane.account([spec], {seen[-1].job_id: {_asker(spec)}}) == {JobPhase.SUCCEEDED: 1}


async def test_a_job_whose_every_worker_is_killed_is_listed_as_dead(plane: Plane) -> None:
    wide = Site(kind=SiteKind.LINEAR, input_shape=(1024,), output_shape=(1024,))  # long enough to be hit
    spec = replace(specs(2_000, 1)[0], site=wide)
    job_id = await plane.ask(spec, "deadly")
    async for job in plane.phases(job_id):
        if job.phase is JobPhase.VALIDATING:
            _kill_workers(plane)
    assert (job.phase, job.deliveries) == (JobPhase.DEAD, 3)
    assert await plane.account([spec], {job_id: {"deadly"}}) == {JobPhase.DEAD: 1}
    await plane.ready()


async def test_a_service_killed_with_jobs_in_hand_and_kernels_on_their_way_loses_none(plane: Plane) -> None:
    asked = specs(3_000, NUM_KERNELS)
    plane.urza.process.suspend()
    askers = await plane.clients(asked, 5, "service")
    await _kept(plane)
    plane.tezzeret.kill()
    plane.urza.process.resume()
    plane.tezzeret.start()
    assert (await plane.account(asked, askers)).keys() == {JobPhase.SUCCEEDED}


async def test_a_library_that_is_gone_for_a_minute_loses_no_kernel(plane: Plane) -> None:
    async with _under_load(plane, 4_000, "library") as asking:
        plane.urza.kill()
        await asyncio.sleep(STORE_AWAY_S)
        plane.urza.start()
    assert (await plane.account(*asking.result())).keys() == {JobPhase.SUCCEEDED}


async def test_a_bus_that_is_killed_and_comes_back_loses_no_job(plane: Plane) -> None:
    async with _under_load(plane, 5_000, "bus") as asking:
        await asyncio.to_thread(plane.nats.kill)
        await asyncio.sleep(AWAY_S)
        await asyncio.to_thread(plane.restart_nats)
    assert (await plane.account(*asking.result())).keys() == {JobPhase.SUCCEEDED}


@pytest.mark.parametrize("name", ["tezzeret", "urza"])
async def test_a_full_disk_loses_no_job_and_leaves_none_half_written(plane: Plane, name: str) -> None:
    async with _under_load(plane, 6_000 if name == "urza" else 7_000, f"full-{name}") as asking:
        with getattr(plane, name).full_disk():
            await asyncio.sleep(AWAY_S)
    counted = await plane.account(*asking.result())
    assert counted.keys() <= {JobPhase.SUCCEEDED, JobPhase.DEAD}
    assert counted[JobPhase.SUCCEEDED] > 0


async def test_jobs_are_counted_once_whatever_happens_at_once(plane: Plane) -> None:
    async with _under_load(plane, 8_000, "all") as asking:
        plane.urza.kill()
        _kill_workers(plane)
        await asyncio.to_thread(plane.nats.kill)
        with plane.tezzeret.full_disk():
            await asyncio.sleep(AWAY_S)
        plane.tezzeret.kill()
        await asyncio.to_thread(plane.restart_nats)
        plane.urza.start()
        plane.tezzeret.start()
        await plane.ready()
        _kill_workers(plane)
    counted = await plane.account(*asking.result())
    assert counted.keys() <= {JobPhase.SUCCEEDED, JobPhase.DEAD}


async def test_a_postgresql_that_is_gone_for_a_minute_loses_no_job(tmp_path: Path) -> None:
    with postgres_process("jobs") as server:
        async with Plane(tmp_path, server.url) as plane:
            async with _under_load(plane, 9_000, "postgres") as asking:
                await asyncio.to_thread(server.kill)
                await asyncio.sleep(STORE_AWAY_S)
                await asyncio.to_thread(server.start)
            assert (await plane.account(*asking.result())).keys() == {JobPhase.SUCCEEDED}


@contextlib.asynccontextmanager
async def _under_load(plane: Plane, first_seed: int, run: str) -> AsyncIterator[asyncio.Task[Any]]:
    """Do what follows while many clients ask, once a first job is worked on; they go on until all are heard."""
    asked = specs(first_seed, NUM_KERNELS)

    async def ask() -> tuple[Any, Any]:
        return asked, await plane.clients(asked, NUM_CLIENTS, run)

    first = await plane.ask(asked[0])
    asking = asyncio.create_task(ask())
    async for job in plane.phases(first):
        if job.phase is not JobPhase.QUEUED:
            break
    try:
        yield asking
        await asking
    finally:
        asking.cancel()


def _asker(spec: CompileSpec) -> str:
    """Give the run that asks: one for each attempt, since a run is told of all it asked for."""
    return f"killed-{spec.random_seed}"


async def _killed_at(plane: Plane, spec: CompileSpec, phase: JobPhase) -> list[CompileJob]:
    """Kill the worker within a phase of its first delivery; gives the phases the job went through.

    From the phase before on, the worker runs a little at a time: so it stands in the phase when that is heard of.
    """
    [worker] = plane.workers()
    reached = asyncio.Event()

    async def creep() -> None:
        while not reached.is_set():
            worker.suspend()
            await asyncio.sleep(TICK_S)
            if not reached.is_set():
                worker.resume()
                await asyncio.sleep(0.003)

    creeping = asyncio.create_task(creep()) if phase is JobPhase.COMPILING else None
    job_id = await plane.ask(spec, _asker(spec))
    seen: list[CompileJob] = []
    async for job in plane.phases(job_id):
        seen.append(job)
        if creeping is None and (job.phase, job.deliveries) == (phase - 1, 1):
            creeping = asyncio.create_task(creep())
        if creeping is not None and (job.phase, job.deliveries) == (phase, 1):
            reached.set()
            await creeping
            worker.kill()
    return seen


async def _kept(plane: Plane) -> None:
    """Return when a kernel waits for the library."""
    async with asyncio.timeout(60):
        while True:
            answer = await plane.patiently("ListJobs", pb.ListJobsRequest(phases=[pb.JOB_PHASE_PACKAGING]))
            if answer.jobs:
                return
            await asyncio.sleep(TICK_S)


def _kill_workers(plane: Plane) -> None:
    for worker in plane.workers():
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.kill()

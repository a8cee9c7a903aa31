"""Whoever would put a job back says which end of it they saw: one of them starts it, the others are told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from esper.contracts.errors import InvalidStateError, NotFoundError, UnavailableError
from esper.contracts.kernel import CompileJob, CompileSpec, JobPhase
from esper.mesh import InProcessChannel
from esper.mesh.database import Database
from esper.services.tezzeret.job_store import JobStore
from esper.services.tezzeret.server import register
from esper.v1 import tezzeret_service_pb2 as pb
from esper.v1.tezzeret_service_pb2_grpc import TezzeretServiceStub
from tests.unit.tezzeret.test_job_store import die, job_of

Mill = Any
KILLED = UnavailableError("compile worker was killed by SIGKILL")


@pytest.fixture
async def stub(mill: Mill) -> AsyncIterator[Any]:
    channel = InProcessChannel()
    register(channel, mill.service)
    yield TezzeretServiceStub(channel)
    await channel.close()


async def dead_job(mill: Mill, spec: CompileSpec) -> CompileJob:
    mill.pool.script = [KILLED] * 3
    job, _ = await mill.service.compile(spec)
    died: CompileJob = await mill.phase(job.job_id, JobPhase.DEAD)
    return died


async def test_two_operators_at_once_start_a_job_once(mill: Mill, spec: CompileSpec) -> None:
    job = await dead_job(mill, spec)
    calls = (mill.service.requeue(job.job_id, job.generation) for _ in range(2))
    found = await asyncio.gather(*calls, return_exceptions=True)
    [loser] = [one for one in found if isinstance(one, Exception)]
    assert isinstance(loser, InvalidStateError)
    assert "must be of generation 0 to be requeued" in str(loser)
    done = await mill.phase(job.job_id, JobPhase.SUCCEEDED)
    assert (done.generation, done.deliveries, len(mill.pool.specs)) == (1, 1, 4)


async def test_an_operator_who_looked_before_another_put_the_job_back_is_told(
    mill: Mill, stub: Any, spec: CompileSpec
) -> None:
    job_id = (await dead_job(mill, spec)).job_id
    [seen] = (await stub.ListDeadLetters(pb.ListDeadLettersRequest())).jobs
    mill.pool.script = [KILLED] * 3
    request = pb.RequeueDeadLetterRequest(job_id=job_id, generation=seen.generation)
    assert (await stub.RequeueDeadLetter(request)).job.generation == 1
    await mill.phase(job_id, JobPhase.DEAD)
    with pytest.raises(InvalidStateError, match="of generation 0 to be requeued, it is DEAD of generation 1"):
        await stub.RequeueDeadLetter(request)
    assert len(mill.pool.specs) == 6
    again = await stub.RequeueDeadLetter(pb.RequeueDeadLetterRequest(job_id=job_id))  # of an older client
    assert again.job.generation == 2
    await mill.phase(job_id, JobPhase.SUCCEEDED)


async def test_a_lost_kernel_that_another_replica_made_meanwhile_is_not_made_again(
    mill: Mill, spec: CompileSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = await mill.service.compile(spec, wait=True)
    mill.library.kernels.clear()
    other = mill.make_service()
    await other.start()
    await other.warm()
    honest = mill.service._library.find
    told: list[NotFoundError] = []

    async def slow(*asked: Any) -> Any:
        try:
            return await honest(*asked)
        except NotFoundError as error:
            if not told:
                told.append(error)
                await other.compile(spec, wait=True)
            raise

    monkeypatch.setattr(mill.service._library, "find", slow)
    job, _ = await mill.service.compile(spec, wait=True)
    assert told
    assert (job.phase, job.generation, len(mill.pool.specs)) == (JobPhase.SUCCEEDED, first.generation + 1, 2)
    await other.close()


async def test_an_end_that_is_remembered_and_out_of_date_bars_nobody(mill: Mill, spec: CompileSpec) -> None:
    first, _ = await mill.service.compile(spec, wait=True)
    await mill.store.requeue(first.job_id, 0, given_up_only=False)  # by a replica, of which this one hears nothing
    await mill.store.succeed(first.job_id, first.artifact_id, first.size_bytes)
    mill.library.kernels.clear()
    late, _ = await mill.service.compile(spec)
    assert late.generation == 1
    job, _ = await mill.service.compile(spec, wait=True)
    assert (job.phase, job.generation, len(mill.pool.specs)) == (JobPhase.SUCCEEDED, 2, 2)
    assert job.artifact_id in mill.library.kernels


async def test_replicas_over_one_file_start_a_job_once(tmp_path: Path, spec: CompileSpec) -> None:
    url = f"sqlite:///{tmp_path}/jobs.db"
    async with Database.open(url) as one, Database.open(url) as another:
        stores = [JobStore(one), JobStore(another)]
        for store in stores:
            await store.open()
        job, _ = await stores[0].add(job_of(spec), None)
        await die(stores[0], job.job_id)
        calls = (store.requeue(job.job_id, 0) for store in stores * 3)
        found = await asyncio.gather(*calls, return_exceptions=True)
        [again] = [item for item in found if isinstance(item, CompileJob)]
        assert [type(item) for item in found if item is not again] == [InvalidStateError] * 5
        assert again == await stores[1].get(job.job_id)

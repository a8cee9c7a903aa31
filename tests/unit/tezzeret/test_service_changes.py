"""What changes under a service: its toolchain, the keys that are trusted, the bus at its start, who asks meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from esper.contracts.errors import InvalidInputError, SignatureError, UnavailableError
from esper.contracts.kernel import CompileJob, CompileSpec, JobPhase
from esper.execution import answers
from esper.execution.keys import SigningKey
from esper.mesh import InProcessChannel
from esper.services.tezzeret import worker_process
from esper.services.tezzeret.config import WorkerPoolConfig
from esper.services.tezzeret.content_key import content_key, job_id_of, toolchain
from esper.services.tezzeret.job_store import Asker
from esper.services.tezzeret.pool import WorkerPool
from esper.services.tezzeret.service import TezzeretService
from esper.services.tezzeret.worker import TezzeretWorker
from esper.services.urza.server import UrzaConfig, UrzaService
from esper.v1 import urza_service_pb2 as urza_pb
from esper.v1.urza_service_pb2_grpc import UrzaServiceStub
from tests.unit.tezzeret.test_job_faults import job_of

Mill = Any


async def test_a_job_of_another_toolchain_ends_with_the_kernel_of_this_one(mill: Mill, spec: CompileSpec) -> None:
    """The service was replaced by a newer one while the job waited."""
    await mill.service.close()
    key = answers.content_key(spec, {**toolchain(), "torch": "1.0.0"})
    older = replace(job_of(spec), job_id=job_id_of(key), content_key=key)
    await mill.store.add(older, Asker(run_id="run-1", adaptation_id="a1"))
    mill.service = mill.make_service()
    await mill.service.start()
    [ready] = await mill.announced("run-1")
    done = await mill.service.job(older.job_id)
    assert (done.phase, done.error, mill.library.uploads) == (JobPhase.SUCCEEDED, "", 1)
    assert mill.library.kernels[done.artifact_id][0].content_key == content_key(spec) != key
    assert (ready.artifact_id, ready.error) == (done.artifact_id, None)
    found, cached = await mill.service.compile(spec)
    assert (found.artifact_id, cached, len(mill.pool.specs)) == (done.artifact_id, True, 1)


async def test_a_bus_that_comes_after_the_pool_gave_up_waiting_for_workers_is_worked_from(
    mill: Mill, monkeypatch: pytest.MonkeyPatch
) -> None:
    await mill.service.close()
    monkeypatch.setattr(worker_process, "_MODULE", "esper.no_such_worker")  # a process that ends at once
    mill.pool = WorkerPool(WorkerPoolConfig(max_failed_starts=1))
    mill.service = mill.make_service()
    consume, refused = mill.bus.consume, []

    async def away_at_first(*args: Any, **named: Any) -> Any:
        if len(refused) < 2:
            refused.append(args)
            raise UnavailableError("bus is away")
        return await consume(*args, **named)

    monkeypatch.setattr(mill.bus, "consume", away_at_first)
    await mill.service.start()
    async with asyncio.timeout(30):
        await mill.service.warm()
    assert mill.pool.started
    assert len(refused) == 2
    with pytest.raises(UnavailableError, match="compile workers are not ready: compile worker ended with code 1"):
        await mill.service.ready()


@asynccontextmanager
async def compiling(mill: Mill, directory: Path, key: SigningKey) -> AsyncIterator[tuple[TezzeretService, Any]]:
    """A service that signs with a key, and a real library on disk that trusts this key alone."""
    config = UrzaConfig(database_url=f"sqlite:///{directory}/urza.db", seed_templates=False)
    async with UrzaService(config, key_ring=key.ring()) as library:
        channel = InProcessChannel()
        library.add_to(channel)
        urza = UrzaServiceStub(channel)
        service = TezzeretService(mill.store, mill.bus, mill.pool, urza, key, mill.config)
        await service.start()
        await service.warm()
        yield service, urza
        await service.close()
        await channel.close()


async def test_a_kernel_whose_key_is_no_longer_trusted_is_made_anew(
    mill: Mill, spec: CompileSpec, tmp_path: Path
) -> None:
    await mill.service.close()
    async with compiling(mill, tmp_path, SigningKey.generate()) as (service, _):
        first, _ = await service.compile(spec, wait=True)
    rotated = SigningKey.generate()
    async with compiling(mill, tmp_path, rotated) as (service, urza):
        asked = urza_pb.GetKernelRequest(content_key=content_key(spec))
        with pytest.raises(SignatureError, match="no longer is"):
            await urza.GetKernel(asked, timeout=10)
        again, cached = await service.compile(spec, run_id="run-1", adaptation_id="a1", wait=True)
        assert (again.job_id, again.phase, cached) == (first.job_id, JobPhase.SUCCEEDED, False)
        assert len(mill.pool.specs) == 2
        [ready] = await mill.announced("run-1")
        given = await urza.GetKernel(asked, timeout=10)
        assert given.manifest.artifact_id == ready.artifact_id == again.artifact_id


async def test_who_is_noted_while_the_job_ends_is_told_at_once(
    mill: Mill, spec: CompileSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on PostgreSQL: the job is read before its end, the asker seen after the outbox looked for whom to tell."""
    await mill.service.close()
    mill.config = replace(mill.config, max_backoff_s=600.0)
    mill.service = mill.make_service()
    await mill.service.start()
    await mill.service.warm()
    asked, looked = asyncio.Event(), asyncio.Event()
    add, succeed, unannounced = mill.store.add, mill.store.succeed, mill.store.unannounced

    async def succeed_once_asked(*args: Any, **named: Any) -> CompileJob:
        await asked.wait()
        done: CompileJob = await succeed(*args, **named)
        return done

    async def look(*args: Any) -> Any:
        found = await unannounced(*args)
        if asked.is_set():
            looked.set()
        return found

    async def add_late(job: CompileJob, asker: Asker) -> tuple[CompileJob, bool]:
        read = await mill.store.get(job.job_id)
        asked.set()
        await looked.wait()
        await add(job, asker)
        return read, False

    monkeypatch.setattr(mill.store, "succeed", succeed_once_asked)
    monkeypatch.setattr(mill.store, "unannounced", look)
    job, _ = await mill.service.compile(spec)
    await mill.phase(job.job_id, JobPhase.PACKAGING)
    await mill.library.upload_attempted.wait()
    monkeypatch.setattr(mill.store, "add", add_late)
    late, cached = await mill.service.compile(spec, run_id="run-2", adaptation_id="a2")
    assert (late.phase, cached) == (JobPhase.PACKAGING, False)
    [ready] = await mill.announced("run-2")
    assert (ready.adaptation_id, ready.error) == ("a2", None)


async def test_an_inline_worker_is_closed_with_its_job_however_that_ends(
    mill: Mill, spec: CompileSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    monkeypatch.setattr(TezzeretWorker, "close", lambda _: made.append("closed"))
    await mill.pool.compile(spec)
    with pytest.raises(InvalidInputError, match="seed"):
        await mill.pool.compile(replace(spec, random_seed=-1))
    assert made == ["closed", "closed"]

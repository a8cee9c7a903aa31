"""Two Tezzerets at one queue and one store, over a real NATS and a real library: of two versions, or one cut off."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from esper.blueprints import default_registry
from esper.contracts.blueprint import Site, SiteKind
from esper.contracts.kernel import CompileJob, CompileSpec, JobPhase, KernelArtifact
from esper.execution.keys import SigningKey
from esper.mesh import MeshServer, open_channel
from esper.mesh.database import Database
from esper.services.tezzeret.config import TezzeretConfig, WorkerPoolConfig
from esper.services.tezzeret.content_key import content_key
from esper.services.tezzeret.job_store import JobStore
from esper.services.tezzeret.pool import WorkerPool
from esper.services.tezzeret.service import TezzeretService
from esper.services.urza.server import UrzaConfig, UrzaService
from esper.telemetry import NatsBus, NatsOptions, NatsServer, NatsServerConfig
from esper.v1 import urza_service_pb2 as urza_pb
from esper.v1.urza_service_pb2_grpc import UrzaServiceStub

SPEC = CompileSpec(
    ir=default_registry().create_blueprint("bottleneck_adapter").ir,
    site=Site(kind=SiteKind.LINEAR, input_shape=(8,), output_shape=(6,)),
)
QUICK = NatsOptions(publish_timeout_s=3.0, attempt_timeout_s=0.5, ping_interval_s=0.2, reconnect_wait_max_s=0.2)


class HeldPool(WorkerPool):
    """Inline workers that begin when they are let."""

    def __init__(self) -> None:
        super().__init__(WorkerPoolConfig(mode="inline"))
        self.begun = asyncio.Event()
        self.gate = asyncio.Event()

    async def compile(
        self, spec: CompileSpec, on_phase: Any = lambda _: None, check: Any = lambda _: None
    ) -> KernelArtifact:
        on_phase(JobPhase.COMPILING)
        self.begun.set()
        await self.gate.wait()
        return await super().compile(spec, on_phase, check)


class Link:
    """A way to a server that can be cut, and mended."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._cut = False
        self._flows: set[asyncio.StreamWriter] = set()

    async def open(self) -> str:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return f"nats://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._cut:
            writer.close()
            return
        there_reader, there_writer = await asyncio.open_connection("127.0.0.1", self._port)
        self._flows |= {writer, there_writer}
        await asyncio.gather(self._carry(reader, there_writer), self._carry(there_reader, writer))

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65_536):
                writer.write(data)
                await writer.drain()
        except OSError:  # the other side is gone, or was cut off
            pass
        finally:
            writer.close()

    def cut(self) -> None:
        self._cut = True
        for writer in self._flows:
            writer.close()
        self._flows.clear()

    async def close(self) -> None:
        self.cut()
        self._server.close()


class Plane:
    """NATS, a library and a store, and the Tezzerets that share them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.key = SigningKey.load_or_create(directory / "keys")
        self.open = AsyncExitStack()
        self.database_url = f"sqlite:///{directory}/tezzeret.db"

    async def start(self) -> None:
        self.nats = await self.open.enter_async_context(NatsServer(NatsServerConfig(store_dir=self.directory / "nats")))
        config = UrzaConfig(database_url=f"sqlite:///{self.directory}/urza.db", seed_templates=False)
        library = await self.open.enter_async_context(UrzaService(config, key_ring=self.key.ring()))
        server = MeshServer()
        library.add_to(server)
        await server.start()
        self.open.push_async_callback(server.drain)
        self.urza_address = server.address
        self.urza = UrzaServiceStub(await self.open.enter_async_context(open_channel(server.address)))
        self.store = JobStore(await self.open.enter_async_context(Database.open(self.database_url)))
        await self.store.open()
        async with await NatsBus.connect(self.nats.url) as bus:
            await bus.ensure_streams()

    async def tezzeret(
        self, config: TezzeretConfig, pool: WorkerPool, url: str = ""
    ) -> tuple[TezzeretService, NatsBus]:
        """Give a service of this version that was not started; it is closed with the plane."""
        bus = await self.open.enter_async_context(await NatsBus.connect(url or self.nats.url, QUICK))
        database = await self.open.enter_async_context(Database.open(self.database_url))
        self.open.push_async_callback(pool.close)
        service = TezzeretService(JobStore(database), bus, pool, self.urza, self.key, config)
        self.open.push_async_callback(service.close)
        return service, bus

    async def older(self, ack_wait_s: float = 30.0) -> None:
        """Have a process of an older version take jobs; it is killed with the plane."""
        words = [self.nats.url, self.urza_address, self.database_url, str(self.directory / "keys"), str(ack_wait_s)]
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.integration.older_tezzeret", *words, stdout=asyncio.subprocess.PIPE
        )
        self.open.push_async_callback(process.wait)
        self.open.callback(process.kill)
        assert process.stdout is not None
        async with asyncio.timeout(120):
            assert await process.stdout.readline() == b"warm\n"

    async def ended(self, job_id: str) -> CompileJob:
        async with asyncio.timeout(60):
            while True:
                job = await self.store.get(job_id)
                if job.finished_at is not None:
                    return job
                await asyncio.sleep(0.01)


@pytest.fixture
async def plane(tmp_path: Path) -> AsyncIterator[Plane]:
    made = Plane(tmp_path)
    try:
        await made.start()
        yield made
    finally:
        await made.open.aclose()


async def test_a_job_of_the_new_version_is_left_to_it_by_the_old(plane: Plane) -> None:
    """The new one is asked before its workers are warm, while those of the old one have nothing to do."""
    await plane.older()
    service, _ = await plane.tezzeret(TezzeretConfig(drain_s=0.5), WorkerPool(WorkerPoolConfig(mode="inline")))
    specs = [replace(SPEC, random_seed=number) for number in range(4)]
    asked = [(await service.compile(spec, run_id="run-1"))[0] for spec in specs]
    await service.start()
    for spec, job in zip(specs, asked, strict=True):
        done = await plane.ended(job.job_id)
        assert (done.phase, done.deliveries) == (JobPhase.SUCCEEDED, 1), done.error
        found = await plane.urza.GetKernel(urza_pb.GetKernelRequest(content_key=content_key(spec)), timeout=10)
        assert found.manifest.artifact_id == done.artifact_id
        again, cached = await service.compile(spec, run_id="run-2")
        assert (again.artifact_id, cached) == (done.artifact_id, True)
        assert (await plane.store.get(job.job_id)).generation == 0, "nobody began it anew"


async def test_a_job_of_a_version_that_nobody_runs_any_more_is_done_by_who_is_there(plane: Plane) -> None:
    await plane.older(ack_wait_s=2.0)
    service, _ = await plane.tezzeret(TezzeretConfig(drain_s=0.5), WorkerPool(WorkerPoolConfig(mode="inline")))
    job, _ = await service.compile(SPEC)  # and the new version is rolled back before it took a job
    done = await plane.ended(job.job_id)
    assert (done.phase, done.deliveries) == (JobPhase.SUCCEEDED, 1), done.error


async def test_a_service_that_lost_the_bus_keeps_the_job_that_it_works_on(plane: Plane) -> None:
    """The queue hears nothing of it any more, the store does."""
    config = TezzeretConfig(ack_wait_s=1.5, drain_s=0.5, sweep_after_s=3.0, sweep_interval_s=0.2)
    link = Link(int(plane.nats.url.rsplit(":", 1)[1]))
    url = await link.open()
    plane.open.push_async_callback(link.close)
    holding, waiting = HeldPool(), HeldPool()
    waiting.gate.set()
    holder, _ = await plane.tezzeret(config, holding, url)
    await holder.start()
    await holder.warm()
    job, _ = await holder.compile(SPEC)
    await asyncio.wait_for(holding.begun.wait(), 60)
    other, bus = await plane.tezzeret(config, waiting)
    await other.start()
    await other.warm()
    link.cut()
    async with asyncio.timeout(60):
        while bus.stats().received < 4:
            assert not waiting.begun.is_set()
            await asyncio.sleep(0.02)
    kept = await plane.store.get(job.job_id)
    assert (kept.deliveries, kept.generation) == (1, 0)
    holding.gate.set()
    done = await plane.ended(job.job_id)
    assert (done.phase, done.deliveries) == (JobPhase.SUCCEEDED, 1), done.error

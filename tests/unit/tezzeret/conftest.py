"""A Tezzeret in this process: memory bus, SQLite in memory, a library in memory behind the real call path."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from esper.blueprints import BlueprintRegistry, default_registry
from esper.contracts.blueprint import Blueprint, Site, SiteKind
from esper.contracts.chunks import Assembler
from esper.contracts.errors import NotFoundError
from esper.contracts.kernel import CompileJob, CompileSpec, JobPhase, KernelArtifact, KernelManifest, KernelReady
from esper.contracts.wire import parse, to_wire
from esper.execution.artifact import verify
from esper.execution.keys import SigningKey
from esper.mesh import InProcessChannel
from esper.mesh.database import Database
from esper.services.tezzeret.config import TezzeretConfig, WorkerPoolConfig
from esper.services.tezzeret.job_store import JobStore
from esper.services.tezzeret.pool import WorkerPool
from esper.services.tezzeret.service import TezzeretService
from esper.telemetry import EVENTS, Bus, MemoryBroker, MemoryBus, build_subject
from esper.v1 import urza_service_pb2 as urza_pb
from esper.v1.urza_service_pb2_grpc import UrzaServiceServicer, UrzaServiceStub, add_UrzaServiceServicer_to_server

LINEAR = Site(kind=SiteKind.LINEAR, input_shape=(8,), output_shape=(6,))


class Library(UrzaServiceServicer):
    """Kernels in memory; fails, sees bits change on the way, and lies, as told."""

    def __init__(self, key: SigningKey) -> None:
        self._ring = key.ring()
        self.kernels: dict[str, tuple[KernelManifest, bytes]] = {}
        self.uploads = 0
        self.upload_failures: list[Exception] = []
        self.lookup_failure: Exception | None = None
        self.upload_attempted = asyncio.Event()
        self.flips_in_transit = 0
        self.alter_answer: Callable[[urza_pb.GetKernelResponse], None] = lambda _: None
        self.alter_receipt: Callable[[urza_pb.UploadKernelResponse], None] = lambda _: None

    async def UploadKernel(self, request_iterator: Any, context: Any) -> urza_pb.UploadKernelResponse:
        assembler = Assembler(max_bytes=1 << 28)
        self.uploads += 1
        self.upload_attempted.set()
        async for chunk in request_iterator:
            if self.flips_in_transit > 0:
                self.flips_in_transit -= 1
                chunk.data = bytes([chunk.data[0] ^ 1]) + chunk.data[1:]
            assembler.add(chunk)
        if self.upload_failures:
            raise self.upload_failures.pop(0)
        data = assembler.finish()
        manifest = verify(data, self._ring).manifest
        known = [one.artifact_id for one, _ in self.kernels.values() if one.content_key == manifest.content_key]
        if not known:
            self.kernels[manifest.artifact_id] = (manifest, data)
        receipt = urza_pb.UploadKernelResponse(artifact_id=(*known, manifest.artifact_id)[0], created=not known)
        self.alter_receipt(receipt)
        return receipt

    async def GetKernel(self, request: urza_pb.GetKernelRequest, context: Any) -> urza_pb.GetKernelResponse:
        if self.lookup_failure is not None:
            raise self.lookup_failure
        for manifest, data in self.kernels.values():
            if manifest.content_key == request.content_key:
                answer = urza_pb.GetKernelResponse(manifest=to_wire(manifest), size_bytes=len(data))  # type: ignore[arg-type]
                self.alter_answer(answer)
                return answer
        raise NotFoundError("no kernel of this key")


class ScriptedPool(WorkerPool):
    """Workers that do what the test says first, and then compile inline."""

    def __init__(self) -> None:
        super().__init__(WorkerPoolConfig(mode="inline"))
        self.script: list[Callable[[CompileSpec], Awaitable[KernelArtifact]] | Exception] = []
        self.specs: list[CompileSpec] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def compile(
        self, spec: CompileSpec, on_phase: Any = lambda _: None, check: Any = lambda _: None
    ) -> KernelArtifact:
        self.specs.append(spec)
        on_phase(JobPhase.COMPILING)
        await self.gate.wait()
        if self.script:
            step = self.script.pop(0)
            if isinstance(step, Exception):
                raise step
            artifact = await step(spec)
            check(artifact)
            return artifact
        return await super().compile(spec, on_phase, check)


class Mill:
    """A running service with everything around it."""

    def __init__(self) -> None:
        self.key = SigningKey.generate()
        self.library = Library(self.key)  # type: ignore[abstract]  # the calls left out answer UNIMPLEMENTED
        self.channel = InProcessChannel()
        self.channel.add_servicer(add_UrzaServiceServicer_to_server, self.library)
        self.broker = MemoryBroker()
        self.bus: Bus = MemoryBus(self.broker)
        self.database = Database.open("sqlite://")
        self.store = JobStore(self.database)
        self.pool = ScriptedPool()
        self.config = TezzeretConfig(
            max_deliver=3, ack_wait_s=5.0, retry_delay_s=0.01, min_backoff_s=0.01, max_backoff_s=0.05, drain_s=0.3
        )
        self.service = self.make_service()

    def make_service(self) -> TezzeretService:
        return TezzeretService(self.store, self.bus, self.pool, UrzaServiceStub(self.channel), self.key, self.config)

    async def open(self) -> None:
        await self.bus.ensure_streams()
        await self.service.start()
        await self.service.warm()

    async def close(self) -> None:
        await self.service.close()
        await self.pool.close()
        await self.channel.close()
        await self.bus.close()
        await self.database.close()

    async def announced(self, run_id: str, count: int = 1) -> list[KernelReady]:
        """Wait for announcements to a run."""
        async with asyncio.timeout(10):
            while True:
                subject = build_subject(run_id, "kernel")
                found = [message async for message in self.bus.replay(subject, stream=EVENTS.name)]
                if len(found) >= count:
                    return [parse(message.payload, KernelReady) for message in found]
                await asyncio.sleep(0.01)

    async def phase(self, job_id: str, phase: JobPhase) -> CompileJob:
        """Wait until a job stands at a phase."""
        async with asyncio.timeout(20):
            while True:
                job = await self.store.find(job_id)
                if job is not None and job.phase is phase:
                    return job
                await asyncio.sleep(0.01)


@pytest.fixture
async def mill() -> AsyncIterator[Mill]:
    made = Mill()
    await made.open()
    yield made
    await made.close()


@pytest.fixture(scope="session")
def registry() -> BlueprintRegistry:
    return default_registry()


@pytest.fixture(scope="session")
def blueprint(registry: BlueprintRegistry) -> Blueprint:
    """A template with a linear map and a norm."""
    return registry.create_blueprint("bottleneck_adapter")


@pytest.fixture(scope="session")
def spec(blueprint: Blueprint) -> CompileSpec:
    return CompileSpec(ir=blueprint.ir, site=LINEAR)

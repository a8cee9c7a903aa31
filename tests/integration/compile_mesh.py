"""Tezzeret and Urza on sockets of this process, with a real compile worker behind them."""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path

from esper.contracts.kernel import CompileSpec
from esper.contracts.wire import to_wire
from esper.execution.keys import SigningKey
from esper.mesh import ChannelConfig, MeshServer, open_channel
from esper.mesh.database import Database
from esper.services.tezzeret.config import CompilerConfig, TezzeretConfig, WorkerLimits, WorkerPoolConfig
from esper.services.tezzeret.job_store import JobStore
from esper.services.tezzeret.pool import WorkerPool
from esper.services.tezzeret.server import register
from esper.services.tezzeret.service import TezzeretService
from esper.services.urza.server import UrzaConfig, UrzaService
from esper.telemetry import MemoryBroker, MemoryBus
from esper.v1 import tezzeret_service_pb2 as pb
from esper.v1.tezzeret_service_pb2_grpc import TezzeretServiceStub
from esper.v1.urza_service_pb2_grpc import UrzaServiceStub


class CompileMesh:
    """Tezzeret and Urza on sockets, with one compile worker as a process."""

    def __init__(self, directory: Path, compiler: CompilerConfig | None = None, *, max_failed_starts: int = 5) -> None:
        self.directory = directory
        self.max_failed_starts = max_failed_starts
        self.compiler = compiler or CompilerConfig()
        self.open = AsyncExitStack()
        self.key = SigningKey.generate()

    async def start(self) -> None:
        bus = await self.open.enter_async_context(MemoryBus(MemoryBroker()))
        await bus.ensure_streams()
        library = UrzaService(UrzaConfig(database_url=f"sqlite:///{self.directory}/urza.db"), key_ring=self.key.ring())
        await library.start()
        self.open.push_async_callback(library.close)
        urza_server = MeshServer()
        library.add_to(urza_server)
        await urza_server.start()
        self.open.push_async_callback(urza_server.drain)
        config = ChannelConfig(retry_attempts=1)
        self.urza = UrzaServiceStub(await self.open.enter_async_context(open_channel(urza_server.address, config)))
        database = await self.open.enter_async_context(Database.open("sqlite://"))
        limits = WorkerLimits(job_timeout_s=600.0, cpu_s=900) if self.compiler.aot_inductor else WorkerLimits()
        self.pool = WorkerPool(
            WorkerPoolConfig(
                limits=limits,
                compiler=self.compiler,
                scratch_dir=self.directory,
                max_failed_starts=self.max_failed_starts,
            )
        )
        self.open.push_async_callback(self.pool.close)
        settings = TezzeretConfig(retry_delay_s=0.05, drain_s=0.5)
        self.service = service = TezzeretService(JobStore(database), bus, self.pool, self.urza, self.key, settings)
        await service.start()
        self.open.push_async_callback(service.close)
        server = MeshServer()
        register(server, service)
        await server.start()
        self.open.push_async_callback(server.drain)
        self.tezzeret = TezzeretServiceStub(await self.open.enter_async_context(open_channel(server.address, config)))
        await service.warm()

    async def compile(self, spec: CompileSpec) -> pb.CompileJob:
        request = pb.CompileRequest(spec=to_wire(spec), run_id="run-1", wait=True)  # type: ignore[arg-type]
        job: pb.CompileJob = (await self.tezzeret.Compile(request, timeout=600)).job
        return job

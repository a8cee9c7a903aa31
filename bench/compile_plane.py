"""NATS, the library and the compiler as C1 asks them: real sockets, a real worker process, a database on disk."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Final, Self

from esper.contracts.errors import InvalidStateError
from esper.contracts.kernel import CompileSpec
from esper.contracts.wire import to_message
from esper.execution.keys import SigningKey
from esper.mesh import MeshServer, open_channel
from esper.mesh.database import Database
from esper.services.tezzeret.config import WorkerPoolConfig
from esper.services.tezzeret.job_store import JobStore
from esper.services.tezzeret.pool import WorkerPool
from esper.services.tezzeret.server import register
from esper.services.tezzeret.service import TezzeretService
from esper.services.urza.server import UrzaConfig, UrzaService
from esper.telemetry import NatsBus, NatsServer, NatsServerConfig
from esper.v1 import tezzeret_service_pb2 as pb
from esper.v1.tezzeret_service_pb2_grpc import TezzeretServiceStub
from esper.v1.urza_service_pb2_grpc import UrzaServiceStub

_DEADLINE_S: Final = 60.0
_COMPILED: Final = "kernel_compiled"
_RUNNER: Final = logging.getLogger("esper.services.tezzeret.job_runner")


class CompilePlane:
    """A compiler with one worker, and what it needs around it. Belongs to one event loop; an async context manager."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._leaving = AsyncExitStack()
        self._compiled = _Count(_COMPILED)
        self._level = _RUNNER.level
        self._address = ""
        self._stub: Any = None
        self.pool = WorkerPool(WorkerPoolConfig(scratch_dir=directory))
        """The workers."""
        self.key = SigningKey.generate()
        """What kernels are signed with."""

    @property
    def num_compiled(self) -> int:
        """Kernels that were compiled for jobs so far; what `pool` does for others does not count."""
        return self._compiled.seen

    async def request(self, spec: CompileSpec) -> float:
        """Ask for a kernel and wait until it is in the library; gives the time that took, in seconds.

        Raises:
            InvalidStateError: It was not compiled.
        """
        return await _request(self._stub, spec)

    async def request_at_once(self, spec: CompileSpec, num_clients: int) -> float:
        """Have clients, each on a connection of its own, ask for one kernel; gives the time until the last has it."""
        channels = [open_channel(self._address) for _ in range(num_clients)]
        try:
            await asyncio.gather(*(channel.channel_ready() for channel in channels))
            begun = time.perf_counter()
            await asyncio.gather(*(_request(TezzeretServiceStub(channel), spec) for channel in channels))
            return time.perf_counter() - begun
        finally:
            await asyncio.gather(*(channel.close() for channel in channels))

    async def __aenter__(self) -> Self:
        try:
            await self._start()
        except BaseException:
            await self._leaving.aclose()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._leaving.aclose()

    async def _start(self) -> None:
        enter = self._leaving.enter_async_context
        _RUNNER.addHandler(self._compiled)
        self._leaving.callback(_RUNNER.removeHandler, self._compiled)
        _RUNNER.setLevel(logging.INFO)
        self._leaving.callback(_RUNNER.setLevel, self._level)
        self._leaving.push_async_callback(self.pool.close)
        await self.pool.start()
        nats = await enter(NatsServer(NatsServerConfig(store_dir=self._directory / "nats")))
        bus = await enter(await NatsBus.connect(nats.url))
        await bus.ensure_streams()
        config = UrzaConfig(database_url=f"sqlite:///{self._directory}/urza.db", seed_templates=False)
        library = await enter(UrzaService(config, key_ring=self.key.ring()))
        library_server = MeshServer()
        library.add_to(library_server)
        await enter(library_server)
        urza = UrzaServiceStub(await enter(open_channel(library_server.address)))

        jobs = JobStore(await enter(Database.open(f"sqlite:///{self._directory}/tezzeret.db")))
        service = TezzeretService(jobs, bus, self.pool, urza, self.key)
        await service.start()
        self._leaving.push_async_callback(service.close)
        await service.warm()
        server = MeshServer()
        register(server, service)
        await enter(server)
        self._address = server.address
        self._stub = TezzeretServiceStub(await enter(open_channel(self._address)))


class _Count(logging.Handler):
    """Counts the records of one event."""

    def __init__(self, event: str) -> None:
        super().__init__(logging.INFO)
        self._event = event
        self.seen = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Count a record of the event."""
        self.seen += record.msg == self._event


async def _request(stub: Any, spec: CompileSpec) -> float:
    request = pb.CompileRequest(spec=to_message(spec, pb.CompileSpec), wait=True)
    begun = time.perf_counter()
    job = (await stub.Compile(request, timeout=_DEADLINE_S)).job
    took_s = time.perf_counter() - begun
    if job.phase != pb.JOB_PHASE_SUCCEEDED:
        raise InvalidStateError(f"kernel must be compiled to be measured, it was not: {job.error or job.phase}")
    return took_s

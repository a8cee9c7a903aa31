"""A compile plane of real processes on loopback, each of which can be killed, frozen, starved of disk and started anew.

``python -m tests.chaos.compile_processes urza|tezzeret SETTINGS`` is one of them; `Plane` is the handle on all.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import psutil
import torch
from sqlalchemy import func, select

from esper.blueprints import default_registry
from esper.contracts.blueprint import Site, SiteKind
from esper.contracts.errors import CapacityExceededError, DeadlineExceededError, EsperError, UnavailableError
from esper.contracts.kernel import ENDED_PHASES, CompileJob, CompileSpec, JobPhase, KernelReady
from esper.contracts.wire import from_wire, parse, to_message
from esper.execution.artifact import verify
from esper.execution.executor import Placement, build_kernel, load_weights
from esper.execution.keys import SigningKey
from esper.execution.tier_urza import UrzaTier
from esper.mesh import ChannelConfig, MeshServer, ServerConfig, free_port, open_channel
from esper.mesh.database import Database
from esper.services.tezzeret.config import TezzeretConfig, WorkerPoolConfig
from esper.services.tezzeret.content_key import content_key
from esper.services.tezzeret.job_store import JobStore
from esper.services.tezzeret.models import AskerRow, OutboxRow, PhaseRow
from esper.services.tezzeret.pool import WorkerPool
from esper.services.tezzeret.server import register
from esper.services.tezzeret.service import TezzeretService
from esper.services.urza.server import UrzaConfig, UrzaService
from esper.telemetry import EVENTS, NatsBus, NatsServer, NatsServerConfig, build_subject
from esper.v1 import tezzeret_service_pb2 as pb
from esper.v1 import urza_service_pb2 as urza_pb
from esper.v1.tezzeret_service_pb2_grpc import TezzeretServiceStub
from esper.v1.urza_service_pb2_grpc import UrzaServiceStub

TICK_S = 0.05
AWAY = (UnavailableError, DeadlineExceededError, CapacityExceededError)
QUICK = TezzeretConfig(
    ack_wait_s=3.0,
    retry_delay_s=0.2,
    min_backoff_s=0.05,
    max_backoff_s=0.5,
    drain_s=0.5,
    sweep_interval_s=0.5,
    sweep_after_s=4.0,
)
"""Times as short as the tests need; what they are held to is otherwise the default."""
SITE = Site(kind=SiteKind.LINEAR, input_shape=(8,), output_shape=(6,))
_PLACEMENT = Placement(device=torch.device("cpu"), dtype=torch.float32)
TEMPLATES = ("lora", "bottleneck_adapter", "gated_mlp")


def specs(first_seed: int, count: int) -> list[CompileSpec]:
    """Give requests for kernels that nobody asked for before, over several blueprints."""
    registry = default_registry()
    graphs = [registry.create_blueprint(name).ir for name in TEMPLATES]
    numbers = range(first_seed, first_seed + count)
    return [CompileSpec(ir=graphs[number % len(graphs)], site=SITE, random_seed=number) for number in numbers]


class Service:
    """One process of the plane."""

    def __init__(self, kind: str, directory: Path, **settings: Any) -> None:
        self.kind = kind
        self.port = free_port()
        self._log = directory / f"{kind}.log"
        self._settings = {"directory": str(directory), "port": self.port, **settings}
        self._running: subprocess.Popen[bytes] | None = None

    @property
    def process(self) -> psutil.Process:
        assert self._running is not None
        return psutil.Process(self._running.pid)

    def start(self) -> None:
        words = [sys.executable, "-m", "tests.chaos.compile_processes", self.kind, json.dumps(self._settings)]
        with self._log.open("ab") as log:
            self._running = subprocess.Popen(words, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})

    def kill(self) -> None:
        """SIGKILL it and what it started."""
        if self._running is None:
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in [*self.process.children(recursive=True), self.process]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        self._running.wait(30)

    @contextlib.contextmanager
    def full_disk(self) -> Iterator[None]:
        """Let it write no file beyond 1 KiB: the kernel refuses in the middle of a page, as a full device does."""
        self.process.rlimit(psutil.RLIMIT_FSIZE, (1024, -1))
        try:
            yield
        finally:
            self.process.rlimit(psutil.RLIMIT_FSIZE, (-1, -1))

    def words(self) -> str:
        """Give the end of what it said."""
        return self._log.read_text(errors="replace")[-4000:] if self._log.exists() else ""


class Plane:
    """NATS, library and compiler, and clients of them. Belongs to one event loop; an async context manager."""

    def __init__(
        self, directory: Path, database_url: str = "", *, config: TezzeretConfig = QUICK, num_workers: int = 1
    ) -> None:
        self.directory = directory
        self._compiling = {"config": asdict(config), "num_workers": num_workers}
        self.database_url = database_url or f"sqlite:///{directory}/tezzeret.db"
        self.key = SigningKey.load_or_create(directory / "keys")
        self.nats = NatsServer(NatsServerConfig(store_dir=directory / "nats", port=free_port()))
        self._open = AsyncExitStack()
        self.warmed: list[str] = []
        """Jobs that the plane asked for itself, to see that it works."""

    async def __aenter__(self) -> Self:
        try:
            await self._start()
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._open.aclose()

    async def _start(self) -> None:
        enter = self._open.enter_async_context
        await asyncio.to_thread(self.nats.start)
        self._open.callback(self._stop_nats)
        self.urza = Service("urza", self.directory)
        self.tezzeret = Service(
            "tezzeret",
            self.directory,
            nats_url=self.nats.url,
            urza_port=self.urza.port,
            database_url=self.database_url,
            **self._compiling,
        )
        for service in (self.urza, self.tezzeret):
            self._open.callback(service.kill)
        self.bus = await enter(await NatsBus.connect(self.nats.url))
        await self.bus.ensure_streams()
        for service in (self.urza, self.tezzeret):
            service.start()
        config = ChannelConfig(retry_attempts=1)
        self.library = UrzaServiceStub(await enter(open_channel(f"127.0.0.1:{self.urza.port}", config)))
        self.compiler = TezzeretServiceStub(await enter(open_channel(f"127.0.0.1:{self.tezzeret.port}", config)))
        self.database = await enter(Database.open(self.database_url))
        await self.ready()

    async def ready(self) -> None:
        """Return when the compiler has made a kernel: its workers are warm."""
        self.warmed.append(await self.ask(*specs(900_000 + len(self.warmed), 1)))
        [job] = await self.ended(self.warmed[-1:])
        assert job.phase is JobPhase.SUCCEEDED, job

    def workers(self) -> list[psutil.Process]:
        """Give the worker processes that live."""
        return [one for one in self.tezzeret.process.children() if one.status() != psutil.STATUS_ZOMBIE]

    def _stop_nats(self) -> None:
        self.nats.stop()  # the newest of them

    def restart_nats(self) -> None:
        """Have its server started again where it stood."""
        self.nats = NatsServer(
            NatsServerConfig(store_dir=self.directory / "nats", port=int(self.nats.url.split(":")[-1]))
        )
        self.nats.start()

    async def patiently(self, method: str, request: Any, limit_s: float = 90.0) -> Any:
        """Call the compiler, again and again while it cannot answer; every call of it is idempotent."""
        end_s = time.monotonic() + limit_s
        while True:
            with contextlib.suppress(*AWAY):
                return await getattr(self.compiler, method)(request, timeout=10)
            assert time.monotonic() < end_s, f"{method} was not answered\n{self.tezzeret.words()}"
            await asyncio.sleep(4 * TICK_S)

    async def ask(self, spec: CompileSpec, run_id: str = "") -> str:
        """Ask for a kernel until the compiler has the job; gives its id."""
        request = pb.CompileRequest(spec=to_message(spec, pb.CompileSpec), run_id=run_id)
        return str((await self.patiently("Compile", request)).job.job_id)

    async def phases(self, job_id: str) -> AsyncIterator[CompileJob]:
        """Follow a job to its end, through whatever happens to the compiler."""
        last: CompileJob | None = None
        while last is None or last.phase not in ENDED_PHASES:
            with contextlib.suppress(*AWAY):
                async for answer in self.compiler.WatchJob(pb.WatchJobRequest(job_id=job_id), timeout=90):
                    last = from_wire(answer.job, CompileJob)
                    yield last
            await asyncio.sleep(TICK_S)

    async def ended(self, job_ids: Sequence[str], limit_s: float = 90.0) -> list[CompileJob]:
        """Give the jobs once all of them have ended."""
        end_s = time.monotonic() + limit_s
        found: list[CompileJob] = []
        for job_id in job_ids:
            while True:
                answer = await self.patiently("GetJob", pb.GetJobRequest(job_id=job_id))
                job = from_wire(answer.job, CompileJob)
                if job.phase in ENDED_PHASES:
                    break
                assert time.monotonic() < end_s, f"not ended: {job}\n{self.tezzeret.words()}"
                await asyncio.sleep(TICK_S)
            found.append(job)
        return found

    async def clients(self, asked: Sequence[CompileSpec], num_clients: int, first_run: str) -> dict[str, set[str]]:
        """Have clients ask for overlapping parts of the kernels at once; gives the runs that asked for each job."""
        askers: dict[str, set[str]] = {}

        async def client(number: int) -> None:
            run_id = f"{first_run}-{number}"
            for place in range(4):
                job_id = await self.ask(asked[(number + place * 5) % len(asked)], run_id)
                askers.setdefault(job_id, set()).add(run_id)

        await asyncio.gather(*(client(number) for number in range(num_clients)))
        return askers

    async def account(self, asked: Sequence[CompileSpec], askers: dict[str, set[str]]) -> Counter[JobPhase]:
        """Hold every job to its promise once all have ended; gives how many ended how."""
        jobs = {job.job_id: job for job in await self.ended(list(askers))}
        by_key = {content_key(spec): spec for spec in asked}
        assert {job.content_key for job in jobs.values()} <= by_key.keys()
        answer = await self.patiently("ListDeadLetters", pb.ListDeadLettersRequest(page_size=500))
        dead = {one.job_id for one in answer.jobs}
        for job in jobs.values():
            assert job.phase in (JobPhase.SUCCEEDED, JobPhase.DEAD), job
            assert (job.phase is JobPhase.DEAD) == (job.job_id in dead)
            if job.phase is JobPhase.SUCCEEDED:
                await self._has_one_whole_kernel(job, by_key[job.content_key])
        await self._settled(jobs)
        for run_id in sorted(set().union(*askers.values())):
            wanted = Counter(job_id for job_id, runs in askers.items() if run_id in runs)
            assert await self._told(run_id, sum(wanted.values())) == wanted
        return Counter(job.phase for job in jobs.values())

    async def _has_one_whole_kernel(self, job: CompileJob, spec: CompileSpec) -> None:
        data = await UrzaTier(self.library).read(job.artifact_id)
        kernel = verify(data, self.key.ring(), artifact_id=job.artifact_id)
        assert (kernel.ir, kernel.manifest.content_key) == (spec.ir, job.content_key)
        load_weights(build_kernel(kernel.ir, kernel.manifest.site, _PLACEMENT), kernel.weights)
        found = await self.library.GetKernel(urza_pb.GetKernelRequest(content_key=job.content_key), timeout=10)
        assert found.manifest.artifact_id == job.artifact_id

    async def _settled(self, jobs: dict[str, CompileJob]) -> None:
        """See that nothing is left on its way, and that no job ended twice."""
        ends = [int(phase) for phase in ENDED_PHASES]
        count = select(PhaseRow.job_id, func.count()).where(PhaseRow.phase.in_(ends)).group_by(PhaseRow.job_id)
        async with asyncio.timeout(30):
            while True:
                async with self.database.reading() as session:
                    ended = {row[0]: row[1] for row in (await session.execute(count)).all()}
                    kept = (await session.scalars(select(OutboxRow.job_id))).all()
                    untold = (await session.scalars(select(AskerRow.job_id).where(~AskerRow.announced))).all()
                if not kept and not untold:
                    break
                await asyncio.sleep(TICK_S)
        assert {job_id: ended[job_id] for job_id in jobs} == dict.fromkeys(jobs, 1)

    async def _told(self, run_id: str, count: int) -> Counter[str]:
        subject = build_subject(run_id, "kernel")
        async with asyncio.timeout(30):
            while True:
                found = [message async for message in self.bus.replay(subject, stream=EVENTS.name)]
                if len(found) >= count:
                    return Counter(parse(message.payload, KernelReady).job_id for message in found)
                await asyncio.sleep(TICK_S)


async def _urza(settings: dict[str, Any]) -> None:
    directory = Path(settings["directory"])
    key = SigningKey.load_or_create(directory / "keys")
    config = UrzaConfig(database_url=f"sqlite:///{directory}/urza.db", seed_templates=False)
    async with UrzaService(config, key_ring=key.ring()) as library:
        server = MeshServer(ServerConfig(port=settings["port"]))
        library.add_to(server)
        await server.serve_until_signal()


async def _tezzeret(settings: dict[str, Any]) -> None:
    directory = Path(settings["directory"])
    async with AsyncExitStack() as leaving:
        bus = await leaving.enter_async_context(await NatsBus.connect(settings["nats_url"]))
        channel = open_channel(f"127.0.0.1:{settings['urza_port']}")
        urza = UrzaServiceStub(await leaving.enter_async_context(channel))
        database = await leaving.enter_async_context(Database.open(settings["database_url"]))
        pool = WorkerPool(WorkerPoolConfig(scratch_dir=directory, num_workers=settings["num_workers"]))
        leaving.push_async_callback(pool.close)
        key = SigningKey.load_or_create(directory / "keys")
        config = TezzeretConfig(**settings["config"])
        service = TezzeretService(JobStore(database), bus, pool, urza, key, config)
        await service.start()
        leaving.push_async_callback(service.close)
        server = MeshServer(ServerConfig(port=settings["port"]))
        register(server, service)
        await server.serve_until_signal()


def main() -> None:
    """Be one process of the plane."""
    logging.basicConfig(level=logging.WARNING)
    kind, settings = sys.argv[1:]
    try:
        asyncio.run({"urza": _urza, "tezzeret": _tezzeret}[kind](json.loads(settings)))
    except EsperError as error:
        sys.exit(f"{kind}: {error}")


if __name__ == "__main__":
    main()

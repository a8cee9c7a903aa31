"""A library whose PostgreSQL is killed says so, and works again once that is back, without a start of its own."""

from __future__ import annotations

import asyncio
import dataclasses
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, Self

import httpx
import pytest
from sqlalchemy import text

from esper.contracts import wire
from esper.contracts.blueprint import BlueprintMetadata, BlueprintState, Lineage
from esper.contracts.chunks import split
from esper.contracts.errors import EsperError, UnavailableError
from esper.contracts.wire import to_message
from esper.execution.artifact import verify
from esper.execution.keys import SigningKey
from esper.execution.tier_urza import UrzaTier
from esper.mesh import ChannelConfig, MeshServer, ServerConfig, open_channel
from esper.mesh.database import Database
from esper.mesh.health import check_health
from esper.services.urza.server import UrzaConfig, UrzaService
from esper.telemetry.memory_bus import MemoryBroker, MemoryBus
from esper.telemetry.subjects import Kind, build_subject
from esper.testing.urza_samples import field_report, graph, kernel_bytes
from esper.v1 import blueprint_pb2, telemetry_pb2
from esper.v1 import urza_service_pb2 as pb
from esper.v1.urza_service_pb2_grpc import UrzaServiceStub
from tests.chaos.compile_processes import TICK_S
from tests.chaos.postgres_process import PostgresProcess, postgres_process

pytestmark = [pytest.mark.chaos, pytest.mark.slow, pytest.mark.timeout(400)]

KEY = SigningKey.generate()
PATIENT_S = 60.0
ENOUGH = 5
"""Answers of every kind that each part of the test waits for."""
BLUEPRINT_ID = "ab" * 32
"""What the field reports are about."""


@pytest.fixture
def postgres() -> Iterator[PostgresProcess]:
    with postgres_process("library") as server:
        yield server


@pytest.fixture
async def bus() -> AsyncIterator[MemoryBus]:
    async with MemoryBus(MemoryBroker()) as bus:
        await bus.ensure_streams()
        yield bus


@pytest.fixture
async def urza(postgres: PostgresProcess, bus: MemoryBus) -> AsyncIterator[UrzaService]:
    config = UrzaConfig(database_url=postgres.url, rest=True, rest_port=0)
    async with UrzaService(config, bus=bus, key_ring=KEY.ring()) as service:
        yield service


@pytest.fixture
async def address(urza: UrzaService) -> AsyncIterator[str]:
    server = MeshServer(ServerConfig(probe_interval_s=0.2))
    urza.add_to(server)
    async with server:
        yield server.address


async def until(reached: Callable[[], bool | Awaitable[bool]], what: str) -> None:
    """Return once a condition holds that nothing tells of."""
    async with asyncio.timeout(PATIENT_S):
        while True:
            answer = reached()
            if answer if isinstance(answer, bool) else await answer:
                return
            await asyncio.sleep(TICK_S)
    raise AssertionError(what)


class Clients:
    """Ask and submit without a pause from the beginning to the end, each call numbered within its kind."""

    def __init__(self, stub: Any) -> None:
        self._stub = stub
        self._kinds = (self.search, self.get, self.create, self.upload, self.report)
        self._tasks: list[asyncio.Task[None]] = []
        self.answered: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.tried: Counter[str] = Counter()
        self.errors: list[EsperError] = []
        self.created: set[str] = set()
        self.uploaded: set[str] = set()

    async def __aenter__(self) -> Self:
        self._tasks = [asyncio.create_task(self._go_on(kind)) for kind in self._kinds]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        ended = await asyncio.gather(*self._tasks, return_exceptions=True)
        assert [one for one in ended if not isinstance(one, asyncio.CancelledError)] == []

    async def enough(self, counted: Counter[str]) -> None:
        """Return once every kind was counted some times more."""
        goal = {kind.__name__: counted[kind.__name__] + ENOUGH for kind in self._kinds}
        await until(lambda: all(counted[name] >= least for name, least in goal.items()), f"{goal} of {counted}")

    async def _go_on(self, kind: Callable[[int], Awaitable[None]]) -> None:
        name = kind.__name__
        while True:
            self.tried[name] += 1
            try:
                await kind(self.tried[name])
            except EsperError as error:
                self.refused[name] += 1
                self.errors.append(error)
            else:
                self.answered[name] += 1
            await asyncio.sleep(TICK_S / 5)

    async def search(self, _: int) -> None:
        found = await self._stub.SearchBlueprints(pb.SearchBlueprintsRequest(all_tags=["validated"]), timeout=20)
        assert len(found.blueprints) > 5

    async def get(self, _: int) -> None:
        found = await self._stub.GetBlueprint(pb.GetBlueprintRequest(reference="lora"), timeout=20)
        assert found.blueprint.state == blueprint_pb2.BLUEPRINT_STATE_ACTIVE

    async def create(self, number: int) -> None:
        request = pb.CreateBlueprintRequest(
            name="made",
            ir=to_message(graph(number), blueprint_pb2.BlueprintIR),
            metadata=to_message(BlueprintMetadata(tags=["made", "tried"]), blueprint_pb2.BlueprintMetadata),
            lineage=to_message(Lineage(operator="mutation", author="karn"), blueprint_pb2.Lineage),
        )
        self.created.add((await self._stub.CreateBlueprint(request, timeout=20)).blueprint.id)

    async def upload(self, number: int) -> None:
        chunks = split(kernel_bytes(KEY, number, weight_floats=70_000))
        requests = (pb.UploadKernelRequest(**dataclasses.asdict(chunk)) for chunk in chunks)
        self.uploaded.add((await self._stub.UploadKernel(requests, timeout=20)).artifact_id)

    async def report(self, number: int) -> None:
        said = field_report(f"r{number}", blueprint_id=BLUEPRINT_ID, estimate=0.5)
        request = pb.RecordFieldReportRequest(report=to_message(said, telemetry_pb2.FieldReport))
        await self._stub.RecordFieldReport(request, timeout=20)

    async def again(self) -> None:
        """Submit everything that was ever tried once more; every call of it is idempotent."""
        for kind in (self.create, self.upload, self.report):
            for number in range(1, self.tried[kind.__name__] + 1):
                await kind(number)


async def test_a_library_outlives_its_postgresql(
    postgres: PostgresProcess, bus: MemoryBus, urza: UrzaService, address: str
) -> None:
    async with (
        open_channel(address, ChannelConfig(retry_attempts=1, breaker_failures=0)) as channel,
        httpx.AsyncClient(base_url=str(urza.rest_url), timeout=20) as rest,
    ):
        clients = Clients(UrzaServiceStub(channel))
        async with clients:
            await clients.enough(clients.answered)
            assert not clients.errors
            assert await _is_serving(channel)
            for number in range(2):
                await asyncio.to_thread(postgres.kill)
                await clients.enough(clients.refused)
                await until(lambda: _negated(_is_serving(channel)), "health says that it does not serve")
                assert (await rest.get("/healthz")).status_code == 200
                for answer in (await rest.get("/readyz"), await rest.get("/v1/blueprints/lora")):
                    assert (answer.status_code, answer.json()["reason"]) == (503, "UNAVAILABLE")
                said = field_report(f"bus-{number}", blueprint_id=BLUEPRINT_ID, estimate=0.5)
                await bus.publish(build_subject("run-1", Kind.FIELD_REPORT), wire.serialize(said), durable=True)
                await asyncio.to_thread(postgres.start)
                await clients.enough(clients.answered)
                await until(lambda: _is_serving(channel), "health says that it serves")
                assert (await rest.get("/readyz")).status_code == 200
        assert {type(error) for error in clients.errors} == {UnavailableError}
        await _assert_whole(clients, postgres.url, urza, channel)
    await urza.ready()


async def _assert_whole(clients: Clients, url: str, urza: UrzaService, channel: Any) -> None:
    """Everything that was answered is there, nothing is there by halves, and what was refused can be sent again."""
    async with Database.open(url) as database:
        assert await _halves(database) == []
    await clients.again()
    assert len(clients.created) == clients.tried["create"]
    assert len(clients.uploaded) == clients.tried["upload"]
    newest = await urza.store.blueprints.get("made")
    assert newest.version == clients.tried["create"]
    assert (await urza.store.blueprints.get("lora")).state is BlueprintState.ACTIVE
    for artifact_id in sorted(clients.uploaded):
        verify(await UrzaTier(UrzaServiceStub(channel)).read(artifact_id), KEY.ring(), artifact_id=artifact_id)
    wanted = clients.tried["report"] + 2

    async def counted() -> bool:
        statistics = await urza.store.reports.statistics(BLUEPRINT_ID)
        return statistics is not None and statistics.trials == wanted

    await until(counted, f"{wanted} field reports are counted")


async def _halves(database: Database) -> list[tuple[Any, ...]]:
    """Give what a write that was cut off would have left: rows without those that come with them."""
    statements = (
        "SELECT 'tags', b.name, b.version FROM urza_blueprints b WHERE b.name = 'made' AND 2 <> "
        "(SELECT count(*) FROM urza_blueprint_tags t WHERE t.blueprint_id = b.id)",
        "SELECT 'costs', b.name, b.version FROM urza_blueprints b WHERE NOT EXISTS "
        "(SELECT 1 FROM urza_blueprint_costs c WHERE c.blueprint_id = b.id)",
        "SELECT 'history', b.name, b.version FROM urza_blueprints b WHERE NOT EXISTS "
        "(SELECT 1 FROM urza_state_changes c WHERE c.blueprint_id = b.id)",
        "SELECT 'versions', n.name, n.newest_version FROM urza_blueprint_names n WHERE n.newest_version <> "
        "(SELECT count(*) FROM urza_blueprints b WHERE b.name = n.name)",
        "SELECT 'total', t.name, t.total FROM urza_totals t WHERE t.name = 'blueprints' AND t.total <> "
        "(SELECT count(*) FROM urza_blueprints)",
        "SELECT 'bytes', k.artifact_id, k.size_bytes FROM urza_kernels k WHERE k.size_bytes <> "
        "(SELECT coalesce(sum(length(c.data)), 0) FROM urza_kernel_chunks c WHERE c.artifact_id = k.artifact_id)",
        "SELECT 'reports', s.blueprint_id, s.trials FROM urza_statistics s WHERE s.trials <> "
        "(SELECT count(*) FROM urza_field_reports r WHERE r.blueprint_id = s.blueprint_id)",
    )
    async with database.reading() as session:
        return [tuple(row) for one in statements for row in (await session.execute(text(one))).all()]


async def _is_serving(channel: Any) -> bool:
    return await check_health(channel, "esper.v1.UrzaService", 5.0)


async def _negated(answer: Awaitable[bool]) -> bool:
    return not await answer

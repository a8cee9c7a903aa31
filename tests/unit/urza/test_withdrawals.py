"""Who is told that the library no longer offers a kernel, and that it reaches what holds one near."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator

import pytest

import esper
from esper.contracts.blueprint import BlueprintState
from esper.contracts.errors import InvalidInputError, NotFoundError, UnavailableError
from esper.execution.tiers import TieredKernelSource
from esper.execution.withdrawals import SUBJECT, WithdrawalFollower, tell_withdrawn
from esper.services.urza.retention import RetentionPolicy
from esper.services.urza.rules import BlueprintDraft
from esper.services.urza.server import UrzaConfig, UrzaService
from esper.telemetry import MemoryBroker, MemoryBus
from esper.testing.urza_kernel_contract import KEY
from esper.testing.urza_samples import graph, kernel_bytes


class Holder:
    """Writes down what it is to let go of, and refuses the first when told to."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str]] = []
        self.refuses = False
        self._heard = asyncio.Condition()

    async def withdraw(self, artifact_id: str, reason: str) -> None:
        if self.refuses:
            self.refuses = False
            raise InvalidInputError.of("artifact_id", "be an artefact id", artifact_id)
        async with self._heard:
            self.told.append((artifact_id, reason))
            self._heard.notify_all()

    async def wait(self, count: int) -> None:
        async with asyncio.timeout(30), self._heard:
            await self._heard.wait_for(lambda: len(self.told) >= count)


class World:
    """A library and what follows it, on one bus."""

    def __init__(self, library: UrzaService, holder: Holder, bus: MemoryBus) -> None:
        self.library, self.holder, self.bus = library, holder, bus

    async def kernel(self, number: int, blueprint: int = 0) -> str:
        record, _ = await self.library.store.kernels.put(kernel_bytes(KEY, number, blueprint=blueprint))
        return record.artifact_id


@pytest.fixture
async def world() -> AsyncIterator[World]:
    broker, holder = MemoryBroker(), Holder()
    bus = MemoryBus(broker)
    await bus.ensure_streams()
    policy = RetentionPolicy(keep_unreferenced_days=0, max_bytes=1, keep_young_days=0, keep_reported_days=0)
    config = UrzaConfig(database_url="sqlite://", seed_templates=False, retention=policy, sweep_interval_s=0)
    follower = WithdrawalFollower(MemoryBus(broker), holder)
    await follower.start()
    async with UrzaService(config, bus=bus, key_ring=KEY.ring()) as library:
        yield World(library, holder, bus)
    await follower.close()
    await follower.close()
    await bus.close()


async def test_kernels_that_are_removed_or_swept_are_told_of_once(world: World) -> None:
    removed, swept = await world.kernel(0), await world.kernel(1)
    assert await world.library.store.kernels.remove(removed)
    assert not await world.library.store.kernels.remove(removed)
    assert (await world.library.store.retention.sweep()).kernel_ids == (swept,)
    await world.holder.wait(2)
    assert world.holder.told == [(removed, "removed from the library"), (swept, "swept from the library")]


async def test_kernels_of_a_blueprint_are_told_of_when_it_is_deprecated_and_when_it_retires(world: World) -> None:
    blueprints = world.library.store.blueprints
    blueprint, _ = await blueprints.create(BlueprintDraft(name="b", ir=graph(0), state=BlueprintState.ACTIVE))
    its, _other = await world.kernel(0), await world.kernel(1, blueprint=1)
    for state in (BlueprintState.DEPRECATED, BlueprintState.DEPRECATED, BlueprintState.RETIRED):
        await blueprints.set_state(blueprint.id, state, actor="ann", reason="slow")
    await world.holder.wait(2)
    assert world.holder.told == [(its, "its blueprint is deprecated"), (its, "its blueprint is retired")]


async def test_what_cannot_be_read_or_let_go_of_keeps_nothing_else_from_it(world: World) -> None:
    await world.bus.publish(SUBJECT, b"\xff no message")
    world.holder.refuses = True
    await tell_withdrawn(world.bus, ["k1", "k2"], "why not")
    await world.holder.wait(1)
    assert world.holder.told == [("k2", "why not")]


async def test_a_bus_that_is_away_costs_the_library_nothing(world: World, caplog: pytest.LogCaptureFixture) -> None:
    class Away(MemoryBus):
        async def publish(self, *_: object, **__: object) -> None:
            raise UnavailableError("no bus")

    await tell_withdrawn(Away(MemoryBroker()), ["k1"], "why not")
    assert "withdrawal_untold" in caplog.text


def test_a_process_that_holds_a_kernel_lets_go_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    let_go, withdraw = threading.Event(), TieredKernelSource.withdraw

    async def noted(source: TieredKernelSource, artifact_id: str, reason: str) -> None:
        await withdraw(source, artifact_id, reason)
        let_go.set()

    monkeypatch.setattr(TieredKernelSource, "withdraw", noted)
    with esper.Mesh.embedded() as mesh:
        ring_key = mesh._backend._key
        library = next(node for node in mesh._backend._nodes if isinstance(node, UrzaService))
        store = library.store.kernels
        record, _ = mesh._loop.run(store.put(kernel_bytes(ring_key)), 30.0)
        mesh.fetch_kernel(record.artifact_id)
        source = mesh.kernel_source._source
        assert source.cached(record.artifact_id) is not None
        mesh._loop.run(store.remove(record.artifact_id), 30.0)
        assert let_go.wait(30.0)
        assert source.cached(record.artifact_id) is None
        with pytest.raises(NotFoundError, match=f"no cache tier has kernel {record.artifact_id}"):
            mesh.fetch_kernel(record.artifact_id)

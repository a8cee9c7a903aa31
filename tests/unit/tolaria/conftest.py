"""What Tolaria's unit tests share: packets of a run, and a node on an in-process bus behind an in-process channel."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from esper.contracts.lifecycle import SeedLifecycleState
from esper.contracts.run import HealthSummary, LayerStatus, RunPhase, SeedEvent, SeedStatus, SystemStatePacket
from esper.contracts.wire import to_wire
from esper.mesh import InProcessChannel
from esper.services.tolaria.server import TolariaNode
from esper.telemetry import MemoryBroker, MemoryBus, build_subject
from esper.telemetry.bus import CONTENT_TYPE_HEADER
from esper.telemetry.consumer import content_type
from esper.telemetry.subjects import Kind
from esper.v1.tolaria_service_pb2_grpc import TolariaServiceStub

MOMENT = datetime(2026, 1, 1, 12, 0, 0, 123_457, tzinfo=UTC)


def packet_of(sequence: int = 1, run_id: str = "run-1", **changes: Any) -> SystemStatePacket:
    """Give a state packet; each next one is a second younger."""
    seed = SeedStatus(seed_index=0, state=SeedLifecycleState.DORMANT)
    values: dict[str, Any] = {
        "run_id": run_id,
        "sequence": sequence,
        "phase": RunPhase.TRAINING,
        "epoch": sequence,
        "step": 10 * sequence,
        "layers": tuple(
            LayerStatus(layer=name, site=None, health=HealthSummary(), seeds=(seed,)) for name in ("body", "head")
        ),
        "created_at": MOMENT + timedelta(seconds=sequence),
    }
    return SystemStatePacket(**(values | changes))


def seed_event(adaptation_id: str = "a" + "1" * 32, **changes: Any) -> SeedEvent:
    """Give one step of a seed."""
    values: dict[str, Any] = {
        "run_id": "run-1",
        "adaptation_id": adaptation_id,
        "layer": "body",
        "seed_index": 0,
        "from_state": SeedLifecycleState.DORMANT,
        "to_state": SeedLifecycleState.LOADING,
        "step": 1,
        "epoch": 0,
        "alpha": 0.0,
        "reason": "accepted",
        "created_at": MOMENT,
    }
    return SeedEvent(**(values | changes))


class Control:
    """Tolaria on a bus, with its stub."""

    def __init__(self) -> None:
        self.bus = MemoryBus(MemoryBroker())
        self.node: TolariaNode
        self.stub: Any

    async def open(self) -> None:
        await self.bus.ensure_streams()
        self.node = await TolariaNode.open(bus=self.bus)
        channel = InProcessChannel()
        self.node.add_to(_ForChannel(channel))
        self.stub = TolariaServiceStub(channel)

    async def close(self) -> None:
        await self.node.close()
        await self.bus.close()

    async def publish(self, kind: Kind, value: Any, run_id: str = "run-1", payload: bytes | None = None) -> None:
        """Say something as a run does."""
        message = value if hasattr(value, "SerializeToString") else to_wire(value)
        await self.bus.publish(
            build_subject(run_id, kind),
            message.SerializeToString() if payload is None else payload,
            headers={CONTENT_TYPE_HEADER: content_type(type(message))},
            durable=True,
        )

    async def say_state(self, packet: SystemStatePacket) -> None:
        """Publish a packet and return once Tolaria has it."""
        await self.publish(Kind.STATE, packet, packet.run_id)
        await self.until(lambda: self._has(packet))

    async def _has(self, packet: SystemStatePacket) -> bool:
        run = await self.node.store.run(packet.run_id)
        return run is not None and run.packet.sequence >= packet.sequence

    async def until(self, condition: Callable[[], Any]) -> None:
        """Return once an asynchronous condition holds, or fail."""
        async with asyncio.timeout(10):
            while not await condition():  # each look asks the store, so the loop has time for everything else
                pass


class _ForChannel:
    def __init__(self, channel: InProcessChannel) -> None:
        self._channel = channel

    def add_servicer(self, registrar: Any, servicer: object, *, ready: Any = ()) -> tuple[str, ...]:
        assert ready, "readiness must be asked of the store and the bus"
        return self._channel.add_servicer(registrar, servicer)


@pytest.fixture
async def control() -> AsyncIterator[Control]:
    one = Control()
    await one.open()
    yield one
    await one.close()


@pytest.fixture
def packet() -> Callable[..., SystemStatePacket]:
    return packet_of


@pytest.fixture
def event() -> Callable[..., SeedEvent]:
    return seed_event

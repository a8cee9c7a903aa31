from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator

import pytest

from esper.contracts.errors import InvalidInputError, UnavailableError
from esper.telemetry.bus import Bus
from esper.telemetry.memory_bus import MemoryBroker, MemoryBus
from esper.telemetry.streams import COMPILE
from esper.telemetry.subjects import compile_job_subject
from esper.testing.bus_contract import BusContract, OpenBus


class TestMemoryBus(BusContract):
    @pytest.fixture
    async def open_bus(self) -> AsyncIterator[OpenBus]:
        broker = MemoryBroker()
        opened: list[Bus] = []

        async def open_one() -> Bus:
            opened.append(MemoryBus(broker))
            return opened[-1]

        yield open_one
        for bus in opened:
            await bus.close()


def test_connections_on_loops_of_different_threads_share_one_broker() -> None:
    broker = MemoryBroker()
    ready = threading.Event()
    got: list[bytes] = []

    async def serve() -> None:
        async with MemoryBus(broker) as bus, asyncio.timeout(20):
            await bus.ensure_streams()
            consumer = await bus.consume(COMPILE.name, "workers")
            health = await bus.subscribe("esper.v1.*.health")
            ready.set()
            for _ in range(50):
                delivery = await anext(consumer)
                got.append(delivery.message.payload)
                await delivery.ack()
            got.append((await anext(health)).payload)

    service = threading.Thread(target=lambda: asyncio.run(serve()))
    service.start()

    async def train() -> None:
        async with MemoryBus(broker) as bus:
            for number in range(50):
                await bus.publish(compile_job_subject("cpu"), b"%d" % number, durable=True)
            await bus.publish("esper.v1.run-1.health", b"last")

    assert ready.wait(10)
    asyncio.run(train())
    service.join(20)
    assert got == [*(b"%d" % number for number in range(50)), b"last"]


async def test_a_closed_bus_says_so() -> None:
    bus = MemoryBus()
    await bus.close()
    with pytest.raises(UnavailableError, match="the in-process bus is closed"):
        await bus.publish("esper.v1.run-1.health", b"")


def test_a_broker_needs_room_for_a_payload() -> None:
    with pytest.raises(InvalidInputError, match="max_payload_bytes must be > 0, got 0"):
        MemoryBroker(max_payload_bytes=0)

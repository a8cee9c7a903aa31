from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from esper.contracts.errors import CorruptDataError, InvalidInputError
from esper.telemetry.bus import CONTENT_TYPE_HEADER, DEAD_REASON_HEADER, BusMessage
from esper.telemetry.consumer import (
    PUBLISHER_HEADER,
    content_type,
    decode,
    decode_any,
    durable_messages,
    health_batches,
    messages,
    replay_run,
)
from esper.telemetry.memory_bus import MemoryBroker, MemoryBus
from esper.telemetry.streams import DEAD, EVENTS
from esper.telemetry.subjects import Kind, build_subject, dead_subject, kind_patterns
from esper.v1.telemetry_pb2 import HealthBatch, SeedEvent, SystemStatePacket

SEED = build_subject("run-1", "seed", "layer1")
HEALTH = build_subject("run-1", "health")
GARBAGE = b"\xff\xff\xff"


@pytest.fixture
async def bus() -> AsyncIterator[MemoryBus]:
    async with MemoryBus(MemoryBroker()) as bus, asyncio.timeout(20):
        await bus.ensure_streams()
        yield bus


def typed(message: SeedEvent | SystemStatePacket | HealthBatch) -> dict[str, str]:
    return {CONTENT_TYPE_HEADER: content_type(type(message))}


async def keep(bus: MemoryBus, message: SeedEvent | SystemStatePacket, subject: str = SEED) -> None:
    await bus.publish(subject, message.SerializeToString(), headers=typed(message), durable=True)


async def test_what_cannot_be_read_is_passed_over_and_counted(bus: MemoryBus) -> None:
    events = await messages(bus, SEED, SeedEvent)
    await bus.publish(SEED, GARBAGE)
    await bus.publish(SEED, SystemStatePacket().SerializeToString(), headers=typed(SystemStatePacket()))
    await bus.publish(SEED, SeedEvent(step=7).SerializeToString())
    received = await anext(events)
    assert (received.message.step, received.subject.layer, received.delivery) == (7, "layer1", None)
    assert events.undecodable == 2
    assert events.dropped == 0
    await events.close()


async def test_what_cannot_be_read_goes_to_the_dead_letters_and_the_rest_goes_on(bus: MemoryBus) -> None:
    consumer = await durable_messages(bus, EVENTS.name, "nissa", SeedEvent, subject_filter=kind_patterns(Kind.SEED))
    await bus.publish(SEED, GARBAGE, durable=True)
    await keep(bus, SeedEvent(step=7))
    received = await anext(consumer)
    assert received.message.step == 7
    assert consumer.undecodable == 1
    [dead] = [message async for message in bus.replay(dead_subject("EVENTS"), stream=DEAD.name)]
    assert dead.payload == GARBAGE
    assert dead.headers[DEAD_REASON_HEADER] == "payload must be a esper.v1.SeedEvent, got 3 other bytes"
    await consumer.close()


async def test_a_consumer_without_a_type_takes_every_message_of_ours(bus: MemoryBus) -> None:
    consumer = await durable_messages(bus, EVENTS.name, "nissa", decode_any)
    await keep(bus, SeedEvent(step=7))
    await keep(bus, SystemStatePacket(epoch=3), build_subject("run-1", "state"))
    seed, state = await anext(consumer), await anext(consumer)
    assert isinstance(seed.message, SeedEvent)
    assert isinstance(state.message, SystemStatePacket)
    assert state.delivery is not None
    await state.delivery.ack()


async def test_a_run_is_replayed_typed_and_in_order(bus: MemoryBus) -> None:
    await keep(bus, SeedEvent(step=1))
    await keep(bus, SystemStatePacket(epoch=1), build_subject("run-1", "state"))
    await keep(bus, SeedEvent(step=2), build_subject("run-2", "seed"))
    replayed = [received async for received in replay_run(bus, "run-1")]
    assert [type(received.message).__name__ for received in replayed] == ["SeedEvent", "SystemStatePacket"]
    assert [received.subject.kind for received in replayed] == [Kind.SEED, Kind.STATE]


async def test_a_replay_with_a_hole_is_an_error(bus: MemoryBus) -> None:
    await bus.publish(SEED, GARBAGE, durable=True)
    with pytest.raises(CorruptDataError, match=r"content type must name a message of esper\.v1"):
        _ = [received async for received in replay_run(bus, "run-1")]


@pytest.mark.parametrize(
    "named",
    [
        "",
        "application/protobuf",
        "application/protobuf; proto=google.protobuf.Any",
        "application/protobuf; proto=esper.v1.No",
    ],
)
def test_a_foreign_content_type_names_no_class(named: str) -> None:
    raw = BusMessage(subject=SEED, payload=b"", headers={CONTENT_TYPE_HEADER: named})
    with pytest.raises(CorruptDataError, match=r"content type must name a message of esper\.v1"):
        decode_any(raw)


def test_a_message_of_another_type_is_not_read_as_this_one() -> None:
    raw = BusMessage(subject=SEED, payload=b"", headers=typed(SystemStatePacket()))
    with pytest.raises(CorruptDataError, match=r"proto=esper\.v1\.SeedEvent, got .*proto=esper\.v1\.SystemStatePacket"):
        decode(raw, SeedEvent)


async def test_health_batches_come_once_each_with_the_losses_counted(bus: MemoryBus) -> None:
    batches = await health_batches(bus, "run-1")
    for sequence, publisher in [(1, "a"), (2, "a"), (2, "a"), (1, "a"), (6, "a"), (1, "b"), (2, "b")]:
        headers = {**typed(HealthBatch()), PUBLISHER_HEADER: publisher}
        await bus.publish(HEALTH, HealthBatch(run_id="run-1", sequence=sequence).SerializeToString(), headers=headers)
    got = [(await anext(batches)).message.sequence for _ in range(5)]
    assert got == [1, 2, 6, 1, 2]
    assert (batches.repeated, batches.lost, batches.undecodable) == (2, 3, 0)
    await batches.close()


async def test_a_bound_below_one_is_refused(bus: MemoryBus) -> None:
    with pytest.raises(InvalidInputError, match="max_pending must be >= 1, got 0"):
        await health_batches(bus, max_pending=0)

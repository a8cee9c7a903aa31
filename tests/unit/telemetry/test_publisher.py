from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import numpy as np
import pytest

from esper.contracts.errors import InvalidInputError, InvalidStateError, NotFoundError, UnavailableError
from esper.telemetry.bus import Bus
from esper.telemetry.consumer import health_batches, replay_run
from esper.telemetry.health_wire import health_columns
from esper.telemetry.mailbox import Mail
from esper.telemetry.memory_bus import MemoryBroker, MemoryBus
from esper.telemetry.memory_streams import Streams
from esper.telemetry.outbox import HealthBox
from esper.telemetry.publisher import OonaPublisher, PublisherConfig
from esper.telemetry.streams import DEAD, EVENTS
from esper.telemetry.subjects import build_subject, dead_subject
from esper.v1.decision_pb2 import ControlMessage, ControlResult
from esper.v1.telemetry_pb2 import FieldReport, SeedEvent, SystemStatePacket

Eventually = Callable[[Callable[[], bool]], None]
SEED = build_subject("run-1", "seed", "layer1")
DECISION = build_subject("run-1", "decision")
CONTROL = build_subject("run-1", "control")


@pytest.fixture
def broker() -> MemoryBroker:
    return MemoryBroker()


@pytest.fixture
def connect(broker: MemoryBroker) -> Callable[[], Any]:
    async def open_bus() -> Bus:
        return MemoryBus(broker)

    return open_bus


@pytest.fixture
def publisher(source: Any) -> Iterator[OonaPublisher]:
    publisher = OonaPublisher("run-1", source=source, config=PublisherConfig(poll_interval_ms=5))
    yield publisher
    publisher.close()


@pytest.fixture
async def reader(broker: MemoryBroker) -> AsyncIterator[MemoryBus]:
    async with MemoryBus(broker) as bus:
        await bus.ensure_streams()
        yield bus


async def test_signals_arrive_as_batches_with_the_layer_names(
    publisher: OonaPublisher, connect: Any, source: Any, reader: MemoryBus
) -> None:
    batches = await health_batches(reader, "run-1")
    publisher.name_layers({0: "layer1"})
    source.steps.extend(range(100))
    source.dropped = 3
    publisher.start(connect)
    async with asyncio.timeout(10):
        first = (await anext(batches)).message
    columns = health_columns(first)
    assert columns["step"].tolist() == list(range(100))
    assert columns["mean"].tolist() == [0.5] * 100
    assert [(entry.layer_id, entry.layer) for entry in first.layer_index] == [(0, "layer1")]
    assert (first.run_id, first.sequence, first.ring_dropped, first.batches_dropped) == ("run-1", 1, 3, 0)
    source.steps.append(100)
    async with asyncio.timeout(10):
        second = (await anext(batches)).message
    assert (second.sequence, list(second.layer_index), list(second.steps)) == (2, [], [100])


async def test_a_batch_is_capped_in_bytes(connect: Any, source: Any, reader: MemoryBus) -> None:
    batches = await health_batches(reader)
    source.steps.extend(range(1000))
    publisher = OonaPublisher("run-1", source=source, config=PublisherConfig(max_batch_bytes=5800))
    publisher.start(connect)
    async with asyncio.timeout(10):
        sizes = [len((await anext(batches)).message.steps) for _ in range(10)]
    publisher.close()
    assert sizes == [100] * 10
    assert publisher.stats().signals_published == 1000


async def test_events_arrive_in_order_and_can_be_replayed(
    publisher: OonaPublisher, connect: Any, reader: MemoryBus
) -> None:
    for step in range(20):
        publisher.offer(SEED, SeedEvent(run_id="run-1", step=step))
    publisher.start(connect)
    publisher.close()
    replayed = [received.message async for received in replay_run(reader, "run-1")]
    assert [event.step for event in replayed if isinstance(event, SeedEvent)] == list(range(20))
    stats = publisher.stats()
    assert (stats.published, stats.dropped, stats.buffered_events, stats.lag_s) == ({"seed": 20}, {}, 0, None)


async def test_an_event_offered_twice_under_one_id_is_kept_once(
    publisher: OonaPublisher, connect: Any, reader: MemoryBus
) -> None:
    for _ in range(2):
        publisher.offer(SEED, SeedEvent(step=7), msg_id="adaptation-1:ACTIVE")
    publisher.start(connect)
    publisher.close()
    assert len([received async for received in replay_run(reader, "run-1")]) == 1


def test_offers_beyond_the_bound_drop_the_oldest_and_are_counted(connect: Any, broker: MemoryBroker) -> None:
    publisher = OonaPublisher("run-1", config=PublisherConfig(max_offers=10))
    for step in range(25):
        publisher.offer(SEED, SeedEvent(step=step))
    assert publisher.stats().dropped == {"seed": 15}
    assert publisher.stats().buffered_events == 10
    publisher.start(connect)
    publisher.close()
    stats = publisher.stats()
    assert (stats.published, stats.dropped) == ({"seed": 10}, {"seed": 15})


def test_encoded_events_beyond_the_byte_bound_are_counted(connect: Any, eventually: Eventually) -> None:
    publisher = OonaPublisher("run-1", config=PublisherConfig(max_event_buffer_bytes=4096))
    for _ in range(10):
        publisher.offer(SEED, SeedEvent(reason="x" * 1000))
    publisher.start(connect)
    publisher.close()
    stats = publisher.stats()
    assert stats.dropped["seed"] + stats.published["seed"] == 10
    assert stats.dropped["seed"] == 7


def answer_of(number: int, detail: str = "") -> ControlMessage:
    return ControlMessage(result=ControlResult(request_id=f"q{number}", detail=detail))


async def test_control_answers_go_before_what_was_offered_first(
    publisher: OonaPublisher, connect: Any, reader: MemoryBus
) -> None:
    for step in range(300):
        publisher.offer(SEED, SeedEvent(step=step))
    for number in range(3):
        publisher.offer(CONTROL, answer_of(number))
    publisher.start(connect)
    publisher.close()
    replayed = [received.message async for received in replay_run(reader, "run-1")]
    assert [one.result.request_id for one in replayed[:3] if isinstance(one, ControlMessage)] == ["q0", "q1", "q2"]
    assert [one.step for one in replayed[3:] if isinstance(one, SeedEvent)] == list(range(300))
    assert publisher.stats().published == {"control": 3, "seed": 300}


def test_a_flood_of_events_drops_no_control_answer_and_the_other_way_round(connect: Any) -> None:
    config = PublisherConfig(max_offers=10, max_event_buffer_bytes=4096, max_control_buffer_bytes=4096)
    publisher = OonaPublisher("run-1", config=config)
    for number in range(3):
        publisher.offer(CONTROL, answer_of(number))
    for _ in range(25):
        publisher.offer(SEED, SeedEvent(reason="x" * 1000))
    assert publisher.stats().dropped == {"seed": 15}
    assert publisher.stats().buffered_events == 13
    publisher.start(connect)
    publisher.close()
    stats = publisher.stats()
    assert (stats.published, stats.dropped) == ({"control": 3, "seed": 3}, {"seed": 22})
    other = OonaPublisher("run-1", config=config)
    other.offer(SEED, SeedEvent())
    for number in range(12):
        other.offer(CONTROL, answer_of(number, "x" * 1000))
    other.start(connect)
    other.close()
    stats = other.stats()
    assert (stats.published, stats.dropped) == ({"control": 3, "seed": 1}, {"control": 9})


class Told:
    """A message that notes when it is encoded, and does what a test says then."""

    DESCRIPTOR = SeedEvent.DESCRIPTOR

    def __init__(self, message: Any, note: Callable[[], None]) -> None:
        self._message = message
        self._note = note

    def SerializeToString(self) -> bytes:
        self._note()
        return bytes(self._message.SerializeToString())


def test_a_flood_that_is_being_encoded_holds_no_control_answer_up(connect: Any) -> None:
    publisher = OonaPublisher("run-1")
    encoded: list[str] = []

    def note_event() -> None:
        encoded.append("event")
        if len(encoded) == 10:
            publisher.offer(CONTROL, Told(answer_of(1), lambda: encoded.append("answer")))  # type: ignore[arg-type]

    for step in range(2000):
        publisher.offer(SEED, Told(SeedEvent(step=step), note_event))  # type: ignore[arg-type]
    publisher.start(connect)
    publisher.close()
    assert encoded.index("answer") < 1000
    assert encoded.count("event") == 2000
    assert publisher.stats().published == {"control": 1, "seed": 2000}


class HeldBus(MemoryBus):
    """A bus on which control answers wait for a gate."""

    def __init__(self, broker: MemoryBroker) -> None:
        super().__init__(broker)
        self.gate = asyncio.Event()

    async def publish(self, subject: str, payload: bytes, **named: Any) -> Any:
        if subject == CONTROL:
            await self.gate.wait()
        return await super().publish(subject, payload, **named)


async def test_mail_is_acknowledged_once_the_answers_before_it_are_out(
    publisher: OonaPublisher, broker: MemoryBroker, reader: MemoryBus, eventually: Eventually
) -> None:
    buses: list[HeldBus] = []

    async def connect() -> Bus:
        buses.append(HeldBus(broker))
        return buses[0]

    publisher.start(connect)
    box = publisher.open_durable_mailbox(EVENTS.name, "training", SystemStatePacket, subject_filter=DECISION)
    await reader.publish(DECISION, SystemStatePacket(epoch=1).SerializeToString(), durable=True)
    eventually(lambda: len(box) == 1)
    publisher.offer(CONTROL, answer_of(1))
    box.drain()[0].settle()
    publisher.offer(SEED, SeedEvent())
    eventually(lambda: publisher.stats().published == {"seed": 1})
    place = broker.streams.get(EVENTS.name).place("training", (DECISION,))
    publisher.submit(_some_looks(publisher)).result(10)
    assert len(place.pending) == 1, "the command would be lost with the answer"

    async def open_gate() -> None:
        buses[0].gate.set()

    publisher.submit(open_gate()).result(10)
    eventually(lambda: not place.pending)
    assert publisher.stats().published == {"seed": 1, "control": 1}


async def _some_looks(publisher: OonaPublisher) -> None:
    """Return when the publisher has looked at its mailboxes several times."""
    for _ in range(10):
        await asyncio.sleep(publisher.config.poll_interval_ms / 1e3)


def test_what_no_bus_takes_is_refused_and_the_rest_goes_on(connect: Any) -> None:
    publisher = OonaPublisher("run-1")
    publisher.offer("esper.v1.nowhere", SeedEvent())
    publisher.offer("esper v1 broken", SeedEvent())
    publisher.offer(SEED, "no message")  # type: ignore[arg-type]
    publisher.offer(SEED, FieldReport(reason="x" * 9_000_000))
    publisher.offer(SEED, SeedEvent())
    publisher.start(connect)
    publisher.close()
    stats = publisher.stats()
    assert stats.published == {"seed": 1}
    assert stats.refused == {"esper.v1.nowhere": 1, "esper v1 broken": 1, "seed": 2}


def test_a_source_that_fails_does_not_end_the_publisher(connect: Any, source: Any, eventually: Eventually) -> None:
    publisher = OonaPublisher("run-1", source=source, config=PublisherConfig(poll_interval_ms=5))
    good_drain = source.drain
    failures = threading.Event()

    def bad_drain(max_records: int) -> dict[str, Any]:
        failures.set()
        raise RuntimeError("the ring is broken")

    source.drain = bad_drain
    publisher.start(connect)
    assert failures.wait(10)
    source.drain = good_drain
    source.steps.append(1)
    eventually(lambda: publisher.stats().signals_published == 1)
    publisher.close()


def test_an_unreachable_bus_is_an_error_at_start_and_may_be_tried_again(connect: Any) -> None:
    async def nowhere() -> Bus:
        raise UnavailableError("there is no NATS server at nats://127.0.0.1:1")

    publisher = OonaPublisher("run-1")
    publisher.offer(SEED, SeedEvent())
    with pytest.raises(UnavailableError, match=r"there is no NATS server at nats://127\.0\.0\.1:1"):
        publisher.start(nowhere)
    assert not publisher.running
    publisher.start(connect)
    publisher.close()
    assert publisher.stats().published == {"seed": 1}


def test_a_publisher_is_started_once(publisher: OonaPublisher, connect: Any) -> None:
    publisher.start(connect)
    with pytest.raises(InvalidStateError, match="the publisher of run run-1 must be new to start"):
        publisher.start(connect)


def test_close_is_idempotent_and_ends_the_thread(publisher: OonaPublisher, connect: Any) -> None:
    publisher.close()
    publisher.start(connect)
    publisher.close()
    publisher.close()
    assert not publisher.running
    assert not publisher.stats().connected
    assert not [thread for thread in threading.enumerate() if thread.name == "esper-oona"]


def test_coroutines_of_others_run_on_its_loop(publisher: OonaPublisher, connect: Any) -> None:
    async def thread_name() -> str:
        return threading.current_thread().name

    async def is_connected(bus: Bus) -> bool:
        return bus.stats().connected

    with pytest.raises(InvalidStateError, match="must run to take a coroutine"):
        publisher.submit(thread_name())
    publisher.start(connect)
    assert publisher.submit(thread_name()).result(10) == "esper-oona"
    assert publisher.submit(is_connected).result(10)


def test_streams_that_were_lost_are_made_again(
    publisher: OonaPublisher, connect: Any, broker: MemoryBroker, eventually: Eventually
) -> None:
    publisher.start(connect)
    broker.streams = Streams()
    publisher.offer(SEED, SeedEvent())
    eventually(lambda: publisher.stats().published == {"seed": 1})


async def test_a_fan_out_mailbox_keeps_the_newest(
    publisher: OonaPublisher, connect: Any, reader: MemoryBus, eventually: Eventually
) -> None:
    publisher.start(connect)
    box = publisher.open_mailbox("esper.v1.run-1.state", SystemStatePacket, max_mail=3)
    for epoch in range(5):
        await reader.publish("esper.v1.run-1.state", SystemStatePacket(epoch=epoch).SerializeToString())
    eventually(lambda: box.dropped == 2)
    assert [mail.message.epoch for mail in box.drain()] == [2, 3, 4]
    assert box.drain() == []


async def test_durable_mail_is_handed_over_once_and_settled(
    publisher: OonaPublisher, connect: Any, reader: MemoryBus, eventually: Eventually
) -> None:
    publisher.start(connect)
    box = publisher.open_durable_mailbox(EVENTS.name, "training", SystemStatePacket, subject_filter=DECISION)
    for epoch in range(3):
        await reader.publish(DECISION, SystemStatePacket(epoch=epoch).SerializeToString(), durable=True)
    eventually(lambda: len(box) == 3)
    mail = box.drain()
    assert [one.message.epoch for one in mail] == [0, 1, 2]
    mail[0].settle()
    mail[1].settle(give_up="not for this run")
    eventually(lambda: not box.settled)
    publisher.close()
    dead = [message.payload async for message in reader.replay(dead_subject(EVENTS.name), stream=DEAD.name)]
    assert dead == [mail[1].raw.payload]
    async with asyncio.timeout(10), await reader.consume(EVENTS.name, "training", DECISION) as left:
        again = await anext(left)
    assert (again.message.payload, again.num_delivered) == (mail[2].raw.payload, 2)


async def test_who_watches_a_mailbox_is_told_before_the_reader_can_look(
    publisher: OonaPublisher, connect: Any, reader: MemoryBus, eventually: Eventually
) -> None:
    publisher.start(connect)
    told: list[tuple[int, int]] = []

    def watch(mail: Mail[SystemStatePacket]) -> None:
        told.append((mail.message.epoch, len(mail.box)))
        if not mail.message.epoch:
            raise ValueError("a defect of the watch keeps no mail back")

    box = publisher.open_durable_mailbox(
        EVENTS.name, "training", SystemStatePacket, subject_filter=DECISION, watch=watch
    )
    for epoch in range(2):
        await reader.publish(DECISION, SystemStatePacket(epoch=epoch).SerializeToString(), durable=True)
    eventually(lambda: len(box) == 2)
    assert told == [(0, 0), (1, 1)]


def test_a_mailbox_on_a_missing_stream_fails_at_once(publisher: OonaPublisher, connect: Any) -> None:
    publisher.start(connect)
    with pytest.raises(NotFoundError, match="no stream is named NOPE"):
        publisher.open_durable_mailbox("NOPE", "training", SystemStatePacket, subject_filter=DECISION)


@pytest.mark.parametrize(
    ("bad", "rule"),
    [
        (
            {"poll_interval_ms": 200},
            "poll_interval_ms must be 1 to 50 ms, so that no signal waits over 100 ms, got 200",
        ),
        ({"max_batch_bytes": 10}, "max_batch_bytes must be >= 1024, got 10"),
        ({"max_offers": 0}, "max_offers must be > 0, got 0"),
        ({"max_control_buffer_bytes": 0}, "max_control_buffer_bytes must be > 0, got 0"),
    ],
)
def test_a_config_that_breaks_a_rule_is_refused(bad: dict[str, Any], rule: str) -> None:
    with pytest.raises(InvalidInputError, match=rule):
        PublisherConfig(**bad)


def test_health_rows_beyond_the_bound_leave_a_gap_and_a_count() -> None:
    box = HealthBox(max_bytes=3 * 800)
    for first in range(5):
        box.put({"step": np.arange(first, first + 100, dtype=np.uint64)}, ring_dropped=0)
    assert (len(box), box.signals, box.batches_dropped, box.signals_dropped) == (3, 300, 2, 200)
    assert [box.pop().sequence for _ in range(3)] == [3, 4, 5]
    assert (box.size_bytes, box.oldest_s) == (0, None)

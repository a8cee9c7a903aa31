"""Control answers over a real NATS with thousands of packets in their way: what comes before what, what is kept."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import nats
import pytest

from esper.contracts.decision import ControlAction, ControlCommand
from esper.contracts.run import SystemStatePacket
from esper.contracts.wire import to_message
from esper.services.tolaria.bus_loop import CONTROL_DURABLE_NAME, DURABLE_NAME, TolariaBusLoop
from esper.services.tolaria.store import TolariaStore
from esper.telemetry import (
    EVENTS,
    Bus,
    Consumer,
    Kind,
    NatsBus,
    NatsOptions,
    NatsServer,
    NatsServerConfig,
    OonaPublisher,
    PublisherConfig,
    build_subject,
    kind_patterns,
    replay_run,
)
from esper.telemetry.bus import CONTENT_TYPE_HEADER
from esper.telemetry.consumer import content_type
from esper.v1 import decision_pb2, telemetry_pb2
from tests.integration.answering_trainer import (
    MANY,
    DefectiveBus,
    StuckBus,
    answer_of,
    offer_answer,
    offer_packets,
    packet_of,
)

QUICK = NatsOptions(publish_timeout_s=3.0, attempt_timeout_s=0.5, ping_interval_s=0.2, reconnect_wait_max_s=0.2)
RUN = "run-1"
STATE, CONTROL = build_subject(RUN, Kind.STATE), build_subject(RUN, Kind.CONTROL)
KINDS_BEFORE = (Kind.STATE, Kind.DECISION, Kind.PLAN, Kind.SEED, Kind.FIELD_REPORT, Kind.CONTROL)
"""What the one consumer of a Tolaria of before took."""
FILTERS_BEFORE = [pattern for kind in KINDS_BEFORE for pattern in kind_patterns(kind)]


@pytest.fixture
def memory() -> Iterator[Path]:
    """A directory that is held in memory where it can be: thousands of packets are written one by one, for good."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="esper-control-", dir=shared if shared.is_dir() else None) as directory:
        yield Path(directory)


@pytest.fixture
async def server(memory: Path) -> AsyncIterator[NatsServer]:
    async with NatsServer(NatsServerConfig(store_dir=memory / "nats")) as server:
        yield server


@pytest.fixture
async def bus(server: NatsServer) -> AsyncIterator[NatsBus]:
    async with await NatsBus.connect(server.url, QUICK) as bus:
        await bus.ensure_streams()
        yield bus


@pytest.fixture
async def publisher() -> AsyncIterator[OonaPublisher]:
    one = OonaPublisher(RUN, config=PublisherConfig(poll_interval_ms=10, flush_timeout_s=0.5))
    yield one
    await asyncio.to_thread(one.close, 1.0)


async def eventually(condition: Callable[[], bool], *, within_s: float = 150.0) -> None:
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110 - another thread or the server brings it about
            await asyncio.sleep(0.01)


def connecting(url: str, options: NatsOptions | None = None) -> Callable[[], Awaitable[Bus]]:
    async def connect() -> Bus:
        return await NatsBus.connect(url, options)

    return connect


def command_of(request_id: str) -> ControlCommand:
    return ControlCommand(
        request_id=request_id, run_id=RUN, action=ControlAction.PAUSE, actor="ada", created_at=datetime.now(UTC)
    )


async def publish(
    bus: Bus, subject: str, message: telemetry_pb2.SystemStatePacket | decision_pb2.ControlMessage
) -> None:
    headers = {CONTENT_TYPE_HEADER: content_type(type(message))}
    await bus.publish(subject, message.SerializeToString(), headers=headers, durable=True)


async def publish_packets(bus: Bus, first: int, count: int) -> None:
    for sequence in range(first, first + count):
        await publish(bus, STATE, packet_of(RUN, sequence))


async def stored(bus: Bus) -> list[str]:
    """Give what the stream has of the run, in its order: ``state 7``, ``answer q1``, ``command q1``."""
    found = []
    async for received in replay_run(bus, RUN):
        message = received.message
        if isinstance(message, decision_pb2.ControlMessage):
            body = message.WhichOneof("body")
            one = message.result if body == "result" else message.command
            found.append(f"{'answer' if body == 'result' else body} {one.request_id}")
        elif isinstance(message, telemetry_pb2.SystemStatePacket):
            found.append(f"state {message.sequence}")
    return found


def packets(count: int = MANY) -> list[str]:
    return [f"state {sequence}" for sequence in range(1, count + 1)]


def of_kind(found: list[str], word: str) -> list[str]:
    return [one for one in found if one.startswith(word)]


async def start_trainer(url: str, how: str) -> asyncio.subprocess.Process:
    words = [sys.executable, "-m", "tests.integration.answering_trainer", url, RUN, how]
    return await asyncio.create_subprocess_exec(*words, stdout=asyncio.subprocess.PIPE)


async def line_of(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    async with asyncio.timeout(60):
        return (await process.stdout.readline()).decode().strip()


class TestSender:
    async def test_an_answer_goes_before_the_packets_that_waited_longer(
        self, server: NatsServer, bus: NatsBus, publisher: OonaPublisher
    ) -> None:
        offer_packets(publisher)
        for number in range(3):
            offer_answer(publisher, f"q{number}")
        await asyncio.to_thread(publisher.start, connecting(server.url))
        await eventually(lambda: publisher.stats().buffered_events == 0)
        found = await stored(bus)
        answers = [f"answer q{number}" for number in range(3)]
        assert of_kind(found, "answer") == answers
        assert of_kind(found, "state") == packets()
        # One message of each lane is on its way at a time: few packets come between two answers.
        assert set(answers) <= set(found[:20])

    async def test_what_never_gets_through_holds_no_answer_up(
        self, server: NatsServer, bus: NatsBus, publisher: OonaPublisher
    ) -> None:
        async def connect() -> Bus:
            stuck = await StuckBus.connect(server.url)
            assert isinstance(stuck, StuckBus)
            stuck.stuck = (STATE,)
            return stuck

        await asyncio.to_thread(publisher.start, connect)
        offer_packets(publisher)
        offer_answer(publisher, "q0")
        await eventually(lambda: publisher.stats().published == {"control": 1})
        assert await stored(bus) == ["answer q0"]
        assert publisher.stats().buffered_events == MANY

    async def test_a_server_that_dies_again_and_again_costs_neither_packets_nor_answers(
        self, server: NatsServer, bus: NatsBus, publisher: OonaPublisher
    ) -> None:
        await asyncio.to_thread(publisher.start, connecting(server.url, QUICK))
        for part in range(3):
            await asyncio.to_thread(server.kill)
            offer_packets(publisher, 1 + part * 300, 300)
            for number in range(10):
                offer_answer(publisher, f"q{part}{number}")
            await asyncio.to_thread(server.start)
            least = 200 * (part + 1)  # the rest is on its way when the server dies the next time
            await eventually(lambda least=least: publisher.stats().published.get("state", 0) >= least)
        await eventually(lambda: publisher.stats().buffered_events == 0)
        found = await stored(bus)
        assert of_kind(found, "state") == packets(900)
        assert of_kind(found, "answer") == [f"answer q{part}{number}" for part in range(3) for number in range(10)]
        assert publisher.stats().dropped == {}

    async def test_a_defect_under_both_senders_costs_neither_packets_nor_answers(
        self, server: NatsServer, bus: NatsBus, publisher: OonaPublisher
    ) -> None:
        async def connect() -> Bus:
            return await DefectiveBus.connect(server.url)

        offer_packets(publisher, count=20)
        for number in range(5):
            offer_answer(publisher, f"q{number}")
        await asyncio.to_thread(publisher.start, connect)
        await eventually(lambda: publisher.stats().buffered_events == 0)
        found = await stored(bus)
        assert of_kind(found, "state") == packets(20)
        assert of_kind(found, "answer") == [f"answer q{number}" for number in range(5)]
        assert publisher.stats().published == {"state": 20, "control": 5}

    async def test_a_trainer_killed_with_its_answer_in_hand_leaves_the_command_to_the_next(
        self, server: NatsServer, bus: NatsBus
    ) -> None:
        command = decision_pb2.ControlMessage(command=to_message(command_of("q1"), decision_pb2.ControlCommand))
        await publish(bus, CONTROL, command)
        first = await start_trainer(server.url, "stuck")
        assert await line_of(first) == "answered q1"
        first.kill()  # with thousands of packets in its memory, too
        await first.wait()
        assert of_kind(await stored(bus), "answer") == []
        second = await start_trainer(server.url, "free")
        assert [await line_of(second), await line_of(second)] == ["answered q1", "out"]
        await second.wait()
        found = await stored(bus)
        assert of_kind(found, "answer") == ["answer q1"]
        assert of_kind(found, "state") == packets(), "what both lives told under one name is there once"
        assert await owed(server.url, f"run-{RUN}-control") == 0


class StoppedStore(TolariaStore):
    """A store in whose way every packet stands still until it is let go; notes what it kept."""

    def hold(self) -> None:
        self.let_go = asyncio.Event()
        self.reached = asyncio.Event()
        self.kept: list[int] = []

    async def keep_packet(self, packet: SystemStatePacket) -> bool:
        self.reached.set()
        await self.let_go.wait()
        self.kept.append(packet.sequence)
        return await super().keep_packet(packet)


@pytest.fixture
async def store(memory: Path) -> AsyncIterator[StoppedStore]:
    one = await StoppedStore.open(f"sqlite:///{memory / 'tolaria.db'}")
    assert isinstance(one, StoppedStore)
    one.hold()
    yield one
    await one.database.close()


@pytest.fixture
async def tolaria(bus: NatsBus, store: StoppedStore) -> AsyncIterator[TolariaBusLoop]:
    one = TolariaBusLoop(store, bus)
    yield one
    await one.close()


class TestTolaria:
    async def test_an_answer_arrives_while_the_intake_of_packets_stands_still(
        self, server: NatsServer, bus: NatsBus, publisher: OonaPublisher, store: StoppedStore, tolaria: TolariaBusLoop
    ) -> None:
        offer_packets(publisher)
        await asyncio.to_thread(publisher.start, connecting(server.url))
        await tolaria.start()
        await eventually(lambda: publisher.stats().buffered_events == 0)  # all of them are in the stream before it
        await store.reached.wait()
        async with answering(bus, publisher):
            assert (await tolaria.command(command_of("q1"), 30)).request_id == "q1"
        assert store.kept == [], "the answer came before the first packet was through"
        store.let_go.set()
        await eventually(lambda: len(store.kept) == MANY)
        assert store.kept == list(range(1, MANY + 1))

    async def test_an_answer_arrives_while_packets_wait_at_both_ends(
        self, server: NatsServer, bus: NatsBus, publisher: OonaPublisher, store: StoppedStore, tolaria: TolariaBusLoop
    ) -> None:
        store.let_go.set()
        await asyncio.to_thread(publisher.start, connecting(server.url))
        await tolaria.start()
        async with answering(bus, publisher, packets_first=MANY):
            assert (await tolaria.command(command_of("q1"), 30)).request_id == "q1"
        assert len(store.kept) < MANY, "the answer came before the last packet that the run told before it"
        await eventually(lambda: len(store.kept) == MANY)
        assert store.kept == list(range(1, MANY + 1))

    async def test_neither_is_lost_with_a_tolaria_that_goes_and_comes(
        self, server: NatsServer, bus: NatsBus, publisher: OonaPublisher, store: StoppedStore, tolaria: TolariaBusLoop
    ) -> None:
        await asyncio.to_thread(publisher.start, connecting(server.url))
        first = TolariaBusLoop(store, bus)
        await first.start()
        await first.close()
        offer_packets(publisher, count=100)
        offer_answer(publisher, "q1")
        await eventually(lambda: publisher.stats().buffered_events == 0)
        await tolaria.start()
        assert (await tolaria.command(command_of("q1"), 30)).request_id == "q1"
        assert store.kept == []
        store.let_go.set()
        await eventually(lambda: len(store.kept) == 100)

    async def test_the_consumer_of_before_is_upgraded_where_it_stands(
        self, server: NatsServer, bus: NatsBus, store: StoppedStore, tolaria: TolariaBusLoop
    ) -> None:
        store.let_go.set()
        await publish_packets(bus, 1, 40)
        before = await bus.consume(EVENTS.name, DURABLE_NAME, FILTERS_BEFORE, batch=1)
        for _ in range(30):
            await (await anext(before)).ack()
        await before.close()
        await publish(bus, CONTROL, answer_of(RUN, "q1"))
        await publish_packets(bus, 41, 20)
        await tolaria.start()
        assert (await tolaria.command(command_of("q1"), 30)).request_id == "q1"
        await eventually(lambda: len(store.kept) == 30)
        assert store.kept == list(range(31, 61)), "its place is kept: nothing comes again, nothing is left out"
        control = set(kind_patterns(Kind.CONTROL))
        assert await filters(server.url, CONTROL_DURABLE_NAME) == control
        assert await filters(server.url, DURABLE_NAME) == set(FILTERS_BEFORE) - control

    async def test_an_answer_in_the_hands_of_a_tolaria_of_before_that_died_is_not_lost(
        self, bus: NatsBus, tolaria: TolariaBusLoop
    ) -> None:
        before = await bus.consume(EVENTS.name, DURABLE_NAME, FILTERS_BEFORE, batch=1)
        await publish(bus, CONTROL, answer_of(RUN, "q1"))
        held = await anext(before)
        assert (held.message.subject, held.settled) == (CONTROL, False)
        await tolaria.start()
        assert (await tolaria.command(command_of("q1"), 15)).request_id == "q1", "long before it comes there again"

    async def test_a_tolaria_of_before_beside_the_new_one_takes_no_answer_away(
        self, server: NatsServer, bus: NatsBus, publisher: OonaPublisher, tolaria: TolariaBusLoop
    ) -> None:
        await asyncio.to_thread(publisher.start, connecting(server.url))
        await tolaria.start()
        before = await bus.consume(EVENTS.name, DURABLE_NAME, FILTERS_BEFORE)  # it comes back, with its own filter
        assert await filters(server.url, DURABLE_NAME) == set(FILTERS_BEFORE)
        eating = asyncio.create_task(eat(before))
        async with answering(bus, publisher):
            asked = [tolaria.command(command_of(f"q{number}"), 30) for number in range(20)]
            results = await asyncio.gather(*asked)
        assert [result.request_id for result in results] == [f"q{number}" for number in range(20)]
        eating.cancel()
        await asyncio.gather(eating, return_exceptions=True)


@contextlib.asynccontextmanager
async def answering(bus: Bus, publisher: OonaPublisher, *, packets_first: int = 0) -> AsyncIterator[None]:
    """Have a publisher answer every command, after so many packets at the first."""
    subscription = await bus.subscribe(CONTROL)

    async def answer() -> None:
        left = packets_first
        async for raw in subscription:
            message = decision_pb2.ControlMessage.FromString(raw.payload)
            if message.WhichOneof("body") == "command":
                offer_packets(publisher, count=left)
                left = 0
                offer_answer(publisher, message.command.request_id)

    task = asyncio.create_task(answer())
    yield
    await subscription.close()
    await task


async def eat(consumer: Consumer) -> None:
    """Take everything in, as a Tolaria of before does."""
    async for delivery in consumer:
        await delivery.ack()


async def filters(url: str, durable_name: str) -> set[str]:
    """Give what the server says that a consumer takes."""
    client = await nats.connect(url)
    try:
        config = (await client.jetstream().consumer_info(EVENTS.name, durable_name)).config
    finally:
        await client.close()
    return set(config.filter_subjects or [str(config.filter_subject)])


async def owed(url: str, durable_name: str) -> int:
    """Give how many messages a consumer has to deliver, or delivered and nobody acknowledged."""
    client = await nats.connect(url)
    try:
        info = await client.jetstream().consumer_info(EVENTS.name, durable_name)
    finally:
        await client.close()
    return (info.num_pending or 0) + (info.num_ack_pending or 0)

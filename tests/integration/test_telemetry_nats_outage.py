from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from esper.contracts.errors import DeadlineExceededError, UnavailableError
from esper.telemetry.bus import Bus, Delivery
from esper.telemetry.consumer import health_batches, replay_run
from esper.telemetry.nats_bus import NatsBus
from esper.telemetry.nats_connection import NatsOptions
from esper.telemetry.nats_server import NatsServer, NatsServerConfig
from esper.telemetry.publisher import OonaPublisher, PublisherConfig
from esper.telemetry.streams import COMPILE, EVENTS
from esper.telemetry.subjects import build_subject, compile_job_subject, kind_patterns
from esper.v1.telemetry_pb2 import SeedEvent

SEED = build_subject("run-1", "seed", "layer1")
STATE = build_subject("run-1", "state")
QUICK = NatsOptions(publish_timeout_s=3.0, attempt_timeout_s=0.5, ping_interval_s=0.2, reconnect_wait_max_s=0.2)


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[NatsServer]:
    async with NatsServer(NatsServerConfig(store_dir=tmp_path)) as server:
        yield server


@pytest.fixture
async def bus(server: NatsServer) -> AsyncIterator[NatsBus]:
    async with await NatsBus.connect(server.url, QUICK) as bus:
        await bus.ensure_streams()
        yield bus


async def eventually(condition: Callable[[], bool], *, within_s: float = 20.0) -> None:
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110 - another thread or the server brings it about
            await asyncio.sleep(0.01)


async def restart(server: NatsServer) -> None:
    await asyncio.to_thread(server.kill)
    await asyncio.to_thread(server.start)


async def take(source: AsyncIterator[Delivery], count: int) -> list[Delivery]:
    async with asyncio.timeout(20):
        return [await anext(source) for _ in range(count)]


async def test_an_unreachable_server_is_an_error_that_names_the_url() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"nats://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(UnavailableError, match=f"there is no NATS server at {url}"):
        await NatsBus.connect(url, QUICK)


async def test_something_else_on_the_port_is_not_taken_for_nats() -> None:
    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as other:
        url = f"nats://127.0.0.1:{other.sockets[0].getsockname()[1]}"
        with pytest.raises(UnavailableError, match=f"there is no NATS server at {url}"):
            await NatsBus.connect(url, QUICK)


async def test_a_durable_publish_outlives_a_restart_of_the_server(server: NatsServer, bus: NatsBus) -> None:
    await bus.publish(STATE, b"before", durable=True)
    await asyncio.to_thread(server.kill)
    waiting = asyncio.create_task(bus.publish(STATE, b"during", durable=True))
    await asyncio.to_thread(server.start)
    await waiting
    assert [message.payload async for message in bus.replay(STATE)] == [b"before", b"during"]
    assert bus.stats().reconnects == 1


async def test_without_a_server_a_publish_fails_in_time(server: NatsServer, bus: NatsBus) -> None:
    await asyncio.to_thread(server.kill)
    await eventually(lambda: not bus.stats().connected)
    with pytest.raises(UnavailableError, match="has been away"):
        await bus.publish(STATE, b"")
    with pytest.raises(UnavailableError, match=f"NATS at {server.url} has been away"):
        await bus.publish(STATE, b"", durable=True)


async def test_a_frozen_server_is_noticed_and_found_again(server: NatsServer, bus: NatsBus) -> None:
    assert server.pid is not None
    pid = server.pid
    subscription = await bus.subscribe(STATE)
    os.kill(pid, signal.SIGSTOP)
    try:
        await eventually(lambda: not bus.stats().connected)
        with pytest.raises((UnavailableError, DeadlineExceededError)):
            await bus.publish(STATE, b"lost in the ice", durable=True, msg_id="one")
    finally:
        os.kill(pid, signal.SIGCONT)
    await bus.wait_connected(10)
    await bus.publish(STATE, b"lost in the ice", durable=True, msg_id="one")
    async with asyncio.timeout(10):
        assert (await anext(subscription)).payload == b"lost in the ice"
    assert [message.payload async for message in bus.replay(STATE)] == [b"lost in the ice"]


async def test_duplicates_are_refused_after_a_restart_too(server: NatsServer, bus: NatsBus) -> None:
    await bus.publish(STATE, b"x", durable=True, msg_id="one")
    await restart(server)
    await bus.wait_connected(10)
    again = await bus.publish(STATE, b"x", durable=True, msg_id="one")
    assert again is not None
    assert again.duplicate


@pytest.mark.parametrize("how", ["stop", "kill"])
async def test_each_event_is_applied_once_over_restarts_of_both(server: NatsServer, how: str) -> None:
    got: list[bytes] = []
    applied: set[str | None] = set()
    async with await NatsBus.connect(server.url, QUICK) as sender:
        await sender.ensure_streams()
        for part in range(3):
            reader = await NatsBus.connect(server.url, QUICK)
            consumer = await reader.consume(EVENTS.name, "nissa")
            for number in range(part * 10, part * 10 + 10):
                await sender.publish(STATE, b"%d" % number, durable=True)
            while len(got) < part * 10 + 10:
                [delivery] = await take(consumer, 1)
                if delivery.message.msg_id not in applied:  # a killed server may forget its last acknowledgements
                    applied.add(delivery.message.msg_id)
                    got.append(delivery.message.payload)
                assert how == "kill" or delivery.num_delivered == 1
                await delivery.ack()
            await reader.close()
            await asyncio.to_thread(getattr(server, how))
            await asyncio.to_thread(server.start)
            await sender.wait_connected(10)
    assert got == [b"%d" % number for number in range(30)]


async def test_a_waiting_consumer_goes_on_after_a_restart(server: NatsServer, bus: NatsBus) -> None:
    consumer = await bus.consume(COMPILE.name, "workers", ack_wait_s=1.0, batch=1)
    await bus.publish(compile_job_subject("cpu"), b"first", durable=True)
    [first] = await take(consumer, 1)
    waiting = asyncio.create_task(anext(consumer))
    await restart(server)
    await first.ack()
    await bus.publish(compile_job_subject("cpu"), b"second", durable=True)
    async with asyncio.timeout(20):
        second = await waiting
        if second.message.payload == b"first":  # a killed server may forget that it had delivered it
            await second.ack()
            second = await anext(consumer)
    assert second.message.payload == b"second"
    await second.ack()


async def test_a_consumer_that_waits_for_an_absent_server_can_be_closed(server: NatsServer, bus: NatsBus) -> None:
    consumer = await bus.consume(EVENTS.name, "reader", SEED)
    server.stop()
    await eventually(lambda: bus._conn.link is None)
    waiting = asyncio.ensure_future(anext(consumer, None))
    await asyncio.sleep(0)  # now it waits for a link
    await consumer.close()
    async with asyncio.timeout(5):
        assert await waiting is None


async def test_a_replay_goes_on_after_a_restart(server: NatsServer, bus: NatsBus) -> None:
    sent = [b"%d" % number for number in range(600)]
    for start in range(0, len(sent), 20):  # a few at a time: each is flushed to disk, and an attempt's time is short
        await asyncio.gather(*(bus.publish(STATE, payload, durable=True) for payload in sent[start : start + 20]))
    replayed: list[int] = []
    async with asyncio.timeout(30):
        async for message in bus.replay(STATE):
            replayed.append(int(message.sequence or 0))
            if len(replayed) == 100:
                await restart(server)
    assert replayed == list(range(1, 601))


class TestPublisher:
    @pytest.fixture
    async def publisher(self, server: NatsServer) -> AsyncIterator[OonaPublisher]:
        async def connect() -> Bus:
            return await NatsBus.connect(server.url, QUICK)

        config = PublisherConfig(poll_interval_ms=10, max_event_buffer_bytes=20_000_000, flush_timeout_s=0.5)
        publisher = OonaPublisher("run-1", config=config)
        await asyncio.to_thread(publisher.start, connect)
        yield publisher
        await asyncio.to_thread(publisher.close, 1.0)

    async def test_it_bridges_an_outage_without_loss(
        self, server: NatsServer, bus: NatsBus, publisher: OonaPublisher
    ) -> None:
        publisher.offer(SEED, SeedEvent(step=0))
        await eventually(lambda: publisher.stats().published == {"seed": 1})
        await asyncio.to_thread(server.kill)
        await eventually(lambda: not publisher.stats().connected)
        for step in range(1, 50):
            publisher.offer(SEED, SeedEvent(step=step))
        await eventually(lambda: publisher.stats().buffered_events == 49)
        assert (publisher.stats().lag_s or 0) > 0
        await asyncio.to_thread(server.start)
        await eventually(lambda: publisher.stats().published == {"seed": 50})
        assert publisher.stats().reconnects == 1
        events = [received.message async for received in replay_run(bus, "run-1")]
        assert [event.step for event in events if isinstance(event, SeedEvent)] == list(range(50))
        assert publisher.stats().dropped == {}

    async def test_beyond_its_bound_it_drops_the_oldest_and_counts_each(
        self, server: NatsServer, bus: NatsBus, publisher: OonaPublisher
    ) -> None:
        await asyncio.to_thread(server.kill)
        await eventually(lambda: not publisher.stats().connected)
        for step in range(100):
            publisher.offer(SEED, SeedEvent(step=step, reason="x" * 1_000_000))
        await eventually(lambda: publisher.stats().dropped.get("seed", 0) > 0)
        await asyncio.to_thread(server.start)
        await eventually(lambda: publisher.stats().buffered_events == 0)
        stats = publisher.stats()
        assert stats.published["seed"] + stats.dropped["seed"] == 100
        steps = [received.message.step async for received in replay_run(bus, "run-1")]  # type: ignore[attr-defined]
        assert len(steps) == stats.published["seed"]
        assert steps == sorted(steps)
        assert steps[-1] == 99

    async def test_mail_is_handed_over_once_over_a_restart(
        self, server: NatsServer, bus: NatsBus, publisher: OonaPublisher
    ) -> None:
        box = await asyncio.to_thread(
            publisher.open_durable_mailbox, EVENTS.name, "training", SeedEvent, subject_filter=kind_patterns("seed")
        )
        for step in range(3):
            await bus.publish(SEED, SeedEvent(step=step).SerializeToString(), durable=True)
        await eventually(lambda: len(box) == 3)
        mail = box.drain()
        mail[0].settle()
        await restart(server)
        mail[1].settle()
        await bus.wait_connected(10)
        await bus.publish(SEED, SeedEvent(step=3).SerializeToString(), durable=True)
        await eventually(lambda: len(box) == 1)
        [last] = box.drain()
        assert [one.message.step for one in (*mail, last)] == [0, 1, 2, 3]
        mail[2].settle()
        last.settle()
        await eventually(lambda: not box.settled)
        await asyncio.to_thread(publisher.close)
        consumer = await bus.consume(EVENTS.name, "training", kind_patterns("seed"))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await anext(consumer)

    async def test_a_message_too_large_is_refused_and_the_rest_goes_on(self, publisher: OonaPublisher) -> None:
        publisher.offer(SEED, SeedEvent(reason="x" * 9_000_000))
        publisher.offer(SEED, SeedEvent())
        await eventually(lambda: publisher.stats().published == {"seed": 1})
        assert publisher.stats().refused == {"seed": 1}

    async def test_closing_without_a_server_keeps_its_deadline_and_counts_what_was_left(
        self, server: NatsServer, publisher: OonaPublisher
    ) -> None:
        await asyncio.to_thread(server.kill)
        for step in range(5):
            publisher.offer(SEED, SeedEvent(step=step))
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        await asyncio.to_thread(publisher.close, 0.5)
        assert loop.time() - began_s < 4.0
        assert publisher.stats().dropped == {"seed": 5}
        assert not publisher.running


async def test_every_health_batch_reaches_two_subscribers_from_the_native_ring(server: NatsServer) -> None:
    from esper.execution._native import SignalRing

    async def connect() -> Bus:
        return await NatsBus.connect(server.url)

    ring = SignalRing(4096)
    publisher = OonaPublisher("run-1", source=ring, config=PublisherConfig(poll_interval_ms=5))
    publisher.name_layers({0: "layer1"})
    async with await NatsBus.connect(server.url) as first_bus, await NatsBus.connect(server.url) as second_bus:
        readers = [await health_batches(first_bus, "run-1"), await health_batches(second_bus)]
        await asyncio.to_thread(publisher.start, connect)
        for step in range(2000):
            assert ring.push(0, -1, step, 0.1, 1.0, 2.0, 0.0, 0.0, None, 0.5)
        for reader in readers:
            steps: list[int] = []
            async with asyncio.timeout(20):
                while len(steps) < 2000:
                    batch = (await anext(reader)).message
                    steps.extend(batch.steps)
            assert steps == list(range(2000))
            assert (reader.lost, reader.repeated) == (0, 0)
        await asyncio.to_thread(publisher.close)
    assert publisher.stats().signals_published == 2000

"""What every ``Bus`` adapter promises, as tests: subclass ``BusContract`` and give it an ``open_bus`` fixture.

The fixture gives a coroutine function that opens one more connection to the same broker, which is empty when a test
begins; the fixture closes what it opened.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from datetime import datetime, timedelta
from typing import TypeVar

import pytest

from esper.contracts.errors import (
    AlreadyExistsError,
    CapacityExceededError,
    InvalidInputError,
    InvalidStateError,
    NotFoundError,
)
from esper.telemetry.bus import (
    DEAD_CONSUMER_HEADER,
    DEAD_DELIVERIES_HEADER,
    DEAD_REASON_HEADER,
    DEAD_SUBJECT_HEADER,
    Bus,
    BusMessage,
    PublishAck,
)
from esper.telemetry.streams import COMPILE, DEAD, EVENTS, StreamSpec, WhenFull
from esper.telemetry.subjects import build_subject, compile_job_subject, dead_subject, kind_patterns, run_pattern

T = TypeVar("T")
OpenBus = Callable[[], Awaitable[Bus]]

SEED = build_subject("run-1", "seed", "block.0.conv")
STATE = build_subject("run-1", "state")
HEALTH = build_subject("run-1", "health")
JOB = compile_job_subject("cpu")


async def take(source: AsyncIterator[T], count: int, *, within_s: float = 10.0) -> list[T]:
    """Give the next ``count`` items of an iterator, or fail once the time is over."""
    async with asyncio.timeout(within_s):
        return [await anext(source) for _ in range(count)]


async def nothing_more(source: AsyncIterator[object], *, for_s: float = 0.2) -> bool:
    """Say whether an iterator stays silent for a while."""
    waiting = asyncio.ensure_future(anext(source))
    done, _ = await asyncio.wait({waiting}, timeout=for_s)
    waiting.cancel()
    await asyncio.wait({waiting})
    return not done


async def keep(bus: Bus, subject: str, payload: bytes, msg_id: str | None = None) -> PublishAck:
    """Publish durably and give the acknowledgement."""
    ack = await bus.publish(subject, payload, msg_id=msg_id, durable=True)
    assert ack is not None
    return ack


async def replayed(bus: Bus, pattern: str, since: datetime | int | None = None, stream: str = "EVENTS") -> list[bytes]:
    """Give the payloads that a replay yields."""
    async with asyncio.timeout(10):
        return [message.payload async for message in bus.replay(pattern, since, stream=stream)]


class FanOutContract:
    """Plain publish and subscribe."""

    async def test_two_subscribers_each_receive_every_message_in_order(self, open_bus: OpenBus) -> None:
        """Fan-out: nobody takes a message away from anybody."""
        sender, first_bus, second_bus = await open_bus(), await open_bus(), await open_bus()
        first = await first_bus.subscribe(run_pattern("run-1"))
        second = await second_bus.subscribe("esper.v1.*.health")
        sent = [f"batch {number}".encode() for number in range(200)]
        for payload in sent:
            await sender.publish(HEALTH, payload)
        assert [message.payload for message in await take(first, 200)] == sent
        assert [message.payload for message in await take(second, 200)] == sent
        assert first.dropped == second.dropped == 0

    async def test_a_message_arrives_as_it_was_sent(self, open_bus: OpenBus) -> None:
        """Subject, payload, headers and message id survive."""
        sender, receiver = await open_bus(), await open_bus()
        subscription = await receiver.subscribe("esper.v1.>")
        await sender.publish(HEALTH, b"\x00\r\n\xff", headers={"traceparent": "00-ab-cd-01"}, msg_id="one")
        [message] = await take(subscription, 1)
        assert (message.subject, message.payload, message.msg_id) == (HEALTH, b"\x00\r\n\xff", "one")
        assert message.headers["traceparent"] == "00-ab-cd-01"
        assert message.sequence is None

    async def test_a_pattern_takes_only_what_matches(self, open_bus: OpenBus) -> None:
        """A star is one token, a last > is one or more."""
        bus = await open_bus()
        star = await bus.subscribe("esper.v1.*.seed.*")
        await bus.publish(STATE, b"state")
        await bus.publish("esper.v1.run-1.seed", b"bare")
        await bus.publish(SEED, b"seed")
        assert [message.payload for message in await take(star, 1)] == [b"seed"]
        assert await nothing_more(star)

    async def test_a_slow_subscription_loses_its_oldest_and_counts(self, open_bus: OpenBus) -> None:
        """The newest matters; every loss is visible."""
        sender, receiver = await open_bus(), await open_bus()
        slow = await receiver.subscribe(HEALTH, max_pending=2)
        witness = await receiver.subscribe(HEALTH)
        for number in range(5):
            await sender.publish(HEALTH, b"%d" % number)
        await take(witness, 5)
        assert [message.payload for message in await take(slow, 2)] == [b"3", b"4"]
        assert slow.dropped == 3
        assert receiver.stats().dropped == 3

    async def test_closing_a_subscription_ends_its_iteration(self, open_bus: OpenBus) -> None:
        """Whoever waits is released."""
        bus = await open_bus()
        subscription = await bus.subscribe(HEALTH)
        waiting = asyncio.ensure_future(anext(subscription, None))
        await asyncio.sleep(0)
        await subscription.close()
        await subscription.close()
        assert await asyncio.wait_for(waiting, 5) is None

    async def test_flush_returns_once_the_broker_has_everything(self, open_bus: OpenBus) -> None:
        """After a flush a new replay sees what was published without an acknowledgement."""
        bus = await open_bus()
        await bus.ensure_streams()
        await bus.publish(STATE, b"unacknowledged")
        await bus.flush()
        assert await replayed(bus, STATE) == [b"unacknowledged"]

    @pytest.mark.parametrize("subject", ["", "esper.v1.*.seed", "esper.v1.>", "esper v1", "esper..v1", "a\r\nPUB b 0"])
    async def test_an_illegal_subject_is_refused(self, open_bus: OpenBus, subject: str) -> None:
        """Nothing from a name reaches the protocol line."""
        bus = await open_bus()
        with pytest.raises(InvalidInputError, match="subject must be"):
            await bus.publish(subject, b"")

    async def test_an_illegal_header_is_refused(self, open_bus: OpenBus) -> None:
        """A header cannot smuggle another."""
        bus = await open_bus()
        with pytest.raises(InvalidInputError, match="header x must be printable"):
            await bus.publish(HEALTH, b"", headers={"x": "a\r\nNats-Msg-Id: b"})

    async def test_a_payload_over_the_limit_is_refused(self, open_bus: OpenBus) -> None:
        """The bound is named, nothing is sent."""
        bus = await open_bus()
        with pytest.raises(CapacityExceededError, match="payload must be at most"):
            await bus.publish(HEALTH, bytes(9 * 1024 * 1024))


class StreamContract:
    """Streams, duplicates and replay."""

    async def test_ensure_streams_is_idempotent(self, open_bus: OpenBus) -> None:
        """Every service calls it at start."""
        first, second = await open_bus(), await open_bus()
        await first.ensure_streams()
        await second.ensure_streams()
        assert (await keep(first, STATE, b"x")).stream == EVENTS.name

    async def test_a_stream_with_other_settings_is_an_error_that_shows_both(self, open_bus: OpenBus) -> None:
        """A mismatch is not repaired in silence."""
        bus = await open_bus()
        await bus.ensure_streams()
        with pytest.raises(AlreadyExistsError, match=r"declared .*max_bytes=4096 .*exists with .*max_bytes=1073741824"):
            await bus.ensure_streams([replace(EVENTS, max_bytes=4096)])

    async def test_two_streams_may_not_keep_the_same_subject(self, open_bus: OpenBus) -> None:
        """Else a message would be kept twice."""
        bus = await open_bus()
        await bus.ensure_streams()
        with pytest.raises(AlreadyExistsError, match="stream OTHER must keep subjects that no other keeps"):
            await bus.ensure_streams([StreamSpec(name="OTHER", subjects=("esper.v1.*.seed.>",))])

    async def test_a_durable_subject_needs_a_stream(self, open_bus: OpenBus) -> None:
        """A message marked durable is never quietly dropped."""
        bus = await open_bus()
        await bus.ensure_streams()
        with pytest.raises(NotFoundError, match=r"subject must belong to a stream, got esper\.v1\.run-1\.health"):
            await bus.publish(HEALTH, b"", durable=True)

    async def test_a_repeated_message_id_is_kept_once(self, open_bus: OpenBus) -> None:
        """A publisher that had no answer may simply try again."""
        bus = await open_bus()
        await bus.ensure_streams()
        first = await keep(bus, SEED, b"first", "id-1")
        again = await keep(bus, SEED, b"first", "id-1")
        other = await keep(bus, SEED, b"second", "id-2")
        assert (first.duplicate, again.duplicate, other.duplicate) == (False, True, False)
        assert again.sequence == first.sequence
        assert await replayed(bus, SEED) == [b"first", b"second"]

    async def test_replay_gives_a_run_back_in_order(self, open_bus: OpenBus) -> None:
        """From the start, from a sequence, from a time, and only what matches."""
        bus = await open_bus()
        await bus.ensure_streams()
        acks = [await keep(bus, SEED if number % 2 else STATE, b"%d" % number) for number in range(10)]
        await keep(bus, build_subject("run-2", "state"), b"other run")
        assert await replayed(bus, run_pattern("run-1")) == [b"%d" % number for number in range(10)]
        assert await replayed(bus, SEED) == [b"1", b"3", b"5", b"7", b"9"]
        assert await replayed(bus, run_pattern("run-1"), acks[7].sequence) == [b"7", b"8", b"9"]
        assert await replayed(bus, run_pattern("run-3")) == []

    async def test_replay_since_a_time(self, open_bus: OpenBus) -> None:
        """A message stored before it is left out."""
        bus = await open_bus()
        await bus.ensure_streams()
        await keep(bus, STATE, b"before")
        stored = [message.stored_at async for message in bus.replay(STATE)]
        assert stored[0] is not None
        since = stored[0] + timedelta(microseconds=1)
        await keep(bus, STATE, b"after")
        assert await replayed(bus, STATE, since) == [b"after"]

    async def test_a_stream_that_refuses_when_full_says_so(self, open_bus: OpenBus) -> None:
        """A queue is bounded, and its bound is an error for the publisher."""
        bus = await open_bus()
        small = StreamSpec(
            name="SMALL", subjects=("esper.v1.small.>",), when_full=WhenFull.REFUSE, max_bytes=2048, max_age_s=3600
        )
        await bus.ensure_streams([small])
        await keep(bus, "esper.v1.small.a", bytes(1200))
        with pytest.raises(CapacityExceededError, match=r"must (have room|hold at most)"):
            await bus.publish("esper.v1.small.a", bytes(1200), durable=True)

    async def test_a_stream_that_drops_oldest_keeps_the_newest(self, open_bus: OpenBus) -> None:
        """Bounded in bytes, newest last."""
        bus = await open_bus()
        await bus.ensure_streams([StreamSpec(name="SMALL", subjects=("esper.v1.small.>",), max_bytes=4096)])
        for number in range(6):
            await keep(bus, "esper.v1.small.a", bytes([number]) * 1000)
        kept = await replayed(bus, "esper.v1.small.>", stream="SMALL")
        assert kept[-1] == b"\x05" * 1000
        assert 1 <= len(kept) < 6


class ConsumerContract:
    """Durable consumption."""

    async def test_a_consumer_gets_what_was_published_before_and_after_it(self, open_bus: OpenBus) -> None:
        """Durable: nothing depends on who listens when."""
        bus = await open_bus()
        await bus.ensure_streams()
        await keep(bus, STATE, b"before")
        consumer = await bus.consume(EVENTS.name, "nissa", run_pattern("run-1"))
        await keep(bus, SEED, b"after")
        deliveries = await take(consumer, 2)
        assert [delivery.message.payload for delivery in deliveries] == [b"before", b"after"]
        assert [delivery.num_delivered for delivery in deliveries] == [1, 1]
        assert deliveries[0].message.sequence == 1

    async def test_an_acknowledged_message_never_comes_again_over_restarts(self, open_bus: OpenBus) -> None:
        """Each is delivered exactly once to a consumer that acknowledges and restarts in between."""
        sender = await open_bus()
        await sender.ensure_streams()
        sent = [b"%d" % number for number in range(30)]
        got: list[bytes] = []
        for start in range(0, 30, 10):
            reader = await open_bus()
            consumer = await reader.consume(EVENTS.name, "tamiyo", batch=4)
            for payload in sent[start : start + 10]:
                await keep(sender, STATE, payload)
            for delivery in await take(consumer, 10):
                got.append(delivery.message.payload)
                await delivery.ack()
            await reader.close()
        assert got == sent
        last = await (await open_bus()).consume(EVENTS.name, "tamiyo")
        assert await nothing_more(last)

    async def test_two_durable_names_each_get_everything(self, open_bus: OpenBus) -> None:
        """Nissa's reading takes nothing from Karn."""
        bus = await open_bus()
        await bus.ensure_streams()
        await keep(bus, STATE, b"x")
        for name in ("nissa", "karn"):
            [delivery] = await take(await bus.consume(EVENTS.name, name), 1)
            await delivery.ack()
            assert delivery.message.payload == b"x"

    async def test_workers_under_one_name_share_the_queue(self, open_bus: OpenBus) -> None:
        """Each job goes to exactly one of them."""
        bus = await open_bus()
        await bus.ensure_streams()
        workers = [await (await open_bus()).consume(COMPILE.name, "workers", batch=1) for _ in range(2)]
        for number in range(12):
            await keep(bus, JOB, b"%d" % number)
        done: list[bytes] = []
        all_done = asyncio.Event()

        async def work(worker: int) -> None:
            async for delivery in workers[worker]:
                await delivery.ack()
                done.append(delivery.message.payload)
                if len(done) == 12:
                    all_done.set()

        tasks = [asyncio.create_task(work(worker)) for worker in range(2)]
        await asyncio.wait_for(all_done.wait(), 10)
        for worker in workers:
            await worker.close()
        await asyncio.gather(*tasks)
        assert sorted(done, key=int) == [b"%d" % number for number in range(12)]

    async def test_an_acknowledged_job_leaves_the_queue(self, open_bus: OpenBus) -> None:
        """A work queue holds what is still to do."""
        bus = await open_bus()
        await bus.ensure_streams()
        await keep(bus, JOB, b"done")
        await keep(bus, JOB, b"to do")
        [first] = await take(await bus.consume(COMPILE.name, "workers", batch=1), 1)
        await first.ack()
        other = await bus.consume(COMPILE.name, "workers", batch=1)
        [second] = await take(other, 1)
        assert second.message.payload == b"to do"

    async def test_a_second_name_on_a_work_queue_is_refused(self, open_bus: OpenBus) -> None:
        """Two names would fight for the same jobs."""
        bus = await open_bus()
        await bus.ensure_streams()
        await bus.consume(COMPILE.name, "workers")
        with pytest.raises(AlreadyExistsError, match="consumer others of work queue COMPILE must take subjects"):
            await bus.consume(COMPILE.name, "others")

    async def test_a_consumer_may_take_several_patterns(self, open_bus: OpenBus) -> None:
        """One place in the stream for all of them; patterns that overlap are refused."""
        bus = await open_bus()
        await bus.ensure_streams()
        for subject in (STATE, SEED, build_subject("run-1", "alert")):
            await keep(bus, subject, subject.encode())
        consumer = await bus.consume(EVENTS.name, "nissa", [*kind_patterns("seed"), "esper.v1.*.alert"])
        got = [delivery.message.subject for delivery in await take(consumer, 2)]
        assert got == [SEED, build_subject("run-1", "alert")]
        assert await nothing_more(consumer)
        with pytest.raises(InvalidInputError, match="subject_filter must be patterns that do not overlap"):
            await bus.consume(EVENTS.name, "nissa", [run_pattern(), SEED])

    async def test_an_unsettled_message_comes_again_after_ack_wait(self, open_bus: OpenBus) -> None:
        """A consumer that died loses nothing."""
        bus = await open_bus()
        await bus.ensure_streams()
        await keep(bus, STATE, b"x")
        consumer = await bus.consume(EVENTS.name, "nissa", ack_wait_s=0.2)
        [first] = await take(consumer, 1)
        [second] = await take(consumer, 1)
        assert (first.num_delivered, second.num_delivered) == (1, 2)
        assert second.message.sequence == first.message.sequence

    async def test_in_progress_holds_redelivery_off(self, open_bus: OpenBus) -> None:
        """Slow work is not repeated while it goes on."""
        bus = await open_bus()
        await bus.ensure_streams()
        await keep(bus, JOB, b"slow")
        consumer = await bus.consume(COMPILE.name, "workers", ack_wait_s=1.5, batch=1)
        [delivery] = await take(consumer, 1)
        for _ in range(5):
            assert await nothing_more(consumer, for_s=0.4)
            await delivery.in_progress()
        await delivery.ack()
        assert await nothing_more(consumer, for_s=0.8)

    async def test_nak_brings_it_again_after_the_delay(self, open_bus: OpenBus) -> None:
        """Refused now does not mean lost."""
        bus = await open_bus()
        await bus.ensure_streams()
        await keep(bus, STATE, b"x")
        consumer = await bus.consume(EVENTS.name, "nissa")
        [first] = await take(consumer, 1)
        loop = asyncio.get_running_loop()
        refused_at = loop.time()
        await first.nak(0.3)
        [second] = await take(consumer, 1)
        assert second.num_delivered == 2
        assert loop.time() - refused_at >= 0.29

    async def test_a_delivery_is_settled_once(self, open_bus: OpenBus) -> None:
        """The second word is an error, not a surprise."""
        bus = await open_bus()
        await bus.ensure_streams()
        await keep(bus, STATE, b"x")
        [delivery] = await take(await bus.consume(EVENTS.name, "nissa"), 1)
        await delivery.ack()
        assert delivery.settled
        with pytest.raises(InvalidStateError, match="was settled before"):
            await delivery.nak()

    async def test_a_missing_stream_is_named(self, open_bus: OpenBus) -> None:
        """Not a silent iterator for ever."""
        bus = await open_bus()
        with pytest.raises(NotFoundError, match="no stream is named NOPE"):
            await bus.consume("NOPE", "nissa")

    @pytest.mark.parametrize(
        ("bad", "rule"),
        [
            ({"ack_wait_s": 0}, "ack_wait_s must be > 0 seconds, got 0"),
            ({"max_deliver": 0}, "max_deliver must be >= 1, got 0"),
            ({"batch": 0}, "batch must be 1 to 1024, got 0"),
            ({"forget_after_s": 0}, "forget_after_s must be > 0 seconds, got 0"),
        ],
    )
    async def test_bad_limits_are_refused(self, open_bus: OpenBus, bad: dict[str, int], rule: str) -> None:
        """The message states the rule and the value."""
        bus = await open_bus()
        await bus.ensure_streams()
        with pytest.raises(InvalidInputError, match=rule):
            await bus.consume(EVENTS.name, "nissa", **bad)  # type: ignore[arg-type]

    async def test_forget_starts_a_name_afresh(self, open_bus: OpenBus) -> None:
        """And forgetting an unknown name is no error."""
        bus = await open_bus()
        await bus.ensure_streams()
        await bus.forget(EVENTS.name, "nissa")
        await keep(bus, STATE, b"x")
        first = await bus.consume(EVENTS.name, "nissa")
        await (await take(first, 1))[0].ack()
        await first.close()
        await bus.forget(EVENTS.name, "nissa")
        [again] = await take(await bus.consume(EVENTS.name, "nissa"), 1)
        assert (again.message.payload, again.num_delivered) == (b"x", 1)

    async def test_a_name_left_alone_for_long_is_forgotten(self, open_bus: OpenBus) -> None:
        """Runs that ended leave no places behind; with somebody there it stays."""
        bus = await open_bus()
        await bus.ensure_streams()
        await keep(bus, STATE, b"x")
        first = await bus.consume(EVENTS.name, "run-1", forget_after_s=0.5)
        await (await take(first, 1))[0].ack()
        assert await nothing_more(first, for_s=0.8)
        await first.close()
        for _ in range(4):  # the broker looks now and then, and looking at a place ourselves keeps it
            await asyncio.sleep(2.0)
            async with await bus.consume(EVENTS.name, "run-1", forget_after_s=0.5) as again:
                if not await nothing_more(again):
                    return
        pytest.fail("the place is still there")


class DeadLetterContract:
    """What nobody could process."""

    async def _dead(self, bus: Bus, stream: str) -> BusMessage:
        async with asyncio.timeout(10):
            while True:
                async for message in bus.replay(dead_subject(stream), stream=DEAD.name):
                    return message
                await asyncio.sleep(0.01)

    async def test_the_last_refusal_moves_it_to_the_dead_letters(self, open_bus: OpenBus) -> None:
        """With its reason, its origin and its payload; and the queue is free of it."""
        bus = await open_bus()
        await bus.ensure_streams()
        await keep(bus, JOB, b"poison")
        consumer = await bus.consume(COMPILE.name, "workers", max_deliver=2, batch=1)
        for _ in range(2):
            [delivery] = await take(consumer, 1)
            await delivery.nak(reason="cannot\r\ncompile")
        dead = await self._dead(bus, COMPILE.name)
        assert dead.payload == b"poison"
        assert dead.headers[DEAD_REASON_HEADER] == "gave up after 2 deliveries: cannot  compile"
        assert dead.headers[DEAD_SUBJECT_HEADER] == JOB
        assert (dead.headers[DEAD_CONSUMER_HEADER], dead.headers[DEAD_DELIVERIES_HEADER]) == ("workers", "2")
        assert await nothing_more(consumer)
        assert bus.stats().dead_letters == 1

    async def test_a_message_that_kills_its_consumers_dies_too(self, open_bus: OpenBus) -> None:
        """Nobody ever settled it: after the limit it is moved without being handed out."""
        bus = await open_bus()
        await bus.ensure_streams()
        await keep(bus, JOB, b"poison")
        consumer = await bus.consume(COMPILE.name, "workers", ack_wait_s=0.15, max_deliver=2, batch=1)
        assert [delivery.num_delivered for delivery in await take(consumer, 2)] == [1, 2]
        waiting = asyncio.ensure_future(anext(consumer, None))
        dead = await self._dead(bus, COMPILE.name)
        assert dead.headers[DEAD_REASON_HEADER] == "delivered 2 times without an acknowledgement"
        await keep(bus, JOB, b"healthy")
        delivery = await asyncio.wait_for(waiting, 5)
        assert delivery is not None
        assert delivery.message.payload == b"healthy"

    async def test_term_gives_up_at_once(self, open_bus: OpenBus) -> None:
        """What cannot be read is not tried again."""
        bus = await open_bus()
        await bus.ensure_streams()
        await keep(bus, STATE, b"garbage")
        consumer = await bus.consume(EVENTS.name, "nissa", ack_wait_s=0.2)
        [delivery] = await take(consumer, 1)
        await delivery.term("undecodable")
        assert (await self._dead(bus, EVENTS.name)).headers[DEAD_REASON_HEADER] == "undecodable"
        assert await nothing_more(consumer, for_s=0.5)

    async def test_a_dead_letter_that_cannot_be_processed_stays_where_it_is(self, open_bus: OpenBus) -> None:
        """Else it would be copied beside itself for ever."""
        bus = await open_bus()
        await bus.ensure_streams()
        await keep(bus, STATE, b"garbage")
        for stream in (EVENTS.name, DEAD.name):
            [delivery] = await take(await bus.consume(stream, "nissa"), 1)
            await delivery.term("undecodable")
        assert await replayed(bus, "esper.v1.dead.>", stream=DEAD.name) == [b"garbage"]
        assert bus.stats().dead_letters == 2


class ClosingContract:
    """How it ends."""

    async def test_close_ends_every_iterator_and_is_idempotent(self, open_bus: OpenBus) -> None:
        """Nobody is left waiting."""
        bus = await open_bus()
        await bus.ensure_streams()
        subscription = await bus.subscribe(HEALTH)
        consumer = await bus.consume(EVENTS.name, "nissa")
        waiting = [asyncio.ensure_future(anext(subscription, None)), asyncio.ensure_future(anext(consumer, None))]
        await asyncio.sleep(0)
        await bus.close()
        await bus.close()
        assert await asyncio.wait_for(asyncio.gather(*waiting), 5) == [None, None]

    async def test_a_closed_consumer_frees_what_it_had_fetched_ahead(self, open_bus: OpenBus) -> None:
        """The next one need not wait for the clock of messages that were never handed out."""
        bus = await open_bus()
        await bus.ensure_streams()
        for number in range(4):
            await keep(bus, STATE, b"%d" % number)
        consumer = await bus.consume(EVENTS.name, "nissa", ack_wait_s=60, batch=4)
        await (await take(consumer, 1))[0].ack()
        await consumer.close()
        rest = await take(await bus.consume(EVENTS.name, "nissa", ack_wait_s=60), 3)
        assert sorted(delivery.message.payload for delivery in rest) == [b"1", b"2", b"3"]

    async def test_stats_count_what_went_through(self, open_bus: OpenBus) -> None:
        """Published and received, per connection."""
        bus = await open_bus()
        subscription = await bus.subscribe(HEALTH)
        await bus.publish(HEALTH, b"x")
        await take(subscription, 1)
        stats = bus.stats()
        assert (stats.connected, stats.published, stats.received, stats.reconnects) == (True, 1, 1, 0)


class BusContract(FanOutContract, StreamContract, ConsumerContract, DeadLetterContract, ClosingContract):
    """Everything every adapter promises."""

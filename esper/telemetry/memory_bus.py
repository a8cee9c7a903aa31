"""The bus inside one process: the same promises as NATS, kept in memory, with no socket and no thread.

``MemoryBroker`` holds the streams; each ``MemoryBus`` is one connection to it. Connections to one broker may live on
different event loops in different threads: the broker's state is under one lock, held for microseconds and never
across an await, and waiters are woken on their own loop.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import datetime
from typing import Final

from typing_extensions import override

from esper.contracts.errors import CapacityExceededError, InvalidInputError, UnavailableError
from esper.telemetry.bus import (
    Bus,
    BusMessage,
    BusStats,
    Consumer,
    Delivery,
    PublishAck,
    Subscription,
    make_headers,
)
from esper.telemetry.memory_streams import DurablePlace, MemoryStream, Streams
from esper.telemetry.streams import EVENTS, STREAMS, StreamSpec
from esper.telemetry.subjects import check_name, check_pattern, check_subject, matches, overlaps

DEFAULT_MAX_PAYLOAD_BYTES: Final = 8 * 1024 * 1024
"""Largest payload, as the embedded NATS server is configured."""


class _Waker:
    """An event of one loop that any thread may set."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._event = asyncio.Event()

    def wake(self) -> None:
        """Set the event from any thread; nothing happens once its loop is closed."""
        if not self._loop.is_closed():
            try:
                self._loop.call_soon_threadsafe(self._event.set)
            except RuntimeError:  # closed between the two lines: nobody waits there any more
                return

    async def wait(self, timeout_s: float | None) -> None:
        """Wait until woken or until the time is over, then arm again."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._event.wait()
        except TimeoutError:
            return
        finally:
            self._event.clear()


class MemoryBroker:
    """The shared state behind in-process buses; safe to use from any thread."""

    def __init__(self, *, max_payload_bytes: int = DEFAULT_MAX_PAYLOAD_BYTES) -> None:
        if max_payload_bytes <= 0:
            raise InvalidInputError.of("max_payload_bytes", "be > 0", max_payload_bytes)
        self.max_payload_bytes = max_payload_bytes
        self.lock = threading.Lock()
        self.streams = Streams()
        self._listeners: set[_Listener] = set()

    def publish(self, subject: str, payload: bytes, headers: Mapping[str, str], *, durable: bool) -> PublishAck | None:
        """Store and fan out one checked message."""
        if len(payload) > self.max_payload_bytes:
            raise CapacityExceededError(
                f"payload must be at most {self.max_payload_bytes} bytes, got {len(payload)}", parameter="payload"
            )
        with self.lock:
            stream = self.streams.taking(subject, required=durable)
            ack = stream.append(subject, payload, headers) if stream is not None else None
            fresh = ack is None or not ack.duplicate
            woken = list(stream.waiting(subject)) if stream is not None and fresh else []
            listeners = [one for one in self._listeners if matches(one.pattern, subject)]
        message = BusMessage(subject=subject, payload=payload, headers=headers)
        for listener in listeners:
            listener.put(message)
        for wake in woken:
            wake()
        return ack if durable else None

    def listen(self, listener: _Listener) -> None:
        """Let a subscription have every message from now on."""
        with self.lock:
            self._listeners.add(listener)

    def unlisten(self, listener: _Listener) -> None:
        """Stop that."""
        with self.lock:
            self._listeners.discard(listener)


class _Listener(Subscription):
    """One fan-out subscription."""

    def __init__(self, bus: MemoryBus, pattern: str, max_pending: int) -> None:
        self.pattern = pattern
        self._bus = bus
        self._waiting: deque[BusMessage] = deque(maxlen=max_pending)
        self._guard = threading.Lock()
        self._waker = _Waker()
        self._dropped = 0
        self._closed = False

    def put(self, message: BusMessage) -> None:
        """Take a message from any thread; a full queue lets its oldest go."""
        with self._guard:
            if self._closed:
                return
            if len(self._waiting) == self._waiting.maxlen:
                self._dropped += 1
            self._waiting.append(message)
        self._waker.wake()

    @override
    async def __anext__(self) -> BusMessage:
        while not self._waiting:
            if self._closed:
                raise StopAsyncIteration
            await self._waker.wait(None)
        self._bus.count_received()
        return self._waiting.popleft()

    @property
    @override
    def dropped(self) -> int:
        return self._dropped

    @override
    async def close(self) -> None:
        with self._guard:
            self._closed = True
        self._bus.detach(self)
        self._waker.wake()


class _MemoryConsumer(Consumer):
    """One handle on a durable place in a stream."""

    def __init__(self, bus: MemoryBus, stream: MemoryStream, place: DurablePlace, limits: tuple[float, int]) -> None:
        ack_wait_s, max_deliver = limits
        super().__init__(bus, stream.spec.name, place.name, max_deliver)
        self.owner = bus
        self.place = place
        self.ack_wait_s = ack_wait_s
        self._stream = stream
        self._waker = _Waker()
        self._closed = False
        self.wake = self._waker.wake
        place.wakers.add(self.wake)

    @override
    async def _next(self) -> Delivery:
        while not self._closed:
            with self.owner.broker.lock:
                taken, due_s = self._stream.take(self.place, self.ack_wait_s, time.monotonic())
            if taken is not None:
                self.owner.count_received()
                record, num_delivered = taken
                return Delivery(self, record.as_message(), num_delivered, _MemorySettler(self, record.sequence))
            await self._waker.wait(None if due_s is None else max(0.0, due_s - time.monotonic()))
        raise StopAsyncIteration

    def settle(self, sequence: int, outcome: str, delay_s: float = 0.0) -> None:
        """Write down what became of a delivery, and wake whoever can take it next."""
        self.owner.check_open()
        with self.owner.broker.lock:
            now = time.monotonic()
            if outcome == "ack":
                self._stream.ack(self.place, sequence)
            else:
                self.place.due_at(sequence, now + (delay_s if outcome == "nak" else self.ack_wait_s))
            woken = list(self.place.wakers)
        for wake in woken:
            wake()

    @override
    async def close(self) -> None:
        self._closed = True
        with self.owner.broker.lock:
            self.place.wakers.discard(self.wake)
            self.place.idle_since_s = time.monotonic()
        self.owner.detach(self)
        self._waker.wake()


class _MemorySettler:
    """Tells the broker about one delivery."""

    def __init__(self, consumer: _MemoryConsumer, sequence: int) -> None:
        self._consumer = consumer
        self._sequence = sequence

    async def ack(self) -> None:
        self._consumer.settle(self._sequence, "ack")

    async def nak(self, delay_s: float) -> None:
        self._consumer.settle(self._sequence, "nak", delay_s)

    async def in_progress(self) -> None:
        self._consumer.settle(self._sequence, "in_progress")


class MemoryBus(Bus):
    """One connection to a broker in this process.

    Publishing is safe from any thread; an iterator belongs to the loop on which it was opened.
    """

    def __init__(self, broker: MemoryBroker | None = None) -> None:
        self.broker = broker if broker is not None else MemoryBroker()
        self._open: set[Subscription | Consumer] = set()
        self._guard = threading.Lock()
        self._closed = False
        self._published = 0
        self._received = 0
        self._gone_dropped = 0
        self._gone_dead = 0

    @override
    async def ensure_streams(self, specs: Sequence[StreamSpec] = STREAMS) -> None:
        self.check_open()
        with self.broker.lock:
            for spec in specs:
                self.broker.streams.ensure(spec)

    @override
    async def publish(
        self,
        subject: str,
        payload: bytes,
        *,
        headers: Mapping[str, str] | None = None,
        msg_id: str | None = None,
        durable: bool = False,
    ) -> PublishAck | None:
        self.check_open()
        checked = make_headers(headers, msg_id, durable=durable)
        ack = self.broker.publish(check_subject(subject), bytes(payload), checked, durable=durable)
        with self._guard:
            self._published += 1
        return ack

    @override
    async def flush(self, timeout_s: float = 5.0) -> None:
        """Return at once: what was published has arrived."""
        del timeout_s
        self.check_open()

    @override
    async def subscribe(self, pattern: str, *, max_pending: int = 65_536) -> Subscription:
        self.check_open()
        if max_pending < 1:
            raise InvalidInputError.of("max_pending", "be >= 1", max_pending)
        listener = _Listener(self, check_pattern(pattern), max_pending)
        with self._guard:
            self._open.add(listener)
        self.broker.listen(listener)
        return listener

    @override
    async def consume(
        self,
        stream: str,
        durable_name: str,
        subject_filter: str | Sequence[str] | None = None,
        *,
        ack_wait_s: float = 30.0,
        max_deliver: int = 5,
        batch: int = 16,
        forget_after_s: float | None = None,
    ) -> Consumer:
        self.check_open()
        filters = check_consume(durable_name, subject_filter, ack_wait_s, max_deliver, batch)
        check_forget_after(forget_after_s)
        with self.broker.lock:
            held = self.broker.streams.get(stream)
            place = held.place(durable_name, filters)
            place.forget_after_s = forget_after_s
            consumer = _MemoryConsumer(self, held, place, (ack_wait_s, max_deliver))
        with self._guard:
            self._open.add(consumer)
        return consumer

    @override
    async def forget(self, stream: str, durable_name: str) -> None:
        self.check_open()
        with self.broker.lock:
            self.broker.streams.get(stream).forget(durable_name)

    @override
    async def replay(
        self, subject_filter: str, since: datetime | int | None = None, *, stream: str = EVENTS.name
    ) -> AsyncIterator[BusMessage]:
        self.check_open()
        check_pattern(subject_filter)
        sequence = since if isinstance(since, int) else 1
        not_before = since if isinstance(since, datetime) else None
        while True:
            with self.broker.lock:
                record = self.broker.streams.get(stream).first_from(sequence, subject_filter, not_before)
            if record is None:
                return
            sequence = record.sequence + 1
            yield record.as_message()

    @override
    async def wait_connected(self, timeout_s: float) -> None:
        """Return at once: the broker is in this process."""
        del timeout_s
        self.check_open()

    @override
    def stats(self) -> BusStats:
        with self._guard:
            open_now = list(self._open)
            dropped = self._gone_dropped + sum(one.dropped for one in open_now if isinstance(one, Subscription))
            dead = self._gone_dead + sum(one.num_dead for one in open_now if isinstance(one, Consumer))
            return BusStats(
                connected=not self._closed,
                published=self._published,
                received=self._received,
                reconnects=0,
                dropped=dropped,
                dead_letters=dead,
            )

    @override
    async def close(self, deadline_s: float = 5.0) -> None:
        del deadline_s  # nothing here waits for anybody
        with self._guard:
            self._closed = True
            open_now = list(self._open)
        for one in open_now:
            await one.close()

    def check_open(self) -> None:
        """Raise unless the bus is open."""
        if self._closed:
            raise UnavailableError("the in-process bus is closed")

    def count_received(self) -> None:
        """Count one message handed to an iterator of this connection."""
        with self._guard:
            self._received += 1

    def detach(self, one: Subscription | Consumer) -> None:
        """Forget a closed iterator but keep its counts."""
        if isinstance(one, _Listener):
            self.broker.unlisten(one)
        with self._guard:
            if one in self._open:
                self._open.discard(one)
                self._gone_dropped += one.dropped if isinstance(one, Subscription) else 0
                self._gone_dead += one.num_dead if isinstance(one, Consumer) else 0


def check_consume(
    name: str, subject_filter: str | Sequence[str] | None, ack_wait_s: float, max_deliver: int, batch: int
) -> tuple[str, ...]:
    """Give the filters of ``Bus.consume`` as patterns, none for everything, once every argument keeps its rule.

    Raises:
        InvalidInputError: An argument breaks its rule.
    """
    check_name("durable_name", name)
    filters = (subject_filter,) if isinstance(subject_filter, str) else tuple(subject_filter or ())
    for place, pattern in enumerate(filters):
        check_pattern(pattern)
        if any(overlaps(pattern, other) for other in filters[:place]):
            raise InvalidInputError.of("subject_filter", "be patterns that do not overlap", filters)
    if ack_wait_s <= 0:
        raise InvalidInputError.of("ack_wait_s", "be > 0 seconds", ack_wait_s)
    if max_deliver < 1:
        raise InvalidInputError.of("max_deliver", "be >= 1", max_deliver)
    if not 1 <= batch <= 1024:
        raise InvalidInputError.of("batch", "be 1 to 1024", batch)
    return filters


def check_forget_after(forget_after_s: float | None) -> None:
    """Raise ``InvalidInputError`` unless a place may be forgotten after so many seconds; ``None`` keeps it."""
    if forget_after_s is not None and forget_after_s <= 0:
        raise InvalidInputError.of("forget_after_s", "be > 0 seconds", forget_after_s)

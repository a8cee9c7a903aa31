"""The publisher: one thread with its own event loop between the training thread and the bus.

The training thread appends to a bounded deque and pushes into the native ring; it never sees a bus call, an exception
or a lock. The publisher's loop polls both, encodes, publishes, and waits out outages: it keeps what fits its bounds,
drops the oldest beyond them, and counts every drop by kind.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import threading
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar

from google.protobuf.message import Message

from esper.contracts.errors import (
    CapacityExceededError,
    DeadlineExceededError,
    EsperError,
    InvalidInputError,
    InvalidStateError,
    NotFoundError,
    UnavailableError,
)
from esper.telemetry.bus import CONTENT_TYPE_HEADER, Bus
from esper.telemetry.consumer import PUBLISHER_HEADER, content_type
from esper.telemetry.health_wire import MAX_SIGNAL_BYTES, Columns, count_signals, encode_health
from esper.telemetry.mailbox import DurableFeed, FanOutFeed, Feed, M, Mailbox, Watch
from esper.telemetry.outbox import Event, EventBox, HealthBox, HealthRows, Offer, OfferQueue, Tally, kind_of
from esper.telemetry.streams import STREAMS, StreamSpec
from esper.telemetry.subjects import build_subject, check_run_id
from esper.telemetry.tracing_context import current_headers, publish_span
from esper.v1 import telemetry_pb2

log = logging.getLogger(__name__)

T = TypeVar("T")
Connect = Callable[[], Awaitable[Bus]]
"""Opens the bus; called on the publisher's loop."""

_MIB: Final = 1024 * 1024
_RETRY_S: Final = 0.1
_REFUSAL_ATTEMPTS: Final = 3
"""How often a message is tried that the bus refuses for a reason which may pass."""
_FLUSH_EVERY: Final = 16
"""Most health batches between two confirmations of the bus."""
_INDEX_EVERY: Final = 50
"""Layer names go with every so many batches, for readers that came late."""


class SignalSource(Protocol):
    """Where health signals come from: the native ``SignalRing``."""

    @property
    def dropped(self) -> int:
        """Signals refused since birth because it was full."""

    def drain(self, max_records: int = ...) -> dict[str, Any]:
        """Take the oldest signals as equally long columns by field name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PublisherConfig:
    """Bounds and times of a publisher."""

    poll_interval_ms: float = 45.0
    """How often the offers are looked at, and every second time the ring: a signal waits for at most twice as long."""
    max_batch_bytes: int = 256 * 1024
    """Largest health batch."""
    max_health_buffer_bytes: int = 32 * _MIB
    """Most bytes of signals kept while the bus is away."""
    max_event_buffer_bytes: int = 64 * _MIB
    """Most bytes of events kept while the bus is away."""
    max_offers: int = 65_536
    """Most events that wait to be encoded."""
    flush_timeout_s: float = 2.0
    """Longest wait for the bus to confirm a health batch before it is sent again."""

    def __post_init__(self) -> None:
        if not 1 <= self.poll_interval_ms <= 50:
            rule = "be 1 to 50 ms, so that no signal waits over 100 ms"
            raise InvalidInputError.of("poll_interval_ms", rule, self.poll_interval_ms)
        if self.max_batch_bytes < 1024:
            raise InvalidInputError.of("max_batch_bytes", "be >= 1024", self.max_batch_bytes)
        for name in ("max_health_buffer_bytes", "max_event_buffer_bytes", "max_offers", "flush_timeout_s"):
            if getattr(self, name) <= 0:
                raise InvalidInputError.of(name, "be > 0", getattr(self, name))


@dataclass(frozen=True, kw_only=True, slots=True)
class PublisherStats:
    """What a publisher has done so far; counts are since its birth."""

    connected: bool
    """Whether the bus can be reached now."""
    published: Mapping[str, int]
    """Messages the bus took, by kind."""
    dropped: Mapping[str, int]
    """Messages lost to a bound, by kind; health counts batches."""
    refused: Mapping[str, int]
    """Messages that no bus would take (too large, no stream, not encodable), by kind."""
    signals_published: int
    """Health signals in batches the bus took."""
    signals_dropped: int
    """Health signals in dropped batches."""
    ring_dropped: int
    """Health signals the ring refused because it was full."""
    buffered_events: int
    """Events that wait, encoded or not."""
    buffered_signals: int
    """Health signals that wait, outside the ring."""
    buffered_bytes: int
    """Bytes of both."""
    reconnects: int
    """Times the bus was lost and found again."""
    lag_s: float | None
    """Age of the oldest thing that waits, in seconds; ``None`` when nothing does."""


class OonaPublisher:
    """Publishes one run's signals and events from a thread of its own.

    ``offer`` and ``stats`` are safe from any thread; ``start`` and ``close`` belong to one owner.
    """

    def __init__(
        self,
        run_id: str,
        *,
        source: SignalSource | None = None,
        config: PublisherConfig | None = None,
        streams: Sequence[StreamSpec] = STREAMS,
    ) -> None:
        self.run_id = check_run_id(run_id)
        self.config = config if config is not None else PublisherConfig()
        self.instance_id = uuid.uuid4().hex
        self._source = source
        self._streams = streams
        self._offers = OfferQueue(self.config.max_offers)
        self._tally = Tally()
        self._events = EventBox(self.config.max_event_buffer_bytes, self._tally)
        self._health = HealthBox(self.config.max_health_buffer_bytes)
        self._sending: Event | None = None
        self._unconfirmed: list[HealthRows] = []
        self._signals_published = 0
        self._layers: dict[int, str] = {}
        self._layers_due = True
        self._num_events = 0
        self._bus: Bus | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._started: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._arrived = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing_s: float | None = None
        self._collected_all = False
        self._source_failed = False
        self._last_reconnects = 0

    # ------------------------------------------------------------------ any thread, never waits

    def offer(self, subject: str, message: Message, *, durable: bool = True, msg_id: str | None = None) -> None:
        """Hand a message over; returns at once, raises nothing, takes no lock.

        The message must not be changed afterwards. It joins the trace of the caller. One with a ``msg_id`` is kept
        once however often it is offered.
        """
        self._offers.put(Offer(subject, message, durable, current_headers(), msg_id, time.monotonic()))

    def name_layers(self, layers: Mapping[int, str]) -> None:
        """Say which layer each number in the signals stands for; the names go out with the next batch."""
        self._layers = dict(layers)
        self._layers_due = True

    def stats(self) -> PublisherStats:
        """Give the counts so far; figures of different fields may be a poll apart."""
        events, health, bus = self._events, self._health, self._bus
        dropped = Counter(self._tally.dropped) + self._offers.overflow
        if health.batches_dropped:
            dropped["health"] += health.batches_dropped
        sending = self._sending
        bus_stats = bus.stats() if bus is not None else None
        if bus_stats is not None:
            self._last_reconnects = bus_stats.reconnects
        unconfirmed = sum(count_signals(rows.columns) for rows in list(self._unconfirmed))
        sending_s = sending.offered_s if sending is not None else None
        since = (sending_s, self._offers.oldest_s, events.oldest_s, health.oldest_s)
        ages = [at_s for at_s in since if at_s is not None]
        return PublisherStats(
            connected=bus_stats is not None and bus_stats.connected,
            published=dict(self._tally.published),
            dropped=dict(dropped),
            refused=dict(self._tally.refused),
            signals_published=self._signals_published,
            signals_dropped=health.signals_dropped,
            ring_dropped=self._source.dropped if self._source is not None else 0,
            buffered_events=len(self._offers) + len(events) + (sending is not None),
            buffered_signals=health.signals + unconfirmed,
            buffered_bytes=events.size_bytes + health.size_bytes,
            reconnects=self._last_reconnects,
            lag_s=time.monotonic() - min(ages) if ages else None,
        )

    # ------------------------------------------------------------------ the owner

    @property
    def running(self) -> bool:
        """Whether the thread runs and the bus was reached."""
        return self._thread is not None and self._thread.is_alive() and self._started.done()

    def start(self, connect: Connect, *, timeout_s: float = 15.0) -> None:
        """Start the thread, open the bus and make sure of its streams; what was offered before goes out now.

        After an error it may be started again.

        Raises:
            UnavailableError: The bus cannot be reached.
            AlreadyExistsError: A stream is there with other settings.
            InvalidStateError: It runs, or was closed.
            DeadlineExceededError: The bus was not open within ``timeout_s`` seconds.
        """
        if self._thread is not None:
            raise InvalidStateError(f"the publisher of run {self.run_id} must be new to start, got one started before")
        self._started = concurrent.futures.Future()
        self._thread = threading.Thread(target=self._main, args=(connect,), name="esper-oona", daemon=True)
        self._thread.start()
        try:
            self._started.result(timeout_s)
        except BaseException as error:
            timed_out = not self._started.done()
            self.close(0.0)
            self._thread = None
            self._closing_s = None
            if timed_out and isinstance(error, TimeoutError):
                raise DeadlineExceededError(f"the bus must open within {timeout_s:g} s, got no answer") from error
            raise

    def close(self, deadline_s: float = 5.0) -> None:
        """Send what waits within ``deadline_s`` seconds, count the rest as dropped, end the thread; idempotent."""
        thread = self._thread
        if thread is None or not thread.is_alive():
            return
        self._closing_s = time.monotonic() + max(0.0, deadline_s)
        thread.join(deadline_s + 5.0)
        if thread.is_alive():
            log.error("publisher_thread_stuck", extra={"run_id": self.run_id})

    def submit(
        self, work: Coroutine[Any, Any, T] | Callable[[Bus], Coroutine[Any, Any, T]]
    ) -> concurrent.futures.Future[T]:
        """Run a coroutine, or what a function makes of the bus, on the publisher's loop; give its future result.

        Raises:
            InvalidStateError: The publisher does not run.
        """
        if not self.running or self._loop is None or self._bus is None:
            if isinstance(work, Coroutine):
                work.close()
            raise InvalidStateError(f"the publisher of run {self.run_id} must run to take a coroutine")
        coroutine = work if isinstance(work, Coroutine) else work(self._bus)
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def open_mailbox(self, pattern: str, message_type: type[M], *, max_mail: int = 1024) -> Mailbox[M]:
        """Give a mailbox that fan-out messages of a pattern land in; live once this returns.

        Raises:
            InvalidStateError: The publisher does not run.
        """
        box: Mailbox[M] = Mailbox(max_mail)
        self._open_feed(FanOutFeed(box, pattern, message_type))
        return box

    def open_durable_mailbox(
        self,
        stream: str,
        durable_name: str,
        message_type: type[M],
        *,
        subject_filter: str | Sequence[str],
        max_mail: int = 1024,
        watch: Watch[M] | None = None,
    ) -> Mailbox[M]:
        """Give a mailbox that durable messages land in, each once, until it is settled; live once this returns.

        ``watch`` is told of each message before it lands, on the publisher's loop: work on it begins there, and the
        reader need not do it again.

        Raises:
            InvalidStateError: The publisher does not run.
            NotFoundError: There is no such stream.
        """
        box: Mailbox[M] = Mailbox(max_mail)
        self._open_feed(DurableFeed(box, stream, durable_name, message_type, subject_filter, watch))
        return box

    def _open_feed(self, feed: Feed) -> None:
        async def open_on(bus: Bus) -> None:
            opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()

            def on_opened() -> None:
                if not opened.done():
                    opened.set_result(None)

            running = self._spawn(feed.run(bus, on_opened), "oona-feed")
            running.add_done_callback(lambda task: _hand_over(task, opened))
            await opened
            self._spawn(self._tend(feed), "oona-tend")

        self.submit(open_on).result(30.0)

    # ------------------------------------------------------------------ the publisher's loop

    def _main(self, connect: Connect) -> None:
        try:
            asyncio.run(self._run(connect))
        except BaseException as error:
            if self._started.done():
                log.exception("publisher_failed", extra={"run_id": self.run_id})
            else:
                self._started.set_exception(error)

    async def _run(self, connect: Connect) -> None:
        self._loop = asyncio.get_running_loop()
        self._arrived = asyncio.Event()
        bus = await connect()
        try:
            await bus.ensure_streams(self._streams)
            self._bus = bus
            self._started.set_result(None)
            senders = [
                self._spawn(self._keep_sending(self._send_events, bus), "oona-events"),
                self._spawn(self._keep_sending(self._send_health, bus), "oona-health"),
            ]
            await self._poll_until_closing()
            await self._drain(senders)
        finally:
            for task in list(self._tasks):
                task.cancel()
            if self._tasks:
                await asyncio.wait(self._tasks, timeout=1.0)
            self._count_unsent()
            left_s = max(0.2, (self._closing_s or 0.0) - time.monotonic())
            await bus.close(left_s)
            self._last_reconnects = bus.stats().reconnects

    async def _poll_until_closing(self) -> None:
        interval_s = self.config.poll_interval_ms / 1e3
        with_source = True
        while self._closing_s is None:
            self._collect_safely(with_source=with_source)
            with_source = not with_source  # fewer, larger batches: half the work beside the training thread
            await asyncio.sleep(interval_s)

    async def _drain(self, senders: list[asyncio.Task[None]]) -> None:
        """Let the senders empty the boxes, until they have or the deadline is over."""
        self._collect_safely(with_source=True)
        self._collected_all = True
        self._arrived.set()
        left_s = (self._closing_s or 0.0) - time.monotonic()
        await asyncio.wait(senders, timeout=max(0.0, left_s))

    def _collect_safely(self, *, with_source: bool) -> None:
        """Collect, whatever the source does; its failure is logged once a spell, and looked at again next time."""
        try:
            self._collect_offers()
            if with_source and self._source is not None:
                self._drain_source(self._source)
        except Exception:
            if not self._source_failed:
                log.exception("signal_source_failed", extra={"run_id": self.run_id})
            self._source_failed = True
        else:
            self._source_failed = False

    def _collect_offers(self) -> None:
        """Take over what the training thread left since the last look."""
        self._tally.dropped.update(self._offers.take_overflow())
        for offer in self._offers.take_all():
            event = self._encode(offer)
            if event is not None:
                self._events.put(event)
        if self._events:
            self._arrived.set()

    def _drain_source(self, source: SignalSource) -> None:
        most = max(1, self.config.max_batch_bytes // MAX_SIGNAL_BYTES)
        while True:
            columns: Columns = source.drain(most)
            count = count_signals(columns)
            if count:
                self._health.put(columns, source.dropped)
                self._arrived.set()
            if count < most:
                return

    def _encode(self, offer: Offer) -> Event | None:
        self._num_events += 1
        msg_id = offer.msg_id or f"{self.run_id}:{self.instance_id}:{self._num_events}"
        try:
            payload = offer.message.SerializeToString()
            headers = {**offer.headers, CONTENT_TYPE_HEADER: content_type(type(offer.message))}
        except Exception:  # whatever was offered, the publisher goes on
            self._tally.refused[offer.kind] += 1
            log.exception("message_not_encodable", extra={"subject": offer.subject})
            return None
        headers[PUBLISHER_HEADER] = self.instance_id
        return Event(offer.subject, payload, headers, msg_id, offer.durable, offer.offered_s)

    async def _keep_sending(self, send: Callable[[Bus], Awaitable[None]], bus: Bus) -> None:
        """Send until everything is sent after the last look; a defect is logged and does not end it."""
        while True:
            try:
                await send(bus)
            except Exception:
                log.exception("publisher_sender_failed", extra={"run_id": self.run_id})
                await asyncio.sleep(_RETRY_S)
            else:
                return

    async def _send_events(self, bus: Bus) -> None:
        """Publish events one by one, in order, each until the bus took or refused it."""
        while True:
            while self._sending is not None or self._events:
                if self._sending is None:
                    self._sending = self._events.pop()
                await self._send_event(bus, self._sending)
                self._sending = None
            if self._collected_all:
                return
            await self._wait_arrival(self._events)

    async def _send_event(self, bus: Bus, event: Event) -> None:
        kind = kind_of(event.subject)
        attempts_left = _REFUSAL_ATTEMPTS
        while True:
            try:
                with publish_span(event.subject, event.headers) as headers:
                    await bus.publish(
                        event.subject, event.payload, headers=headers, msg_id=event.msg_id, durable=event.durable
                    )
                    if not event.durable:
                        await bus.flush(self.config.flush_timeout_s)
            except (UnavailableError, DeadlineExceededError) as error:
                log.info("event_postponed", extra={"subject": event.subject, "error": str(error)})
            except CapacityExceededError as error:
                if error.parameter == "payload":
                    self._refuse(kind, event, error)
                    return
                log.warning("stream_full", extra={"subject": event.subject, "error": str(error)})
            except EsperError as error:
                attempts_left -= 1
                if isinstance(error, InvalidInputError) or not attempts_left or not await self._repair(bus, error):
                    self._refuse(kind, event, error)
                    return
            else:
                self._tally.published[kind] += 1
                return
            await self._wait_bus(bus)

    async def _repair(self, bus: Bus, error: EsperError) -> bool:
        """Make the streams again if the bus has lost them; say whether another attempt makes sense."""
        if not isinstance(error, NotFoundError):
            return True
        try:
            await bus.ensure_streams(self._streams)
        except (UnavailableError, DeadlineExceededError):
            return True
        except EsperError:
            log.exception("streams_not_repaired", extra={"run_id": self.run_id})
            return False
        return True

    def _refuse(self, kind: str, event: Event, error: EsperError) -> None:
        self._tally.refused[kind] += 1
        log.error("event_refused", extra={"subject": event.subject, "reason": error.reason, "error": str(error)})

    async def _send_health(self, bus: Bus) -> None:
        """Publish health batches; those the bus has not confirmed go again, under the same sequence."""
        subject = build_subject(self.run_id, "health")
        headers = {CONTENT_TYPE_HEADER: content_type(telemetry_pb2.HealthBatch), PUBLISHER_HEADER: self.instance_id}
        while True:
            while self._health or self._unconfirmed:
                while self._health and len(self._unconfirmed) < _FLUSH_EVERY:
                    self._unconfirmed.append(self._health.pop())
                try:
                    for rows in self._unconfirmed:
                        await bus.publish(subject, self._health_payload(rows), headers=headers)
                    await bus.flush(self.config.flush_timeout_s)
                except (UnavailableError, DeadlineExceededError):
                    self._layers_due = True  # whoever listens after an outage may be new
                    await self._wait_bus(bus)
                except EsperError:
                    log.exception("health_refused", extra={"run_id": self.run_id})
                    for rows in self._unconfirmed:
                        self._health.count_lost(rows)
                    self._unconfirmed = []
                else:
                    self._confirm_health()
            if self._collected_all:
                return
            await self._wait_arrival(self._health)

    def _confirm_health(self) -> None:
        self._tally.published["health"] += len(self._unconfirmed)
        self._signals_published += sum(count_signals(rows.columns) for rows in self._unconfirmed)
        self._unconfirmed = []

    def _health_payload(self, rows: HealthRows) -> bytes:
        envelope = telemetry_pb2.HealthBatch(
            run_id=self.run_id,
            sequence=rows.sequence,
            ring_dropped=rows.ring_dropped,
            batches_dropped=self._health.batches_dropped,
        )
        if self._layers_due or rows.sequence % _INDEX_EVERY == 0:
            self._layers_due = False  # before the names are read: one that comes now goes with the next batch
            envelope.layer_index.extend(
                telemetry_pb2.LayerIndexEntry(layer_id=number, layer=name) for number, name in self._layers.items()
            )
        return encode_health(envelope, rows.columns)

    async def _wait_arrival(self, box: EventBox | HealthBox) -> None:
        while not box and not self._collected_all:
            self._arrived.clear()
            await self._arrived.wait()

    async def _wait_bus(self, bus: Bus) -> None:
        """Wait a moment, then until the bus can be reached again."""
        await asyncio.sleep(_RETRY_S)
        with contextlib.suppress(UnavailableError):  # the caller tries again either way
            await bus.wait_connected(self.config.flush_timeout_s)

    async def _tend(self, feed: Feed) -> None:
        interval_s = self.config.poll_interval_ms / 1e3
        last_s = time.monotonic()
        while True:
            await asyncio.sleep(interval_s)
            now_s = time.monotonic()
            await feed.tend(now_s - last_s)
            last_s = now_s

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("publisher_task_failed", extra={"task": task.get_name()}, exc_info=task.exception())

    def _count_unsent(self) -> None:
        """Count what the deadline left behind as dropped."""
        if self._sending is not None:
            self._events.put(self._sending)
            self._sending = None
        while self._events:
            event = self._events.pop()
            self._tally.dropped[kind_of(event.subject)] += 1
        for rows in self._unconfirmed:
            self._health.count_lost(rows)
        self._unconfirmed = []
        while self._health:
            self._health.count_lost(self._health.pop())


def _hand_over(task: asyncio.Task[None], opened: asyncio.Future[None]) -> None:
    """Give the error of a feed that failed before it was live to whoever opened it."""
    if opened.done():
        return
    error = None if task.cancelled() else task.exception()
    opened.set_exception(error if error is not None else InvalidStateError("the publisher was closed"))

"""The publisher: one thread with its own event loop between the training thread and the bus.

The training thread appends to a bounded deque and pushes into the native ring; it never sees a bus call, an exception
or a lock. The publisher's loop polls both, encodes, publishes, and waits out outages: it keeps what fits its bounds,
drops the oldest beyond them, and counts every drop by kind.

Control answers go in a lane of their own, with its own bounds and its own sender: they wait behind no other event.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import threading
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence, Sized
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Protocol, TypeVar

from google.protobuf.message import Message

from esper.contracts.errors import (
    DeadlineExceededError,
    EsperError,
    InvalidInputError,
    InvalidStateError,
    UnavailableError,
)
from esper.telemetry.bus import CONTENT_TYPE_HEADER, Bus
from esper.telemetry.consumer import PUBLISHER_HEADER, content_type
from esper.telemetry.event_sender import RETRY_S, EventSender, wait_bus
from esper.telemetry.health_wire import MAX_SIGNAL_BYTES, Columns, count_signals, encode_health
from esper.telemetry.mailbox import DurableFeed, FanOutFeed, Feed, M, Mailbox, Watch
from esper.telemetry.outbox import Event, HealthBox, HealthRows, Lane, Offer, Tally, is_express
from esper.telemetry.streams import STREAMS, StreamSpec
from esper.telemetry.subjects import build_subject, check_run_id
from esper.telemetry.tracing_context import current_headers
from esper.v1 import telemetry_pb2

log = logging.getLogger(__name__)

T = TypeVar("T")
Connect = Callable[[], Awaitable[Bus]]
"""Opens the bus; called on the publisher's loop."""

_MIB: Final = 1024 * 1024
_ENCODED_AT_ONCE: Final = 256
"""Most events of a lane that are encoded before the loop looks at everything else again."""
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
    """Most bytes of events kept while the bus is away, control answers aside."""
    max_control_buffer_bytes: int = 4 * _MIB
    """Most bytes of control answers kept while the bus is away."""
    max_offers: int = 65_536
    """Most events that wait to be encoded, and as many control answers."""
    flush_timeout_s: float = 2.0
    """Longest wait for the bus to confirm a health batch before it is sent again."""

    def __post_init__(self) -> None:
        if not 1 <= self.poll_interval_ms <= 50:
            rule = "be 1 to 50 ms, so that no signal waits over 100 ms"
            raise InvalidInputError.of("poll_interval_ms", rule, self.poll_interval_ms)
        if self.max_batch_bytes < 1024:
            raise InvalidInputError.of("max_batch_bytes", "be >= 1024", self.max_batch_bytes)
        bounds = ("max_health_buffer_bytes", "max_event_buffer_bytes", "max_control_buffer_bytes", "max_offers")
        for name in (*bounds, "flush_timeout_s"):
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
        self._tally = Tally()
        self._express = Lane(self.config.max_offers, self.config.max_control_buffer_bytes, self._tally)
        self._ordinary = Lane(self.config.max_offers, self.config.max_event_buffer_bytes, self._tally)
        self._lanes = (self._express, self._ordinary)
        self._health = HealthBox(self.config.max_health_buffer_bytes)
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
        once however often it is offered. Control answers keep their order, everything else keeps its own.
        """
        lane = self._express if is_express(subject) else self._ordinary
        lane.offers.put(Offer(subject, message, durable, current_headers(), msg_id, time.monotonic()))

    def name_layers(self, layers: Mapping[int, str]) -> None:
        """Say which layer each number in the signals stands for; the names go out with the next batch."""
        self._layers = dict(layers)
        self._layers_due = True

    def stats(self) -> PublisherStats:
        """Give the counts so far; figures of different fields may be a poll apart."""
        health, bus = self._health, self._bus
        dropped = sum((lane.offers.overflow for lane in self._lanes), Counter(self._tally.dropped))
        if health.batches_dropped:
            dropped["health"] += health.batches_dropped
        bus_stats = bus.stats() if bus is not None else None
        if bus_stats is not None:
            self._last_reconnects = bus_stats.reconnects
        unconfirmed = sum(count_signals(rows.columns) for rows in list(self._unconfirmed))
        since = (*(lane.oldest_s for lane in self._lanes), health.oldest_s)
        ages = [at_s for at_s in since if at_s is not None]
        return PublisherStats(
            connected=bus_stats is not None and bus_stats.connected,
            published=dict(self._tally.published),
            dropped=dict(dropped),
            refused=dict(self._tally.refused),
            signals_published=self._signals_published,
            signals_dropped=health.signals_dropped,
            ring_dropped=self._source.dropped if self._source is not None else 0,
            buffered_events=sum(len(lane) for lane in self._lanes),
            buffered_signals=health.signals + unconfirmed,
            buffered_bytes=sum(lane.events.size_bytes for lane in self._lanes) + health.size_bytes,
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
        reader need not do it again. What is settled is acknowledged once the control answers offered before are out:
        a command whose answer died with this process comes again to the next.

        Raises:
            InvalidStateError: The publisher does not run.
            NotFoundError: There is no such stream.
        """
        box: Mailbox[M] = Mailbox(max_mail)
        feed = DurableFeed(
            box, stream, durable_name, message_type, subject_filter, watch=watch, answered=self._answered
        )
        self._open_feed(feed)
        return box

    def _answered(self) -> bool:
        """Say whether every control answer that was offered is out."""
        return not self._express

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
                self._spawn(self._keep_sending(partial(self._send_lane, self._express), bus), "oona-control"),
                self._spawn(self._keep_sending(partial(self._send_lane, self._ordinary), bus), "oona-events"),
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
            more = self._collect_safely(with_source=with_source)
            with_source = not with_source  # fewer, larger batches: half the work beside the training thread
            await asyncio.sleep(0.0 if more else interval_s)

    async def _drain(self, senders: list[asyncio.Task[None]]) -> None:
        """Let the senders empty the boxes, until they have or the deadline is over."""
        while self._collect_safely(with_source=True):  # noqa: ASYNC110 - the senders' turn, no wait
            await asyncio.sleep(0.0)
        self._collected_all = True
        self._arrived.set()
        left_s = (self._closing_s or 0.0) - time.monotonic()
        await asyncio.wait(senders, timeout=max(0.0, left_s))

    def _collect_safely(self, *, with_source: bool) -> bool:
        """Collect, whatever the source does; its failure is logged once a spell, and looked at again next time.

        Says whether offers are left.
        """
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
        return any(lane.offers for lane in self._lanes)

    def _collect_offers(self) -> None:
        """Take over what the training thread left since the last look, so much that a flood holds nothing else up."""
        for lane in self._lanes:
            self._tally.dropped.update(lane.offers.take_overflow())
            for offer in lane.offers.take(_ENCODED_AT_ONCE):
                event = self._encode(offer)
                if event is not None:
                    lane.events.put(event)
            if lane.events:
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
                await asyncio.sleep(RETRY_S)
            else:
                return

    async def _send_lane(self, lane: Lane, bus: Bus) -> None:
        """Publish a lane's events one by one, in order, until everything is sent after the last look."""
        sender = EventSender(self.run_id, lane, self._tally, self._streams, self.config.flush_timeout_s)
        while True:
            await sender.send_all(bus)
            if self._collected_all:
                return
            await self._wait_arrival(lane.events)

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
                    await wait_bus(bus, self.config.flush_timeout_s)
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

    async def _wait_arrival(self, box: Sized) -> None:
        while not box and not self._collected_all:
            self._arrived.clear()
            await self._arrived.wait()

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
        for lane in self._lanes:
            lane.drop_all()
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

"""The bus over NATS: core publish for fan-out, JetStream for what must not be lost.

A durable publish waits for the stream's acknowledgement and is repeated under the same message id, over reconnects,
until its time is over. Settling a delivery waits for the server's word in the same way.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import datetime
from functools import partial
from typing import Any, Final

import nats.errors
import nats.js.api as js_api
import nats.js.errors
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription as NatsPySubscription
from typing_extensions import override

from esper.contracts.errors import (
    AlreadyExistsError,
    EsperError,
    InternalError,
    InvalidInputError,
    NotFoundError,
    UnavailableError,
)
from esper.telemetry.bus import Bus, BusMessage, BusStats, Consumer, PublishAck, Subscription, make_headers
from esper.telemetry.memory_bus import check_consume, check_forget_after
from esper.telemetry.memory_streams import no_stream, queue_overlap, stream_mismatch
from esper.telemetry.nats_connection import Connection, Link, NatsOptions
from esper.telemetry.nats_consumer import NatsConsumer, PullFeed, message_of
from esper.telemetry.streams import EVENTS, STREAMS, Retention, StreamSpec, WhenFull
from esper.telemetry.subjects import check_name, check_pattern, check_subject

_WORK_QUEUE_OVERLAP_CODES: Final = frozenset({10_099, 10_100})
_NAME_TAKEN_CODES: Final = frozenset({10_058, 10_065})
_API_S: Final = 5.0


class NatsBus(Bus):
    """One connection to a NATS server; open it with ``NatsBus.connect``. Belongs to one event loop."""

    def __init__(self, connection: Connection) -> None:
        self._conn = connection
        self._open: set[_NatsSubscription | NatsConsumer] = set()
        self._published = 0
        self._received = 0
        self._gone_dropped = 0
        self._gone_dead = 0

    @classmethod
    async def connect(cls, url: str, options: NatsOptions | None = None) -> NatsBus:
        """Connect to a server.

        Raises:
            InvalidInputError: The url is not one of a NATS server.
            UnavailableError: Nothing answers there as NATS does; the message names the url.
        """
        if not url.startswith(("nats://", "tls://")):
            raise InvalidInputError.of("url", "start with nats:// or tls://", url)
        connection = Connection(url, options if options is not None else NatsOptions())
        await connection.start()
        return cls(connection)

    @property
    def url(self) -> str:
        """Where it is connected."""
        return self._conn.url

    @override
    async def ensure_streams(self, specs: Sequence[StreamSpec] = STREAMS) -> None:
        for spec in specs:
            await self._conn.persist(partial(_ensure, spec), 2 * _API_S)

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
        checked = make_headers(headers, msg_id, durable=durable)
        check_subject(subject)
        if not durable:
            link = await self._conn.ready(0.001)
            send = link.client.publish(subject, payload, headers=checked or None)
            await link.run(send, self._conn.options.attempt_timeout_s)
            self._published += 1
            return None
        ack = await self._conn.persist(
            lambda link, limit_s: _publish_kept(link, limit_s, subject, payload, checked),
            self._conn.options.publish_timeout_s,
        )
        self._published += 1
        return PublishAck(stream=ack.stream, sequence=ack.seq, duplicate=bool(ack.duplicate))

    @override
    async def flush(self, timeout_s: float = 5.0) -> None:
        link = await self._conn.ready(timeout_s)
        await link.ping(timeout_s)

    @override
    async def subscribe(self, pattern: str, *, max_pending: int = 65_536) -> Subscription:
        if max_pending < 1:
            raise InvalidInputError.of("max_pending", "be >= 1", max_pending)
        subscription = _NatsSubscription(self, self._conn, check_pattern(pattern), max_pending)
        await subscription.open()
        self._open.add(subscription)
        return subscription

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
        filters = check_consume(durable_name, subject_filter, ack_wait_s, max_deliver, batch)
        check_forget_after(forget_after_s)
        config = js_api.ConsumerConfig(
            durable_name=durable_name,
            filter_subject=filters[0] if len(filters) == 1 else None,
            filter_subjects=list(filters) if len(filters) > 1 else None,
            ack_wait=ack_wait_s,
            max_deliver=-1,  # the limit is ours: after the server's own limit a message would stay in a work queue
            max_ack_pending=max(1000, batch),
            inactive_threshold=forget_after_s,
        )

        async def make(link: Link) -> tuple[str, int]:
            return await _make_consumer(link, check_name("stream", stream), config)

        feed = PullFeed(self._conn, stream, make, batch)
        await self._conn.persist(feed.bind, 2 * _API_S)
        consumer = NatsConsumer(self, self._conn, feed, (stream, durable_name, max_deliver))
        self._open.add(consumer)
        return consumer

    @override
    async def forget(self, stream: str, durable_name: str) -> None:
        async def delete(link: Link, limit_s: float) -> None:
            try:
                await link.run(link.js.delete_consumer(stream, durable_name), limit_s)
            except InternalError as error:
                if not isinstance(error.__cause__, nats.js.errors.NotFoundError):
                    raise

        await self._conn.persist(delete, 2 * _API_S)

    @override
    async def replay(
        self, subject_filter: str, since: datetime | int | None = None, *, stream: str = EVENTS.name
    ) -> AsyncIterator[BusMessage]:
        check_pattern(subject_filter)
        start: datetime | int = since if since is not None else 1
        while True:
            feed = PullFeed(self._conn, stream, _replay_maker(stream, subject_filter, start), 256)
            left = await self._conn.persist(feed.bind, 2 * _API_S)
            try:
                expected = 1
                while left:
                    raw = await feed.next_raw(rebind=False)
                    if raw is None or raw.metadata.sequence.consumer != expected:
                        break  # the link or a message was lost: go on from the next sequence on a new consumer
                    expected += 1
                    message = message_of(raw)
                    start = raw.metadata.sequence.stream + 1
                    left = raw.metadata.num_pending
                    self._received += 1
                    yield message
                else:
                    return
            finally:
                await feed.close()

    @override
    async def wait_connected(self, timeout_s: float) -> None:
        await self._conn.ready(timeout_s)

    @override
    def stats(self) -> BusStats:
        open_now = list(self._open)  # one step: other threads ask too
        dropped = sum(one.dropped for one in open_now if isinstance(one, _NatsSubscription))
        dead = sum(one.num_dead for one in open_now if isinstance(one, NatsConsumer))
        return BusStats(
            connected=self._conn.link is not None,
            published=self._published,
            received=self._received,
            reconnects=self._conn.reconnects,
            dropped=self._gone_dropped + dropped,
            dead_letters=self._gone_dead + dead,
        )

    @override
    async def close(self, deadline_s: float = 5.0) -> None:
        if self._conn.closed:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(deadline_s):
                for one in list(self._open):
                    await one.close()
                if self._conn.link is not None:
                    with contextlib.suppress(EsperError):  # a link that dies now has nothing left to hand over
                        await self._conn.link.ping(deadline_s)
        await self._conn.close()

    def count_received(self) -> None:
        """Count one message handed to an iterator of this connection."""
        self._received += 1

    def detach(self, one: _NatsSubscription | NatsConsumer) -> None:
        """Forget a closed iterator but keep its counts."""
        if one in self._open:
            self._open.discard(one)
            self._gone_dropped += one.dropped if isinstance(one, _NatsSubscription) else 0
            self._gone_dead += one.num_dead if isinstance(one, NatsConsumer) else 0


class _NatsSubscription(Subscription):
    """One fan-out subscription, bound again to every new link."""

    def __init__(self, bus: NatsBus, connection: Connection, pattern: str, max_pending: int) -> None:
        self._bus = bus
        self._conn = connection
        self._pattern = pattern
        self._waiting: deque[BusMessage] = deque(maxlen=max_pending)
        self._arrived = asyncio.Event()
        self._inner: NatsPySubscription | None = None
        self._dropped = 0
        self._closed = False

    async def open(self) -> None:
        """Subscribe; live once this returns."""
        self._conn.bind(self._bind)
        try:
            link = await self._conn.ready(_API_S)
            await self._bind(link)
        except BaseException:
            self._conn.unbind(self._bind)
            raise

    async def _bind(self, link: Link) -> None:
        self._inner = await link.run(link.client.subscribe(self._pattern, cb=self._take), _API_S)
        await link.ping(_API_S)

    async def _take(self, raw: Msg) -> None:
        if len(self._waiting) == self._waiting.maxlen:
            self._dropped += 1
        self._waiting.append(BusMessage(subject=raw.subject, payload=raw.data, headers=raw.headers or {}))
        self._arrived.set()

    @override
    async def __anext__(self) -> BusMessage:
        while not self._waiting:
            if self._closed:
                raise StopAsyncIteration
            self._arrived.clear()
            await self._arrived.wait()
        self._bus.count_received()
        return self._waiting.popleft()

    @property
    @override
    def dropped(self) -> int:
        return self._dropped

    @override
    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._conn.unbind(self._bind)
        self._bus.detach(self)
        self._arrived.set()
        if self._inner is not None:
            with contextlib.suppress(nats.errors.Error):  # a lost link has dropped it already
                await self._inner.unsubscribe()


async def _publish_kept(
    link: Link, limit_s: float, subject: str, payload: bytes, headers: dict[str, str]
) -> js_api.PubAck:
    try:
        return await link.run(link.js.publish(subject, payload, timeout=limit_s, headers=headers), limit_s)
    except UnavailableError as error:
        if isinstance(error.__cause__, nats.js.errors.NoStreamResponseError):
            await _require_stream(link, limit_s, subject)
        raise


async def _require_stream(link: Link, limit_s: float, subject: str) -> None:
    """Raise ``NotFoundError`` if JetStream is there and says that no stream keeps the subject."""
    try:
        await link.run(link.js.find_stream_name_by_subject(subject), limit_s)
    except InternalError as error:
        if isinstance(error.__cause__, nats.js.errors.NotFoundError):
            raise no_stream(subject) from error
        raise


async def _ensure(spec: StreamSpec, link: Link, limit_s: float) -> None:
    wanted = _stream_config(spec)
    try:
        info = await link.run(link.js.stream_info(spec.name), limit_s)
    except InternalError as error:
        if not isinstance(error.__cause__, nats.js.errors.NotFoundError):
            raise
    else:
        _compare(spec, info.config)
        return
    try:
        info = await link.run(link.js.add_stream(wanted), limit_s)
    except InternalError as error:
        cause = error.__cause__
        if getattr(cause, "err_code", None) in _NAME_TAKEN_CODES:
            raise AlreadyExistsError(
                f"stream {spec.name} must keep subjects that no other keeps: declared {spec.describe()}; {error}"
            ) from error
        raise
    _compare(spec, info.config)


def _stream_config(spec: StreamSpec) -> js_api.StreamConfig:
    return js_api.StreamConfig(
        name=spec.name,
        subjects=list(spec.subjects),
        retention=js_api.RetentionPolicy(spec.retention.value),
        discard=js_api.DiscardPolicy(spec.when_full.value),
        storage=js_api.StorageType.FILE,
        max_bytes=spec.max_bytes,
        max_age=spec.max_age_s,
        duplicate_window=spec.duplicate_window_s,
        num_replicas=spec.replicas,
        max_consumers=-1,
        max_msgs=-1,
    )


def _compare(spec: StreamSpec, config: js_api.StreamConfig) -> None:
    if config.storage != js_api.StorageType.FILE.value:
        raise stream_mismatch(spec, f"storage={config.storage}")
    existing = StreamSpec(
        name=spec.name,
        subjects=tuple(config.subjects or ()),
        retention=Retention(config.retention or "limits"),
        when_full=WhenFull(config.discard or "old"),
        max_bytes=config.max_bytes or -1,
        max_age_s=config.max_age or 0.0,
        duplicate_window_s=config.duplicate_window,
        replicas=config.num_replicas or 1,
    )
    if existing.describe() != spec.describe():
        raise stream_mismatch(spec, existing.describe())


async def _make_consumer(link: Link, stream: str, config: js_api.ConsumerConfig) -> tuple[str, int]:
    """Create or find a consumer; give its name and how many messages it has to come."""
    try:
        info = await link.run(link.js.add_consumer(stream, config), _API_S)
    except InternalError as error:
        cause = error.__cause__
        if isinstance(cause, nats.js.errors.NotFoundError):
            raise NotFoundError(
                f"no stream is named {stream}; ensure_streams creates it", parameter="stream"
            ) from error
        if getattr(cause, "err_code", None) in _WORK_QUEUE_OVERLAP_CODES:
            wanted = tuple(config.filter_subjects or ([config.filter_subject] if config.filter_subject else []))
            raise queue_overlap(stream, str(config.durable_name), wanted) from error
        raise
    return info.name, info.num_pending or 0


def _replay_maker(stream: str, subject_filter: str, start: datetime | int) -> Any:
    config = js_api.ConsumerConfig(
        filter_subject=subject_filter,
        ack_policy=js_api.AckPolicy.NONE,
        mem_storage=True,
        num_replicas=1,
        inactive_threshold=30.0,
    )
    if isinstance(start, datetime):
        if start.tzinfo is None:
            raise InvalidInputError.of("since", "have a time zone", start.isoformat())
        config.deliver_policy = js_api.DeliverPolicy.BY_START_TIME
        config.opt_start_time = start
    else:
        config.deliver_policy = js_api.DeliverPolicy.BY_START_SEQUENCE
        config.opt_start_seq = max(1, start)

    async def make(link: Link) -> tuple[str, int]:
        return await _make_consumer(link, stream, config)

    return make

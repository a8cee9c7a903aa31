"""Pull consumption from JetStream: one standing request for a batch, renewed as it is used up or lost.

nats-py's ``fetch`` holds the first message of a batch back until the batch is full or its time is over; this feed
gives every message as it comes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final

import nats.errors
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription as NatsPySubscription
from typing_extensions import override

from esper.contracts.errors import EsperError, InvalidStateError, NotFoundError, UnavailableError
from esper.telemetry.bus import BusMessage, Consumer, Delivery
from esper.telemetry.nats_connection import Connection, Link

if TYPE_CHECKING:
    from esper.telemetry.nats_bus import NatsBus

_PULL_S: Final = 30.0
_HEARTBEAT_S: Final = 2.0
_AWAY_S: Final = 0.1
_LOOK_S: Final = 0.5
"""Seconds that a link is waited for before it is looked whether the feed was closed meanwhile."""
_NANO: Final = 1_000_000_000
_SETTLE_S: Final = 10.0

Maker = Callable[[Link], Awaitable[tuple[str, int]]]
"""Creates or finds the consumer on a link; gives its name and the number of messages to come."""


class PullFeed:
    """Raw messages of one JetStream consumer, over as many links as it takes."""

    def __init__(self, connection: Connection, stream: str, make: Maker, batch: int) -> None:
        self._conn = connection
        self._stream = stream
        self._make = make
        self._batch = batch
        self._link: Link | None = None
        self._inbox = ""
        self._name = ""
        self._inner: NatsPySubscription | None = None
        self._queue: asyncio.Queue[Msg | None] = asyncio.Queue()
        self._wanted = 0
        self._closed = False

    async def bind(self, link: Link, limit_s: float = 5.0) -> int:
        """Create the consumer on a link and listen; give the number of messages to come."""
        await self._unbind()
        self._name, pending = await self._make(link)
        self._inbox = link.client.new_inbox()
        self._queue = asyncio.Queue()
        self._inner = await link.run(link.client.subscribe(self._inbox, cb=self._take), limit_s)
        self._link = link
        self._wanted = 0
        link.lost.add_done_callback(self._wake)
        return pending

    async def next_raw(self, *, rebind: bool = True) -> Msg | None:
        """Wait for the next message; ``None`` once closed, or on a lost link when it may not bind again."""
        while not self._closed:
            link = self._link
            if link is None or not link.alive:
                if not rebind:
                    return None
                await self._rebind()
                continue
            if self._wanted <= 0:
                await self._pull(link)
            try:
                async with asyncio.timeout(2 * _HEARTBEAT_S + 1.0):
                    raw = await self._queue.get()
            except TimeoutError:  # not even a heartbeat: the request is gone
                self._wanted = 0
                continue
            if raw is None:
                continue
            if not _is_status(raw):
                self._wanted -= 1
                return raw
            await self._heed(raw)
        return None

    def take_waiting(self) -> list[Msg]:
        """Give what arrived and was not handed out."""
        waiting: list[Msg] = []
        while not self._queue.empty():
            raw = self._queue.get_nowait()
            if raw is not None and not _is_status(raw):
                waiting.append(raw)
        return waiting

    async def close(self) -> None:
        """Stop listening; whoever waits gets ``None``. Idempotent."""
        self._closed = True
        self._queue.put_nowait(None)
        await self._unbind()

    async def _rebind(self) -> None:
        try:
            link = await self._conn.ready(_LOOK_S)
        except UnavailableError:
            return  # the caller looks whether it was closed meanwhile
        try:
            await self.bind(link)
        except NotFoundError:
            raise
        except EsperError:
            await asyncio.sleep(_AWAY_S)

    async def _unbind(self) -> None:
        inner, self._inner = self._inner, None
        if self._link is not None:
            self._link.lost.remove_done_callback(self._wake)
            self._link = None
        if inner is not None:
            with contextlib.suppress(nats.errors.Error):  # a lost link has dropped it already
                await inner.unsubscribe()

    async def _pull(self, link: Link) -> None:
        request = {
            "batch": self._batch,
            "expires": int(_PULL_S * _NANO),
            "idle_heartbeat": int(_HEARTBEAT_S * _NANO),
        }
        subject = f"$JS.API.CONSUMER.MSG.NEXT.{self._stream}.{self._name}"
        try:
            await link.run(link.client.publish(subject, json.dumps(request).encode(), reply=self._inbox), 2.0)
        except EsperError:
            link.mark_lost()
        else:
            self._wanted = self._batch

    async def _heed(self, raw: Msg) -> None:
        """Act on a status message of the server."""
        status = (raw.headers or {}).get("Status", "")
        words = (raw.headers or {}).get("Description", "").lower()
        if status == "100":  # heartbeat
            return
        self._wanted = 0
        if status == "503" or "shutdown" in words:  # JetStream is starting or going
            await asyncio.sleep(_AWAY_S)
        if "consumer deleted" in words or "consumer is deleted" in words or status == "503":
            await self._unbind()

    async def _take(self, raw: Msg) -> None:
        self._queue.put_nowait(raw)

    def _wake(self, _: asyncio.Future[None]) -> None:
        self._queue.put_nowait(None)


class NatsConsumer(Consumer):
    """One handle on a durable consumer."""

    def __init__(self, bus: NatsBus, connection: Connection, feed: PullFeed, limits: tuple[str, str, int]) -> None:
        stream, name, max_deliver = limits
        super().__init__(bus, stream, name, max_deliver)
        self._owner = bus
        self._conn = connection
        self._feed = feed

    @override
    async def _next(self) -> Delivery:
        try:
            raw = await self._feed.next_raw()
        except InvalidStateError as error:  # the bus was closed while we waited for a link
            raise StopAsyncIteration from error
        if raw is None:
            raise StopAsyncIteration
        self._owner.count_received()
        return Delivery(self, message_of(raw), raw.metadata.num_delivered, _NatsSettler(self._conn, raw.reply))

    @override
    async def close(self) -> None:
        waiting = self._feed.take_waiting()
        await self._feed.close()
        self._owner.detach(self)
        link = self._conn.link
        if link is not None:
            with contextlib.suppress(EsperError):  # untold, they come again once their clock ran out
                for raw in waiting:
                    await link.run(link.client.publish(raw.reply, b"-NAK"), 1.0)


class _NatsSettler:
    """Tells JetStream what became of one delivery, and waits for its word."""

    def __init__(self, connection: Connection, reply: str) -> None:
        self._conn = connection
        self._reply = reply

    async def ack(self) -> None:
        """Confirm."""
        await self._tell(b"+ACK")

    async def nak(self, delay_s: float) -> None:
        """Ask for another delivery."""
        delay = b' {"delay": %d}' % int(delay_s * _NANO) if delay_s > 0 else b""
        await self._tell(b"-NAK" + delay)

    async def in_progress(self) -> None:
        """Start the clock again."""
        await self._tell(b"+WPI")

    async def _tell(self, word: bytes) -> None:
        async def tell(link: Link, limit_s: float) -> None:
            await link.run(link.client.request(self._reply, word, timeout=limit_s), limit_s)

        await self._conn.persist(tell, _SETTLE_S)


def message_of(raw: Msg) -> BusMessage:
    """Give a JetStream message as our own."""
    place = raw.metadata
    return BusMessage(
        subject=raw.subject,
        payload=raw.data,
        headers=raw.headers or {},
        sequence=place.sequence.stream,
        stored_at=place.timestamp,
    )


def _is_status(raw: Msg) -> bool:
    return not raw.data and "Status" in (raw.headers or {}) and not raw.reply.startswith("$JS.ACK")

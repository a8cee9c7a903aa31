"""A connection to NATS that is found again by itself: links, their loss, and calls that do not outlive a link.

nats-py's own reconnect is switched off: it keeps writes that may be lost, closes for good on some server errors, and
can wedge on a frozen peer. Here each TCP connection is one ``Link``; when it is lost, or does not answer a ping, it is
abandoned and a new one is made, with growing jittered pauses, for ever. Whoever holds subscriptions binds them again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import ssl
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import nats.errors
import nats.js.errors
from nats.aio.client import Client
from nats.js import JetStreamContext

from esper.contracts.errors import (
    CapacityExceededError,
    DeadlineExceededError,
    EsperError,
    InternalError,
    InvalidInputError,
    InvalidStateError,
    UnavailableError,
)

log = logging.getLogger(__name__)

T = TypeVar("T")

_CLOSE_S: Final = 1.0
_STREAM_FULL_CODES: Final = frozenset({10_023, 10_047, 10_077})
"""JetStream error codes: insufficient resources, storage exceeded, maximum bytes exceeded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NatsOptions:
    """How a connection behaves; credentials and TLS are the operator's."""

    name: str = "esper"
    """Name shown in the server's connection list."""
    tls: ssl.SSLContext | None = None
    """TLS context; ``None`` speaks plain text (loopback only)."""
    user: str | None = None
    """User name, with ``password``."""
    password: str | None = field(default=None, repr=False)
    """Password of ``user``."""
    token: str | None = field(default=None, repr=False)
    """Bearer token, instead of a user."""
    connect_timeout_s: float = 2.0
    """Longest wait for one attempt to connect."""
    publish_timeout_s: float = 10.0
    """Longest wait for a durable message to be acknowledged, over all attempts."""
    attempt_timeout_s: float = 2.0
    """Longest wait of one attempt before it is repeated under the same id."""
    ping_interval_s: float = 2.0
    """How often the link is proven alive."""
    reconnect_wait_s: float = 0.05
    """First pause between attempts to reconnect; doubles each time, with jitter."""
    reconnect_wait_max_s: float = 2.0
    """Longest such pause."""

    def __post_init__(self) -> None:
        times = ("connect_timeout_s", "publish_timeout_s", "attempt_timeout_s", "ping_interval_s", "reconnect_wait_s")
        for name in times:
            if getattr(self, name) <= 0:
                raise InvalidInputError.of(name, "be > 0 seconds", getattr(self, name))
        if self.reconnect_wait_max_s < self.reconnect_wait_s:
            rule = f"be at least reconnect_wait_s ({self.reconnect_wait_s:g} s)"
            raise InvalidInputError.of("reconnect_wait_max_s", rule, self.reconnect_wait_max_s)


class Link:
    """One live connection; ``lost`` resolves when it is gone."""

    def __init__(self, client: Client, number: int) -> None:
        self.client = client
        self.js: JetStreamContext = client.jetstream(timeout=5)
        self.number = number
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def alive(self) -> bool:
        """Whether nobody noticed its loss yet."""
        return not self.lost.done()

    def mark_lost(self) -> None:
        """Say that it is gone; idempotent."""
        if not self.lost.done():
            self.lost.set_result(None)

    async def run(self, call: Coroutine[Any, Any, T], timeout_s: float) -> T:
        """Await a call on this link, but no longer than the link lives or ``timeout_s`` seconds.

        Raises:
            UnavailableError: The link was lost.
            DeadlineExceededError: The time ran out.
            CapacityExceededError: The server refused for want of room.
        """
        task = asyncio.ensure_future(call)
        try:
            waited: set[asyncio.Future[Any]] = {task, self.lost}
            done, _ = await asyncio.wait(waited, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            await _end(task)
            raise
        if task in done:
            try:
                return task.result()
            except asyncio.CancelledError as error:  # nats-py cancels inner calls when it closes
                raise UnavailableError("the NATS connection was lost during the call") from error
            except Exception as error:
                raise translate(error) from error
        await _end(task)
        if self.lost in done:
            raise UnavailableError("the NATS connection was lost during the call")
        raise DeadlineExceededError(f"NATS must answer within {timeout_s:g} s, got no answer")

    async def ping(self, timeout_s: float) -> None:
        """Return once the server has read everything written before; same errors as ``run``."""
        await self.run(self.client.flush(timeout=timeout_s), timeout_s)  # type: ignore[arg-type] # takes fractions


class Connection:
    """Keeps one link to a server alive until closed."""

    def __init__(self, url: str, options: NatsOptions) -> None:
        self.url = url
        self.options = options
        self.reconnects = 0
        self._link: Link | None = None
        self._changed = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None
        self._closing: set[asyncio.Task[None]] = set()
        self._closed = False
        self._on_link: list[Callable[[Link], Awaitable[None]]] = []
        self._random = random.SystemRandom()

    @property
    def link(self) -> Link | None:
        """The live link, or ``None``."""
        return self._link if self._link is not None and self._link.alive else None

    @property
    def closed(self) -> bool:
        """Whether ``close`` was called."""
        return self._closed

    async def start(self) -> None:
        """Make the first link.

        Raises:
            UnavailableError: There is no NATS server at the url; the message names it.
        """
        self._link = await self._connect(number=0)
        self._keeper = asyncio.create_task(self._keep(), name="nats-keeper")

    def bind(self, on_link: Callable[[Link], Awaitable[None]]) -> None:
        """Have a coroutine called with every later link, to subscribe again."""
        self._on_link.append(on_link)

    def unbind(self, on_link: Callable[[Link], Awaitable[None]]) -> None:
        """Stop that."""
        if on_link in self._on_link:
            self._on_link.remove(on_link)

    async def ready(self, timeout_s: float | None) -> Link:
        """Give a live link, waiting for one if need be.

        Raises:
            UnavailableError: There was none within ``timeout_s`` seconds.
            InvalidStateError: The connection is closed.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    if self._closed:
                        raise InvalidStateError("the NATS bus is closed")
                    if (link := self.link) is not None:
                        return link
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError as error:
            waited = f" for {timeout_s:g} s" if timeout_s else ""
            raise UnavailableError(f"NATS at {self.url} has been away{waited}") from error

    async def persist(self, call: Callable[[Link, float], Awaitable[T]], timeout_s: float) -> T:
        """Repeat an idempotent call over as many links as it takes, within ``timeout_s`` seconds.

        ``call`` gets the link and the time of one attempt.

        Raises:
            DeadlineExceededError: The last attempt got no answer; its fate is unknown.
            UnavailableError: There was no link for the rest of the time.
        """
        deadline_s = time.monotonic() + timeout_s
        pause_s = self.options.reconnect_wait_s
        while True:
            left_s = max(0.001, deadline_s - time.monotonic())
            link = await self.ready(left_s)
            try:
                return await call(link, min(left_s, self.options.attempt_timeout_s))
            except (UnavailableError, DeadlineExceededError):
                if time.monotonic() + pause_s >= deadline_s:
                    raise
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, self.options.reconnect_wait_max_s)

    async def close(self) -> None:
        """Let the link go; idempotent."""
        self._closed = True
        self._changed.set()
        if self._keeper is not None:
            await _end(self._keeper)
            self._keeper = None
        if self._link is not None:
            self._link.mark_lost()
            self._abandon(self._link)
        if self._closing:
            await asyncio.wait(self._closing)

    async def _connect(self, number: int) -> Link:
        client = Client()
        link_box: list[Link] = []

        async def on_closed() -> None:
            for link in link_box:
                link.mark_lost()

        options = self.options
        try:
            async with asyncio.timeout(2 * options.connect_timeout_s):
                await client.connect(
                    self.url,
                    name=options.name,
                    tls=options.tls,
                    user=options.user,
                    password=options.password,
                    token=options.token,
                    connect_timeout=options.connect_timeout_s,  # type: ignore[arg-type] # takes fractions
                    allow_reconnect=False,
                    max_reconnect_attempts=1,
                    reconnect_time_wait=0,
                    ping_interval=3600,  # we ping ourselves, see _stay
                    closed_cb=on_closed,
                    error_cb=_note_error,
                )
        except (nats.errors.Error, OSError, TimeoutError, ValueError) as error:
            with contextlib.suppress(nats.errors.Error, OSError):
                await client.close()
            raise UnavailableError(f"there is no NATS server at {self.url}: {_words(error)}") from error
        link = Link(client, number)
        link_box.append(link)
        if client.is_closed:
            link.mark_lost()
        return link

    async def _keep(self) -> None:
        while True:
            link = self._link
            if link is not None:
                await self._stay(link)
                link.mark_lost()
                self._abandon(link)
                log.warning("nats_link_lost", extra={"url": self.url})
            self._link = await self._reconnect()
            self.reconnects += 1
            log.info("nats_link_found", extra={"url": self.url, "reconnects": self.reconnects})
            for on_link in list(self._on_link):
                try:
                    await on_link(self._link)
                except (EsperError, nats.errors.Error, OSError) as error:
                    log.warning("nats_bind_failed", extra={"error": _words(error)})
                    self._link.mark_lost()
                    break
            self._changed.set()

    async def _stay(self, link: Link) -> None:
        """Return once the link is lost: closed by the peer, or a ping without an answer."""
        while True:
            done, _ = await asyncio.wait({link.lost}, timeout=self.options.ping_interval_s)
            if done:
                return
            try:
                await link.ping(self.options.attempt_timeout_s)
            except EsperError:
                return

    async def _reconnect(self) -> Link:
        pause_s = self.options.reconnect_wait_s
        number = self._link.number + 1 if self._link is not None else 0
        while True:
            await asyncio.sleep(pause_s * self._random.uniform(0.5, 1.0))
            try:
                return await self._connect(number)
            except UnavailableError:
                pause_s = min(2 * pause_s, self.options.reconnect_wait_max_s)

    def _abandon(self, link: Link) -> None:
        """Close a lost link in the background; a frozen peer may not hold us up."""

        async def close() -> None:
            with contextlib.suppress(TimeoutError, nats.errors.Error, OSError):
                async with asyncio.timeout(_CLOSE_S):
                    await link.client.close()

        task = asyncio.create_task(close(), name="nats-abandon")
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)


def translate(error: Exception) -> EsperError:
    """Give our error for one of nats-py's."""
    if isinstance(error, EsperError):
        return error
    if isinstance(error, nats.errors.MaxPayloadError):
        message = "payload must be at most the NATS server's max_payload, got a larger one"
        return CapacityExceededError(message, parameter="payload")
    if isinstance(error, nats.js.errors.APIError):
        if error.err_code in _STREAM_FULL_CODES:
            return CapacityExceededError(f"the stream must have room, got {_words(error)}")
        if error.code == 503:
            return UnavailableError(f"JetStream is away: {_words(error)}")
        return InternalError(f"JetStream refused: {_words(error)}")
    if isinstance(error, (nats.js.errors.NoStreamResponseError, nats.errors.NoRespondersError)):
        return UnavailableError("JetStream does not answer")
    if isinstance(error, (nats.errors.TimeoutError, TimeoutError)):
        return DeadlineExceededError("NATS must answer in time, got no answer")
    if isinstance(error, (nats.errors.Error, OSError)):
        return UnavailableError(f"NATS cannot be reached: {_words(error)}")
    raise error


async def _end(task: asyncio.Future[Any]) -> None:
    """Cancel a task until it has ended: before Python 3.12 ``wait_for`` inside it may swallow a cancellation."""
    while not task.done():
        task.cancel()
        await asyncio.wait({task}, timeout=0.1)
    if not task.cancelled():
        task.exception()  # seen, and of no use to anybody any more


async def _note_error(error: Exception) -> None:
    log.debug("nats_client_error", extra={"error": _words(error)})


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__

"""The port to the message bus: what Oona asks of NATS, and what the in-process bus gives just the same.

Two ways to send: a plain publish reaches whoever listens now; a durable one is kept by a stream, acknowledged, and
delivered to every durable consumer at least once, in order, within its redelivery limit. What a consumer cannot
process goes to ``esper.v1.dead.<stream>`` with the reason, never round for ever. A message id makes repeats harmless:
a stream keeps the first of equal ids within its window.

What was acknowledged by a stream survives a crash of the broker. What a consumer acknowledged may come once more after
one: the broker writes a consumer's place a moment later. So whoever applies messages keeps the ids it has applied.

A bus object belongs to the event loop that opened it, except where an adapter says otherwise.
"""

from __future__ import annotations

import abc
import logging
import re
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final, Protocol, Self

from esper.contracts.errors import DeadlineExceededError, InvalidInputError, InvalidStateError, UnavailableError
from esper.telemetry.streams import DEAD, EVENTS, STREAMS, StreamSpec
from esper.telemetry.subjects import dead_subject

log = logging.getLogger(__name__)

MSG_ID_HEADER: Final = "Nats-Msg-Id"
"""Header whose value makes a repeated message harmless."""

CONTENT_TYPE_HEADER: Final = "Content-Type"
"""Header that names the protobuf message in the payload."""

DEAD_REASON_HEADER: Final = "Esper-Dead-Reason"
"""Why a message was given up, in words."""
DEAD_SUBJECT_HEADER: Final = "Esper-Dead-Subject"
"""Subject it had been published to."""
DEAD_CONSUMER_HEADER: Final = "Esper-Dead-Consumer"
"""Durable consumer that gave it up."""
DEAD_DELIVERIES_HEADER: Final = "Esper-Dead-Deliveries"
"""How often it had been delivered."""
DEAD_SEQUENCE_HEADER: Final = "Esper-Dead-Sequence"
"""Its sequence in the stream it came from."""

_HEADER_NAME = re.compile(r"[A-Za-z0-9-]{1,64}")
_MAX_REASON_CHARS = 500


@dataclass(frozen=True, kw_only=True, slots=True)
class BusMessage:
    """One message as it came off the bus."""

    subject: str
    """Where it was published."""
    payload: bytes
    """One serialised protobuf message."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Trace context, content type, message id and whatever the publisher added."""
    sequence: int | None = None
    """Place in its stream, from 1; ``None`` for fan-out."""
    stored_at: datetime | None = None
    """When the stream took it, UTC; ``None`` for fan-out."""

    @property
    def msg_id(self) -> str | None:
        """Identity under which a repeat of it counts as the same message."""
        return self.headers.get(MSG_ID_HEADER)


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishAck:
    """A stream's word that it has the message on disk."""

    stream: str
    """Stream that took it."""
    sequence: int
    """Its place there, from 1."""
    duplicate: bool
    """Whether an earlier message with the same id was there already, so that nothing was added."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BusStats:
    """Counts of one bus object since it was opened."""

    connected: bool
    """Whether it can reach the broker now."""
    published: int
    """Messages handed over, durable or not."""
    received: int
    """Messages taken off the bus."""
    reconnects: int
    """Times the connection was lost and found again."""
    dropped: int
    """Fan-out messages thrown away because a subscription here was too slow."""
    dead_letters: int
    """Messages moved to the dead letters by consumers here."""


class Settler(Protocol):
    """How an adapter tells the broker what became of one delivery."""

    async def ack(self) -> None:
        """Confirm, and return once the broker has it."""

    async def nak(self, delay_s: float) -> None:
        """Ask for another delivery, no sooner than ``delay_s`` seconds from now."""

    async def in_progress(self) -> None:
        """Start the acknowledgement clock again."""


class Delivery:
    """One durable message in a consumer's hands; exactly one of ack, nak and term ends it.

    Every one of them raises ``UnavailableError`` when the broker cannot be told within its time; the message then
    comes again once the acknowledgement clock ran out, so processing must be idempotent under ``message.msg_id``.
    """

    def __init__(self, consumer: Consumer, message: BusMessage, num_delivered: int, settler: Settler) -> None:
        self.message = message
        self.num_delivered = num_delivered
        self._consumer = consumer
        self._settler = settler
        self._settled = False

    @property
    def settled(self) -> bool:
        """Whether it was acknowledged, refused or given up."""
        return self._settled

    @property
    def last_attempt(self) -> bool:
        """Whether a further failure means the dead letters."""
        return self.num_delivered >= self._consumer.max_deliver

    async def ack(self) -> None:
        """Say that it was processed; returns once the broker has written that down."""
        self._check_open()
        await self._settler.ack()
        self._settled = True

    async def nak(self, delay_s: float = 0.0, *, reason: str = "refused by the consumer") -> None:
        """Ask for another delivery after ``delay_s`` seconds; on the last attempt, give it up with ``reason``."""
        if delay_s < 0:
            raise InvalidInputError.of("delay_s", "be >= 0 seconds", delay_s)
        if self.last_attempt:
            await self.term(f"gave up after {self.num_delivered} deliveries: {reason}")
            return
        self._check_open()
        await self._settler.nak(delay_s)
        self._settled = True

    async def in_progress(self) -> None:
        """Say that work on it goes on, which starts the acknowledgement clock again."""
        self._check_open()
        await self._settler.in_progress()

    async def term(self, reason: str) -> None:
        """Give it up for good: it moves to the dead letters with ``reason`` and is acknowledged here."""
        self._check_open()
        await self._consumer.bury(self.message, self.num_delivered, reason)
        await self._settler.ack()
        self._settled = True

    def _check_open(self) -> None:
        if self._settled:
            raise InvalidStateError(f"delivery of {self.message.subject} was settled before; settle it once")


class Subscription(abc.ABC):
    """Fan-out messages that match a pattern, as an async iterator; ends when it or its bus is closed."""

    def __aiter__(self) -> Self:
        return self

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @abc.abstractmethod
    async def __anext__(self) -> BusMessage:
        """Wait for the next message."""

    @property
    @abc.abstractmethod
    def dropped(self) -> int:
        """Messages thrown away, oldest first, because nobody took them in time."""

    @abc.abstractmethod
    async def close(self) -> None:
        """Stop listening; idempotent."""


class Consumer(abc.ABC):
    """Durable messages of a stream, as an async iterator of deliveries; ends when it or its bus is closed.

    Consumers that share a name share the work: each message goes to one of them.
    """

    def __init__(self, bus: Bus, stream: str, name: str, max_deliver: int) -> None:
        if max_deliver < 1:
            raise InvalidInputError.of("max_deliver", "be >= 1", max_deliver)
        self.stream = stream
        self.name = name
        self.max_deliver = max_deliver
        self._bus = bus
        self.num_dead = 0

    def __aiter__(self) -> Self:
        return self

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def __anext__(self) -> Delivery:
        """Wait for the next delivery; one that came too often goes to the dead letters instead."""
        while True:
            delivery = await self._next()
            if delivery.num_delivered <= self.max_deliver:
                return delivery
            try:
                await delivery.term(f"delivered {delivery.num_delivered - 1} times without an acknowledgement")
            except (UnavailableError, DeadlineExceededError) as error:
                log.warning("dead_letter_postponed", extra={"subject": delivery.message.subject, "error": str(error)})

    @abc.abstractmethod
    async def _next(self) -> Delivery:
        """Wait for the next delivery, whatever its count; ``StopAsyncIteration`` once closed."""

    @abc.abstractmethod
    async def close(self) -> None:
        """Stop consuming; the place is kept, and what was not handed out is free for others. Idempotent."""

    async def bury(self, message: BusMessage, num_delivered: int, reason: str) -> None:
        """Copy a message to the dead letters of its stream, with the reason in its headers.

        A message of the dead letters themselves stays where it is; it is counted and logged all the same.
        """
        self.num_dead += 1
        log.warning(
            "message_dead",
            extra={"subject": message.subject, "consumer": self.name, "reason": reason, "deliveries": num_delivered},
        )
        if self.stream == DEAD.name:
            return
        headers = {
            **message.headers,
            DEAD_REASON_HEADER: _one_line(reason),
            DEAD_SUBJECT_HEADER: message.subject,
            DEAD_CONSUMER_HEADER: self.name,
            DEAD_DELIVERIES_HEADER: str(num_delivered),
            DEAD_SEQUENCE_HEADER: str(message.sequence),
        }
        msg_id = f"dead:{self.stream}:{self.name}:{message.sequence}"
        await self._bus.publish(
            dead_subject(self.stream), message.payload, headers=headers, msg_id=msg_id, durable=True
        )


class Bus(abc.ABC):
    """A connection to the message bus; every method is a coroutine of the loop that opened it."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @abc.abstractmethod
    async def ensure_streams(self, specs: Sequence[StreamSpec] = STREAMS) -> None:
        """Create the streams that are not there; idempotent.

        Raises:
            AlreadyExistsError: A stream is there with other settings; the message shows both.
            UnavailableError: The broker cannot be reached.
        """

    @abc.abstractmethod
    async def publish(
        self,
        subject: str,
        payload: bytes,
        *,
        headers: Mapping[str, str] | None = None,
        msg_id: str | None = None,
        durable: bool = False,
    ) -> PublishAck | None:
        """Send one message; durable returns the stream's acknowledgement, else ``None`` at once.

        Raises:
            InvalidInputError: The subject or a header is illegal.
            CapacityExceededError: The payload is larger than the broker takes, or the stream is full and refuses.
            NotFoundError: Durable, and no stream keeps this subject.
            UnavailableError: The broker cannot be reached.
            DeadlineExceededError: No acknowledgement in time; the message may be stored, so repeat it only under
                the same ``msg_id``.
        """

    @abc.abstractmethod
    async def flush(self, timeout_s: float = 5.0) -> None:
        """Return once the broker has taken everything published before.

        Raises:
            UnavailableError: It did not within ``timeout_s`` seconds.
        """

    @abc.abstractmethod
    async def subscribe(self, pattern: str, *, max_pending: int = 65_536) -> Subscription:
        """Listen to a pattern; live once this returns. Beyond ``max_pending`` waiting messages the oldest go."""

    @abc.abstractmethod
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
        """Consume a stream under a durable name, from where that name stopped (a new name: from the start).

        ``subject_filter`` is one pattern or several that do not overlap; ``None`` takes the whole stream.
        A delivery not settled within ``ack_wait_s`` seconds comes again. ``batch`` messages at most are fetched
        ahead; their clock runs while they wait, so take 1 where work is slow. With ``forget_after_s`` the name and its
        place are forgotten once nobody has consumed under it for so many seconds.

        Raises:
            NotFoundError: There is no such stream.
            AlreadyExistsError: On a work queue, another name takes some of the same subjects.
            UnavailableError: The broker cannot be reached.
        """

    @abc.abstractmethod
    async def forget(self, stream: str, durable_name: str) -> None:
        """Remove a durable name and its place; no error when it is not there."""

    @abc.abstractmethod
    def replay(
        self, subject_filter: str, since: datetime | int | None = None, *, stream: str = EVENTS.name
    ) -> AsyncIterator[BusMessage]:
        """Read a stream back in order, from a time or sequence on, until caught up; nothing is acknowledged."""

    @abc.abstractmethod
    async def wait_connected(self, timeout_s: float) -> None:
        """Return once the broker can be reached.

        Raises:
            UnavailableError: It could not within ``timeout_s`` seconds.
        """

    @abc.abstractmethod
    def stats(self) -> BusStats:
        """Give the counts so far."""

    @abc.abstractmethod
    async def close(self, deadline_s: float = 5.0) -> None:
        """Hand over what was published, end every iterator, let go; within ``deadline_s`` seconds. Idempotent."""


def make_headers(headers: Mapping[str, str] | None, msg_id: str | None, *, durable: bool) -> dict[str, str]:
    """Give checked headers with the message id among them; a durable message without one gets a random id.

    Raises:
        InvalidInputError: A name or value is not legal in a header.
    """
    checked: dict[str, str] = {}
    for name, value in (headers or {}).items():
        if not _HEADER_NAME.fullmatch(name):
            raise InvalidInputError.of("header name", "match [A-Za-z0-9-]{1,64}", name)
        if not value.isprintable() or value != value.strip():
            raise InvalidInputError.of(f"header {name}", "be printable text with no blank at its ends", value)
        checked[name] = value
    if msg_id is not None:
        if not msg_id or not msg_id.isprintable() or msg_id != msg_id.strip() or len(msg_id) > 256:
            raise InvalidInputError.of("msg_id", "be 1 to 256 printable characters with no blank at its ends", msg_id)
        checked[MSG_ID_HEADER] = msg_id
    elif durable:
        checked[MSG_ID_HEADER] = uuid.uuid4().hex
    else:
        checked.pop(MSG_ID_HEADER, None)
    return checked


def _one_line(text: str) -> str:
    """Give text that a header can carry: one line, printable, bounded."""
    plain = "".join(char if char.isprintable() else " " for char in text).strip() or "no reason given"
    return plain[:_MAX_REASON_CHARS].strip()

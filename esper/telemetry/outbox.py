"""Bounded buffers between the training thread and the bus: what waits, what was dropped, how old the oldest is.

``OfferQueue`` is filled by any thread with one deque append; everything else here belongs to the publisher's loop.

Events go in two lanes, each in order and within bounds of its own: what somebody waits for does not wait behind what
is merely told, and a flood of the one drops nothing of the other.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Final

from google.protobuf.message import Message

from esper.telemetry.health_wire import Columns, count_signals
from esper.telemetry.subjects import RESERVED_RUNS, Kind

_EXPRESS_KINDS: Final = frozenset(kind.value for kind in Kind if kind.express)


@dataclass(frozen=True, slots=True)
class Offer:
    """A message as the training thread handed it over; not encoded yet."""

    subject: str
    """Where to publish it."""
    message: Message
    """What to publish; nobody changes it any more."""
    durable: bool
    """Whether a stream must keep it."""
    headers: dict[str, str]
    """Trace context of the moment."""
    msg_id: str | None
    """Identity the caller gave, or ``None``."""
    offered_s: float
    """Monotonic time of the offer, in seconds."""

    @property
    def kind(self) -> str:
        """What it counts as."""
        return kind_of(self.subject)


@dataclass(frozen=True, slots=True)
class Event:
    """An encoded message that waits to be published."""

    subject: str
    """Where to publish it."""
    payload: bytes
    """The encoded message."""
    headers: dict[str, str]
    """Trace context and content type."""
    msg_id: str
    """Identity that stays the same over every attempt."""
    durable: bool
    """Whether a stream must keep it."""
    offered_s: float
    """Monotonic time of the offer, in seconds."""

    @property
    def size_bytes(self) -> int:
        """What it counts against the bound."""
        return len(self.payload) + len(self.subject) + 64


@dataclass(frozen=True, slots=True)
class HealthRows:
    """Drained signals that wait to become one batch."""

    sequence: int
    """Number of the batch, from 1."""
    columns: Columns
    """The signals."""
    ring_dropped: int
    """Signals the ring had dropped when these were drained."""
    drained_s: float
    """Monotonic time of the draining, in seconds."""

    @property
    def size_bytes(self) -> int:
        """What it counts against the bound."""
        return sum(column.nbytes for column in self.columns.values())


@dataclass(slots=True)
class Tally:
    """Counts by kind of message."""

    published: Counter[str] = field(default_factory=Counter)
    """Messages the bus took."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Messages lost to a bound, oldest first."""
    refused: Counter[str] = field(default_factory=Counter)
    """Messages the bus or the encoder will never take."""


class OfferQueue:
    """What the training thread offers; append only, no lock, no wait, and never longer than its bound."""

    def __init__(self, max_offers: int) -> None:
        self._offers: deque[Offer] = deque()
        self._max_offers = max_offers
        self._overflow: deque[str] = deque()

    def __len__(self) -> int:
        return len(self._offers)

    def put(self, offer: Offer) -> None:
        """Append; at the bound the oldest goes and is counted."""
        if len(self._offers) >= self._max_offers:
            oldest = self._pop()
            if oldest is not None:
                self._overflow.append(oldest.kind)
        self._offers.append(offer)

    def take(self, at_most: int) -> list[Offer]:
        """Take what is there, oldest first."""
        taken: list[Offer] = []
        while len(taken) < at_most and (offer := self._pop()) is not None:
            taken.append(offer)
        return taken

    def take_overflow(self) -> list[str]:
        """Take the kinds of the offers dropped at the bound since the last call."""
        return [self._overflow.popleft() for _ in range(len(self._overflow))]

    @property
    def overflow(self) -> Counter[str]:
        """Offers dropped at the bound that nobody took note of yet, by kind."""
        return Counter(list(self._overflow))

    @property
    def oldest_s(self) -> float | None:
        """Monotonic time of the oldest offer in here; readable from any thread."""
        try:
            return self._offers[0].offered_s
        except IndexError:
            return None

    def _pop(self) -> Offer | None:
        try:
            return self._offers.popleft()
        except IndexError:  # the other thread took it
            return None


class EventBox:
    """Encoded events in order, bounded in bytes."""

    def __init__(self, max_bytes: int, tally: Tally) -> None:
        self._events: deque[Event] = deque()
        self._max_bytes = max_bytes
        self._tally = tally
        self.size_bytes = 0

    def __len__(self) -> int:
        return len(self._events)

    def put(self, event: Event) -> None:
        """Append; at the bound the oldest go and are counted."""
        self._events.append(event)
        self.size_bytes += event.size_bytes
        while self.size_bytes > self._max_bytes and self._events:
            self._tally.dropped[kind_of(self.pop().subject)] += 1

    def pop(self) -> Event:
        """Take the oldest."""
        event = self._events.popleft()
        self.size_bytes -= event.size_bytes
        return event

    @property
    def oldest_s(self) -> float | None:
        """Monotonic time of the oldest offer in here; readable from any thread."""
        try:
            return self._events[0].offered_s
        except IndexError:
            return None


class Lane:
    """Events of one class on their way to the bus: offered, encoded, one being sent; in order, within own bounds."""

    def __init__(self, max_offers: int, max_bytes: int, tally: Tally) -> None:
        self.offers = OfferQueue(max_offers)
        self.events = EventBox(max_bytes, tally)
        self._sending: Event | None = None
        self._tally = tally

    def __len__(self) -> int:
        return len(self.offers) + len(self.events) + (self._sending is not None)

    def begin(self) -> Event | None:
        """Give the event to send now, the same one until ``finish``; ``None`` when nothing encoded waits."""
        if self._sending is None and self.events:
            self._sending = self.events.pop()
        return self._sending

    def finish(self) -> None:
        """Say that the bus took or refused what ``begin`` gave."""
        self._sending = None

    def drop_all(self) -> None:
        """Count everything encoded in here as dropped."""
        if self._sending is not None:
            self._tally.dropped[kind_of(self._sending.subject)] += 1
            self._sending = None
        while self.events:
            self._tally.dropped[kind_of(self.events.pop().subject)] += 1

    @property
    def oldest_s(self) -> float | None:
        """Monotonic time of the oldest offer in here; readable from any thread."""
        sending = self._sending
        ages = (sending.offered_s if sending is not None else None, self.events.oldest_s, self.offers.oldest_s)
        return next((at_s for at_s in ages if at_s is not None), None)


class HealthBox:
    """Drained signals in order, bounded in bytes; a dropped batch leaves a gap in the sequence."""

    def __init__(self, max_bytes: int) -> None:
        self._rows: deque[HealthRows] = deque()
        self._max_bytes = max_bytes
        self._last_sequence = 0
        self.size_bytes = 0
        self.signals = 0
        self.batches_dropped = 0
        self.signals_dropped = 0

    def __len__(self) -> int:
        return len(self._rows)

    def put(self, columns: Columns, ring_dropped: int) -> None:
        """Append drained signals as one batch; at the bound the oldest batches go and are counted."""
        self._last_sequence += 1
        rows = HealthRows(self._last_sequence, columns, ring_dropped, time.monotonic())
        self._rows.append(rows)
        self.size_bytes += rows.size_bytes
        self.signals += count_signals(columns)
        while self.size_bytes > self._max_bytes and self._rows:
            self.count_lost(self.pop())

    def pop(self) -> HealthRows:
        """Take the oldest."""
        rows = self._rows.popleft()
        self.size_bytes -= rows.size_bytes
        self.signals -= count_signals(rows.columns)
        return rows

    def count_lost(self, rows: HealthRows) -> None:
        """Count a batch that will not be sent."""
        self.batches_dropped += 1
        self.signals_dropped += count_signals(rows.columns)

    @property
    def oldest_s(self) -> float | None:
        """Monotonic time when the oldest were drained; readable from any thread."""
        try:
            return self._rows[0].drained_s
        except IndexError:
            return None


def is_express(subject: str) -> bool:
    """Say whether messages of a subject take the lane that waits behind no other."""
    tokens = subject.split(".")
    return len(tokens) > 3 and tokens[2] not in RESERVED_RUNS and tokens[3] in _EXPRESS_KINDS


def kind_of(subject: str) -> str:
    """Give the kind in a subject, for counts: ``health``, ``seed`` ... or ``jobs``."""
    tokens = subject.split(".")
    if len(tokens) > 2 and tokens[2] == "jobs":
        return "jobs"
    return tokens[3] if len(tokens) > 3 else subject

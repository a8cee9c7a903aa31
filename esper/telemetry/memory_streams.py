"""The streams of the in-process broker: bounded logs, durable places in them, duplicates refused.

Nothing here locks or waits; the broker calls it under its lock. Clocks: ages and redelivery run on the monotonic
clock, in seconds; ``stored_at`` is wall time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

from esper.contracts.errors import AlreadyExistsError, CapacityExceededError, NotFoundError
from esper.telemetry.bus import MSG_ID_HEADER, BusMessage, PublishAck
from esper.telemetry.streams import Retention, StreamSpec, WhenFull
from esper.telemetry.subjects import matches, overlaps


@dataclass(frozen=True, slots=True)
class Record:
    """One stored message."""

    sequence: int
    """Place in the stream, from 1."""
    subject: str
    """Where it was published."""
    payload: bytes
    """Its payload."""
    headers: Mapping[str, str]
    """Its headers, the message id among them."""
    stored_at: datetime
    """Wall time of storing, UTC."""
    stored_s: float
    """Monotonic time of storing, in seconds."""

    @property
    def size_bytes(self) -> int:
        """What it counts against the stream's bound."""
        return len(self.subject) + len(self.payload) + sum(len(k) + len(v) for k, v in self.headers.items())

    def as_message(self) -> BusMessage:
        """Give it as a consumer sees it."""
        return BusMessage(
            subject=self.subject,
            payload=self.payload,
            headers=self.headers,
            sequence=self.sequence,
            stored_at=self.stored_at,
        )


@dataclass(slots=True)
class _Pending:
    """A delivered message nobody acknowledged yet."""

    num_delivered: int
    due_s: float


@dataclass(slots=True, eq=False)
class DurablePlace:
    """How far a durable name has come, and what it still owes an acknowledgement."""

    name: str
    """The durable name."""
    filters: tuple[str, ...]
    """Patterns of what it takes; none takes all."""
    next_sequence: int = 1
    """First sequence never delivered to it."""
    pending: dict[int, _Pending] = field(default_factory=dict)
    """Delivered and not acknowledged, by sequence."""
    wakers: set[Callable[[], None]] = field(default_factory=set)
    """Called when there may be something to take; none when nobody consumes."""
    forget_after_s: float | None = None
    """How long it is kept while nobody consumes, in seconds; ``None`` for ever."""
    idle_since_s: float = 0.0
    """Monotonic time since when nobody consumes."""

    def forgotten(self, now_s: float) -> bool:
        """Say whether it has been left alone for too long."""
        idle = not self.wakers and self.forget_after_s is not None
        return idle and now_s - self.idle_since_s > (self.forget_after_s or 0.0)

    def wants(self, subject: str) -> bool:
        """Say whether it takes messages of this subject."""
        return not self.filters or any(matches(pattern, subject) for pattern in self.filters)

    def shares_with(self, filters: tuple[str, ...]) -> bool:
        """Say whether it and these filters would take some subject both."""
        return any(overlaps(mine, theirs) for mine in self.filters or (">",) for theirs in filters or (">",))

    def due_at(self, sequence: int, due_s: float) -> None:
        """Set when an unacknowledged message comes again; nothing when it is acknowledged already."""
        if sequence in self.pending:
            self.pending[sequence].due_s = due_s


class MemoryStream:
    """One stream: a log in order of sequence, bounded in bytes and age."""

    def __init__(self, spec: StreamSpec) -> None:
        self.spec = spec
        self._records: dict[int, Record] = {}
        self._size_bytes = 0
        self._last_sequence = 0
        self._seen: dict[str, tuple[int, float]] = {}
        self._places: dict[str, DurablePlace] = {}

    def takes(self, subject: str) -> bool:
        """Say whether it keeps messages of this subject."""
        return any(matches(pattern, subject) for pattern in self.spec.subjects)

    def append(self, subject: str, payload: bytes, headers: Mapping[str, str]) -> PublishAck:
        """Store a message unless its id was seen within the window."""
        now_s = time.monotonic()
        self._expire(now_s)
        msg_id = headers.get(MSG_ID_HEADER)
        if msg_id is not None and msg_id in self._seen:
            return PublishAck(stream=self.spec.name, sequence=self._seen[msg_id][0], duplicate=True)
        record = Record(self._last_sequence + 1, subject, payload, headers, datetime.now(UTC), now_s)
        self._make_room(record.size_bytes)
        self._records[record.sequence] = record
        self._size_bytes += record.size_bytes
        self._last_sequence = record.sequence
        if msg_id is not None:
            self._seen[msg_id] = (record.sequence, now_s)
        return PublishAck(stream=self.spec.name, sequence=record.sequence, duplicate=False)

    def waiting(self, subject: str) -> Iterator[Callable[[], None]]:
        """Give the wakers of every consumer that takes this subject."""
        for place in self._places.values():
            if place.wants(subject):
                yield from place.wakers

    def place(self, name: str, filters: tuple[str, ...]) -> DurablePlace:
        """Give the durable place of a name, made on first use; new filters take the place of the old ones."""
        self._places = {key: one for key, one in self._places.items() if not one.forgotten(time.monotonic())}
        if self.spec.retention is Retention.WORK_QUEUE:
            for other in self._places.values():
                if other.name != name and other.shares_with(filters):
                    raise queue_overlap(self.spec.name, name, filters)
        place = self._places.setdefault(name, DurablePlace(name, filters))
        place.filters = filters
        return place

    def forget(self, name: str) -> None:
        """Remove a durable place."""
        self._places.pop(name, None)

    def take(
        self, place: DurablePlace, ack_wait_s: float, now_s: float
    ) -> tuple[tuple[Record, int] | None, float | None]:
        """Give the next delivery of a place and its count, or when the next one falls due (``None``: not known)."""
        self._expire(now_s)
        due = min((owed.due_s for owed in place.pending.values()), default=None)
        if due is not None and due <= now_s:
            sequence = min(seq for seq, owed in place.pending.items() if owed.due_s <= now_s)
            owed = place.pending[sequence]
            owed.num_delivered += 1
            owed.due_s = now_s + ack_wait_s
            return (self._records[sequence], owed.num_delivered), None
        while place.next_sequence <= self._last_sequence:
            record = self._records.get(place.next_sequence)
            place.next_sequence += 1
            if record is not None and place.wants(record.subject):
                place.pending[record.sequence] = _Pending(1, now_s + ack_wait_s)
                return (record, 1), None
        return None, due

    def ack(self, place: DurablePlace, sequence: int) -> None:
        """Settle a delivery; a work queue lets the message go."""
        place.pending.pop(sequence, None)
        if self.spec.retention is Retention.WORK_QUEUE:
            self._drop(sequence)

    def first_from(self, sequence: int, subject_filter: str, not_before: datetime | None) -> Record | None:
        """Give the first stored message at or after a sequence that matches, or ``None``."""
        self._expire(time.monotonic())
        for number in range(max(1, sequence), self._last_sequence + 1):
            record = self._records.get(number)
            if record is None or (not_before is not None and record.stored_at < not_before):
                continue
            if matches(subject_filter, record.subject):
                return record
        return None

    def _make_room(self, size_bytes: int) -> None:
        over = size_bytes > self.spec.max_bytes
        refuse = self.spec.when_full is WhenFull.REFUSE and self._size_bytes + size_bytes > self.spec.max_bytes
        if over or refuse:
            raise CapacityExceededError(
                f"stream {self.spec.name} must hold at most {self.spec.max_bytes} bytes, "
                f"got {size_bytes} on top of {self._size_bytes}"
            )
        while self._size_bytes + size_bytes > self.spec.max_bytes:
            self._drop(next(iter(self._records)))

    def _expire(self, now_s: float) -> None:
        while self._records:
            oldest = next(iter(self._records.values()))
            if now_s - oldest.stored_s <= self.spec.max_age_s:
                break
            self._drop(oldest.sequence)
        while self._seen:
            msg_id, (_, seen_s) = next(iter(self._seen.items()))
            if now_s - seen_s <= self.spec.duplicate_window_s:
                break
            del self._seen[msg_id]

    def _drop(self, sequence: int) -> None:
        record = self._records.pop(sequence, None)
        if record is not None:
            self._size_bytes -= record.size_bytes
            for place in self._places.values():
                place.pending.pop(sequence, None)


class Streams:
    """Every stream of a broker, by name."""

    def __init__(self) -> None:
        self._by_name: dict[str, MemoryStream] = {}

    def ensure(self, spec: StreamSpec) -> None:
        """Create a stream, or check that the one that is there has the same settings."""
        held = self._by_name.get(spec.name)
        if held is None:
            self._check_free(spec)
            self._by_name[spec.name] = MemoryStream(spec)
        elif held.spec.describe() != spec.describe():
            raise stream_mismatch(spec, held.spec.describe())

    def get(self, name: str) -> MemoryStream:
        """Give a stream by its name."""
        if name not in self._by_name:
            raise NotFoundError(f"no stream is named {name}; ensure_streams creates it", parameter="stream")
        return self._by_name[name]

    def taking(self, subject: str, *, required: bool) -> MemoryStream | None:
        """Give the stream that keeps a subject."""
        for stream in self._by_name.values():
            if stream.takes(subject):
                return stream
        if required:
            raise no_stream(subject)
        return None

    def _check_free(self, spec: StreamSpec) -> None:
        for other in self._by_name.values():
            for theirs in other.spec.subjects:
                for ours in spec.subjects:
                    if overlaps(theirs, ours):
                        raise AlreadyExistsError(
                            f"stream {spec.name} must keep subjects that no other keeps, "
                            f"got {ours} beside {theirs} of {other.spec.name}"
                        )


def stream_mismatch(spec: StreamSpec, existing: str) -> AlreadyExistsError:
    """Give the error that shows a declared stream beside the one that is there."""
    return AlreadyExistsError(
        f"stream {spec.name} must have the declared settings: declared {spec.describe()}; exists with {existing}"
    )


def no_stream(subject: str) -> NotFoundError:
    """Give the error of a durable message that no stream keeps."""
    return NotFoundError(f"subject must belong to a stream, got {subject}", parameter="subject")


def queue_overlap(stream: str, name: str, filters: tuple[str, ...]) -> AlreadyExistsError:
    """Give the error of a second name that wants the same jobs."""
    return AlreadyExistsError(
        f"consumer {name} of work queue {stream} must take subjects that nobody else takes, "
        f"got {', '.join(filters) or '>'}"
    )

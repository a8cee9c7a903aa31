"""Typed consumption: protobuf messages off the bus as async iterators; what cannot be read never stops a reader."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Generic, Self, TypeVar

from google.protobuf import symbol_database
from google.protobuf.message import DecodeError, Message

from esper.contracts.errors import CorruptDataError, DeadlineExceededError, InvalidInputError, UnavailableError
from esper.telemetry.bus import CONTENT_TYPE_HEADER, Bus, BusMessage, Consumer, Delivery, Subscription
from esper.telemetry.subjects import Subject, build_subject, parse_subject, run_pattern
from esper.v1 import decision_pb2, kernel_pb2, telemetry_pb2

log = logging.getLogger(__name__)

M = TypeVar("M", bound=Message)

PUBLISHER_HEADER: Final = "Esper-Publisher"
"""Header that tells one publisher process from the next one of the same run."""

_MEDIA: Final = "application/protobuf"
_MAX_SENDERS: Final = 4096
_KNOWN: Final = (decision_pb2, kernel_pb2, telemetry_pb2)
"""Modules whose messages travel on the bus; importing them registers their names."""


@dataclass(frozen=True, slots=True)
class Received(Generic[M]):
    """One decoded message and what it came in."""

    message: M
    """The protobuf message."""
    raw: BusMessage
    """Subject, headers and place in the stream."""
    delivery: Delivery | None = None
    """How to settle it; ``None`` for fan-out and replay."""

    @property
    def subject(self) -> Subject:
        """Run, kind and layer from its subject.

        Raises:
            InvalidInputError: It was not published under a run's subject.
        """
        return parse_subject(self.raw.subject)


def content_type(message_type: type[Message]) -> str:
    """Give the content type that names a protobuf message."""
    return f"{_MEDIA}; proto={message_type.DESCRIPTOR.full_name}"


def decode(raw: BusMessage, message_type: type[M]) -> M:
    """Give the message in a payload.

    Raises:
        CorruptDataError: The content type names another message, or the bytes are not one.
    """
    named = raw.headers.get(CONTENT_TYPE_HEADER)
    if named is not None and named != content_type(message_type):
        raise CorruptDataError(f"content type must be {content_type(message_type)}, got {named}")
    try:
        return message_type.FromString(raw.payload)
    except DecodeError as error:
        full_name = message_type.DESCRIPTOR.full_name
        raise CorruptDataError(f"payload must be a {full_name}, got {len(raw.payload)} other bytes") from error


def decode_any(raw: BusMessage) -> Message:
    """Give the message that the content type names, if it is one of ``esper.v1``.

    Raises:
        CorruptDataError: The content type is absent or names no message of ours, or the bytes are not one.
    """
    media, _, name = raw.headers.get(CONTENT_TYPE_HEADER, "").partition("; proto=")
    if media != _MEDIA or not name.startswith("esper.v1."):
        raise CorruptDataError(f"content type must name a message of esper.v1, got {media!r} {name!r}")
    try:
        message_type = symbol_database.Default().GetSymbol(name)
    except KeyError as error:
        raise CorruptDataError(f"content type must name a message of esper.v1, got {name!r}") from error
    return decode(raw, message_type)


class TypedSubscription(Generic[M]):
    """Decoded fan-out messages; what cannot be read is counted and passed over."""

    def __init__(self, subscription: Subscription, message_type: type[M]) -> None:
        self._subscription = subscription
        self._message_type = message_type
        self.undecodable = 0

    @property
    def dropped(self) -> int:
        """Messages lost because nobody took them in time."""
        return self._subscription.dropped

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Received[M]:
        """Wait for the next message that can be read."""
        while True:
            raw = await anext(self._subscription)
            try:
                return Received(decode(raw, self._message_type), raw)
            except CorruptDataError as error:
                self.undecodable += 1
                log.warning("message_undecodable", extra={"subject": raw.subject, "error": str(error)})

    async def close(self) -> None:
        """Stop listening; idempotent."""
        await self._subscription.close()


class TypedConsumer(Generic[M]):
    """Decoded durable messages; what cannot be read is counted and goes to the dead letters."""

    def __init__(self, consumer: Consumer, decoder: Callable[[BusMessage], M]) -> None:
        self._consumer = consumer
        self._decode = decoder
        self.undecodable = 0

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Received[M]:
        """Wait for the next message that can be read; settle it through ``delivery``."""
        while True:
            delivery = await anext(self._consumer)
            try:
                message = self._decode(delivery.message)
            except CorruptDataError as error:
                self.undecodable += 1
                await self._give_up(delivery, str(error))
            else:
                return Received(message, delivery.message, delivery)

    async def close(self) -> None:
        """Stop consuming; idempotent."""
        await self._consumer.close()

    async def _give_up(self, delivery: Delivery, reason: str) -> None:
        try:
            await delivery.term(reason)
        except (UnavailableError, DeadlineExceededError) as error:  # it comes again and is given up then
            log.warning("dead_letter_postponed", extra={"subject": delivery.message.subject, "error": str(error)})


async def messages(bus: Bus, pattern: str, message_type: type[M], *, max_pending: int = 65_536) -> TypedSubscription[M]:
    """Listen for messages of one type under a pattern; live once this returns."""
    return TypedSubscription(await bus.subscribe(pattern, max_pending=max_pending), message_type)


async def durable_messages(
    bus: Bus,
    stream: str,
    durable_name: str,
    decoder: type[M] | Callable[[BusMessage], M],
    *,
    subject_filter: str | Sequence[str] | None = None,
    ack_wait_s: float = 30.0,
    max_deliver: int = 5,
    batch: int = 16,
) -> TypedConsumer[M]:
    """Consume messages of one type under a durable name; ``decode_any`` as decoder takes every type of ``esper.v1``.

    Same arguments and errors as ``Bus.consume``.
    """
    consumer = await bus.consume(
        stream, durable_name, subject_filter, ack_wait_s=ack_wait_s, max_deliver=max_deliver, batch=batch
    )
    return typed_consumer(consumer, decoder)


def typed_consumer(consumer: Consumer, decoder: type[M] | Callable[[BusMessage], M]) -> TypedConsumer[M]:
    """Give a consumer's messages decoded as one type, or by a function."""
    if isinstance(decoder, type):
        message_type: type[M] = decoder
        return TypedConsumer(consumer, lambda raw: decode(raw, message_type))
    return TypedConsumer(consumer, decoder)


async def replay_run(bus: Bus, run_id: str, since: datetime | int | None = None) -> AsyncIterator[Received[Message]]:
    """Read a run's events back in the order in which they were stored, until caught up.

    Raises:
        CorruptDataError: A stored event cannot be read; a replay with a hole would be a false one.
    """
    async for raw in bus.replay(run_pattern(run_id), since):
        yield Received(decode_any(raw), raw)


class HealthBatches:
    """Health batches of one run or all, each once and in order, with what was lost on the way counted."""

    def __init__(self, subscription: TypedSubscription[telemetry_pb2.HealthBatch]) -> None:
        self._subscription = subscription
        self._last: dict[tuple[str, str], int] = {}
        self.lost = 0
        self.repeated = 0

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Received[telemetry_pb2.HealthBatch]:
        """Wait for the next batch; a repeat, as after a reconnect, is passed over and counted."""
        while True:
            received = await anext(self._subscription)
            batch = received.message
            sender = (batch.run_id, received.raw.headers.get(PUBLISHER_HEADER, ""))
            last = self._last.get(sender)
            if last is not None and batch.sequence <= last:
                self.repeated += 1
                continue
            self.lost += 0 if last is None else batch.sequence - last - 1
            self._last.pop(sender, None)  # re-entered last, so that the first entry is the longest silent
            self._last[sender] = batch.sequence
            if len(self._last) > _MAX_SENDERS:
                del self._last[next(iter(self._last))]
            return received

    @property
    def undecodable(self) -> int:
        """Payloads that were not health batches."""
        return self._subscription.undecodable

    async def close(self) -> None:
        """Stop listening; idempotent."""
        await self._subscription.close()


async def health_batches(bus: Bus, run_id: str | None = None, *, max_pending: int = 4096) -> HealthBatches:
    """Listen to the health batches of a run, or of every run; live once this returns."""
    if max_pending < 1:
        raise InvalidInputError.of("max_pending", "be >= 1", max_pending)
    pattern = "esper.v1.*.health" if run_id is None else build_subject(run_id, "health")
    return HealthBatches(await messages(bus, pattern, telemetry_pb2.HealthBatch, max_pending=max_pending))

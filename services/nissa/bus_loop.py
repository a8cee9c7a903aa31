"""Nissa on the bus: takes every durable event and every health batch in, looks at the clock, and sends alerts."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Coroutine
from datetime import UTC, datetime
from typing import Any, Final

from google.protobuf.message import Message

from esper.contracts.errors import CorruptDataError, EsperError, InvalidInputError, UnavailableError
from esper.contracts.wire import serialize
from esper.services.nissa.service import Nissa
from esper.services.nissa.store import NewEvent
from esper.telemetry.bus import CONTENT_TYPE_HEADER, Bus, BusMessage
from esper.telemetry.consumer import (
    HealthBatches,
    Received,
    TypedConsumer,
    content_type,
    decode_any,
    durable_messages,
    health_batches,
)
from esper.telemetry.streams import EVENTS
from esper.telemetry.subjects import Kind, build_subject, kind_patterns
from esper.v1 import decision_pb2, kernel_pb2, telemetry_pb2

log = logging.getLogger(__name__)

DURABLE_NAME: Final = "nissa"
"""Name under which Nissa keeps its place in the stream."""

_RETRY_S: Final = 1.0
_TICK_S: Final = 1.0
_MESSAGES: Final[dict[Kind, type[Message]]] = {
    Kind.STATE: telemetry_pb2.SystemStatePacket,
    Kind.DECISION: decision_pb2.AdaptationDecision,
    Kind.PLAN: decision_pb2.AdaptationPlan,
    Kind.KERNEL: kernel_pb2.KernelReady,
    Kind.SEED: telemetry_pb2.SeedEvent,
    Kind.FIELD_REPORT: telemetry_pb2.FieldReport,
    Kind.CONTROL: decision_pb2.ControlMessage,
    Kind.ALERT: decision_pb2.Anomaly,
}


class NissaBusLoop:
    """Consumes and announces. Belongs to one event loop."""

    def __init__(self, nissa: Nissa, bus: Bus) -> None:
        self._nissa = nissa
        self._bus = bus
        self._consumer: TypedConsumer[Message] | None = None
        self._health: HealthBatches | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._wake = asyncio.Event()

    async def start(self) -> None:
        """Open the consumers and begin.

        Raises:
            UnavailableError: The bus cannot be reached.
        """
        patterns = [pattern for kind in _MESSAGES for pattern in kind_patterns(kind)]
        self._consumer = await durable_messages(
            self._bus, EVENTS.name, DURABLE_NAME, decode_any, subject_filter=patterns
        )
        self._health = await health_batches(self._bus)
        self._begin(self._run_events(self._consumer), "nissa-events")
        self._begin(self._run_health(self._health), "nissa-health")
        self._begin(self._run_clock(), "nissa-clock")

    async def ready(self) -> None:
        """Return when messages are being taken in.

        Raises:
            UnavailableError: They are not.
        """
        if not self._tasks or any(task.done() for task in self._tasks):
            raise UnavailableError("Nissa's bus loop must run, got one that ended")
        if not self._bus.stats().connected:
            raise UnavailableError("the bus must be reachable, got a lost connection")

    async def close(self) -> None:
        """Stop consuming; idempotent."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        if self._health is not None:
            await self._health.close()
            self._health = None
        if self._consumer is not None:
            await self._consumer.close()
            self._consumer = None

    def _begin(self, work: Coroutine[Any, Any, None], name: str) -> None:
        self._tasks.append(asyncio.create_task(work, name=name))

    async def _run_events(self, consumer: TypedConsumer[Message]) -> None:
        async for received in consumer:
            await self._take(received)
            if self._nissa.to_announce:
                self._wake.set()

    async def _take(self, received: Received[Message]) -> None:
        delivery = received.delivery
        assert delivery is not None
        try:
            await self._nissa.take(_event(received))
        except (InvalidInputError, CorruptDataError) as error:
            log.warning("event_refused", extra={"subject": received.raw.subject, "error": str(error)})
            await _told(delivery.term(str(error)))
        except EsperError as error:
            log.warning("event_postponed", extra={"subject": received.raw.subject, "error": str(error)})
            await _told(delivery.nak(_RETRY_S, reason=str(error)))
        except Exception as error:
            log.exception("event_failed", extra={"subject": received.raw.subject})
            await _told(delivery.term(f"{type(error).__name__}: {error}"))
        else:
            await _told(delivery.ack())

    async def _run_health(self, batches: HealthBatches) -> None:
        async for received in batches:
            try:
                if received.message.run_id != received.subject.run_id:
                    raise InvalidInputError.of("run_id", "be that of the subject", received.message.run_id)
                await self._nissa.take_health(received.message)
            except EsperError as error:  # fan-out: the next batch comes in a moment
                log.warning("health_refused", extra={"subject": received.raw.subject, "error": str(error)})
            if self._nissa.to_announce:
                self._wake.set()

    async def _run_clock(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_TICK_S):
                    await self._wake.wait()
            self._wake.clear()
            try:
                await self._nissa.look_at_clock()
                await self._announce()
            except EsperError as error:  # tried again at the next tick
                log.warning("announcing_postponed", extra={"error": str(error)})
                await asyncio.sleep(_RETRY_S)

    async def _announce(self) -> None:
        for anomaly in list(self._nissa.to_announce.values()):
            await self._bus.publish(
                build_subject(anomaly.run_id, Kind.ALERT),
                serialize(anomaly),
                headers={CONTENT_TYPE_HEADER: content_type(decision_pb2.Anomaly)},
                msg_id=anomaly.anomaly_id,
                durable=True,
            )
            await self._nissa.announced(anomaly.anomaly_id)


def _event(received: Received[Message]) -> NewEvent:
    raw, subject = received.raw, received.subject
    wanted = _MESSAGES.get(subject.kind)
    if wanted is None or not isinstance(received.message, wanted):
        name = received.message.DESCRIPTOR.full_name
        raise InvalidInputError.of("message", f"be one that belongs under {subject.kind.value}", name)
    return NewEvent(
        run_id=subject.run_id,
        key=_key(raw),
        kind=subject.kind.value,
        recorded_at=raw.stored_at or datetime.now(UTC),
        payload=raw.payload,
    )


def _key(raw: BusMessage) -> str:
    # The sequence tells repeats of one message apart; the id tells apart two streams that both began at 1.
    return f"{raw.sequence}:{raw.msg_id or ''}"


async def _told(settling: Awaitable[None]) -> None:
    """Settle a delivery; when the broker cannot be told, the event comes again and is known then."""
    try:
        await settling
    except EsperError as error:
        log.warning("settling_postponed", extra={"error": str(error)})

"""Karn on the bus: field reports come in order, each learned once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Final

from esper.contracts.errors import EsperError, InvalidInputError, InvalidStateError
from esper.contracts.run import FieldReport
from esper.contracts.wire import from_wire
from esper.services.karn.service import Karn
from esper.telemetry.bus import Bus
from esper.telemetry.consumer import Received, TypedConsumer, durable_messages
from esper.telemetry.streams import EVENTS
from esper.telemetry.subjects import Kind, kind_patterns
from esper.v1 import telemetry_pb2

log = logging.getLogger(__name__)

DURABLE_NAME: Final = "karn"
"""Name under which Karn keeps its place in the stream."""

_MAX_DELAY_S: Final = 30.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportLoopConfig:
    """How Karn treats what comes off the bus."""

    durable_name: str = DURABLE_NAME
    """Name of the durable consumer."""
    retry_delay_s: float = 1.0
    """Seconds until a report is tried again whose learning failed by an outage; doubles each time, to 30. >= 0."""
    max_deliver: int = 40
    """Times a report is tried before it goes to the dead letters: about a quarter of an hour. At least 1."""

    def __post_init__(self) -> None:
        if not self.retry_delay_s >= 0:
            raise InvalidInputError.of("retry_delay_s", "be >= 0 seconds", self.retry_delay_s)
        if self.max_deliver < 1:
            raise InvalidInputError.of("max_deliver", "be >= 1", self.max_deliver)


class ReportLoop:
    """Consumes field reports. Belongs to one event loop."""

    def __init__(self, karn: Karn, bus: Bus, config: ReportLoopConfig | None = None) -> None:
        self._karn = karn
        self._bus = bus
        self._config = config or ReportLoopConfig()
        self._consumer: TypedConsumer[telemetry_pb2.FieldReport] | None = None
        self._running: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to consume, in a task of its own.

        Raises:
            UnavailableError: The bus cannot be reached.
        """
        self._consumer = await durable_messages(
            self._bus,
            EVENTS.name,
            self._config.durable_name,
            telemetry_pb2.FieldReport,
            subject_filter=kind_patterns(Kind.FIELD_REPORT),
            max_deliver=self._config.max_deliver,
            batch=1,
        )
        self._running = asyncio.create_task(self._run(self._consumer), name="karn-reports")

    async def close(self) -> None:
        """Stop consuming once the report in hand is done; idempotent."""
        if self._consumer is not None:
            await self._consumer.close()
        if self._running is not None:
            await asyncio.gather(self._running, return_exceptions=True)
            self._running = None

    async def ready(self) -> None:
        """Return while the loop runs; a readiness probe.

        Raises:
            InvalidStateError: It does not.
        """
        if self._running is None or self._running.done():
            raise InvalidStateError("Karn's report loop must be running, got one that ended or never began")

    async def _run(self, consumer: TypedConsumer[telemetry_pb2.FieldReport]) -> None:
        async for received in consumer:
            await self._settle(received)

    async def _settle(self, received: Received[telemetry_pb2.FieldReport]) -> None:
        """Learn one report and settle it; an outage asks for it again, anything else gives it up with the reason."""
        delivery = received.delivery
        assert delivery is not None
        try:
            await self._karn.learn(from_wire(received.message, FieldReport))
        except InvalidInputError as error:
            await _told(delivery.term(str(error)))
        except EsperError as error:
            log.warning("report_postponed", extra={"subject": received.raw.subject, "error": str(error)})
            doublings = min(delivery.num_delivered - 1, 10)
            delay_s = min(self._config.retry_delay_s * 2**doublings, _MAX_DELAY_S)
            await _told(delivery.nak(delay_s, reason=str(error)))
        except Exception as error:
            log.exception("report_failed", extra={"subject": received.raw.subject})
            await _told(delivery.term(f"{type(error).__name__}: {error}"))
        else:
            await _told(delivery.ack())


async def _told(settling: Awaitable[None]) -> None:
    """Settle a delivery; when the broker cannot be told, the report comes again, which is harmless."""
    try:
        await settling
    except EsperError as error:
        log.warning("settling_failed", extra={"error": str(error)})

"""Takes field reports off the bus and counts them in the library."""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from esper.contracts import wire
from esper.contracts.errors import (
    CorruptDataError,
    DeadlineExceededError,
    EsperError,
    InvalidInputError,
    UnavailableError,
)
from esper.contracts.run import FieldReport
from esper.services.urza.report_store import ReportStore
from esper.telemetry.bus import Bus, Consumer, Delivery
from esper.telemetry.streams import EVENTS
from esper.telemetry.subjects import Kind, kind_patterns

log = logging.getLogger(__name__)

DURABLE_NAMES: Final = ("urza-field-reports", "urza-field-reports-by-layer")
"""Names under which the bus keeps our place; replicas that share them share the work."""

_RETRY_DELAY_S: Final = 2.0
_MAX_DELIVER: Final = 20


class ReportConsumer:
    """Runs from `start` to `close`; belongs to the event loop of its bus and store."""

    def __init__(self, bus: Bus, reports: ReportStore) -> None:
        self._bus = bus
        self._reports = reports
        self._consumers: list[Consumer] = []
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Begin to consume.

        Raises:
            NotFoundError: The bus has no stream for events.
            UnavailableError: The bus cannot be reached.
        """
        for name, pattern in zip(DURABLE_NAMES, kind_patterns(Kind.FIELD_REPORT), strict=True):
            # One at a time: what waited in our hands while the store is away would be delivered again and again.
            consumer = await self._bus.consume(EVENTS.name, name, pattern, max_deliver=_MAX_DELIVER, batch=1)
            self._consumers.append(consumer)
            self._tasks.append(asyncio.create_task(self._run(consumer), name=name))

    def check(self) -> None:
        """Return while reports are being taken, for readiness.

        Raises:
            UnavailableError: The consumption has ended by itself; the log says why.
        """
        ended = [task.get_name() for task in self._tasks if task.done()]
        if ended:
            raise UnavailableError(f"field reports are no longer taken off the bus by {', '.join(ended)}")

    async def close(self) -> None:
        """Stop; a report that was not acknowledged comes again on the next start. Idempotent."""
        for consumer in self._consumers:
            await consumer.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._consumers, self._tasks = [], []

    async def _run(self, consumer: Consumer) -> None:
        try:
            async for delivery in consumer:
                try:
                    await self._settle(delivery)
                except (UnavailableError, DeadlineExceededError) as error:
                    # The broker was not told: the report comes again, and counting it twice changes nothing.
                    log.warning("report_not_settled", extra={"subject": delivery.message.subject, "error": str(error)})
        except Exception:
            log.exception("report_consumer_failed", extra={"consumer": consumer.name})
            raise

    async def _record(self, delivery: Delivery, report: FieldReport) -> None:
        """Count a report, however long the store is away: that is no fault of the report, and costs it no delivery."""
        while True:
            try:
                await self._reports.record(report)
            except UnavailableError as error:
                log.warning("report_waits_for_store", extra={"report_id": report.report_id, "error": str(error)})
            else:
                return
            await delivery.in_progress()
            await asyncio.sleep(_RETRY_DELAY_S)

    async def _settle(self, delivery: Delivery) -> None:
        try:
            await self._record(delivery, wire.parse(delivery.message.payload, FieldReport))
        except (CorruptDataError, InvalidInputError) as error:
            await delivery.term(f"{error.reason}: {error}")
        except EsperError as error:
            log.warning("report_not_recorded", extra={"subject": delivery.message.subject, "error": str(error)})
            await delivery.nak(_RETRY_DELAY_S, reason=f"{error.reason}: {error}")
        except Exception as error:  # a defect met by one report must not keep the others from being counted
            log.error("report_defect", exc_info=error, extra={"subject": delivery.message.subject})
            await delivery.nak(_RETRY_DELAY_S, reason=f"defect: {type(error).__name__}")
        else:
            await delivery.ack()

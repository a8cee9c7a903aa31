"""Takes one lane of events to the bus, in order, each until the bus took it or will never take it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from typing import Final

from esper.contracts.errors import (
    CapacityExceededError,
    DeadlineExceededError,
    EsperError,
    InvalidInputError,
    NotFoundError,
    UnavailableError,
)
from esper.telemetry.bus import Bus
from esper.telemetry.outbox import Event, Lane, Tally, kind_of
from esper.telemetry.streams import StreamSpec
from esper.telemetry.tracing_context import publish_span

log = logging.getLogger(__name__)

RETRY_S: Final = 0.1
"""Pause before what failed is tried again, in seconds."""
_REFUSAL_ATTEMPTS: Final = 3
"""How often a message is tried that the bus refuses for a reason which may pass."""


class EventSender:
    """Sends what is encoded in one lane. Belongs to the publisher's loop."""

    def __init__(self, run_id: str, lane: Lane, tally: Tally, streams: Sequence[StreamSpec], wait_s: float) -> None:
        """Join the parts.

        Args:
            run_id: For the log.
            lane: What to send.
            tally: Where it is counted.
            streams: Made again where the bus has lost them.
            wait_s: Longest wait for the bus before the next attempt, and for it to confirm what no stream keeps.
        """
        self._run_id = run_id
        self._lane = lane
        self._tally = tally
        self._streams = streams
        self._wait_s = wait_s

    async def send_all(self, bus: Bus) -> None:
        """Return once the lane has nothing encoded left."""
        while (event := self._lane.begin()) is not None:
            await self._send(bus, event)
            self._lane.finish()

    async def _send(self, bus: Bus, event: Event) -> None:
        kind = kind_of(event.subject)
        attempts_left = _REFUSAL_ATTEMPTS
        while True:
            try:
                with publish_span(event.subject, event.headers) as headers:
                    await bus.publish(
                        event.subject, event.payload, headers=headers, msg_id=event.msg_id, durable=event.durable
                    )
                    if not event.durable:
                        await bus.flush(self._wait_s)
            except (UnavailableError, DeadlineExceededError) as error:
                log.info("event_postponed", extra={"subject": event.subject, "error": str(error)})
            except CapacityExceededError as error:
                if error.parameter == "payload":
                    self._refuse(kind, event, error)
                    return
                log.warning("stream_full", extra={"subject": event.subject, "error": str(error)})
            except EsperError as error:
                attempts_left -= 1
                if isinstance(error, InvalidInputError) or not attempts_left or not await self._repair(bus, error):
                    self._refuse(kind, event, error)
                    return
            else:
                self._tally.published[kind] += 1
                return
            await wait_bus(bus, self._wait_s)

    async def _repair(self, bus: Bus, error: EsperError) -> bool:
        """Make the streams again if the bus has lost them; say whether another attempt makes sense."""
        if not isinstance(error, NotFoundError):
            return True
        try:
            await bus.ensure_streams(self._streams)
        except (UnavailableError, DeadlineExceededError):
            return True
        except EsperError:
            log.exception("streams_not_repaired", extra={"run_id": self._run_id})
            return False
        return True

    def _refuse(self, kind: str, event: Event, error: EsperError) -> None:
        self._tally.refused[kind] += 1
        log.error("event_refused", extra={"subject": event.subject, "reason": error.reason, "error": str(error)})


async def wait_bus(bus: Bus, at_most_s: float) -> None:
    """Wait a moment, then until the bus can be reached again; the caller tries again either way."""
    await asyncio.sleep(RETRY_S)
    with contextlib.suppress(UnavailableError):
        await bus.wait_connected(at_most_s)

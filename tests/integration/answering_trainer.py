"""A trainer's end of the bus: what it says, buses that do it harm, and a process that says it and answers a command.

``python -m tests.integration.answering_trainer URL RUN stuck|free``; ``stuck``, its answers never reach the bus.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from datetime import UTC, datetime
from typing import Final

from typing_extensions import override

from esper.contracts.decision import ControlResult
from esper.contracts.run import RunPhase, SystemStatePacket
from esper.contracts.wire import to_message
from esper.telemetry import (
    EVENTS,
    Kind,
    Mail,
    Mailbox,
    NatsBus,
    OonaPublisher,
    PublisherConfig,
    build_subject,
    kind_patterns,
)
from esper.telemetry.bus import PublishAck
from esper.telemetry.mailbox import DurableFeed
from esper.telemetry.nats_connection import Connection
from esper.v1 import decision_pb2, telemetry_pb2

MANY: Final = 2000
"""Packets that wait beside an answer."""
_TICK_S: Final = 0.01
_LIMIT_S: Final = 60.0
_WRONG_ACK_S: Final = 0.5
"""Time for an acknowledgement that must not be sent: ten looks at the mailbox."""


class StuckBus(NatsBus):
    """A bus on which messages of some subjects never get through."""

    stuck: Collection[str] = ()

    @override
    async def publish(
        self,
        subject: str,
        payload: bytes,
        *,
        headers: Mapping[str, str] | None = None,
        msg_id: str | None = None,
        durable: bool = False,
    ) -> PublishAck | None:
        if subject in self.stuck:
            await asyncio.Event().wait()
        return await super().publish(subject, payload, headers=headers, msg_id=msg_id, durable=durable)


class DefectiveBus(NatsBus):
    """A bus with a defect: every third publish of a subject ends in one before, every fifth after it was stored."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection)
        self.calls: Counter[str] = Counter()

    @override
    async def publish(
        self,
        subject: str,
        payload: bytes,
        *,
        headers: Mapping[str, str] | None = None,
        msg_id: str | None = None,
        durable: bool = False,
    ) -> PublishAck | None:
        self.calls[subject] += 1
        if self.calls[subject] % 3 == 0:
            raise ZeroDivisionError("before the bus had it")
        ack = await super().publish(subject, payload, headers=headers, msg_id=msg_id, durable=durable)
        if self.calls[subject] % 5 == 0:
            raise ZeroDivisionError("after the bus had it")
        return ack


def packet_of(run_id: str, sequence: int) -> telemetry_pb2.SystemStatePacket:
    """Give a state packet of a run."""
    packet = SystemStatePacket(
        run_id=run_id,
        sequence=sequence,
        phase=RunPhase.TRAINING,
        epoch=sequence,
        step=sequence,
        layers=(),
        created_at=datetime.now(UTC),
    )
    return to_message(packet, telemetry_pb2.SystemStatePacket)


def answer_of(run_id: str, request_id: str) -> decision_pb2.ControlMessage:
    """Give a run's answer to a command."""
    result = ControlResult(request_id=request_id, run_id=run_id, accepted=True, detail="held", step=7)
    return decision_pb2.ControlMessage(result=to_message(result, decision_pb2.ControlResult))


def offer_packets(publisher: OonaPublisher, first: int = 1, count: int = MANY) -> None:
    """Have a publisher tell so many states, each under a name that stays the same over lives of the run."""
    subject = build_subject(publisher.run_id, Kind.STATE)
    for sequence in range(first, first + count):
        publisher.offer(subject, packet_of(publisher.run_id, sequence), msg_id=f"state-{sequence}")


def offer_answer(publisher: OonaPublisher, request_id: str) -> None:
    """Have a publisher answer a command."""
    publisher.offer(build_subject(publisher.run_id, Kind.CONTROL), answer_of(publisher.run_id, request_id))


def main() -> None:
    """Be the trainer."""
    url, run_id, how = sys.argv[1:]
    DurableFeed.ack_wait_s = 1.0  # what the one before held comes soon

    async def connect() -> NatsBus:
        bus = await StuckBus.connect(url)
        assert isinstance(bus, StuckBus)
        bus.stuck = (build_subject(run_id, Kind.CONTROL),) if how == "stuck" else ()
        return bus

    publisher = OonaPublisher(run_id, config=PublisherConfig(poll_interval_ms=10))
    publisher.start(connect)
    box = publisher.open_durable_mailbox(
        EVENTS.name,
        f"run-{run_id}-control",
        decision_pb2.ControlMessage,
        subject_filter=kind_patterns(Kind.CONTROL, run_id),
    )
    offer_packets(publisher)
    command = _next(box)
    offer_answer(publisher, command.message.command.request_id)
    command.settle()
    if how == "stuck":
        threading.Event().wait(_WRONG_ACK_S)
    _say(f"answered {command.message.command.request_id}")
    if how == "stuck":
        threading.Event().wait()
    _next(box).settle()  # its own answer, as everybody gets it
    _until(lambda: publisher.stats().buffered_events == 0)
    publisher.close()
    _say("out")


def _next(box: Mailbox[decision_pb2.ControlMessage]) -> Mail[decision_pb2.ControlMessage]:
    _until(lambda: len(box) > 0)
    [mail] = box.drain()
    return mail


def _say(words: str) -> None:
    sys.stdout.write(f"{words}\n")
    sys.stdout.flush()


def _until(condition: Callable[[], bool]) -> None:
    deadline_s, tick = time.monotonic() + _LIMIT_S, threading.Event()
    while not condition():
        assert time.monotonic() < deadline_s, "the condition did not come about in time"
        tick.wait(_TICK_S)


if __name__ == "__main__":
    main()

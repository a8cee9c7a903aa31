"""Tolaria on the bus: takes in what runs say, and carries commands to them.

Runs' answers to commands come in by a consumer of their own: they wait behind no event, and no store.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from google.protobuf.message import Message

from esper.contracts.decision import AdaptationDecision, AdaptationPlan, ControlCommand, ControlResult
from esper.contracts.errors import DeadlineExceededError, EsperError, InvalidInputError, UnavailableError
from esper.contracts.run import FieldReport, SeedEvent, SystemStatePacket
from esper.contracts.wire import from_wire, to_message
from esper.mesh.validation import require_size
from esper.services.tolaria.store import MAX_ADAPTATION_ID, StoredEvent, TolariaStore
from esper.telemetry.bus import CONTENT_TYPE_HEADER, Bus
from esper.telemetry.consumer import Received, TypedConsumer, content_type, decode_any, durable_messages
from esper.telemetry.streams import EVENTS
from esper.telemetry.subjects import Kind, build_subject, kind_patterns
from esper.v1 import decision_pb2, telemetry_pb2

log = logging.getLogger(__name__)

DURABLE_NAME: Final = "tolaria"
"""Name under which Tolaria keeps its place among the events of the stream."""
CONTROL_DURABLE_NAME: Final = "tolaria-control"
"""Name under which it keeps its place among commands and their answers."""

_INTAKES: Final[Mapping[str, tuple[Kind, ...]]] = {
    CONTROL_DURABLE_NAME: (Kind.CONTROL,),
    DURABLE_NAME: (Kind.STATE, Kind.DECISION, Kind.PLAN, Kind.SEED, Kind.FIELD_REPORT),
}
"""Kinds that each consumer takes, in one order."""
_EVENT_KINDS: Final[Mapping[type[Message], tuple[str, type]]] = {
    decision_pb2.AdaptationDecision: ("decision", AdaptationDecision),
    decision_pb2.AdaptationPlan: ("plan", AdaptationPlan),
    telemetry_pb2.SeedEvent: ("seed", SeedEvent),
    telemetry_pb2.FieldReport: ("field_report", FieldReport),
}
_ANSWERS_KEPT: Final = 4096
_RETRY_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class RunNews:
    """Something that happened in a run."""

    run_id: str
    """Run."""
    message: Message
    """State packet, decision, seed event or field report."""


class TolariaBusLoop:
    """Consumes runs' events into the store and tells watchers. Belongs to one event loop."""

    def __init__(self, store: TolariaStore, bus: Bus) -> None:
        self._store = store
        self._bus = bus
        self._consumers: list[TypedConsumer[Message]] = []
        self._intakes: list[asyncio.Task[None]] = []
        self._watchers: dict[str, set[asyncio.Queue[RunNews]]] = {}
        self._waiting: dict[str, set[asyncio.Future[ControlResult]]] = {}
        self._answers: dict[str, ControlResult] = {}
        self._answered: deque[str] = deque()

    async def start(self) -> None:
        """Open the consumers and begin; one of before there were two keeps its place, and lets control go.

        Raises:
            UnavailableError: The bus cannot be reached; nothing was begun.
        """
        try:
            for name, kinds in _INTAKES.items():
                patterns = [pattern for kind in kinds for pattern in kind_patterns(kind)]
                consumer = await durable_messages(self._bus, EVENTS.name, name, decode_any, subject_filter=patterns)
                self._consumers.append(consumer)
        except BaseException:
            await self.close()
            raise
        self._intakes += [asyncio.create_task(self._run(one), name="tolaria-intake") for one in self._consumers]

    async def ready(self) -> None:
        """Return when events are being taken in.

        Raises:
            UnavailableError: They are not.
        """
        if not self._intakes or any(task.done() for task in self._intakes):
            raise UnavailableError("Tolaria's bus loop must run, got one that ended")
        if not self._bus.stats().connected:
            raise UnavailableError("the bus must be reachable, got a lost connection")

    async def close(self) -> None:
        """Stop consuming; idempotent."""
        for task in self._intakes:
            task.cancel()
        for ended in await asyncio.gather(*self._intakes, return_exceptions=True):
            if isinstance(ended, Exception):
                log.error("intake_failed", exc_info=ended)
        self._intakes.clear()
        for consumer in self._consumers:
            await consumer.close()
        self._consumers.clear()

    async def command(self, command: ControlCommand, timeout_s: float) -> ControlResult:
        """Send a command to its run and wait for the answer; a repeated request id is sent once.

        Raises:
            DeadlineExceededError: The run did not answer in time; it may still carry the command out.
            UnavailableError: The bus cannot be reached.
        """
        known = self._answers.get(command.request_id)
        if known is not None:
            return known
        answer: asyncio.Future[ControlResult] = asyncio.get_running_loop().create_future()
        waiting = self._waiting.setdefault(command.request_id, set())
        waiting.add(answer)
        try:
            async with asyncio.timeout(timeout_s):
                await self._publish(command)
                return await answer
        except TimeoutError as error:
            message = (
                f"run {command.run_id} must answer within {timeout_s:.1f} s, got no answer to {command.action.name}"
            )
            raise DeadlineExceededError(message) from error
        finally:
            waiting.discard(answer)
            if not waiting:
                self._waiting.pop(command.request_id, None)

    @contextlib.contextmanager
    def watch(self, run_id: str) -> Iterator[AsyncIterator[RunNews]]:
        """Give what happens in a run from now on; a watcher that falls 1,000 events behind loses the oldest."""
        queue: asyncio.Queue[RunNews] = asyncio.Queue(1000)
        self._watchers.setdefault(run_id, set()).add(queue)
        try:
            yield _drain(queue)
        finally:
            self._watchers[run_id].discard(queue)
            if not self._watchers[run_id]:
                del self._watchers[run_id]

    async def _publish(self, command: ControlCommand) -> None:
        message = decision_pb2.ControlMessage(command=to_message(command, decision_pb2.ControlCommand))
        await self._bus.publish(
            build_subject(command.run_id, Kind.CONTROL),
            message.SerializeToString(),
            headers={CONTENT_TYPE_HEADER: content_type(decision_pb2.ControlMessage)},
            msg_id=f"command-{command.request_id}",
            durable=True,
        )

    async def _run(self, consumer: TypedConsumer[Message]) -> None:
        async for received in consumer:
            delivery = received.delivery
            assert delivery is not None
            try:
                await self._take(received)
            except InvalidInputError as error:
                log.warning("event_refused", extra={"subject": received.raw.subject, "error": str(error)})
                await self._settle(delivery.term(str(error)))
            except EsperError as error:
                log.warning("event_postponed", extra={"subject": received.raw.subject, "error": str(error)})
                await self._settle(delivery.nak(_RETRY_S, reason=str(error)))
            except Exception as error:  # a defect with one event must not end the intake of all
                log.exception("event_failed", extra={"subject": received.raw.subject})
                await self._settle(delivery.nak(_RETRY_S, reason=type(error).__name__))
            else:
                await self._settle(delivery.ack())

    @staticmethod
    async def _settle(settling: object) -> None:
        try:
            await settling  # type: ignore[misc]
        except (UnavailableError, DeadlineExceededError) as error:  # it comes again, and is known then
            log.warning("settling_postponed", extra={"error": str(error)})

    async def _take(self, received: Received[Message]) -> None:
        message, run_id = received.message, received.subject.run_id
        if isinstance(message, decision_pb2.ControlMessage):
            if message.WhichOneof("body") == "result":
                self._answer(from_wire(message.result, ControlResult))
            return
        if isinstance(message, telemetry_pb2.SystemStatePacket):
            if await self._store.keep_packet(from_wire(message, SystemStatePacket)):
                self._tell(run_id, message)
            return
        found = _EVENT_KINDS.get(type(message))
        if found is None:
            raise InvalidInputError.of("message", "be an event of a run", message.DESCRIPTOR.full_name)
        kind, domain = found
        adaptation_id: str = from_wire(message, domain).adaptation_id  # what is kept can be read by whoever asks
        require_size("adaptation_id", adaptation_id, max_bytes=MAX_ADAPTATION_ID)
        event = StoredEvent(adaptation_id=adaptation_id, kind=kind, payload=message.SerializeToString())
        if await self._store.keep_event(run_id, int(received.raw.sequence or 0), event):
            self._tell(run_id, message)

    def _answer(self, result: ControlResult) -> None:
        if result.request_id not in self._answers:  # a repeat is no younger
            self._answered.append(result.request_id)
        self._answers[result.request_id] = result
        while len(self._answered) > _ANSWERS_KEPT:
            self._answers.pop(self._answered.popleft(), None)
        for waiting in self._waiting.get(result.request_id, ()):
            if not waiting.done():
                waiting.set_result(result)

    def _tell(self, run_id: str, message: Message) -> None:
        for queue in self._watchers.get(run_id, ()):
            if queue.full():
                queue.get_nowait()
            queue.put_nowait(RunNews(run_id, message))


async def _drain(queue: asyncio.Queue[RunNews]) -> AsyncIterator[RunNews]:
    while True:
        yield await queue.get()

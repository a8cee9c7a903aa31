"""Tamiyo on the bus: packets, plans and reports come in order; decisions go out, and what grows is sent to be compiled.

Everything is safe to repeat: a redelivered packet finds its decision in the store, the decision carries its adaptation
id as message id, and equal compile requests share one job, whatever run they come from: the weights a seed begins with
are drawn in the run. Once a packet is answered, the run is told which kernels it is likely to want next.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from google.protobuf.message import Message
from opentelemetry.context import Context
from opentelemetry.trace import SpanKind

from esper.contracts.decision import AdaptationDecision, AdaptationPlan
from esper.contracts.errors import CorruptDataError, EsperError, InvalidInputError, InvalidStateError
from esper.contracts.kernel import CompileSpec, KernelForecast, KernelReady
from esper.contracts.run import FieldReport, SeedEvent, SystemStatePacket
from esper.contracts.wire import from_wire, serialize, to_wire
from esper.services.tamiyo.forecast import KernelForecaster
from esper.services.tamiyo.service import Tamiyo
from esper.telemetry.bus import CONTENT_TYPE_HEADER, Bus, BusMessage, Delivery
from esper.telemetry.consumer import Received, TypedConsumer, content_type, decode, durable_messages
from esper.telemetry.streams import EVENTS
from esper.telemetry.subjects import Kind, build_subject, kind_patterns, parse_subject
from esper.telemetry.tracing import adaptation_span, inject_headers
from esper.v1 import decision_pb2, kernel_pb2, telemetry_pb2, tezzeret_service_pb2

log = logging.getLogger(__name__)

DURABLE_NAME: Final = "tamiyo"
"""Name under which Tamiyo keeps its place in the stream."""

_MAX_DELAY_S: Final = 30.0
_MESSAGES: Final[Mapping[Kind, type[Message]]] = {
    Kind.STATE: telemetry_pb2.SystemStatePacket,
    Kind.PLAN: decision_pb2.AdaptationPlan,
    Kind.SEED: telemetry_pb2.SeedEvent,
    Kind.FIELD_REPORT: telemetry_pb2.FieldReport,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class BusLoopConfig:
    """How Tamiyo treats what comes off the bus."""

    durable_name: str = DURABLE_NAME
    """Name of the durable consumer."""
    stale_after_s: float = 300.0
    """Age from which a packet is taken in but nobody is told to act on it, in seconds. > 0."""
    retry_delay_s: float = 1.0
    """Seconds until a message is tried again whose work failed by an outage; doubles each time, to 30. >= 0."""
    max_deliver: int = 40
    """Times a message is tried before it goes to the dead letters: about a quarter of an hour. At least 1."""
    compile_timeout_s: float = 10.0
    """Seconds the compile request may take. > 0."""

    def __post_init__(self) -> None:
        for name in ("stale_after_s", "compile_timeout_s"):
            if not getattr(self, name) > 0:
                raise InvalidInputError.of(name, "be > 0 seconds", getattr(self, name))
        if not self.retry_delay_s >= 0:
            raise InvalidInputError.of("retry_delay_s", "be >= 0 seconds", self.retry_delay_s)
        if self.max_deliver < 1:
            raise InvalidInputError.of("max_deliver", "be >= 1", self.max_deliver)


class TamiyoBusLoop:
    """Consumes a run's events and acts on them. Belongs to one event loop; `run` until cancelled or closed."""

    def __init__(
        self,
        tamiyo: Tamiyo,
        bus: Bus,
        tezzeret: Any | None,
        config: BusLoopConfig | None = None,
        *,
        forecaster: KernelForecaster | None = None,
    ) -> None:
        """Make a loop that has not begun.

        Args:
            tamiyo: Decides and learns.
            bus: Open bus with its streams.
            tezzeret: ``TezzeretServiceStub``; ``None`` where nothing compiles, which runs are told for each kernel.
            config: Ages and delays.
            forecaster: Tells which kernels a run is likely to want next; ``None`` tells nothing.
        """
        self._tamiyo = tamiyo
        self._bus = bus
        self._tezzeret = tezzeret
        self._config = config or BusLoopConfig()
        self._forecaster = forecaster
        self._foretelling: dict[str, asyncio.Task[None]] = {}
        self._consumer: TypedConsumer[Message] | None = None
        self._running: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to consume, in a task of its own.

        Raises:
            UnavailableError: The bus cannot be reached.
        """
        patterns = [pattern for kind in _MESSAGES for pattern in kind_patterns(kind)]
        self._consumer = await durable_messages(
            self._bus,
            EVENTS.name,
            self._config.durable_name,
            decode_event,
            subject_filter=patterns,
            max_deliver=self._config.max_deliver,
            batch=1,
        )
        self._running = asyncio.create_task(self._run(self._consumer), name="tamiyo-bus")

    async def close(self) -> None:
        """Stop consuming once the message in hand is done; idempotent."""
        if self._consumer is not None:
            await self._consumer.close()
        if self._running is not None:
            await asyncio.gather(self._running, return_exceptions=True)
            self._running = None
        foretelling = list(self._foretelling.values())
        for task in foretelling:
            task.cancel()
        await asyncio.gather(*foretelling, return_exceptions=True)

    async def ready(self) -> None:
        """Return while the loop runs; a readiness probe.

        Raises:
            InvalidStateError: It does not.
        """
        if self._running is None or self._running.done():
            raise InvalidStateError("Tamiyo's bus loop must be running, got one that ended or never began")

    async def _run(self, consumer: TypedConsumer[Message]) -> None:
        async for received in consumer:
            await self._settle(received)

    async def _settle(self, received: Received[Message]) -> None:
        """Handle one message and settle it; an outage asks for it again, anything else gives it up with the reason."""
        delivery = received.delivery
        assert delivery is not None
        try:
            await self._handle(received)
        except InvalidInputError as error:
            await self._told(delivery.term(str(error)))
        except InvalidStateError as error:
            log.info("message_stale", extra={"subject": received.raw.subject, "reason": str(error)})
            await self._told(delivery.ack())
        except EsperError as error:
            log.warning("message_postponed", extra={"subject": received.raw.subject, "error": str(error)})
            await self._told(delivery.nak(self._delay_s(delivery), reason=str(error)))
        except Exception as error:
            log.exception("message_failed", extra={"subject": received.raw.subject})
            await self._told(delivery.term(f"{type(error).__name__}: {error}"))
        else:
            await self._told(delivery.ack())

    def _delay_s(self, delivery: Delivery) -> float:
        doublings = min(delivery.num_delivered - 1, 10)
        return float(min(self._config.retry_delay_s * 2**doublings, _MAX_DELAY_S))

    async def _told(self, settling: Any) -> None:
        """Settle a delivery; when the broker cannot be told, the message comes again, which is harmless."""
        try:
            await settling
        except EsperError as error:
            log.warning("settling_failed", extra={"error": str(error)})

    async def _handle(self, received: Received[Message]) -> None:
        match received.message:
            case telemetry_pb2.SystemStatePacket() as packet:
                await self._decide(from_wire(packet, SystemStatePacket), received.raw.stored_at)
            case telemetry_pb2.FieldReport() as report:
                await self._tamiyo.learn(from_wire(report, FieldReport))
            case telemetry_pb2.SeedEvent() as event:
                self._tamiyo.tracker.observe_event(from_wire(event, SeedEvent))
            case decision_pb2.AdaptationPlan() as plan:
                await self._tamiyo.note_plan(from_wire(plan, AdaptationPlan))
            case other:
                name = other.DESCRIPTOR.full_name
                raise InvalidInputError.of("message", "be a packet, plan, seed event or field report", name)

    async def _decide(self, packet: SystemStatePacket, stored_at: datetime | None) -> None:
        decisions = await self._tamiyo.analyze(packet)
        if stored_at is not None and (datetime.now(UTC) - stored_at).total_seconds() > self._config.stale_after_s:
            log.info("decision_stale", extra={"run_id": packet.run_id, "adaptation_id": decisions[0].adaptation_id})
            return
        for decision in decisions:
            await self._tell(decision)
        self._begin_to_foretell(packet)

    async def _tell(self, decision: AdaptationDecision) -> None:
        """Tell the run what was decided, and ask for the kernel."""
        if not decision.actionable:
            await self._publish(decision)
            return
        # The root of the adaptation's trace: everything that follows hangs below it, in whatever process.
        with adaptation_span(
            "decide",
            decision.adaptation_id,
            parent=Context(),
            kind=SpanKind.INTERNAL,
            run_id=decision.run_id,
            adaptation_type=decision.adaptation_type.value,
            layer=decision.layer,
        ):
            await self._publish(decision)
            if decision.adaptation_type.grows:
                await self._compile(decision)

    async def _publish(self, decision: AdaptationDecision) -> None:
        headers = {CONTENT_TYPE_HEADER: content_type(decision_pb2.AdaptationDecision)}
        subject = build_subject(decision.run_id, Kind.DECISION)
        await self._bus.publish(
            subject, serialize(decision), headers=inject_headers(headers), msg_id=decision.adaptation_id, durable=True
        )

    async def _compile(self, decision: AdaptationDecision) -> None:
        """Ask for the kernel; when nobody can be asked, tell the run, so that it does not wait for it."""
        assert decision.blueprint is not None
        assert decision.site is not None
        spec = CompileSpec(ir=decision.blueprint.ir, site=decision.site)
        request = tezzeret_service_pb2.CompileRequest(
            adaptation_id=decision.adaptation_id, run_id=decision.run_id, wait=False
        )
        request.spec.CopyFrom(to_wire(spec))  # type: ignore[arg-type]
        try:
            if self._tezzeret is None:
                raise InvalidStateError("no compiler is configured")
            await self._tezzeret.Compile(request, timeout=self._config.compile_timeout_s)
        except EsperError as error:
            log.warning("compile_refused", extra={"adaptation_id": decision.adaptation_id, "error": str(error)})
            await self._announce_failure(decision, f"the kernel was not asked for: {error}"[:500])

    async def _announce_failure(self, decision: AdaptationDecision, reason: str) -> None:
        assert decision.site is not None
        failure = KernelReady(
            adaptation_id=decision.adaptation_id,
            run_id=decision.run_id,
            job_id="",
            blueprint_id=decision.blueprint_id,
            site=decision.site,
            error=reason,
        )
        headers = {CONTENT_TYPE_HEADER: content_type(kernel_pb2.KernelReady)}
        await self._bus.publish(
            build_subject(decision.run_id, Kind.KERNEL),
            serialize(failure),
            headers=inject_headers(headers),
            msg_id=f"kernel-refused:{decision.adaptation_id}",
            durable=True,
        )

    def _begin_to_foretell(self, packet: SystemStatePacket) -> None:
        """Make a forecast beside the messages, which do not wait for it; one at a time for each run."""
        if self._forecaster is None or packet.run_id in self._foretelling:
            return
        task = asyncio.create_task(self._foretell(self._forecaster, packet), name=f"tamiyo-forecast-{packet.run_id}")
        self._foretelling[packet.run_id] = task
        task.add_done_callback(lambda _: self._foretelling.pop(packet.run_id, None))

    async def _foretell(self, forecaster: KernelForecaster, packet: SystemStatePacket) -> None:
        """Tell a run which kernels it is likely to want next; a forecast that does not get through is not repeated."""
        try:
            artifact_ids = await forecaster.foresee(packet)
            if artifact_ids:
                headers = {CONTENT_TYPE_HEADER: content_type(kernel_pb2.KernelForecast)}
                forecast = KernelForecast(run_id=packet.run_id, artifact_ids=artifact_ids)
                subject = build_subject(packet.run_id, Kind.FORECAST)
                await self._bus.publish(subject, serialize(forecast), headers=headers)
        except EsperError as error:
            log.info("forecast_not_sent", extra={"run_id": packet.run_id, "error": str(error)})
        except Exception:  # a defect of a hint costs nothing but the hint
            log.exception("forecast_failed", extra={"run_id": packet.run_id})


def decode_event(raw: BusMessage) -> Message:
    """Give the message of an event that Tamiyo takes in, by the kind in its subject.

    Raises:
        CorruptDataError: The subject is of another kind, or the payload is not what the kind asks for.
    """
    try:
        kind = parse_subject(raw.subject).kind
    except InvalidInputError as error:
        raise CorruptDataError(f"subject must be one of a run, got {raw.subject}") from error
    message_type = _MESSAGES.get(kind)
    if message_type is None:
        raise CorruptDataError(f"subject must be of kind {', '.join(_MESSAGES)}, got {kind}")
    return decode(raw, message_type)

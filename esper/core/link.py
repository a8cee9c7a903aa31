"""A run's line to the mesh, as the training thread sees it: words out, words in, never a wait.

Everything that waits (bus, channels, kernel fetches) lives on the publisher's thread, and begins there as a message
comes in; the training thread appends to and pops from deques. A decision is read and checked there too, once.

A kernel that the compiler named for an equal request before is fetched as the decision comes in, and arrives with it,
at the same step boundary where it is in memory; the announcement that follows confirms it, or changes what the next
decision finds; a seed that has begun goes on. Where none was named, where the compiler has taken it back since, or
where it cannot be fetched, the announcement brings the kernel, or says why there is none.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final, Protocol, TypeVar

from google.protobuf.message import Message
from opentelemetry import context as otel_context

from esper.contracts.decision import AdaptationDecision, ControlCommand, ControlResult
from esper.contracts.errors import EsperError, InvalidInputError, InvalidStateError
from esper.contracts.kernel import MAX_FORECAST, CompileSpec, KernelForecast, KernelReady
from esper.contracts.run import CacheTierStatus
from esper.contracts.wire import from_wire, to_message, to_wire
from esper.core.morphable import MorphableModel
from esper.execution.answers import job_id_of
from esper.execution.artifact import VerifiedKernel
from esper.telemetry.client import OonaClient
from esper.telemetry.mailbox import Mail, Mailbox, Watch
from esper.telemetry.streams import EVENTS
from esper.telemetry.subjects import Kind, build_subject, kind_patterns
from esper.telemetry.tracing import adaptation_span, extract_context
from esper.v1 import decision_pb2, kernel_pb2

log = logging.getLogger(__name__)
M = TypeVar("M", bound=Message)

_FORECASTS_KEPT: Final = 4
"""Forecasts that wait for the training thread; a new one says all that the ones before it said."""
_LOOKS_KEPT: Final = 1024
"""Adaptations of which it is remembered whether their kernel was looked for, or announced."""


class TieredSource(Protocol):
    """Where kernels come from: a tiered source with statistics; its coroutines run on the publisher's loop alone."""

    async def fetch(self, artifact_id: str, *, announced: bool = False) -> VerifiedKernel:
        """Give a verified kernel, from the nearest tier that has it; one just announced, whatever was found before."""

    def at_hand(self, artifact_id: str) -> VerifiedKernel | None:
        """Give a kernel that can be had at once, without waiting for anything; ``None`` for any other."""

    def answer_to(self, spec: CompileSpec) -> str | None:
        """Give the id of the kernel that the compiler named for an equal request and has not taken back, if any."""

    def refuse(self, job_id: str) -> None:
        """Note that the compiler says of a job that it has no kernel."""

    async def warm(self, artifact_ids: Sequence[str]) -> Sequence[str]:
        """Bring kernels nearer that are likely to be wanted; gives those that are near now."""

    def stats(self) -> Sequence[CacheTierStatus]:
        """Give the statistics of every tier."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelArrival:
    """A kernel that was asked for: here, or never to come."""

    ready: KernelReady
    """The announcement it follows."""
    kernel: VerifiedKernel | None = None
    """The kernel; ``None`` when it failed."""
    error: str = ""
    """Why it failed, in words."""


Arrival = AdaptationDecision | KernelArrival | ControlCommand


class RunLink(Protocol):
    """What a session asks of its line to the mesh."""

    def send(self, kind: Kind, value: object, *, layer: str | None = None, msg_id: str | None = None) -> None:
        """Hand a domain value over; returns at once and never raises for what the mesh does."""

    def arrivals(self) -> Iterator[Arrival]:
        """Give what has come in; each counts as dealt with once the next is asked for."""

    def cache_tiers(self) -> Sequence[CacheTierStatus]:
        """Give the statistics of the kernel cache."""

    def close(self, deadline_s: float = 5.0) -> None:
        """Send what waits, within the deadline, and let go."""


def fresh_client(model: MorphableModel, run_id: str) -> OonaClient:
    """Give the client that a new run of this model speaks through; its layers' signals go there.

    A client serves one run. Where the model's own has served one before, a new one over the same signal ring takes its
    place, in the model and in every layer, with the same layer numbers.

    Raises:
        InvalidInputError: The run id is illegal.
        InvalidStateError: An earlier run of this model is not closed yet.
    """
    known = model.oona_client
    if known is None:
        return OonaClient(run_id)
    if not known.connected:
        known.assume_run(run_id)
        return known
    if known.publisher.running:
        raise InvalidStateError(
            f"model must be in one run at a time, got one in run {known.run_id}: close its session", parameter="model"
        )
    client = OonaClient(run_id, known.ring, config=known.publisher.config)
    for name in known.layers:
        client.register_layer(name)
    for layer in model.kasmina_layers.values():
        if layer.oona_client is known:
            layer._kasmina.client = client
    model._oona_client = client
    return client


class BusLink:
    """A :class:`RunLink` over a publisher's thread and a tiered kernel source."""

    def __init__(self, client: OonaClient, source: TieredSource) -> None:
        """Open the run's mailboxes.

        Args:
            client: Connected; closed with the link.
            source: Where kernels come from; stays the caller's.
        """
        self._client = client
        self._publisher = client.publisher
        self._source = source
        self._fetched: deque[KernelArrival] = deque()
        self._read: dict[Mail[decision_pb2.AdaptationDecision], AdaptationDecision] = {}
        self._looks: OrderedDict[str, asyncio.Future[str | None] | None] = OrderedDict()
        self._fetches: set[asyncio.Task[None]] = set()
        self._decisions = self._open(Kind.DECISION, decision_pb2.AdaptationDecision, self._begin_to_look)
        self._kernels = self._open(Kind.KERNEL, kernel_pb2.KernelReady, self._begin_to_fetch)
        self._controls = self._open(Kind.CONTROL, decision_pb2.ControlMessage)
        self.run_id = client.run_id
        subject = build_subject(self.run_id, Kind.FORECAST)
        self._forecasts = self._publisher.open_mailbox(subject, kernel_pb2.KernelForecast, max_mail=_FORECASTS_KEPT)

    def send(self, kind: Kind, value: object, *, layer: str | None = None, msg_id: str | None = None) -> None:
        """Hand a domain value over; returns at once."""
        message: Message
        if isinstance(value, ControlResult):
            message = decision_pb2.ControlMessage(result=to_message(value, decision_pb2.ControlResult))
        else:
            message = to_wire(value)
        self._publisher.offer(build_subject(self.run_id, kind, layer), message, durable=True, msg_id=msg_id)

    def arrivals(self) -> Iterator[Arrival]:
        """Give what has come in; with nothing there this costs five length checks."""
        if self._decisions:
            for mail in self._decisions.drain():
                yield from self._value(mail, mail.message, AdaptationDecision, self._read.pop(mail, None))
        if self._kernels:
            self._kernels.drain()  # they are dealt with since they came in
        while self._fetched:
            yield self._fetched.popleft()
        if self._controls:
            for control in self._controls.drain():
                if control.message.WhichOneof("body") == "command":
                    yield from self._value(control, control.message.command, ControlCommand)
                else:
                    control.settle()
        if self._forecasts:
            self._warm(self._forecasts.drain()[-1])

    def cache_tiers(self) -> Sequence[CacheTierStatus]:
        """Give the statistics of the kernel cache."""
        return self._source.stats()

    def close(self, deadline_s: float = 5.0) -> None:
        """Send what waits, then end the publisher's thread; idempotent."""
        self._client.close(deadline_s)

    def _open(self, kind: Kind, message_type: type[M], watch: Watch[M] | None = None) -> Mailbox[M]:
        run_id = self._publisher.run_id
        return self._publisher.open_durable_mailbox(
            EVENTS.name,
            f"run-{run_id}-{kind.value}",
            message_type,
            subject_filter=kind_patterns(kind, run_id),
            watch=watch,
        )

    def _value(
        self,
        mail: Mail[M],
        message: Message,
        cls: type[AdaptationDecision | ControlCommand],
        read: AdaptationDecision | None = None,
    ) -> Iterator[Arrival]:
        try:
            value = read or from_wire(message, cls)
        except InvalidInputError as error:
            log.warning("arrival_refused", extra={"subject": mail.raw.subject, "error": str(error)})
            mail.settle(give_up=str(error))
            return
        with _joined_trace(mail):
            yield value
        mail.settle()

    def _warm(self, mail: Mail[kernel_pb2.KernelForecast]) -> None:
        """Have the kernels of a forecast brought nearer on the publisher's loop; a hint that fails costs nothing."""
        try:
            forecast = from_wire(mail.message, KernelForecast)
            self._publisher.submit(self._bring(forecast.artifact_ids[:MAX_FORECAST]))
        except (InvalidInputError, InvalidStateError) as error:
            log.info("forecast_ignored", extra={"run_id": self.run_id, "error": str(error)})

    async def _bring(self, artifact_ids: Sequence[str]) -> None:
        try:
            near = await self._source.warm(artifact_ids)
        except Exception:  # a defect of a tier; the kernels are fetched when they are wanted
            log.exception("kernels_not_warmed", extra={"run_id": self.run_id})
        else:
            extra = {"run_id": self.run_id, "asked": len(artifact_ids), "near": len(near)}
            log.info("kernels_warmed", extra=extra)

    def _begin_to_look(self, mail: Mail[decision_pb2.AdaptationDecision]) -> None:
        """Look for the kernel of a decision that has come in; on the publisher's loop."""
        try:
            decision = from_wire(mail.message, AdaptationDecision)
        except InvalidInputError:  # who reads the mailbox refuses it, and says so
            return
        self._read[mail] = decision
        if not (decision.actionable and decision.adaptation_type.grows):
            return
        if decision.adaptation_id in self._looks:  # announced already: the mailboxes keep no order between them
            return
        if decision.blueprint is None or decision.site is None:
            return
        spec = CompileSpec(ir=decision.blueprint.ir, site=decision.site)
        artifact_id = self._source.answer_to(spec)
        if artifact_id is None:
            return
        ready = KernelReady(
            adaptation_id=decision.adaptation_id,
            run_id=self.run_id,
            job_id="",
            blueprint_id=decision.blueprint_id,
            site=decision.site,
            artifact_id=artifact_id,
        )
        with _joined_trace(mail):
            self._remember(decision.adaptation_id, self._look(ready))

    def _look(self, ready: KernelReady) -> asyncio.Future[str | None]:
        """Have a kernel arrive that was named before: before the decision can be read where it is at hand."""
        try:
            kernel = self._source.at_hand(ready.artifact_id)
        except Exception:  # a defect of the first tier; the kernel is fetched like one that is not at hand
            log.exception("kernel_not_at_hand", extra={"artifact_id": ready.artifact_id})
            kernel = None
        if kernel is None:
            return asyncio.create_task(self._look_near(ready), name=f"kernel-look-{ready.adaptation_id}")
        found: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        with adaptation_span("load", ready.adaptation_id, artifact_id=ready.artifact_id):
            found.set_result(self._arrived(ready, kernel))
        return found

    def _remember(self, adaptation_id: str, look: asyncio.Future[str | None] | None) -> None:
        self._looks[adaptation_id] = look
        while len(self._looks) > _LOOKS_KEPT:
            self._looks.popitem(last=False)

    async def _look_near(self, ready: KernelReady) -> str | None:
        """Have a kernel arrive that was named before; what goes wrong is left to the announcement."""
        try:
            with adaptation_span("load", ready.adaptation_id, artifact_id=ready.artifact_id):
                kernel = await self._source.fetch(ready.artifact_id)
        except EsperError as error:
            log.info("kernel_not_near", extra={"artifact_id": ready.artifact_id, "error": str(error)})
            return None
        except Exception:  # a defect of a tier; the announcement says what becomes of the kernel
            log.exception("kernel_not_near", extra={"artifact_id": ready.artifact_id})
            return None
        return self._arrived(ready, kernel)

    def _arrived(self, ready: KernelReady, kernel: VerifiedKernel) -> str:
        """Hand a kernel to the training thread, and give its id."""
        job_id = job_id_of(kernel.manifest.content_key)
        arrival = KernelArrival(ready=replace(ready, job_id=job_id, size_bytes=kernel.size_bytes), kernel=kernel)
        self._fetched.append(arrival)
        return ready.artifact_id

    def _begin_to_fetch(self, mail: Mail[kernel_pb2.KernelReady]) -> None:
        """Fetch a kernel whose announcement has come in; on the publisher's loop."""
        try:
            ready = from_wire(mail.message, KernelReady)
        except InvalidInputError as error:
            log.warning("arrival_refused", extra={"subject": mail.raw.subject, "error": str(error)})
            mail.settle(give_up=str(error))
            return
        look = self._looks.get(ready.adaptation_id)
        self._remember(ready.adaptation_id, look)
        with _joined_trace(mail):
            fetch = asyncio.create_task(self._follow(ready, mail, look), name=f"kernel-fetch-{ready.adaptation_id}")
        self._fetches.add(fetch)
        fetch.add_done_callback(self._fetches.discard)

    async def _follow(
        self, ready: KernelReady, mail: Mail[kernel_pb2.KernelReady], look: asyncio.Future[str | None] | None
    ) -> None:
        """Have what an announcement is about arrive, unless it arrived with its decision."""
        try:
            given = None if look is None else await look
            if ready.error is not None or not ready.artifact_id:
                self._source.refuse(ready.job_id)
                if given is None or ready.job_id:  # without a job nobody could be asked: what was named before stands
                    self._fetched.append(KernelArrival(ready=ready, error=ready.error or "no kernel was named"))
            elif given != ready.artifact_id:
                self._fetched.append(await self._announced(ready))
        except asyncio.CancelledError:
            self._fetched.append(KernelArrival(ready=ready, error="the publisher ended before the kernel was here"))
            raise
        mail.settle()

    async def _announced(self, ready: KernelReady) -> KernelArrival:
        try:
            with adaptation_span("load", ready.adaptation_id, artifact_id=ready.artifact_id):
                kernel = await self._source.fetch(ready.artifact_id, announced=True)
        except EsperError as error:
            log.warning("kernel_fetch_failed", extra={"artifact_id": ready.artifact_id, "error": str(error)})
            return KernelArrival(ready=ready, error=str(error))
        except Exception as error:  # a defect of a tier must not leave the seed waiting
            log.exception("kernel_fetch_failed", extra={"artifact_id": ready.artifact_id})
            return KernelArrival(ready=ready, error=f"{type(error).__name__}: {error}")
        return KernelArrival(ready=ready, kernel=kernel)


@contextlib.contextmanager
def _joined_trace(mail: Mail[M]) -> Iterator[None]:
    """Let what the reader does with a mail join the mail's trace."""
    token = otel_context.attach(extract_context(mail.raw.headers))
    try:
        yield
    finally:
        otel_context.detach(token)

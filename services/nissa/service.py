"""Nissa without a network: takes messages in once, watches runs, and answers what is asked of them."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import psutil

from esper.contracts.decision import AdaptationDecision, AdaptationPlan, Anomaly
from esper.contracts.errors import InvalidInputError, NotFoundError
from esper.contracts.kernel import KernelReady
from esper.contracts.metrics import ProcessMetrics, SystemMetrics
from esper.contracts.run import ENDED_RUN_PHASES, FieldReport, SeedEvent, SystemStatePacket
from esper.contracts.wire import parse
from esper.services.nissa.aggregate import RunAggregate, RunEvent
from esper.services.nissa.chain import ChainedEvent
from esper.services.nissa.monitor import RunMonitor
from esper.services.nissa.report import build_report
from esper.services.nissa.store import NewEvent, NissaStore, moment_of
from esper.telemetry.health_wire import health_columns
from esper.v1 import telemetry_pb2

_NEVER: Final = datetime.min.replace(tzinfo=UTC)
log = logging.getLogger(__name__)

_DOMAIN: Final[Mapping[str, type[Any]]] = {
    "state": SystemStatePacket,
    "seed": SeedEvent,
    "decision": AdaptationDecision,
    "plan": AdaptationPlan,
    "field_report": FieldReport,
    "kernel": KernelReady,
}
"""Kinds that change figures, and what they carry; ``control`` and ``alert`` are kept for the record alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NissaConfig:
    """How Nissa watches."""

    silence_s: float = 30.0
    """Seconds after which a training run that is not heard counts as silent, unless its pauses are longer. > 0."""
    abandoned_after_s: float = 3600.0
    """Seconds after which a run that is not heard no longer counts as live. >= ``silence_s``."""
    max_held_runs: int = 32
    """Runs whose figures are held in memory, at least 3; others are read back from the store when asked for."""

    def __post_init__(self) -> None:
        if not self.silence_s > 0:
            raise InvalidInputError.of("silence_s", "be > 0 seconds", self.silence_s)
        if not self.abandoned_after_s >= self.silence_s:
            raise InvalidInputError.of("abandoned_after_s", "be >= silence_s", self.abandoned_after_s)
        if self.max_held_runs < 3:
            raise InvalidInputError.of("max_held_runs", "be >= 3", self.max_held_runs)


@dataclass(frozen=True, slots=True, eq=False)
class HeldRun:
    """One run in memory."""

    aggregate: RunAggregate
    """Its figures."""
    monitor: RunMonitor
    """Its detectors."""


class Nissa:
    """Figures, anomalies and reports of all runs. Belongs to one event loop."""

    def __init__(
        self,
        store: NissaStore,
        config: NissaConfig | None = None,
        *,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.store = store
        self.config = config or NissaConfig()
        self.clock = clock
        self.to_announce: dict[str, Anomaly] = {}
        """Anomalies that the bus has not been told of yet, by id."""
        self._runs: OrderedDict[str, HeldRun] = OrderedDict()
        self._holding = asyncio.Lock()
        self._process = psutil.Process()
        self._process.cpu_percent(None)  # the first reading has nothing to compare with
        self._cpu_read = False

    async def start(self) -> None:
        """Read back the runs that were live and the newest one.

        Raises:
            UnavailableError: The store cannot be reached.
        """
        names = list(reversed(await self.store.live_runs(self.config.max_held_runs)))
        newest = await self.store.newest_run()
        for run_id in [*names, *([newest] if newest is not None else [])]:
            held = await self._hold(run_id)
            held.monitor.rearm(self.clock())
        self.to_announce |= {anomaly.anomaly_id: anomaly for anomaly in await self.store.unannounced()}

    async def take(self, event: NewEvent) -> bool:
        """Take one durable event in: chained, counted, watched. False when it was taken before.

        Raises:
            InvalidInputError: Its payload breaks a rule, or names another run than its subject.
            CorruptDataError: Its payload does not parse.
            UnavailableError: The store cannot be reached; nothing was taken.
        """
        value = _value(event.kind, event.payload)
        if value is not None and getattr(value, "run_id", "") not in ("", event.run_id):
            raise InvalidInputError.of("run_id", f"be that of the subject, {event.run_id}", value.run_id)
        held = await self._hold(event.run_id)
        ended = value.phase in ENDED_RUN_PHASES if isinstance(value, SystemStatePacket) else None
        if ended is False and held.aggregate.live:
            ended = None  # nothing new for the store
        if not await self.store.append(event, ended=ended):
            return False
        for anomaly in _apply(held, value, event.recorded_at):
            await self._keep(anomaly)
        return True

    async def take_health(self, batch: telemetry_pb2.HealthBatch) -> None:
        """Take one health batch in.

        Raises:
            CorruptDataError: Its columns differ in length.
            UnavailableError: The store cannot be reached.
        """
        columns = health_columns(batch)
        now = self.clock()
        held = await self._hold(batch.run_id)
        dropped = (batch.ring_dropped, batch.batches_dropped)
        held.aggregate.count_health(len(columns["step"]), ring_dropped=dropped[0], batches_dropped=dropped[1], at=now)
        names = {entry.layer_id: entry.layer for entry in batch.layer_index}
        for anomaly in held.monitor.observe_health(columns, layer_index=names, dropped=dropped, at=now):
            await self._keep(anomaly)

    async def look_at_clock(self) -> None:
        """Find out who is silent; to be called about once a second."""
        now = self.clock()
        for held in [one for one in self._runs.values() if self.is_live(one)]:
            for anomaly in held.monitor.observe_clock(now):
                await self._keep(anomaly)

    async def announced(self, anomaly_id: str) -> None:
        """Note that the bus was told of an anomaly."""
        await self.store.mark_announced(anomaly_id)
        self.to_announce.pop(anomaly_id, None)

    async def get_current_metrics(self, run_id: str = "") -> SystemMetrics:
        """Give the figures of a run, or of the newest.

        Raises:
            NotFoundError: There is no such run, or none at all.
        """
        held = await self._known(run_id or await self._newest())
        return held.aggregate.metrics(read_at=self.clock(), process=self._process_metrics())

    def exposed_runs(self, limit: int) -> list[HeldRun]:
        """Give the newest run and the live ones, at most ``limit``; all of them are in memory."""
        newest = self._newest_held()
        live = [one for one in reversed(self._runs.values()) if one is not newest and self.is_live(one)]
        return ([] if newest is None else [newest]) + live[: limit - 1]

    def is_live(self, held: HeldRun) -> bool:
        """Tell whether a run has not ended and was heard within ``abandoned_after_s``."""
        heard = held.aggregate.last_heard_at
        if not held.aggregate.live or heard is None:
            return False
        return self.clock() - heard <= timedelta(seconds=self.config.abandoned_after_s)

    async def get_run_report(self, run_id: str) -> dict[str, Any]:
        """Give the report of a run as plain values, sealed by the head of its chain.

        Raises:
            NotFoundError: The run is unknown.
            CorruptDataError: A stored event no longer parses.
        """
        events = await self.store.events(run_id)
        if not events:
            raise _unknown(run_id)
        aggregate = self._replayed(run_id, events).aggregate
        anomalies = await self.store.anomalies(run_id=run_id)
        return build_report(events, aggregate.metrics(read_at=self.clock()), anomalies, made_at=self.clock())

    async def _newest(self) -> str:
        newest = await self.store.newest_run()
        if newest is None:
            raise NotFoundError("a run must have been heard, got none so far", parameter="run_id")
        return newest

    async def _known(self, run_id: str) -> HeldRun:
        if run_id not in self._runs and not await self.store.knows_run(run_id):
            raise _unknown(run_id)
        return await self._hold(run_id)

    async def _hold(self, run_id: str) -> HeldRun:
        """Give a run from memory, else from the store, else a new one."""
        async with self._holding:
            held = self._runs.get(run_id)
            if held is None:
                held = await self._restored(run_id)
                self._runs[run_id] = held
                self._make_room()
            self._runs.move_to_end(run_id)
            return held

    def _newest_held(self) -> HeldRun | None:
        """Give the run that was first heard last; it is always held."""
        begun = [held for held in self._runs.values() if held.aggregate.started_at is not None]
        return max(begun, key=lambda held: held.aggregate.started_at or _NEVER, default=None)

    def _make_room(self) -> None:
        while len(self._runs) > self.config.max_held_runs:
            kept = (self._newest_held(), next(reversed(self._runs.values())))
            others = [name for name, held in self._runs.items() if held not in kept]
            over = (name for name in others if not self.is_live(self._runs[name]))
            del self._runs[next(over, others[0])]

    async def _restored(self, run_id: str) -> HeldRun:
        events = await self.store.events(run_id)
        held = self._replayed(run_id, events)
        kept = {anomaly.anomaly_id: anomaly for anomaly in await self.store.anomalies(run_id=run_id)}
        for anomaly in held.monitor.open_anomalies:
            if anomaly.anomaly_id not in kept:  # found, but the process ended before it was written down
                await self._keep(anomaly)
        if held.aggregate.packet is None or held.aggregate.live:
            held.monitor.resume(anomaly for anomaly in kept.values() if not anomaly.resolved)
        return held

    def _replayed(self, run_id: str, events: list[ChainedEvent]) -> HeldRun:
        held = HeldRun(RunAggregate(run_id), RunMonitor(run_id, silence_s=self.config.silence_s))
        for event in events:
            _apply(held, _value(event.kind, event.payload), moment_of(event.recorded_us))
        return held

    async def _keep(self, anomaly: Anomaly) -> None:
        if await self.store.keep_anomaly(anomaly):
            self.to_announce[anomaly.anomaly_id] = anomaly
            log.warning(
                "anomaly_opened",
                extra={"run_id": anomaly.run_id, "detector": anomaly.detector, "subject": anomaly.subject},
            )
        elif anomaly.resolved:
            log.info("anomaly_passed", extra={"run_id": anomaly.run_id, "detector": anomaly.detector})

    def _process_metrics(self) -> ProcessMetrics:
        percent = self._process.cpu_percent(None)
        first, self._cpu_read = not self._cpu_read, True
        return ProcessMetrics(
            cpu_percent=None if first else percent, resident_bytes=int(self._process.memory_info().rss)
        )


def _value(kind: str, payload: bytes) -> Any | None:
    cls = _DOMAIN.get(kind)
    return None if cls is None else parse(payload, cls)


def _apply(held: HeldRun, value: RunEvent | None, at: datetime) -> list[Anomaly]:
    held.aggregate.apply(value, at)
    match value:
        case SystemStatePacket():
            return held.monitor.observe_packet(value, at)
        case AdaptationDecision():
            return held.monitor.observe_decision(value, at)
    return []


def _unknown(run_id: str) -> NotFoundError:
    return NotFoundError(f"run must be known, got {run_id!r}", parameter="run_id")

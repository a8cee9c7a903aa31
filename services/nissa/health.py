"""The health of every component: those with an address are asked, the others judged by what the bus brought."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from datetime import datetime
from typing import Final

from esper.contracts.decision import AnomalySeverity
from esper.contracts.errors import EsperError
from esper.contracts.metrics import ComponentHealth, HealthReport, SystemHealth
from esper.contracts.run import RunPhase
from esper.mesh.channel import ChannelConfig, probe
from esper.services.nissa.service import HeldRun, Nissa
from esper.telemetry.bus import Bus

Prober = Callable[[str], Awaitable[None]]
"""Returns when the server at ``host:port`` is SERVING; raises an `EsperError` when it is not."""

_OWN_NAME: Final = "nissa"
_CACHED_S: Final = 1.0
_PROBE_S: Final = 2.0
_CHECK_S: Final = 5.0
_DROP_MEMORY_S: Final = 60.0
_MAX_RUNS: Final = 64
_RANK: Final = {
    SystemHealth.HEALTHY: 0,
    SystemHealth.DEGRADED: 1,
    SystemHealth.UNKNOWN: 2,
    SystemHealth.UNHEALTHY: 3,
}


def prober_over(channel: ChannelConfig | None = None) -> Prober:
    """Give a prober that asks over channels of this kind, and waits `_PROBE_S` seconds at most."""

    async def ask(target: str) -> None:
        await probe(target, _PROBE_S, config=channel)

    return ask


class HealthBoard:
    """Asks and judges. Belongs to one event loop; answers are kept for a second, and asked for once at a time."""

    def __init__(
        self,
        nissa: Nissa,
        bus: Bus,
        loop_ready: Callable[[], Awaitable[None]],
        components: Mapping[str, str],
        *,
        prober: Prober | None = None,
    ) -> None:
        """Make a board.

        Args:
            nissa: What is known of the runs.
            bus: The open bus.
            loop_ready: Returns while messages are taken in.
            components: Address (``host:port``) of every component by name; Nissa itself is not asked over the network.
            prober: Asks one address; ``None`` asks over a plain channel, which stays on loopback.
        """
        self._nissa = nissa
        self._bus = bus
        self._loop_ready = loop_ready
        self._components = {name: address for name, address in components.items() if name != _OWN_NAME}
        self._prober = prober or prober_over()
        self._last_heard: dict[str, datetime] = {}
        self._drops = bus.stats().dropped
        self._dropped_s: float | None = None
        self._report: HealthReport | None = None
        self._made_s = 0.0
        self._making = asyncio.Lock()

    async def report(self) -> HealthReport:
        """Give the health of everything, at most a second old. Never raises for a component that is away."""
        async with self._making:
            if self._report is None or time.monotonic() - self._made_s > _CACHED_S:
                self._report = await self._make()
                self._made_s = time.monotonic()
            return self._report

    async def _make(self) -> HealthReport:
        asked = [self._asked(name, address) for name, address in sorted(self._components.items())]
        configured = await asyncio.gather(self._own(), self._store(), *asked)
        judged = [*configured, self._of_bus()]
        runs = self._nissa.exposed_runs(_MAX_RUNS)
        heard = [self._of_training(held) for held in runs if self._nissa.is_live(held)]
        heard += self._of_policy(runs)
        return HealthReport(
            overall_status=worst(one.health for one in judged),
            components=tuple(sorted([*judged, *heard], key=lambda one: one.component)),
            active_kernels=sum(held.aggregate.active_seeds for held in runs),
        )

    async def _own(self) -> ComponentHealth:
        return await self._checked(_OWN_NAME, self._loop_ready(), "takes events in")

    async def _store(self) -> ComponentHealth:
        return await self._checked("store", self._nissa.store.database.ping(), "answers")

    async def _asked(self, name: str, address: str) -> ComponentHealth:
        return await self._checked(name, self._prober(address), f"serves at {address}")

    async def _checked(self, name: str, check: Awaitable[None], good: str) -> ComponentHealth:
        try:
            async with asyncio.timeout(_CHECK_S):
                await check
        except (EsperError, TimeoutError) as error:
            reason = str(error) or f"gave no answer within {_CHECK_S:g} s"
            return self._entry(name, SystemHealth.UNHEALTHY, reason)
        self._last_heard[name] = self._nissa.clock()
        return self._entry(name, SystemHealth.HEALTHY, good)

    def _of_bus(self) -> ComponentHealth:
        stats, now_s = self._bus.stats(), time.monotonic()
        if stats.dropped > self._drops:
            self._drops, self._dropped_s = stats.dropped, now_s
        if not stats.connected:
            return self._entry("bus", SystemHealth.UNHEALTHY, "the connection is lost")
        self._last_heard["bus"] = self._nissa.clock()
        if self._dropped_s is not None and now_s - self._dropped_s < _DROP_MEMORY_S:
            return self._entry("bus", SystemHealth.DEGRADED, f"{stats.dropped} messages were dropped here so far")
        return self._entry("bus", SystemHealth.HEALTHY, "connected")

    def _of_training(self, held: HeldRun) -> ComponentHealth:
        aggregate = held.aggregate
        assert aggregate.packet is not None
        health, reason = SystemHealth.HEALTHY, f"run {aggregate.run_id} is {aggregate.packet.phase.name}"
        open_now = held.monitor.open_anomalies
        silent = [one for one in open_now if one.detector == "silent_component" and one.subject == "training"]
        critical = [one for one in open_now if one.severity is AnomalySeverity.CRITICAL]
        if silent:
            seconds = (self._nissa.clock() - silent[0].first_seen_at).total_seconds()
            health, reason = SystemHealth.UNKNOWN, f"silent beyond its limit for {seconds:.0f} s"
        elif critical:
            names = ", ".join(f"{one.detector} of {one.subject}" for one in critical)
            health, reason = SystemHealth.DEGRADED, f"open anomalies: {names}"
        elif aggregate.packet.phase is RunPhase.PAUSED:
            reason = f"run {aggregate.run_id} is held by an operator"
        return ComponentHealth(
            component=f"training/{aggregate.run_id}",
            health=health,
            reason=reason,
            last_heard_at=aggregate.last_heard_at,
        )

    def _of_policy(self, runs: list[HeldRun]) -> list[ComponentHealth]:
        """Judge Tamiyo by its decisions where it was given no address."""
        decisions = [held.aggregate.last_decision for held in runs if held.aggregate.last_decision is not None]
        if "tamiyo" in self._components or not decisions:
            return []
        late = [one for held in runs for one in held.monitor.open_anomalies if one.subject == "tamiyo"]
        health = SystemHealth.UNKNOWN if late else SystemHealth.HEALTHY
        reason = "packets wait for a decision" if late else "decides"
        heard = max(one.created_at for one in decisions)
        return [ComponentHealth(component="tamiyo", health=health, reason=reason, last_heard_at=heard)]

    def _entry(self, name: str, health: SystemHealth, reason: str) -> ComponentHealth:
        return ComponentHealth(component=name, health=health, reason=reason, last_heard_at=self._last_heard.get(name))


def worst(healths: Iterable[SystemHealth]) -> SystemHealth:
    """Give the worst of several: UNHEALTHY, then UNKNOWN, then DEGRADED, then HEALTHY; UNKNOWN for none."""
    return max(healths, key=_RANK.__getitem__, default=SystemHealth.UNKNOWN)

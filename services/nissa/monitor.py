"""The detectors of one run, fed from its packets and health batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from esper.contracts.decision import AdaptationDecision, Anomaly
from esper.contracts.run import ENDED_RUN_PHASES, RunPhase, SystemStatePacket
from esper.services.nissa.alarm import Alarm
from esper.services.nissa.detectors import (
    DeadUnitsDetector,
    DropBurstDetector,
    GradientExplosionDetector,
    GradientVanishingDetector,
    LatencyShiftDetector,
    LossSpikeDetector,
    NonFiniteDetector,
    PlateauDetector,
    SilenceDetector,
)

MAX_LAYERS: Final = 512
"""Layers of a run that are watched one by one; further ones are not."""

_LAYER_DETECTORS: Final = (NonFiniteDetector, DeadUnitsDetector, LatencyShiftDetector)


class _Detector(Protocol):
    alarm: Alarm


class RunMonitor:
    """Watches one run. Feed it in order; every method gives the anomalies that opened, last on, or passed."""

    def __init__(self, run_id: str, *, silence_s: float) -> None:
        self.run_id = run_id
        self._finite = {
            name: NonFiniteDetector(run_id=run_id, subject=name)
            for name in ("train_loss", "control_loss", "gradient_norm")
        }
        self._spikes = {name: LossSpikeDetector(run_id=run_id, subject=name) for name in ("train_loss", "control_loss")}
        self._explosion = GradientExplosionDetector(run_id=run_id, subject="gradient_norm")
        self._vanishing = GradientVanishingDetector(run_id=run_id, subject="gradient_norm")
        self._plateau = PlateauDetector(run_id=run_id, subject="control_loss")
        self._drops = DropBurstDetector(run_id=run_id, subject="health")
        self._training = SilenceDetector(run_id=run_id, subject="training", limit_s=silence_s)
        self._policy = SilenceDetector(run_id=run_id, subject="tamiyo", limit_s=silence_s)
        self._layers: dict[str, tuple[NonFiniteDetector, DeadUnitsDetector, LatencyShiftDetector]] = {}
        self._layer_names: dict[int, str] = {}
        self._phase: RunPhase | None = None
        self._policy_seen = False
        self._policy_waited_for = False

    @property
    def open_anomalies(self) -> list[Anomaly]:
        """What is open now."""
        return [one.alarm.current for one in self._all() if one.alarm.current is not None]

    def resume(self, anomalies: Iterable[Anomaly]) -> None:
        """Go on with anomalies that were open before a restart."""
        for anomaly in anomalies:
            if anomaly.detector in {kind.RULE.detector for kind in _LAYER_DETECTORS}:
                self._layer(anomaly.subject)
            for one in self._all():
                if (one.alarm.rule.detector, one.alarm.subject) == (anomaly.detector, anomaly.subject):
                    one.alarm.resume(anomaly)

    def rearm(self, now: datetime) -> None:
        """Start the clocks of silence anew, as after a restart: nobody could have been heard meanwhile."""
        self._training.forgive(now)
        self._policy.forgive(now)

    def observe_packet(self, packet: SystemStatePacket, at: datetime) -> list[Anomaly]:
        """Take a state packet that arrived at ``at``."""
        if self._phase is RunPhase.PAUSED:
            self._training.forgive(at)
        found = [self._training.hear(at)]
        moment = packet.created_at
        for name, finite in self._finite.items():
            value = getattr(packet, name)
            if value is not None:
                found.append(finite.observe(value, moment))
        for name, spike in self._spikes.items():
            value = getattr(packet, name)
            if value is not None:
                found.append(spike.observe(value, moment))
        if packet.gradient_norm is not None:
            found.append(self._explosion.observe(packet.gradient_norm, moment))
            found.append(self._vanishing.observe(packet.gradient_norm, moment))
        if packet.control_loss is not None:
            found.append(self._plateau.observe(packet.control_loss, moment))
        if self._policy_seen and not self._policy_waited_for:
            self._policy_waited_for = True
            self._policy.forgive(at)
        self._phase = packet.phase
        given = [one for one in found if one is not None]
        return given + (self._end() if packet.phase in ENDED_RUN_PHASES else [])

    def observe_decision(self, decision: AdaptationDecision, at: datetime) -> list[Anomaly]:
        """Take a decision: the policy answered."""
        del decision
        self._policy_seen, self._policy_waited_for = True, False
        self._policy.forgive(at)
        closed = self._policy.hear(at)
        return [] if closed is None else [closed]

    def observe_health(
        self,
        columns: Mapping[str, NDArray[Any]],
        *,
        layer_index: Mapping[int, str],
        dropped: tuple[int, int],
        at: datetime,
    ) -> list[Anomaly]:
        """Take the columns of one health batch; ``dropped`` are totals of ring and publisher."""
        self._layer_names.update(layer_index)
        found = [self._training.hear(at), self._drops.observe(len(columns["step"]), *dropped, at)]
        if self._phase not in ENDED_RUN_PHASES:
            of_layer = columns["seed"] == -1
            for layer_id in np.unique(columns["layer_id"][of_layer]).tolist():
                rows = of_layer & (columns["layer_id"] == layer_id)
                name = self._layer_names.get(layer_id)
                if name is not None:
                    found += self._observe_layer(name, {key: column[rows] for key, column in columns.items()}, at)
        return [one for one in found if one is not None]

    def observe_clock(self, now: datetime) -> list[Anomaly]:
        """Look whether somebody is silent who should speak."""
        if self._phase not in (RunPhase.STARTED, RunPhase.TRAINING):
            return []
        found = [self._training.observe(now)]
        if self._policy_waited_for:
            found.append(self._policy.observe(now))
        return [one for one in found if one is not None]

    def _observe_layer(self, name: str, rows: Mapping[str, NDArray[Any]], at: datetime) -> list[Anomaly | None]:
        detectors = self._layer(name)
        if detectors is None:
            return []
        finite, dead, latency = detectors
        found = [finite.observe_share(float(rows["nonfinite_share"].max()), at)]
        found.append(dead.observe(float(rows["dead_share"].mean()), at))
        measured = rows["latency_ms"][np.isfinite(rows["latency_ms"])]
        if len(measured):
            found.append(latency.observe(float(np.median(measured)), at))
        return found

    def _layer(self, name: str) -> tuple[NonFiniteDetector, DeadUnitsDetector, LatencyShiftDetector] | None:
        if name not in self._layers:
            if len(self._layers) >= MAX_LAYERS:
                return None
            self._layers[name] = (
                NonFiniteDetector(run_id=self.run_id, subject=name),
                DeadUnitsDetector(run_id=self.run_id, subject=name),
                LatencyShiftDetector(run_id=self.run_id, subject=name),
            )
        return self._layers[name]

    def _end(self) -> list[Anomaly]:
        """Close what is open: the run is over, and so is every condition of it."""
        closed = [one.alarm.close() for one in self._all()]
        return [one for one in closed if one is not None]

    def _all(self) -> list[_Detector]:
        fixed: list[_Detector] = [*self._finite.values(), *self._spikes.values()]
        fixed += [self._explosion, self._vanishing, self._plateau, self._drops, self._training, self._policy]
        for detectors in self._layers.values():
            fixed += detectors
        return fixed

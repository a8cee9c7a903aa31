"""How layers and seeds have been doing: rolling figures, averages, trends and rewards, kept in memory.

A trend is the least-squares slope of a figure per packet over the window; with fewer than two measured values there
is none. Accuracy and losses are the run's own: each counts for the seeds that stood in the layer when it was taken.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, field
from statistics import fmean
from typing import Final

from esper.contracts.errors import InvalidInputError, NotFoundError
from esper.contracts.lifecycle import SeedLifecycleState
from esper.contracts.run import FieldReport, HealthSummary, LayerStatus, SeedEvent, SystemStatePacket
from esper.services.tamiyo.curve import least_squares_slope

DEFAULT_WINDOW: Final = 20
"""Packets over which averages and trends are taken."""

MAX_SEEDS: Final = 8_192
"""Seeds tracked at once, over all runs; the one heard of longest ago goes first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SeedMetrics:
    """One seed as it has been doing; a figure nobody measured is ``None``."""

    run_id: str
    """Run."""
    layer_name: str
    """Dotted module name."""
    seed_index: int
    """Seed within its layer."""
    state: SeedLifecycleState
    """Newest life-cycle state."""
    alpha: float
    """Newest blend factor, 0 to 1."""
    num_samples: int
    """Packets in the window."""
    accuracy: float | None
    """Mean control accuracy over the window, 0 to 1."""
    accuracy_trend: float | None
    """Change of control accuracy per packet."""
    control_loss: float | None
    """Mean control loss over the window."""
    loss_trend: float | None
    """Change of control loss per packet; negative is good."""
    activation_entropy: float | None
    """Mean activation entropy of the layer, in nats."""
    gradient_variance: float | None
    """Mean gradient variance at the layer."""
    latency_ms: float | None
    """Mean forward latency of the layer, in milliseconds."""
    errors: int
    """Failures of the layer since the run began."""
    rewards: tuple[float, ...]
    """Rewards reported for trials of this seed, oldest first, in units of loss."""
    mean_reward: float | None
    """Mean of those."""
    transitions: int
    """Life-cycle steps seen."""


@dataclass(frozen=True, slots=True)
class _Sample:
    accuracy: float | None
    control_loss: float | None
    health: HealthSummary


@dataclass(slots=True)
class _Seed:
    samples: deque[_Sample]
    rewards: deque[float]
    state: SeedLifecycleState = SeedLifecycleState.DORMANT
    alpha: float = 0.0
    step: int = -1
    transitions: int = field(default=0)


_Key = tuple[str, str, int]


class PerformanceTracker:
    """Rolling metrics of seeds, fed by packets, seed events and reports. Belongs to one event loop."""

    def __init__(self, window: int = DEFAULT_WINDOW) -> None:
        if window < 2:
            raise InvalidInputError.of("window", "be >= 2 packets", window)
        self._window = window
        self._seeds: OrderedDict[_Key, _Seed] = OrderedDict()
        self._sequences: dict[str, int] = {}

    def observe_packet(self, packet: SystemStatePacket) -> None:
        """Take in a state packet; one that is not newer than the last of its run changes nothing."""
        if packet.sequence <= self._sequences.get(packet.run_id, 0):
            return
        self._sequences[packet.run_id] = packet.sequence
        for layer in packet.layers:
            sample = _Sample(packet.control_accuracy, packet.control_loss, layer.health)
            self._observe_layer(packet, layer, sample)

    def observe_event(self, event: SeedEvent) -> None:
        """Take in one life-cycle step."""
        seed = self._seed((event.run_id, event.layer, event.seed_index))
        seed.transitions += 1
        if event.step >= seed.step:
            seed.state, seed.alpha, seed.step = event.to_state, event.alpha, event.step

    def observe_report(self, report: FieldReport) -> None:
        """Take in the reward of a trial, where one was measured."""
        if report.grew and report.reward is not None:
            self._seed((report.run_id, report.layer, report.seed_index)).rewards.append(report.reward)

    async def get_seed_metrics(self, layer_name: str, seed_idx: int = 0, *, run_id: str | None = None) -> SeedMetrics:
        """Give how a seed has been doing; without a run, in the one heard of last.

        Raises:
            NotFoundError: Nothing was heard of this seed.
        """
        known = [key for key in self._seeds if key[1:] == (layer_name, seed_idx) and run_id in (None, key[0])]
        if not known:
            where = "" if run_id is None else f" in run {run_id}"
            raise NotFoundError(f"nothing was heard of seed {seed_idx} of layer {layer_name!r}{where}")
        return self._metrics(known[-1])

    def layers(self, run_id: str) -> tuple[str, ...]:
        """Give the layers of a run of which anything was heard."""
        return tuple(dict.fromkeys(layer for run, layer, _ in self._seeds if run == run_id))

    def _observe_layer(self, packet: SystemStatePacket, layer: LayerStatus, sample: _Sample) -> None:
        for status in layer.seeds:
            seed = self._seed((packet.run_id, layer.layer, status.seed_index))
            seed.samples.append(sample)
            if packet.step >= seed.step:
                seed.state, seed.alpha, seed.step = status.state, status.alpha, packet.step

    def _seed(self, key: _Key) -> _Seed:
        seed = self._seeds.pop(key, None) or _Seed(deque(maxlen=self._window), deque(maxlen=self._window))
        self._seeds[key] = seed
        while len(self._seeds) > MAX_SEEDS:
            self._seeds.popitem(last=False)
        return seed

    def _metrics(self, key: _Key) -> SeedMetrics:
        seed = self._seeds[key]
        samples = list(seed.samples)
        health = [sample.health for sample in samples]
        rewards = tuple(seed.rewards)
        return SeedMetrics(
            run_id=key[0],
            layer_name=key[1],
            seed_index=key[2],
            state=seed.state,
            alpha=seed.alpha,
            num_samples=len(samples),
            accuracy=_mean([sample.accuracy for sample in samples]),
            accuracy_trend=_trend([sample.accuracy for sample in samples]),
            control_loss=_mean([sample.control_loss for sample in samples]),
            loss_trend=_trend([sample.control_loss for sample in samples]),
            activation_entropy=_mean([one.activation_entropy for one in health]),
            gradient_variance=_mean([one.gradient_variance for one in health]),
            latency_ms=_mean([one.latency_ms for one in health]),
            errors=health[-1].errors if health else 0,
            rewards=rewards,
            mean_reward=fmean(rewards) if rewards else None,
            transitions=seed.transitions,
        )


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _trend(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return least_squares_slope(known)[0] if len(known) >= 2 else None

"""What is known of one run, from the messages it sent: pure, deterministic, no I/O.

Improvement: contributions of kept seeds that still stand are added, and so are the ends of their intervals. All were
measured on one control split, so their errors may be correlated; the standard deviation of a sum is at most the sum of
the standard deviations, so for normal errors the added ends cover at least as often as each interval does, whatever
the correlation. It is wider than needed where the errors are independent.
"""

from __future__ import annotations

from collections import Counter
from datetime import datetime
from typing import Final

from esper.contracts.decision import AdaptationDecision, AdaptationPlan, PlanStatus
from esper.contracts.kernel import KernelReady
from esper.contracts.lifecycle import LIVE_STATES, SeedLifecycleState
from esper.contracts.metrics import (
    BusMetrics,
    KernelMetrics,
    MorphogeneticMetrics,
    ProcessMetrics,
    SystemMetrics,
    TrainingMetrics,
)
from esper.contracts.run import (
    ENDED_RUN_PHASES,
    AdaptationOutcome,
    Contribution,
    FieldReport,
    RunPhase,
    SeedEvent,
    SystemStatePacket,
)

RunEvent = SystemStatePacket | SeedEvent | AdaptationDecision | AdaptationPlan | FieldReport | KernelReady
"""Messages that change what is known of a run."""

_MEASURED: Final = {
    "loss": "train_loss",
    "control_loss": "control_loss",
    "accuracy": "control_accuracy",
    "examples_per_second": "examples_per_second",
    "learning_rate": "learning_rate",
    "gradient_norm": "gradient_norm",
}
"""Training figure and the packet's field it comes from; the last packet that measured it counts."""


class RunAggregate:
    """Figures of one run. Feed it in the order of the stream; not thread-safe."""

    def __init__(self, run_id: str) -> None:
        self.run_id = run_id
        self.packet: SystemStatePacket | None = None
        """Newest packet by sequence."""
        self.started_at: datetime | None = None
        """When its first durable event came."""
        self.last_heard_at: datetime | None = None
        """When anything of the training side was last heard."""
        self.last_decision: AdaptationDecision | None = None
        """Newest decision."""
        self._measured: dict[str, float] = {}
        self._seeds: dict[tuple[str, int], tuple[int, SeedLifecycleState]] = {}
        self._begun: set[str] = set()
        self._outcomes: dict[str, AdaptationOutcome] = {}
        self._standing: dict[tuple[str, int], Contribution] = {}
        self._kernels: dict[str, bool] = {}
        self._events = 0
        self._health_batches = 0
        self._health_signals = 0
        self._ring_dropped = 0
        self._batches_dropped = 0

    @property
    def live(self) -> bool:
        """Whether the run was announced and has not said that it ended."""
        return self.packet is not None and self.packet.phase not in ENDED_RUN_PHASES

    @property
    def training(self) -> bool:
        """Whether it should be heard: it trains, neither paused nor over."""
        return self.packet is not None and self.packet.phase in (RunPhase.STARTED, RunPhase.TRAINING)

    @property
    def active_seeds(self) -> int:
        """Seeds that are ACTIVE, EVALUATING or FOSSILIZED."""
        return sum(state in LIVE_STATES for _, state in self._seeds.values())

    def heard(self, at: datetime) -> None:
        """Note that something of the run arrived."""
        if self.last_heard_at is None or at > self.last_heard_at:
            self.last_heard_at = at

    def apply(self, event: RunEvent | None, at: datetime) -> None:
        """Take one durable event in; ``None`` counts one that changes no figure."""
        self._events += 1
        self.started_at = self.started_at or at
        match event:
            case SystemStatePacket():
                self.heard(at)
                self._take_packet(event)
            case SeedEvent():
                self.heard(at)
                self._take_seed(event)
            case AdaptationDecision():
                self.last_decision = event
            case AdaptationPlan():
                if event.status is not PlanStatus.REJECTED:
                    self._begun.add(event.adaptation_id)
            case FieldReport():
                self.heard(at)
                self._take_report(event)
            case KernelReady():
                self._kernels[event.job_id] = event.error is None
            case None:
                pass

    def count_health(self, num_signals: int, *, ring_dropped: int, batches_dropped: int, at: datetime) -> None:
        """Take the counts of one health batch in; drops are totals since the run began."""
        self.heard(at)
        self._health_batches += 1
        self._health_signals += num_signals
        self._ring_dropped = max(self._ring_dropped, ring_dropped)
        self._batches_dropped = max(self._batches_dropped, batches_dropped)

    def metrics(self, *, read_at: datetime, process: ProcessMetrics | None = None) -> SystemMetrics:
        """Give every figure; what nobody measured is ``None``."""
        return SystemMetrics(
            run_id=self.run_id,
            training=self._training(),
            morphogenetic=self._morphogenetic(),
            kernels=KernelMetrics(
                tiers=self.packet.cache_tiers if self.packet is not None else (),
                kernels_ready=sum(self._kernels.values()),
                kernels_failed=sum(not ready for ready in self._kernels.values()),
            ),
            bus=BusMetrics(
                health_batches=self._health_batches,
                health_signals=self._health_signals,
                ring_dropped=self._ring_dropped,
                batches_dropped=self._batches_dropped,
                events=self._events,
            ),
            process=process or ProcessMetrics(),
            read_at=read_at,
        )

    def _training(self) -> TrainingMetrics:
        packet = self.packet
        return TrainingMetrics(
            **self._measured,
            epoch=packet.epoch if packet is not None else 0,
            step=packet.step if packet is not None else 0,
        )

    def _morphogenetic(self) -> MorphogeneticMetrics:
        kept = [outcome is AdaptationOutcome.KEPT for outcome in self._outcomes.values()]
        improvement = combine(tuple(self._standing.values()))
        counts = Counter(state.name.lower() for _, state in self._seeds.values())
        return MorphogeneticMetrics(
            seeds_by_state=dict(sorted(counts.items())),
            active_seeds_total=self.active_seeds,
            adaptations_attempted=len(self._begun),
            adaptations_kept=sum(kept),
            adaptations_removed=len(kept) - sum(kept),
            performance_improvement=improvement[0] if improvement else None,
            performance_improvement_low=improvement[1] if improvement else None,
            performance_improvement_high=improvement[2] if improvement else None,
        )

    def _take_packet(self, packet: SystemStatePacket) -> None:
        if self.packet is not None and packet.sequence <= self.packet.sequence:
            return
        self.packet = packet
        for figure, name in _MEASURED.items():
            value = getattr(packet, name)
            if value is not None:
                self._measured[figure] = value
        for layer in packet.layers:
            for seed in layer.seeds:
                self._set_seed((layer.layer, seed.seed_index), packet.step, seed.state)

    def _take_seed(self, event: SeedEvent) -> None:
        place = (event.layer, event.seed_index)
        if event.adaptation_id:
            self._begun.add(event.adaptation_id)
        self._set_seed(place, event.step, event.to_state)
        if event.to_state not in LIVE_STATES:
            self._standing.pop(place, None)

    def _set_seed(self, place: tuple[str, int], step: int, state: SeedLifecycleState) -> None:
        known = self._seeds.get(place)
        if known is None or step >= known[0]:
            self._seeds[place] = (step, state)

    def _take_report(self, report: FieldReport) -> None:
        if report.grew:  # what took a seed out, or tried other settings, is none that was grown
            self._begun.add(report.adaptation_id)
            self._outcomes[report.adaptation_id] = report.outcome
        if report.outcome is AdaptationOutcome.KEPT and report.contribution is not None:
            self._standing[report.layer, report.seed_index] = report.contribution


def combine(contributions: tuple[Contribution, ...]) -> tuple[float, float, float] | None:
    """Give estimate, low and high of a sum of contributions, ends added; ``None`` for none."""
    if not contributions:
        return None
    return (
        sum(one.estimate for one in contributions),
        sum(one.low for one in contributions),
        sum(one.high for one in contributions),
    )

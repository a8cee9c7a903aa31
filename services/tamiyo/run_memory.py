"""What the policy remembers of one run: its curve, what was decided, what is under way, and what came of it."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final

from esper.contracts.blueprint import BlueprintCost
from esper.contracts.decision import AdaptationDecision, AdaptationPlan, AdaptationType, CurveState, PlanStatus
from esper.contracts.lifecycle import SeedLifecycleState
from esper.contracts.run import (
    AdaptationOutcome,
    BudgetStatus,
    FieldReport,
    LayerStatus,
    RunPhase,
    SystemStatePacket,
)
from esper.services.tamiyo.curve import CurvePoint
from esper.services.tamiyo.posterior import contribution_variance
from esper.services.tamiyo.seed_selection import SeedHistory

MAX_POINTS: Final = 2_000
"""Epochs of the curve that are kept."""

MAX_DECISIONS: Final = 256
"""Newest decisions that are kept in memory; the store has them all."""

MAX_REWARDS_KEPT: Final = 200
"""Newest rewards of one seed that are kept."""

_MOST_DOUBLINGS: Final = 16
_LONG_AGO: Final = datetime.min.replace(tzinfo=UTC)

UNDER_WAY: Final = frozenset({SeedLifecycleState.LOADING, SeedLifecycleState.ACTIVE, SeedLifecycleState.EVALUATING})
"""States of a seed whose adaptation has not ended."""


@dataclass(frozen=True, slots=True)
class Pending:
    """A decision the run was told to act on and has not shown yet."""

    layer: str
    epoch: int
    cost: BlueprintCost | None
    group: str


@dataclass(frozen=True, slots=True)
class Measured:
    """What a seed was measured to bring, and what it had to bring."""

    effect: float
    """Estimate, in units of loss."""
    error: float
    """Its standard error."""
    price: float
    """Price at that time, in units of loss."""
    at: datetime
    """When."""


@dataclass(slots=True)
class SeedRecord:
    """What came of the trials of one seed."""

    rewards: list[float] = field(default_factory=list)
    last_step: int | None = None


class RunMemory:
    """One run as the policy knows it; a pure function of the packets, decisions, plans and reports it was shown."""

    def __init__(self) -> None:
        self.points: list[CurvePoint] = []
        self.last_sequence = 0
        self.decisions: OrderedDict[int, tuple[AdaptationDecision, ...]] = OrderedDict()
        self.new_errors: dict[str, int] = {}
        self.has_tried = False
        """Whether anything was to grow, or has grown, in this run."""
        self._measured: dict[str, Measured] = {}
        self._removed_at = _LONG_AGO
        self._pending: dict[str, Pending] = {}
        self._layer_epochs: dict[str, int] = {}
        self._embargoes: dict[tuple[str, str], int] = {}
        self._seeds: dict[tuple[str, int], SeedRecord] = {}
        self._errors: dict[str, int] = {}
        self._epoch = 0
        self._step = 0
        self._parameter_epoch: int | None = None
        self._asked_calm: dict[str, int] = {}
        self._calmed: list[int] = []
        self._fruitless: dict[str, int] = {}
        self._fruitful: set[str] = set()
        self._grown_epoch = 0

    @property
    def curve(self) -> list[CurvePoint]:
        """The learning curve of the network as it is: from the last seed that was kept on."""
        return [point for point in self.points if point.epoch > self._grown_epoch]

    @property
    def pays(self) -> bool:
        """Whether something was kept, and nothing came to nothing since."""
        return bool(self._fruitful) and not self._fruitless

    @property
    def calmed_epoch(self) -> int | None:
        """Epoch after which the rate was last lowered because the run was unstable; ``None`` where it never was.

        It counts once its trial was judged, whether it was kept or not: one that was refused or taken back with the
        whole state is as if it had not been.
        """
        return max(self._calmed, default=None)

    @property
    def is_decided(self) -> bool:
        """Whether the newest packet has its decision."""
        return self.last_sequence in self.decisions

    def observe(self, packet: SystemStatePacket) -> None:
        """Take in a packet newer than every one before it."""
        self.last_sequence = packet.sequence
        if packet.epoch < self._epoch:  # a run that was taken back: what it kept since is gone
            self._grown_epoch = min(self._grown_epoch, packet.epoch)
            self._calmed = [epoch for epoch in self._calmed if epoch < packet.epoch]
        self._epoch, self._step = packet.epoch, packet.step
        new_epoch = not self.points or packet.epoch > self.points[-1].epoch
        if packet.phase is RunPhase.TRAINING and new_epoch and packet.epoch > 0:
            self.points.append(point_of(packet))
            del self.points[:-MAX_POINTS]
        self.new_errors = {}
        for layer in packet.layers:
            self._observe_layer(layer)
        self._pending = {
            name: pending
            for name, pending in self._pending.items()
            if name not in shown_adaptations(packet) and pending.epoch <= packet.epoch
        }

    def _observe_layer(self, layer: LayerStatus) -> None:
        before = self._errors.get(layer.layer, 0)
        self._errors[layer.layer] = layer.health.errors
        if layer.health.errors > before:
            self.new_errors[layer.layer] = layer.health.errors - before
        for seed in layer.seeds:
            self.has_tried |= seed.state is not SeedLifecycleState.DORMANT
            if seed.state in UNDER_WAY:
                self._record(layer.layer, seed.seed_index).last_step = self._step

    def remember(self, decision: AdaptationDecision, cost: BlueprintCost | None) -> None:
        """Keep a decision; one to be acted on holds its place until the run shows it, ends it, or lets it lapse."""
        self.decisions[decision.state_sequence] = (*self.decisions.get(decision.state_sequence, ()), decision)
        while len(self.decisions) > MAX_DECISIONS:
            self.decisions.popitem(last=False)
        if not decision.actionable:
            return
        if decision.adaptation_type is AdaptationType.REMOVE_SEED:
            self._removed_at = max(self._removed_at, decision.created_at)
        if decision.adaptation_type is AdaptationType.OPTIMIZE_PARAMETERS:
            self._parameter_epoch = decision.epoch
            if decision.curve_state is CurveState.UNSTABLE:
                self._asked_calm[decision.adaptation_id] = decision.epoch
            return
        self._layer_epochs[decision.layer] = decision.epoch
        if decision.adaptation_type.grows:
            self.has_tried = True
            self._pending[decision.adaptation_id] = Pending(decision.layer, decision.epoch, cost, decision.group)

    def note_plan(self, plan: AdaptationPlan) -> bool:
        """Take in that the run refused or gave up a decision; false where it was not to be taken up any more."""
        refused = plan.status in (PlanStatus.REJECTED, PlanStatus.FAILED)
        return refused and self._pending.pop(plan.adaptation_id, None) is not None

    def note_report(self, report: FieldReport) -> None:
        """Take in what came of an adaptation."""
        self._pending.pop(report.adaptation_id, None)
        asked = self._asked_calm.pop(report.adaptation_id, None)
        if asked is not None and report.outcome in (AdaptationOutcome.KEPT, AdaptationOutcome.CULLED):
            self._calmed.append(asked)
        self._note_measured(report)
        if not report.grew:
            return
        self._note_fruit(report)
        record = self._record(report.layer, report.seed_index)
        record.last_step = self._step
        if report.reward is not None:
            record.rewards.append(report.reward)
            del record.rewards[:-MAX_REWARDS_KEPT]
        if report.outcome is not AdaptationOutcome.KEPT and report.blueprint_id and not _only_outrun(report):
            self._embargoes[report.layer, report.blueprint_id] = max(self._epoch, report.begun_epoch)

    def _note_measured(self, report: FieldReport) -> None:
        """Keep what is newest, in whatever order reports come."""
        known = self._measured.get(report.adaptation_id)
        if report.contribution is None or (known is not None and known.at >= report.created_at):
            return
        error = math.sqrt(contribution_variance(report))
        measured = Measured(report.contribution.estimate, error, report.price or 0.0, report.created_at)
        self._measured[report.adaptation_id] = measured

    def measured(self, adaptation_id: str) -> Measured | None:
        """Give what a seed was measured to bring; ``None`` where nobody has since the last removal of any seed."""
        found = self._measured.get(adaptation_id)
        return found if found is not None and found.at > self._removed_at else None

    def _note_fruit(self, report: FieldReport) -> None:
        """Count the adaptations that came to nothing since the last that was kept; a race is one."""
        if report.outcome is AdaptationOutcome.KEPT:
            self._fruitless.clear()
            self._fruitful.add(report.group)
            self._grown_epoch = max(self._epoch, report.begun_epoch)
        elif report.outcome is not AdaptationOutcome.FAILED and report.group not in self._fruitful:
            self._fruitless[report.group] = max(self._epoch, report.begun_epoch)

    def rests(self, rest_epochs: int) -> bool:
        """Say whether growing rests: ``rest_epochs`` after the first that came to nothing, doubled by each after it."""
        if not self._fruitless:
            return False
        doublings = min(len(self._fruitless) - 1, _MOST_DOUBLINGS)
        return self._epoch - max(self._fruitless.values()) < rest_epochs << doublings

    def pending(self, window_epochs: int) -> dict[str, Pending]:
        """Give the decisions that may still be taken up, by adaptation."""
        return {name: one for name, one in self._pending.items() if self._epoch - one.epoch < window_epochs}

    def open_groups(self, packet: SystemStatePacket, window_epochs: int) -> set[str]:
        """Give the adaptations under way or still to be taken up; a race is one."""
        groups = {one.adaptation_id: one.group for row in self.decisions.values() for one in row}
        shown = {
            groups.get(seed.adaptation_id, seed.adaptation_id or f"{layer.layer}/{seed.seed_index}")
            for layer in packet.layers
            for seed in layer.seeds
            if seed.state in UNDER_WAY
        }
        return shown | {one.group for one in self.pending(window_epochs).values()}

    def layer_rests(self, layer: str, cooldown_epochs: int) -> bool:
        """Say whether a layer was decided upon within the cooldown."""
        decided = self._layer_epochs.get(layer)
        return decided is not None and self._epoch - decided < cooldown_epochs

    def embargoed(self, layer: str, blueprint_id: str, embargo_epochs: int) -> bool:
        """Say whether a blueprint failed at a layer within the embargo."""
        failed = self._embargoes.get((layer, blueprint_id))
        return failed is not None and self._epoch - failed < embargo_epochs

    def parameters_rest(self, cooldown_epochs: int) -> bool:
        """Say whether the optimizer's settings were changed within the cooldown."""
        return self._parameter_epoch is not None and self._epoch - self._parameter_epoch < cooldown_epochs

    def history_of(self, layer: str, seed_index: int) -> SeedHistory:
        """Give what the trials of one seed brought."""
        record = self._seeds.get((layer, seed_index), SeedRecord())
        since = None if record.last_step is None else max(0, self._step - record.last_step)
        return SeedHistory(seed_index=seed_index, rewards=tuple(record.rewards), steps_since_attempt=since)

    def _record(self, layer: str, seed_index: int) -> SeedRecord:
        return self._seeds.setdefault((layer, seed_index), SeedRecord())


def point_of(packet: SystemStatePacket) -> CurvePoint:
    """Give the point of the learning curve that a packet reports."""
    return CurvePoint(
        epoch=packet.epoch,
        train_loss=packet.train_loss,
        control_loss=packet.control_loss,
        control_loss_se=packet.control_loss_se,
    )


def shown_adaptations(packet: SystemStatePacket) -> frozenset[str]:
    """Give the adaptations that a packet shows at some seed."""
    return frozenset(seed.adaptation_id for layer in packet.layers for seed in layer.seeds if seed.adaptation_id)


def budget_left(budget: BudgetStatus, reserved: Collection[Pending]) -> tuple[float, float, float]:
    """Give the parameters, FLOPs and adaptations still to be spent, reservations taken off; ``inf`` without a bound.

    A race takes what its largest rival costs; a reservation without a known cost takes one adaptation.
    """
    parameters: dict[str, int] = {}
    flops: dict[str, int] = {}
    for one in reserved:
        if one.cost is not None:
            parameters[one.group] = max(parameters.get(one.group, 0), one.cost.parameters)
            flops[one.group] = max(flops.get(one.group, 0), one.cost.flops)

    def left(bound: int | None, used: int, held: int) -> float:
        return float("inf") if bound is None else bound - used - held

    return (
        left(budget.max_added_parameters, budget.added_parameters, sum(parameters.values())),
        left(budget.max_added_flops, budget.added_flops, sum(flops.values())),
        left(budget.max_adaptations, budget.adaptations, len(reserved)),
    )


def _only_outrun(report: FieldReport) -> bool:
    """Say whether a seed did help and merely met a better one: that speaks against no second try."""
    measured = report.contribution
    return bool(report.race_id) and not report.graft_steps and measured is not None and measured.low > 0.0

"""What Nissa's tests share: a healthy recorded run, and messages built from a few words."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from esper.contracts.decision import (
    AdaptationDecision,
    AdaptationPlan,
    AdaptationType,
    CurveState,
    Evidence,
    PlanStatus,
)
from esper.contracts.lifecycle import SeedLifecycleState
from esper.contracts.run import (
    AdaptationOutcome,
    Contribution,
    FieldReport,
    LayerStatus,
    RunPhase,
    SeedEvent,
    SeedStatus,
    SystemStatePacket,
)

MOMENT = datetime(2026, 1, 1, tzinfo=UTC)
ADAPTATION = "a" + "1" * 32

HEALTHY_LOSS = (
    2.303, 1.871, 1.472, 1.201, 1.013, 0.884, 0.801, 0.733, 0.688, 0.651, 0.627, 0.598,
    0.583, 0.561, 0.549, 0.541, 0.524, 0.519, 0.507, 0.503, 0.494, 0.489, 0.478, 0.477,
)  # fmt: skip
"""Control loss per epoch of a small classifier that trains without trouble."""
HEALTHY_NORM = (
    1.91, 1.74, 1.52, 1.31, 1.22, 1.13, 0.98, 1.02, 0.91, 0.88, 0.93, 0.84,
    0.79, 0.83, 0.77, 0.71, 0.74, 0.69, 0.72, 0.66, 0.68, 0.63, 0.65, 0.61,
)  # fmt: skip
"""Gradient norm per epoch of the same run."""


def seconds(count: float) -> datetime:
    """Give the moment so many seconds into the run."""
    return MOMENT + timedelta(seconds=count)


def packet_of(sequence: int, **changes: Any) -> SystemStatePacket:
    """Give the packet at the end of epoch ``sequence``."""
    values: dict[str, Any] = {
        "run_id": "run-1",
        "sequence": sequence,
        "phase": RunPhase.TRAINING,
        "epoch": sequence,
        "step": 32 * sequence,
        "train_loss": HEALTHY_LOSS[min(sequence, len(HEALTHY_LOSS)) - 1],
        "control_loss": HEALTHY_LOSS[min(sequence, len(HEALTHY_LOSS)) - 1] + 0.01,
        "gradient_norm": HEALTHY_NORM[min(sequence, len(HEALTHY_NORM)) - 1],
        "layers": (LayerStatus(layer="hidden", seeds=(seed_of(0), seed_of(1))),),
        "host_parameters": 1000,
        "current_parameters": 1000,
        "random_seed": 7,
        "created_at": seconds(sequence),
    }
    return SystemStatePacket(**(values | changes))


def seed_of(index: int, state: SeedLifecycleState = SeedLifecycleState.DORMANT) -> SeedStatus:
    """Give one seed of a packet."""
    return SeedStatus(seed_index=index, state=state)


def event_of(to_state: SeedLifecycleState, **changes: Any) -> SeedEvent:
    """Give one step of seed 0 of the hidden layer."""
    values: dict[str, Any] = {
        "run_id": "run-1",
        "adaptation_id": ADAPTATION,
        "layer": "hidden",
        "seed_index": 0,
        "from_state": SeedLifecycleState.EVALUATING,
        "to_state": to_state,
        "step": 100,
        "epoch": 3,
        "alpha": 1.0,
        "reason": "pays its price",
        "created_at": seconds(4),
    }
    return SeedEvent(**(values | changes))


def report_of(estimate: float | None = 0.05, **changes: Any) -> FieldReport:
    """Give the report of an adaptation that was kept."""
    measured = None
    if estimate is not None:
        measured = Contribution(estimate=estimate, low=estimate - 0.02, high=estimate + 0.01, num_examples=400)
    values: dict[str, Any] = {
        "report_id": "r1",
        "adaptation_id": ADAPTATION,
        "run_id": "run-1",
        "layer": "hidden",
        "seed_index": 0,
        "outcome": AdaptationOutcome.KEPT,
        "contribution": measured,
        "created_at": seconds(5),
    }
    return FieldReport(**(values | changes))


def decision_of(**changes: Any) -> AdaptationDecision:
    """Give an actionable decision for seed 0 of the hidden layer."""
    values: dict[str, Any] = {
        "adaptation_id": ADAPTATION,
        "run_id": "run-1",
        "state_sequence": 2,
        "epoch": 2,
        "adaptation_type": AdaptationType.ADD_SEED,
        "layer": "hidden",
        "seed_index": 0,
        "confidence": 0.8,
        "urgency": 0.7,
        "curve_state": CurveState.PLATEAU,
        "evidence": (Evidence(name="page_hinkley", value=3.5, detail="falls | no longer"),),
        "actionable": True,
        "explanation": "the loss has stopped to fall",
        "created_at": seconds(2.5),
    }
    return AdaptationDecision(**(values | changes))


def plan_of(status: PlanStatus = PlanStatus.ACCEPTED) -> AdaptationPlan:
    """Give a plan of the adaptation."""
    return AdaptationPlan(adaptation_id=ADAPTATION, run_id="run-1", status=status, step=80, created_at=seconds(3))


class Builders:
    """The builders above, for tests."""

    packet = staticmethod(packet_of)
    seed = staticmethod(seed_of)
    event = staticmethod(event_of)
    report = staticmethod(report_of)
    decision = staticmethod(decision_of)
    plan = staticmethod(plan_of)
    at = staticmethod(seconds)
    healthy_loss = HEALTHY_LOSS
    healthy_norm = HEALTHY_NORM
    adaptation_id = ADAPTATION


@pytest.fixture
def make() -> type[Builders]:
    """Builders of messages."""
    return Builders


@pytest.fixture
def at() -> Callable[[float], datetime]:
    """The moment so many seconds into the run."""
    return seconds

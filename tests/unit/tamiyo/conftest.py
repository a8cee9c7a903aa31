"""What Tamiyo's unit tests share: packets, candidates and reports, built from a few words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

import pytest

from esper.blueprints import default_registry
from esper.blueprints.cost import cost
from esper.contracts.blueprint import Site, SiteKind
from esper.contracts.lifecycle import SeedLifecycleState
from esper.contracts.run import (
    AdaptationOutcome,
    BudgetStatus,
    Contribution,
    FieldReport,
    HealthSummary,
    LayerStatus,
    RunPhase,
    SeedStatus,
    SystemStatePacket,
)
from esper.services.tamiyo.candidates import Candidate

MOMENT = datetime(2026, 1, 1, tzinfo=UTC)
SITES = {
    "hidden": Site(kind=SiteKind.LINEAR, input_shape=(64,), output_shape=(16,)),
    "head": Site(kind=SiteKind.LINEAR, input_shape=(16,), output_shape=(10,)),
}
FLATTENING = [2.0, 1.2, 0.8, 0.6, 0.5, 0.45, 0.43, 0.42, 0.417, 0.416, 0.4155, 0.4153]
"""Control loss that falls, then flattens; with the standard error of ``packet`` a plateau from about the eighth on."""

DORMANT = tuple(SeedStatus(seed_index=index, state=SeedLifecycleState.DORMANT) for index in range(4))


def layer_of(name: str, *, seeds: Sequence[SeedStatus] = DORMANT, errors: int = 0) -> LayerStatus:
    """Give one layer of a packet."""
    return LayerStatus(layer=name, site=SITES[name], health=HealthSummary(errors=errors), seeds=tuple(seeds))


def packet_of(sequence: int, control: float | None, **changes: Any) -> SystemStatePacket:
    """Give the packet at the end of epoch ``sequence``."""
    values: dict[str, Any] = {
        "run_id": "run-1",
        "sequence": sequence,
        "phase": RunPhase.TRAINING,
        "epoch": sequence,
        "step": 32 * sequence,
        "train_loss": control,
        "control_loss": control,
        "control_loss_se": 0.02,
        "planned_epochs": 40,
        "layers": tuple(layer_of(name) for name in SITES),
        "random_seed": 7,
        "created_at": MOMENT,
    }
    return SystemStatePacket(**(values | changes))


def candidates_of(layers: Sequence[str] = tuple(SITES)) -> list[Candidate]:
    """Give every template that fits the layers."""
    registry = default_registry()
    return [
        Candidate(layer=name, site=SITES[name], blueprint=one, cost=cost(one.ir, SITES[name]))
        for name in layers
        for one in registry.for_site(SITES[name])
    ]


def report_of(report_id: str = "r1", reward: float | None = 0.05, **changes: Any) -> FieldReport:
    """Give a report whose contribution is ``reward`` plus or minus 0.01, with no price."""
    measured = None
    if reward is not None:
        measured = Contribution(estimate=reward, low=reward - 0.01, high=reward + 0.01, num_examples=400)
    values: dict[str, Any] = {
        "report_id": report_id,
        "adaptation_id": "a" + "0" * 32,
        "run_id": "run-1",
        "layer": "hidden",
        "seed_index": 0,
        "site": SITES["hidden"],
        "blueprint_id": "b" * 64,
        "outcome": AdaptationOutcome.KEPT,
        "contribution": measured,
        "decision_confidence": 0.8,
        "created_at": MOMENT,
    }
    return FieldReport(**(values | changes))


@pytest.fixture
def flattening() -> list[SystemStatePacket]:
    """Packets of a run that reaches a plateau."""
    return [packet_of(place, loss) for place, loss in enumerate(FLATTENING, start=1)]


@pytest.fixture
def make_packet() -> Callable[..., SystemStatePacket]:
    """Builder of packets."""
    return packet_of


@pytest.fixture
def make_report() -> Callable[..., FieldReport]:
    """Builder of reports."""
    return report_of


@pytest.fixture
def make_layer() -> Callable[..., LayerStatus]:
    """Builder of layers."""
    return layer_of


@pytest.fixture
def make_candidates() -> Callable[..., list[Candidate]]:
    """Builder of candidates."""
    return candidates_of


@pytest.fixture
def bounded_budget() -> BudgetStatus:
    """A budget of 150 parameters."""
    return BudgetStatus(max_added_parameters=150)

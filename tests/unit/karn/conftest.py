"""What Karn's unit tests share: sites, reports, and a designer over a store in memory."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest

from esper.contracts.blueprint import Site, SiteKind
from esper.contracts.run import AdaptationOutcome, Contribution, FieldReport
from esper.services.karn.service import Karn
from esper.services.karn.store import open_store
from tests.unit.karn.karn_mesh import Mesh

LINEAR = Site(kind=SiteKind.LINEAR, input_shape=(64,), output_shape=(16,))
CONV = Site(kind=SiteKind.CONV2D, input_shape=(6, 8, 8), output_shape=(8, 8, 8))
TOKENS = Site(kind=SiteKind.LINEAR, input_shape=(16, 32), output_shape=(16, 32))


def report_of(report_id: str, blueprint_id: str, reward: float | None, **changes: Any) -> FieldReport:
    """Give a report whose contribution is ``reward`` plus or minus 0.02, with no price."""
    measured = None
    if reward is not None:
        measured = Contribution(estimate=reward, low=reward - 0.02, high=reward + 0.02, num_examples=400)
    values: dict[str, Any] = {
        "report_id": report_id,
        "adaptation_id": "a1",
        "run_id": "run-1",
        "layer": "hidden",
        "seed_index": 0,
        "site": LINEAR,
        "blueprint_id": blueprint_id,
        "outcome": AdaptationOutcome.KEPT,
        "contribution": measured,
        "created_at": datetime(2026, 1, 1, tzinfo=UTC),
    }
    return FieldReport(**(values | changes))


@pytest.fixture
def linear_site() -> Site:
    """A layer from 64 to 16 features."""
    return LINEAR


@pytest.fixture(params=[LINEAR, CONV, TOKENS], ids=["linear", "conv2d", "tokens"])
def any_site(request: pytest.FixtureRequest) -> Site:
    """One site of each layout."""
    site: Site = request.param
    return site


@pytest.fixture
def make_report() -> Callable[..., FieldReport]:
    """Builder of reports."""
    return report_of


@pytest.fixture
async def karn():
    """A designer with no library, over a store in memory."""
    opened = Karn(await open_store("sqlite://"))
    await opened.start()
    yield opened
    await opened.store.database.close()


@pytest.fixture
async def mesh():
    """A bus and a library; Karn once it is opened."""
    made = Mesh()
    yield made
    await made.close()

"""What a measured effect says, held against its price."""

from __future__ import annotations

import math

import pytest

from esper.contracts.run import Contribution
from esper.core.evaluation import Judgement, is_hopeless, judge, level_per_look


@pytest.mark.parametrize(
    ("low", "high", "price", "expected"),
    [
        (0.02, 0.04, 0.01, Judgement.PAYS),
        (0.01, 0.04, 0.01, Judgement.OPEN),
        (0.00, 0.02, 0.01, Judgement.OPEN),
        (-0.02, 0.01, 0.01, Judgement.OPEN),
        (-0.02, 0.005, 0.01, Judgement.DOES_NOT_PAY),
        (math.nan, math.nan, 0.01, Judgement.DOES_NOT_PAY),
        (0.02, math.inf, 0.01, Judgement.DOES_NOT_PAY),
        (0.02, 0.04, math.nan, Judgement.DOES_NOT_PAY),
    ],
)
def test_a_seed_pays_where_the_whole_interval_is_above_its_price(
    low: float, high: float, price: float, expected: Judgement
) -> None:
    found, check = judge(Contribution(estimate=(low + high) / 2, low=low, high=high, num_examples=9), price)
    assert found is expected
    assert check.passed == (expected is Judgement.PAYS)
    assert f"price {price:.5f}" in check.detail


@pytest.mark.parametrize(
    ("estimate", "high", "looks_left", "expected"),
    [
        (0.01, 0.02, 0, True),
        (0.01, 0.02, 1, True),
        (0.01, 0.03, 1, False),
        (0.01, 0.02, 2, False),
        (-0.01, 0.5, 2, True),
        (0.0, 0.5, 2, True),
        (math.nan, math.nan, 2, True),
    ],
)
def test_a_seed_is_hopeless_where_doubling_with_every_look_would_not_do(
    estimate: float, high: float, looks_left: int, expected: bool
) -> None:
    found = Contribution(estimate=estimate, low=-0.1, high=high, num_examples=9)
    assert is_hopeless(found, 0.05, looks_left) is expected


def test_all_looks_together_have_the_level() -> None:
    assert level_per_look(0.95, 1) == pytest.approx(0.95)
    assert level_per_look(0.94, 3) == pytest.approx(0.98)

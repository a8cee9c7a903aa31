from __future__ import annotations

import pytest

from esper.contracts.errors import InvalidInputError
from esper.execution.student import student_quantile

# Table values, e.g. NIST/SEMATECH e-Handbook of Statistical Methods, 1.3.6.7.2.
TABLE = [
    (0.975, 1, 12.706205),
    (0.975, 2, 4.302653),
    (0.975, 4, 2.776445),
    (0.95, 10, 1.812461),
    (0.995, 30, 2.749996),
    (0.975, 99, 1.984217),
    (0.999, 5, 5.893430),
]


@pytest.mark.parametrize(("probability", "degrees", "expected"), TABLE)
def test_quantiles_are_those_of_the_tables(probability: float, degrees: int, expected: float) -> None:
    assert student_quantile(probability, degrees) == pytest.approx(expected, abs=1e-6)


def test_quantiles_are_symmetric_and_zero_in_the_middle() -> None:
    assert student_quantile(0.025, 7) == -student_quantile(0.975, 7)
    assert student_quantile(0.5, 3) == pytest.approx(0.0, abs=1e-9)


def test_many_degrees_of_freedom_are_nearly_normal() -> None:
    assert student_quantile(0.975, 1_000_000) == pytest.approx(1.959964, abs=1e-5)


@pytest.mark.parametrize("probability", [0.0, 1.0, -0.1, float("nan")])
def test_a_probability_outside_is_refused(probability: float) -> None:
    with pytest.raises(InvalidInputError, match="probability must be within"):
        student_quantile(probability, 3)


def test_no_degrees_of_freedom_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="degrees_of_freedom must be at least 1, got 0"):
        student_quantile(0.9, 0)

"""Quantiles of Student's t, for intervals over paired differences.

    symbol   meaning
    n        degrees of freedom
    I_x(a,b) regularised incomplete beta function
    F(t)     1 - I_x(n/2, 1/2) / 2 with x = n / (n + t^2), for t >= 0

I is evaluated by Lentz's continued fraction (DLMF 8.17.22), the quantile by bisection; the error is below 1e-10.
"""

from __future__ import annotations

import math
from functools import lru_cache

from esper.contracts.errors import InvalidInputError

_TINY = 1e-300
_MAX_TERMS = 500


@lru_cache(maxsize=256)
def student_quantile(probability: float, degrees_of_freedom: int) -> float:
    """Give the t below which a Student variable falls with the given probability.

    Raises:
        InvalidInputError: The probability is not within (0, 1), or there is no degree of freedom.
    """
    if not 0.0 < probability < 1.0:
        raise InvalidInputError.of("probability", "be within (0, 1)", probability)
    if degrees_of_freedom < 1:
        raise InvalidInputError.of("degrees_of_freedom", "be at least 1", degrees_of_freedom)
    if probability < 0.5:
        return -student_quantile(1.0 - probability, degrees_of_freedom)
    low, high = 0.0, 1.0
    while _cdf(high, degrees_of_freedom) < probability:
        low, high = high, 2.0 * high
    while high - low > 1e-12 * max(1.0, high):
        middle = 0.5 * (low + high)
        if middle in (low, high):
            break
        low, high = (middle, high) if _cdf(middle, degrees_of_freedom) < probability else (low, middle)
    return 0.5 * (low + high)


def _cdf(t: float, n: int) -> float:
    return 1.0 - 0.5 * _beta_share(n / (n + t * t), n / 2.0, 0.5)


def _beta_share(x: float, a: float, b: float) -> float:
    """Give I_x(a, b)."""
    if x <= 0.0 or x >= 1.0:
        return min(max(x, 0.0), 1.0)
    if x > (a + 1.0) / (a + b + 2.0):
        return 1.0 - _beta_share(1.0 - x, b, a)
    log_front = a * math.log(x) + b * math.log1p(-x) + math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    return math.exp(log_front) / a * _fraction(x, a, b)


def _fraction(x: float, a: float, b: float) -> float:
    c, d = 1.0, 1.0 / _off_zero(1.0 - (a + b) * x / (a + 1.0))
    value = d
    for m in range(1, _MAX_TERMS):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d = 1.0 / _off_zero(1.0 + term * d)
            c = _off_zero(1.0 + term / c)
            value *= c * d
        if abs(c * d - 1.0) < 1e-16:
            break
    return value


def _off_zero(value: float) -> float:
    return value if abs(value) > _TINY else _TINY

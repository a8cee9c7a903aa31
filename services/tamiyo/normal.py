"""The normal distribution as the policy needs it, and the joining of independent evidence."""

from __future__ import annotations

import math
from typing import Final

_SQRT_2: Final = math.sqrt(2.0)
_INVERSE_SQRT_2PI: Final = 1.0 / math.sqrt(2.0 * math.pi)
_SMALLEST_POSITIVE: Final = 2.2250738585072014e-308
_EVIDENCE_BOUND: Final = 0.8


def normal_cdf(z: float) -> float:
    """Give P(Z <= z) of a standard normal variable."""
    return 0.5 * math.erfc(-z / _SQRT_2)


def normal_pdf(z: float) -> float:
    """Give the density of a standard normal variable at z."""
    return _INVERSE_SQRT_2PI * math.exp(-0.5 * z * z)


def probability_positive(mean: float, deviation: float) -> float:
    """Give P(X > 0) for X normal with this mean and standard deviation (> 0)."""
    return normal_cdf(mean / deviation)


def option_value(mean: float, deviation: float) -> float:
    """Give E[max(X, 0)] for X normal: what a trial is worth that is undone when it does harm; always > 0."""
    z = mean / deviation
    return max(mean * normal_cdf(z) + deviation * normal_pdf(z), _SMALLEST_POSITIVE)


def join_evidence(probability: float, evidence: float) -> float:
    """Give the probability of a claim after independent evidence for it: the log odds add.

    ``evidence`` is what the evidence alone would say from even odds; it is held within 0.2 to 0.8, so that no single
    test decides alone: a claim held for unlikely (below 0.37) never reaches 0.7 by it.
    """
    bounded = min(max(evidence, 1.0 - _EVIDENCE_BOUND), _EVIDENCE_BOUND)
    claim = min(max(probability, 1e-9), 1.0 - 1e-9)
    both = claim * bounded
    return both / (both + (1.0 - claim) * (1.0 - bounded))

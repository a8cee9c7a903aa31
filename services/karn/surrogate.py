"""What a design is expected to earn at a site: Bayesian ridge regression on its figures, with uncertainty.

    symbol   meaning                                             shape, unit
    p(d)     1, the figures of design d and their squares        [D]
    w        weights, normal with mean 0 and deviation t         [D], loss
    y_i      reward of report i, with known variance v_i         loss
    A        precision of w: I / t^2 + sum p p' / (v_i + s^2)     [D, D]

The posterior of w is normal with covariance A^-1 and mean A^-1 sum p y / (v_i + s^2) (Bishop, Pattern Recognition and
Machine Learning, 2006, section 3.3). Sums are taken in the order of the report ids, so a set of reports gives the same
bits in whatever order it came.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from esper.contracts.errors import InvalidInputError
from esper.services.karn.design import NUM_FIGURES

_Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class SurrogateConfig:
    """Prior of the surrogate, in units of loss."""

    weight_deviation: float = 0.1
    """``t``: prior standard deviation of a weight. > 0."""
    noise_deviation: float = 0.02
    """``s``: what differs between trials beyond the measured error. > 0."""

    def __post_init__(self) -> None:
        for name in ("weight_deviation", "noise_deviation"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise InvalidInputError.of(name, "be finite and > 0", getattr(self, name))


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One reward with the figures of the design that earned it."""

    report_id: str
    """Report it comes from."""
    figures: _Array
    """Figures of the design at the site of the report, [NUM_FIGURES]."""
    reward: float
    """Contribution minus price, in units of loss."""
    variance: float
    """Squared standard error of the reward."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """What is expected of some designs, and one joint draw of it."""

    means: _Array
    """Posterior means, [n], in units of loss."""
    deviations: _Array
    """Posterior standard deviations, [n], in units of loss."""
    draws: _Array
    """Rewards under one draw of the weights, [n], in units of loss."""


class Surrogate:
    """The regression with what it has learned. Not thread-safe."""

    def __init__(self, config: SurrogateConfig | None = None) -> None:
        self._config = config or SurrogateConfig()
        self._samples: dict[str, Sample] = {}
        self._solved: tuple[_Array, _Array] | None = None

    @property
    def num_samples(self) -> int:
        """Rewards learned and not forgotten."""
        return len(self._samples)

    def learn(self, sample: Sample) -> bool:
        """Learn one reward; false when its report was learned before."""
        if sample.report_id in self._samples:
            return False
        self._samples[sample.report_id] = sample
        self._solved = None
        return True

    def forget(self, report_id: str) -> None:
        """Take a reward out again, as if its report had not come."""
        del self._samples[report_id]
        self._solved = None

    def estimate(self, figures: Sequence[_Array], random: np.random.Generator) -> Estimate:
        """Give what is expected of designs by their figures, [n][NUM_FIGURES]."""
        rows = np.stack([_features(one) for one in figures])
        mean, covariance = self._posterior()
        root = np.linalg.cholesky(covariance)
        weights = mean + root @ random.standard_normal(len(mean))
        variances = np.einsum("nd,de,ne->n", rows, covariance, rows)
        return Estimate(rows @ mean, np.sqrt(np.maximum(variances, 0.0)), rows @ weights)

    def _posterior(self) -> tuple[_Array, _Array]:
        """Give mean [D] and covariance [D, D] of the weights."""
        if self._solved is None:
            size = 1 + 2 * NUM_FIGURES
            precision = np.eye(size) / self._config.weight_deviation**2
            total = np.zeros(size)
            for sample in sorted(self._samples.values(), key=lambda one: one.report_id):
                row = _features(sample.figures)
                weight = 1.0 / (sample.variance + self._config.noise_deviation**2)
                precision += weight * np.outer(row, row)
                total += weight * sample.reward * row
            covariance = np.linalg.inv(precision)
            covariance = (covariance + covariance.T) / 2.0
            self._solved = covariance @ total, covariance
        return self._solved


def _features(figures: _Array) -> _Array:
    return np.concatenate(([1.0], figures, figures**2))

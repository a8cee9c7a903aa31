"""How often decisions like one have helped: the policy's own probability, corrected by what became of earlier ones.

    symbol   meaning                                                              shape, unit
    p        probability before calibration
    x        1; log odds of p over those of 0.9; ln(1 + f); ln(1 + k)             [4]
    f, k     decisions of the kind that had helped nothing, or had helped, in the run before this one
    w        weights, normal with means m and deviations d beforehand             [4]
    y        whether the decision helped: any seed of its race was kept, or the settings were

P(y | x) = s(x w) with s the logistic function: Platt scaling (J. Platt, Probabilistic outputs for support vector
machines, 1999) that also sees how the run has gone. w is learned by Laplace's approximation, and averaged over in
MacKay's way: s(x w / sqrt(1 + pi x C x / 8)) with C its covariance (C. Bishop, Pattern Recognition and Machine
Learning, 2006, sections 4.4 and 4.5). It depends on the set of cases alone, never on the order in which they came.

Why it is needed: the prior of rewards is optimistic on purpose, so that what nobody tried is tried; the probability
that follows from it is right for choosing what to do, and far too high as a promise (experiment 0004).
"""

from __future__ import annotations

import enum
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from esper.contracts.decision import AdaptationDecision, AdaptationType, Evidence
from esper.contracts.errors import InvalidInputError
from esper.contracts.run import AdaptationOutcome, FieldReport
from esper.mesh.validation import require_range

CALIBRATION_VERSION: Final = 3
"""Version of the features and the prior; cases are kept raw, in decisions and reports, and learned anew."""

MAX_CASES: Final = 2_000
"""Newest cases that are learned from."""

RAW: Final = "confidence_before_calibration"
"""Evidence that holds p."""

_FRUITLESS: Final = "fruitless_before"
_HELPED: Final = "helped_before"
_LEVEL: Final = math.log(9.0)
_NUM_WEIGHTS: Final = 4
_STEPS: Final = 30
_SHORT: Final = 1e-10

_Array = NDArray[np.float64]
_Weights = tuple[float, float, float, float]


class Kind(enum.Enum):
    """Decisions that are calibrated together."""

    GROW = "grow"
    """Seeds, and changes of the host that stand as seeds."""
    TUNE = "tune"
    """Changes of the optimizer's settings."""

    @classmethod
    def of(cls, adaptation_type: AdaptationType) -> Kind | None:
        """Give the kind of a decision; ``None`` where no outcome says whether it helped."""
        if adaptation_type.grows:
            return cls.GROW
        return cls.TUNE if adaptation_type is AdaptationType.OPTIMIZE_PARAMETERS else None


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationConfig:
    """Prior of the weights, in log odds: the level, the share of p's own, the effects of f and of k.

    The means were measured on 33 runs (experiment 0014) and rounded: of the first races all found something, of those
    after one that had one in four; of the first changes of settings one in two helped, of the later ones one in three.
    What a first race that finds nothing says of the next is a guess: none did. A dozen cases outweigh them.
    """

    grow_mean: _Weights = (3.5, 0.1, -3.0, -6.6)
    """Means for decisions to grow."""
    tune_mean: _Weights = (0.0, 0.5, -0.8, -1.0)
    """Means for settings."""
    deviations: _Weights = (0.7, 0.3, 1.0, 2.0)
    """Standard deviations of all. > 0."""

    def __post_init__(self) -> None:
        for name in ("grow_mean", "tune_mean", "deviations"):
            row = getattr(self, name)
            if len(row) != _NUM_WEIGHTS or not all(math.isfinite(value) for value in row):
                raise InvalidInputError.of(name, f"hold {_NUM_WEIGHTS} finite numbers", row)
        if min(self.deviations) <= 0:
            raise InvalidInputError.of("deviations", "be > 0", self.deviations)

    def mean_of(self, kind: Kind) -> _Array:
        """Give the prior means of a kind, [4]."""
        return np.array(self.grow_mean if kind is Kind.GROW else self.tune_mean)


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What a decision is calibrated by."""

    kind: Kind
    """Kind of decision."""
    raw: float
    """Probability before calibration, 0 to 1."""
    fruitless: int = 0
    """Decisions of the kind that helped nothing in the run before. >= 0."""
    helped: int = 0
    """Decisions of the kind that helped in the run before. >= 0."""

    @classmethod
    def of(cls, decision: AdaptationDecision) -> Asked | None:
        """Read back what a decision was calibrated by; ``None`` where it was not."""
        kind = Kind.of(decision.adaptation_type)
        figures = {one.name: one.value for one in decision.evidence}
        if kind is None or not figures.keys() >= {RAW, _FRUITLESS, _HELPED}:
            return None
        return cls(kind=kind, raw=figures[RAW], fruitless=int(figures[_FRUITLESS]), helped=int(figures[_HELPED]))

    @property
    def evidence(self) -> tuple[Evidence, ...]:
        """The same as figures of a decision."""
        return (
            Evidence(name=RAW, value=self.raw, detail="what the threshold is compared with"),
            Evidence(name=_FRUITLESS, value=self.fruitless, detail="decisions of this run that helped nothing"),
            Evidence(name=_HELPED, value=self.helped, detail="decisions of this run that helped"),
        )

    @property
    def row(self) -> _Array:
        """``x``, [4]."""
        bounded = min(max(self.raw, 0.01), 0.99)
        odds = math.log(bounded / (1.0 - bounded)) - _LEVEL
        return np.array([1.0, odds, math.log1p(self.fruitless), math.log1p(self.helped)])


def check_evidence(decision: AdaptationDecision) -> None:
    """Refuse a decision made elsewhere whose figures nothing can be learned from.

    Raises:
        InvalidInputError: A figure that it was calibrated by is out of its range.
    """
    bounds = {RAW: 1.0, _FRUITLESS: None, _HELPED: None}
    for one in decision.evidence:
        if one.name in bounds:
            require_range(f"decision.evidence.{one.name}", one.value, low=0.0, high=bounds[one.name])


@dataclass(slots=True)
class Case:
    """A decision that was carried out, and what became of it: of a race, of all its seeds."""

    run_id: str
    """Run it was for."""
    asked: Asked
    """What it was calibrated by."""
    size: int
    """Seeds of the race; 1 for what stands alone."""
    outcomes: dict[str, AdaptationOutcome] = field(default_factory=dict)
    """How its adaptations ended, as far as they have."""

    @property
    def helped(self) -> bool:
        """Whether anything was kept."""
        return AdaptationOutcome.KEPT in self.outcomes.values()

    @property
    def counts(self) -> bool:
        """Whether it says anything: what failed to run at all was not tried."""
        return any(outcome is not AdaptationOutcome.FAILED for outcome in self.outcomes.values())

    @property
    def is_over(self) -> bool:
        """Whether nothing that is still to come can change it."""
        return self.helped or len(self.outcomes) >= self.size


class Calibrator:
    """Turns probabilities into promises that are kept as often as they say. Not thread-safe."""

    def __init__(self, config: CalibrationConfig | None = None) -> None:
        self._config = config or CalibrationConfig()
        self._cases: dict[str, Case] = {}

    @property
    def num_cases(self) -> int:
        """Decisions learned from."""
        return sum(case.counts and case.is_over for case in self._cases.values())

    def learn(self, report: FieldReport, begun: AdaptationDecision) -> None:
        """Learn how an adaptation of ``begun`` ended; again, it changes nothing."""
        asked = Asked.of(begun)
        if asked is None:
            return
        case = self._cases.setdefault(report.group, Case(report.run_id, asked, max(1, begun.race_size)))
        case.outcomes[report.adaptation_id] = report.outcome
        while len(self._cases) > MAX_CASES:
            del self._cases[next(iter(self._cases))]

    def ask(self, kind: Kind, raw: float, *, run_id: str, under_way: Collection[str]) -> Asked:
        """Give what a decision of a run is calibrated by; groups ``under_way`` may still come to something."""
        ended = [
            case
            for group, case in self._cases.items()
            if case.run_id == run_id
            and case.asked.kind is kind
            and case.counts
            and (case.is_over or group not in under_way)
        ]
        helped = sum(case.helped for case in ended)
        return Asked(kind=kind, raw=raw, fruitless=len(ended) - helped, helped=helped)

    def confidence(self, asked: Asked) -> float:
        """Give the probability that a decision helps, within (0, 1)."""
        cases = [
            case
            for _, case in sorted(self._cases.items())
            if case.asked.kind is asked.kind and case.counts and case.is_over
        ]
        return self._average(asked, *self._fit(asked.kind, cases))

    def _fit(self, kind: Kind, cases: Sequence[Case]) -> tuple[_Array, _Array]:
        """Give mean [4] and covariance [4, 4] of the weights after some cases, by Newton's method."""
        prior, precision = self._config.mean_of(kind), np.diag(1.0 / np.array(self._config.deviations) ** 2)
        rows = np.array([case.asked.row for case in cases]).reshape(-1, _NUM_WEIGHTS)
        truth = np.array([float(case.helped) for case in cases])
        weights = prior
        hessian = precision
        for _ in range(_STEPS):
            chance = _logistic(rows @ weights)
            slope = rows.T @ (truth - chance) - precision @ (weights - prior)
            hessian = precision + (rows.T * (chance * (1.0 - chance))) @ rows
            step = np.linalg.solve(hessian, slope)
            # A step of Newton's may overshoot where cases are many and surely known; it never need be long.
            weights = weights + step / max(1.0, float(np.abs(step).max()))
            if float(np.abs(step).max()) < _SHORT:
                break
        return weights, np.asarray(np.linalg.inv(hessian), dtype=np.float64)

    @staticmethod
    def _average(asked: Asked, weights: _Array, covariance: _Array) -> float:
        row = asked.row
        spread = float(row @ covariance @ row)
        return float(_logistic(np.array(row @ weights / math.sqrt(1.0 + math.pi * spread / 8.0))))


def _logistic(odds: _Array) -> _Array:
    return np.asarray(0.5 * (1.0 + np.tanh(0.5 * odds)))

"""What a candidate is worth: a Bayesian linear model over kinds of site, blueprints, sizes and phases.

    symbol   meaning                                                              shape, unit
    f(c)     reward of candidate c: contribution minus price                      loss
    y_i      reward that report i measured, with known variance v_i               [n], loss
    K        prior covariance of f between candidates                             [n, n], loss^2
    m(c)     prior mean of f: a level, and a lift by size                         loss

The model is linear in indicator features with independent normal weights: a shared level, one weight per kind of site,
per blueprint, per family of operators, per (kind, blueprint), per size class, per phase of the run, per reach (own
input or another layer's), and per place in one run. It is worked with in its dual form, so that no feature has to be
known beforehand: K(c, d) is the sum of the variances of the features that c and d share (Rasmussen & Williams, Gaussian
Processes for Machine Learning, 2006, sections 2.1 and 2.7). Noise is v_i plus what differs from run to run. The
posterior depends on the set of reports alone, never on the order in which they came.

The prior is optimistic (mean about one standard deviation above zero) because a trial that does harm is undone: what is
uncertain is worth trying, and a blueprint has to prove itself bad before it is left alone. It also expects a little
more of a seed that adds real capacity than of a handful of scales and shifts; a few reports overrule that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Final

import numpy as np
from numpy.typing import NDArray

from esper.contracts.blueprint import BlueprintIR, Site, SiteKind
from esper.contracts.errors import InvalidInputError
from esper.contracts.run import AdaptationOutcome, FieldReport

MODEL_VERSION: Final = 2
"""Version of the features and the prior; reports are kept raw and learned anew when it changes."""

MAX_OBSERVATIONS: Final = 1_000
"""Newest observations the model works with; solving takes the cube of it (about 50 ms at this size)."""

_Array = NDArray[np.float64]
_SIZE_CLASSES: Final = ((256, "xs"), (2_048, "s"), (16_384, "m"), (131_072, "l"))
_SIZE_LIFTS: Final = {"xs": -1.0, "s": 0.0, "m": 1.0, "l": 1.0, "xl": 1.0}
_FAMILIES: Final = {
    "conv": ("conv", "depthwise_conv"),
    "attention": ("attention",),
    "linear": ("linear", "low_rank"),
}
_Z_OF_95: Final = 1.959963984540054


@dataclass(frozen=True, kw_only=True, slots=True)
class Features:
    """What the model sees of a candidate or of the trial behind a report; an empty text shares nothing."""

    site_kind: SiteKind
    """Kind of layer."""
    blueprint_id: str
    """Content id of the blueprint."""
    family: str = ""
    """Heaviest kind of operator in it."""
    size_class: str = ""
    """Class of its parameter count."""
    phase: str = ""
    """Phase of the run at its beginning."""
    layer: str = ""
    """Run, layer and source, for what is peculiar to one place."""
    reach: str = ""
    """Whether it reads its own layer's input or, as a skip seed, another's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PosteriorConfig:
    """Prior of the model, in units of loss."""

    prior_mean: float = 0.04
    """Reward expected of what nobody tried."""
    size_lift: float = 0.015
    """How much more is expected of sizes m to xl than of s, and less of xs. >= 0."""
    level_deviation: float = 0.02
    """Of the level all candidates share. > 0."""
    kind_deviation: float = 0.01
    """Of the kind of site. > 0."""
    blueprint_deviation: float = 0.02
    """Of the blueprint. > 0."""
    family_deviation: float = 0.015
    """Of the family of operators. > 0."""
    pair_deviation: float = 0.015
    """Of the blueprint at this kind of site. > 0."""
    size_deviation: float = 0.01
    """Of the size class. > 0."""
    phase_deviation: float = 0.01
    """Of the phase of the run. > 0."""
    layer_deviation: float = 0.015
    """Of the one place. > 0."""
    reach_deviation: float = 0.01
    """Of reading the own layer's input, or another's. > 0."""
    noise_deviation: float = 0.02
    """From trial to trial, beyond the measured error. > 0."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not math.isfinite(value):
                raise InvalidInputError.of(field.name, "be finite", value)
            if field.name.endswith("deviation") and value <= 0:
                raise InvalidInputError.of(field.name, "be > 0", value)

    @property
    def total_deviation(self) -> float:
        """Prior standard deviation of one candidate's reward."""
        names = [field.name for field in fields(self) if field.name.endswith("deviation")]
        return math.sqrt(sum(getattr(self, name) ** 2 for name in names if name != "noise_deviation"))

    def mean_of(self, features: Features) -> float:
        """Give the prior mean of a candidate's reward."""
        return self.prior_mean + self.size_lift * _SIZE_LIFTS.get(features.size_class, 0.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Observation:
    """One reward as the model learns it."""

    report_id: str
    """Report it comes from."""
    features: Features
    """Where it was seen."""
    reward: float
    """Contribution minus price, in units of loss."""
    variance: float
    """Squared standard error of the reward."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Belief:
    """Mean and spread of one candidate's reward, and a draw from the joint posterior."""

    mean: float
    """Posterior mean, in units of loss."""
    deviation: float
    """Posterior standard deviation of that reward's expectation, in units of loss; > 0."""
    draw: float
    """Drawn together with those of the other candidates asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Draws:
    """What is believed of k candidates, in units of loss."""

    mean: _Array
    """Posterior means, [k]."""
    deviation: _Array
    """Posterior standard deviations of those rewards' expectations, [k], > 0."""
    draws: _Array
    """Independent draws from the joint posterior, [draws, k]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """What is believed of one blueprint at one kind of site."""

    site_kind: SiteKind
    """Kind of layer."""
    blueprint_id: str
    """Content id of the blueprint."""
    mean: float
    """Posterior mean, in units of loss."""
    deviation: float
    """Posterior standard deviation, in units of loss."""
    num_reports: int
    """Reports behind it."""


class RewardPosterior:
    """The model with what it has learned. Not thread-safe; owned by one event loop."""

    def __init__(self, config: PosteriorConfig | None = None) -> None:
        self.config = config or PosteriorConfig()
        self._observations: dict[str, Observation] = {}
        self._solved: _Solved | None = None

    @property
    def num_observations(self) -> int:
        """Rewards learned and still in use."""
        return len(self._observations)

    def tried(self) -> set[tuple[str, str, str, str]]:
        """Give blueprint id, family of operators, reach and place of every reward that was learned."""
        seen = (one.features for one in self._observations.values())
        return {(one.blueprint_id, one.family, one.reach, one.layer) for one in seen}

    def learn(self, observation: Observation) -> bool:
        """Learn one reward; false, and nothing changes, when its report was learned before.

        Raises:
            InvalidInputError: The reward is not finite or its variance is not finite and >= 0.
        """
        if not math.isfinite(observation.reward):
            raise InvalidInputError.of("reward", "be finite", observation.reward)
        if not (math.isfinite(observation.variance) and observation.variance >= 0):
            raise InvalidInputError.of("variance", "be finite and >= 0", observation.variance)
        if observation.report_id in self._observations:
            return False
        self._observations[observation.report_id] = observation
        while len(self._observations) > MAX_OBSERVATIONS:
            del self._observations[next(iter(self._observations))]
        self._solved = None
        return True

    def believe(self, candidates: Sequence[Features], random: np.random.Generator) -> list[Belief]:
        """Give what is believed of each candidate, with one joint draw for all of them."""
        if not candidates:
            return []
        drawn = self.draw(candidates, random, count=1)
        rows = zip(drawn.mean, drawn.deviation, drawn.draws[0], strict=True)
        return [Belief(mean=float(m), deviation=float(d), draw=float(z)) for m, d, z in rows]

    def draw(self, candidates: Sequence[Features], random: np.random.Generator, *, count: int) -> Draws:
        """Give ``count`` independent draws, each of all candidates jointly."""
        mean, covariance = self._joint(candidates)
        values, vectors = np.linalg.eigh(covariance)
        # The symmetric root is one and continuous; eigenvectors are not: equal candidates make equal eigenvalues, and
        # which basis of theirs comes out, and with which signs, is up to the processor and the last bit.
        root = vectors * np.sqrt(np.clip(values, 0.0, None)) @ vectors.T
        noise = random.standard_normal((count, len(candidates)))
        draws = mean + noise @ root
        return Draws(mean=mean, deviation=np.sqrt(np.diagonal(covariance)), draws=draws)

    def arms(self, site_kind: SiteKind | None = None) -> list[Arm]:
        """Give every (kind of site, blueprint) that was ever reported, best mean first."""
        counts: dict[tuple[SiteKind, str], int] = {}
        families: dict[str, str] = {}
        for one in self._observations.values():
            key = (one.features.site_kind, one.features.blueprint_id)
            if site_kind in (None, key[0]):
                counts[key] = counts.get(key, 0) + 1
                families.setdefault(key[1], one.features.family)
        if not counts:
            return []
        keys = sorted(counts)
        asked = [Features(site_kind=kind, blueprint_id=name, family=families[name]) for kind, name in keys]
        mean, covariance = self._joint(asked)
        found = [
            Arm(
                site_kind=kind,
                blueprint_id=name,
                mean=float(mean[row]),
                deviation=float(np.sqrt(covariance[row, row])),
                num_reports=counts[kind, name],
            )
            for row, (kind, name) in enumerate(keys)
        ]
        return sorted(found, key=lambda arm: (-arm.mean, arm.site_kind, arm.blueprint_id))

    def _joint(self, asked: Sequence[Features]) -> tuple[_Array, _Array]:
        """Give mean [k] and covariance [k, k] of the rewards asked for."""
        prior = self._covariance(asked, asked) + 1e-12 * np.eye(len(asked))
        mean = np.array([self.config.mean_of(one) for one in asked])
        if not self._observations:
            return mean, prior
        solved = self._solve()
        across = self._covariance(asked, solved.features)
        half = np.linalg.solve(solved.lower, across.T)
        covariance = prior - half.T @ half
        # Rounding may take a tiny variance below zero; a reward is never known to better than that.
        np.fill_diagonal(covariance, np.maximum(np.diagonal(covariance), 1e-12))
        return mean + across @ solved.weights, covariance

    def _solve(self) -> _Solved:
        if self._solved is None:
            # In the order of the ids: the same set of reports gives the same bits, whatever came first.
            rows = sorted(self._observations.values(), key=lambda one: one.report_id)
            features = [one.features for one in rows]
            noise = [one.variance + self.config.noise_deviation**2 for one in rows]
            lower: _Array = np.linalg.cholesky(self._covariance(features, features) + np.diag(noise)).astype(np.float64)
            residual = np.array([one.reward - self.config.mean_of(one.features) for one in rows])
            weights: _Array = np.linalg.solve(lower.T, np.linalg.solve(lower, residual)).astype(np.float64)
            self._solved = _Solved(features, lower, weights)
        return self._solved

    def _covariance(self, left: Sequence[Features], right: Sequence[Features]) -> _Array:
        """Give K between two rows of features: the summed variances of what they share."""
        prior = self.config
        total = np.full((len(left), len(right)), prior.level_deviation**2)
        shares: Mapping[str, float] = {
            "site_kind": prior.kind_deviation,
            "blueprint_id": prior.blueprint_deviation,
            "family": prior.family_deviation,
            "size_class": prior.size_deviation,
            "phase": prior.phase_deviation,
            "layer": prior.layer_deviation,
            "reach": prior.reach_deviation,
        }
        equal: dict[str, NDArray[np.bool_]] = {}
        for name, deviation in shares.items():
            equal[name] = _equal([getattr(one, name) for one in left], [getattr(one, name) for one in right])
            total += deviation**2 * equal[name]
        total += prior.pair_deviation**2 * (equal["site_kind"] & equal["blueprint_id"])
        if left is right:
            # What a candidate does not name is still part of its own uncertainty.
            for name in ("family", "size_class", "phase", "layer", "reach"):
                unnamed = np.array([not getattr(one, name) for one in left], dtype=np.float64)
                total += np.diag(shares[name] ** 2 * unnamed)
        return total


@dataclass(frozen=True, slots=True)
class _Solved:
    """The observations' factorised covariance, and the weights of their residuals."""

    features: list[Features]
    lower: _Array
    weights: _Array


def place_of(run_id: str, layer: str, source: str) -> str:
    """Give the text that stands for one place of one run."""
    return f"{run_id}/{layer}<{source}" if source else f"{run_id}/{layer}"


def reach_of(source: str) -> str:
    """Give the reach of a seed that reads the input of ``source``, or its own layer's where that is empty."""
    return "skip" if source else "own"


def features_of(
    site: Site,
    blueprint_id: str,
    *,
    parameters: int | None,
    progress: float | None,
    family: str = "",
    place: str = "",
    reach: str = "",
) -> Features:
    """Give the model's features of a candidate at a site; ``progress`` is the share of the plan that has passed."""
    return Features(
        site_kind=site.kind,
        blueprint_id=blueprint_id,
        family=family,
        size_class="" if parameters is None else size_class(parameters),
        phase="" if progress is None else phase_of(progress),
        layer=place,
        reach=reach,
    )


def observation_of(
    report: FieldReport, *, family: str = "", config: PosteriorConfig | None = None
) -> Observation | None:
    """Give what a report teaches of a blueprint, or ``None`` when it teaches nothing.

    Nothing is learned from a report with no blueprint or site, nor from one with no measured effect, with one
    exception: a trial the governor took back did harm that nobody could measure; it counts as a reward of one prior
    standard deviation below zero, as uncertain as the prior.
    """
    if report.site is None or not report.blueprint_id or not report.grew:
        return None
    prior = config or PosteriorConfig()
    reward = report.reward
    if reward is not None:
        variance = contribution_variance(report)
    elif report.outcome is AdaptationOutcome.ROLLED_BACK:
        reward, variance = -prior.total_deviation, prior.total_deviation**2
    else:
        return None
    features = features_of(
        report.site,
        report.blueprint_id,
        parameters=None if report.cost is None else report.cost.parameters,
        progress=report.run_progress,
        family=family,
        place=place_of(report.run_id, report.layer, report.source),
        reach=reach_of(report.source),
    )
    return Observation(report_id=report.report_id, features=features, reward=reward, variance=variance)


def contribution_variance(report: FieldReport) -> float:
    """Give the squared standard error of a report's contribution, from its interval read as a normal one.

    Raises:
        InvalidInputError: The report has no contribution, or its interval is no interval.
    """
    measured = report.contribution
    if measured is None:
        raise InvalidInputError.of("contribution", "be measured", None)
    figures = (measured.estimate, measured.low, measured.high)
    if not all(math.isfinite(figure) for figure in figures) or measured.low > measured.high:
        raise InvalidInputError.of("contribution", "be finite with low <= high", figures)
    if not 0.5 <= measured.confidence_level < 1.0:
        raise InvalidInputError.of("confidence_level", "be within [0.5, 1)", measured.confidence_level)
    return ((measured.high - measured.low) / (2.0 * _quantile(measured.confidence_level))) ** 2


def family_of(ir: BlueprintIR) -> str:
    """Give the heaviest kind of operator of a graph: ``conv``, ``attention``, ``linear`` or ``pointwise``."""
    operators = {node.op for node in ir.nodes}
    return next((name for name, members in _FAMILIES.items() if operators.intersection(members)), "pointwise")


def size_class(parameters: int) -> str:
    """Give the class of a parameter count: xs, s, m, l or xl, each eight times the one before."""
    return next((name for bound, name in _SIZE_CLASSES if parameters < bound), "xl")


def phase_of(progress: float) -> str:
    """Give the third of the run that a share of the plan falls into: early, middle or late."""
    return "early" if progress < 1 / 3 else "middle" if progress < 2 / 3 else "late"


def _equal(left: Sequence[object], right: Sequence[object]) -> NDArray[np.bool_]:
    """Give which pairs are equal; an empty text equals nothing."""
    codes: dict[object, int] = {}
    a = np.array([codes.setdefault(one, len(codes)) if one != "" else -1 for one in left])
    b = np.array([codes.setdefault(one, len(codes)) if one != "" else -2 for one in right])
    return np.asarray(a[:, None] == b[None, :])


def _quantile(level: float) -> float:
    """Give z with P(-z <= Z <= z) = level for a standard normal Z, by bisection on the distribution."""
    if level == 0.95:
        return _Z_OF_95
    low, high = 0.0, 40.0
    for _ in range(80):
        middle = (low + high) / 2.0
        low, high = (middle, high) if math.erf(middle / math.sqrt(2.0)) < level else (low, middle)
    return (low + high) / 2.0

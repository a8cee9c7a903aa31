"""Which seed of a layer to try next: Thompson sampling over the rewards each seed has brought.

    symbol        meaning                                                  unit
    r             reward of one trial: contribution minus price            loss
    mu, sigma^2   mean and variance of a seed's reward                     loss, loss^2
    m, k, a, b    parameters of the Normal-Inverse-Gamma posterior:        loss, trials, 1, loss^2
                  sigma^2 ~ InvGamma(a, b),  mu | sigma^2 ~ N(m, sigma^2 / k)

After n rewards with mean r' and sum of squares Q about it: k_n = k + n, m_n = (k m + n r') / k_n, a_n = a + n / 2,
b_n = b + Q / 2 + k n (r' - m)^2 / (2 k_n)  (K. Murphy, Conjugate Bayesian analysis of the Gaussian distribution, 2007).

A trial that does harm is undone, so what trying is worth is the option value E[max(mu, 0)], which is positive whatever
the history: with a bad one merely small. ``expected_reward`` is that value, with mu's marginal taken as the normal of
equal mean and variance. ``exploration_bonus`` is how far the draw lies from the mean, taken upwards (May et al.,
Optimistic Bayesian sampling in contextual-bandit problems, JMLR 13, 2012); the seed with the largest sum is chosen.

The prior is mildly optimistic: an untried seed is expected to help by 0.02, as if half a trial had said so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from esper.contracts.errors import InvalidInputError, InvalidStateError
from esper.services.tamiyo.normal import option_value

MAX_REWARDS: Final = 1_000
"""Rewards of one seed that are taken, at most."""

_FIELDS: Final = frozenset({"rewards", "steps_since_attempt", "available"})


@dataclass(frozen=True, kw_only=True, slots=True)
class SeedHistory:
    """What is known of one seed."""

    seed_index: int
    """Seed within its layer, from 0."""
    rewards: tuple[float, ...] = ()
    """Rewards seen there, oldest first, in units of loss."""
    steps_since_attempt: int | None = None
    """Steps since it was last tried; ``None`` when it never was."""
    available: bool = True
    """Whether it may be chosen at all."""

    def __post_init__(self) -> None:
        if self.seed_index < 0:
            raise InvalidInputError.of("seed_index", "be >= 0", self.seed_index)
        if len(self.rewards) > MAX_REWARDS:
            raise InvalidInputError.of(f"rewards of seed {self.seed_index}", f"be <= {MAX_REWARDS}", len(self.rewards))
        for reward in self.rewards:
            if not math.isfinite(reward):
                raise InvalidInputError.of(f"rewards of seed {self.seed_index}", "be finite", reward)
        if self.steps_since_attempt is not None and self.steps_since_attempt < 0:
            raise InvalidInputError.of("steps_since_attempt", "be >= 0 steps", self.steps_since_attempt)


PerformanceData = Mapping[int, Any] | Sequence[SeedHistory]
"""Histories in a row, or by seed: a ``SeedHistory``, a row of rewards, or a mapping with ``SeedHistory``'s fields."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SeedSelection:
    """The seed drawn, and why."""

    layer_name: str
    """Dotted module name."""
    seed_index: int
    """Seed drawn."""
    expected_reward: float
    """Option value of trying it, in units of loss; > 0."""
    exploration_bonus: float
    """What the draw adds for being uncertain, in units of loss; > 0."""
    num_rewards: int
    """Rewards behind it."""
    explanation: str
    """Why, in words."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SelectionConfig:
    """Prior and cooldown of the selection."""

    prior_mean: float = 0.02
    """``m``, in units of loss."""
    prior_trials: float = 0.5
    """``k``: trials the prior counts for. > 0."""
    prior_shape: float = 2.0
    """``a``; > 1, so that the variance has a mean."""
    prior_scale: float = 0.001
    """``b``, in squared units of loss; > 0. With ``a`` = 2 it is the expected variance of one reward."""
    cooldown_steps: int = 0
    """Steps after an attempt during which a seed rests. >= 0."""

    def __post_init__(self) -> None:
        for name, low in (("prior_trials", 0.0), ("prior_shape", 1.0), ("prior_scale", 0.0)):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > low):
                raise InvalidInputError.of(name, f"be finite and > {low:g}", getattr(self, name))
        if not math.isfinite(self.prior_mean):
            raise InvalidInputError.of("prior_mean", "be finite", self.prior_mean)
        if self.cooldown_steps < 0:
            raise InvalidInputError.of("cooldown_steps", "be >= 0 steps", self.cooldown_steps)


class SeedSelector:
    """Draws seeds; equal seeds of the stream and equal histories give equal draws. Not thread-safe."""

    def __init__(self, random_seed: int | Sequence[int] = 0, config: SelectionConfig | None = None) -> None:
        self._config = config or SelectionConfig()
        self._random = np.random.default_rng(random_seed)

    def select_seed_for_adaptation(self, layer_name: str, performance_data: PerformanceData) -> SeedSelection:
        """Draw the seed of a layer to try next.

        Raises:
            InvalidInputError: The data holds no seed, the same seed twice, or a figure that is no figure.
            InvalidStateError: Every seed is taken or cooling down.
        """
        if not layer_name:
            raise InvalidInputError.of("layer_name", "name a layer", layer_name)
        histories = read_histories(performance_data)
        free = [history for history in histories if history.available and not self._cools(history)]
        if not free:
            cooling = sum(1 for history in histories if history.available)
            raise InvalidStateError(
                f"layer {layer_name!r} must have an available seed, got {len(histories)} seeds: "
                f"{len(histories) - cooling} taken, {cooling} cooling down"
            )
        drawn = [self._draw(layer_name, history) for history in free]
        return max(drawn, key=lambda one: (one.expected_reward + one.exploration_bonus, -one.seed_index))

    def _cools(self, history: SeedHistory) -> bool:
        steps = history.steps_since_attempt
        return steps is not None and steps < self._config.cooldown_steps

    def _draw(self, layer_name: str, history: SeedHistory) -> SeedSelection:
        mean, trials, shape, scale = self._posterior(history.rewards)
        variance = scale / self._random.gamma(shape)
        bonus = math.sqrt(variance / trials) * abs(float(self._random.standard_normal()))
        deviation = math.sqrt(scale / (shape - 1.0) / trials)
        count = len(history.rewards)
        past = f"{count} rewards, posterior mean {mean:.4g}" if count else "never tried; the prior speaks"
        return SeedSelection(
            layer_name=layer_name,
            seed_index=history.seed_index,
            expected_reward=option_value(mean, deviation),
            exploration_bonus=max(bonus, 1e-12),
            num_rewards=count,
            explanation=f"seed {history.seed_index} of {layer_name}: {past}, uncertain by {deviation:.3g}",
        )

    def _posterior(self, rewards: Sequence[float]) -> tuple[float, float, float, float]:
        """Give m, k, a, b after the rewards."""
        prior, count = self._config, len(rewards)
        if not count:
            return prior.prior_mean, prior.prior_trials, prior.prior_shape, prior.prior_scale
        mean = math.fsum(rewards) / count
        squares = math.fsum((reward - mean) ** 2 for reward in rewards)
        trials = prior.prior_trials + count
        pull = prior.prior_trials * count * (mean - prior.prior_mean) ** 2 / (2.0 * trials)
        return (
            (prior.prior_trials * prior.prior_mean + count * mean) / trials,
            trials,
            prior.prior_shape + count / 2.0,
            prior.prior_scale + squares / 2.0 + pull,
        )


def read_histories(performance_data: object) -> tuple[SeedHistory, ...]:
    """Give the histories of performance data, by seed index.

    Raises:
        InvalidInputError: The data holds no seed, the same seed twice, or something that is no history.
    """
    if isinstance(performance_data, Mapping):
        found = [_history(index, entry) for index, entry in performance_data.items()]
    elif isinstance(performance_data, Sequence) and not isinstance(performance_data, str | bytes):
        found = list(performance_data)
    else:
        raise InvalidInputError.of("performance_data", "map seeds to their histories", performance_data)
    if not found:
        raise InvalidInputError.of("performance_data", "hold at least one seed", performance_data)
    for history in found:
        if not isinstance(history, SeedHistory):
            raise InvalidInputError.of("performance_data", "hold SeedHistory entries", history)
    if len({history.seed_index for history in found}) < len(found):
        raise InvalidInputError.of("performance_data", "name every seed once", [one.seed_index for one in found])
    return tuple(sorted(found, key=lambda history: history.seed_index))


def _history(index: object, entry: object) -> SeedHistory:
    if isinstance(index, bool) or not isinstance(index, int):
        raise InvalidInputError.of("performance_data", "have whole numbers as keys", index)
    if isinstance(entry, SeedHistory):
        if entry.seed_index != index:
            raise InvalidInputError.of("performance_data", f"hold seed {index} under its own key", entry.seed_index)
        return entry
    if isinstance(entry, Mapping):
        unknown = sorted(str(name) for name in set(entry) - _FIELDS)
        if unknown:
            raise InvalidInputError.of(f"performance_data[{index}]", f"hold only {', '.join(sorted(_FIELDS))}", unknown)
        fields = {str(name): value for name, value in entry.items()}
        fields["rewards"] = _rewards(index, fields.get("rewards", ()))
        return SeedHistory(seed_index=index, **fields)
    return SeedHistory(seed_index=index, rewards=_rewards(index, entry))


def _rewards(index: int, entry: object) -> tuple[float, ...]:
    rule = "be a row of numbers"
    if not isinstance(entry, Sequence | np.ndarray) or isinstance(entry, str | bytes):
        raise InvalidInputError.of(f"performance_data[{index}]", rule, entry)
    for reward in entry:
        if isinstance(reward, bool) or not isinstance(reward, int | float | np.floating | np.integer):
            raise InvalidInputError.of(f"performance_data[{index}]", rule, reward)
    return tuple(float(reward) for reward in entry)

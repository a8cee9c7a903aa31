"""What a run's learning curve says: improving, at a plateau, overfitting, or unstable; by sequential tests.

    symbol   meaning                                                        unit
    L_t      control loss after epoch t                                     loss
    T_t      training loss of epoch t                                       loss
    s_t      standard error of L_t; without one, the robust noise of L      loss
    k_t      improvement per epoch worth waiting for: max(a s_t, b L_t)     loss per epoch
    S_t      CUSUM of missing improvement                                   standard errors
    U_t      Page-Hinkley statistic of rising control loss                  standard errors

Plateau: S_t = max(0, S_{t-1} + (k_t - (L_{t-1} - L_t)) / s_t), alarm while S_t >= h. The increments telescope, so that
noise enters only through the two ends of a stretch and not once per epoch. S is held at 2h: after a real improvement
it comes down within a few epochs. A loss that falls faster than ever before is no plateau, however slow: the run has
yet to begin.
Overfitting: U_t = (L_t - min_{j<=t} L_j) / s_t less a drift per epoch since that minimum, alarm while U_t >= h_u and
training loss has fallen since that minimum.
Unstable: a loss that is not finite, or a rise by more than ``jump_errors`` times the larger of s_t and the robust
spread of earlier changes and by more than ``jump_share`` of the level before it.

Sources: E. S. Page, Continuous inspection schemes, Biometrika 41 (1954); D. V. Hinkley, Inference about the
change-point from cumulative sum tests, Biometrika 58 (1971). Both read the same points in the same order, so equal
packets give equal readings.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median
from typing import Final

from esper.contracts.decision import CurveState, Evidence
from esper.contracts.errors import InvalidInputError
from esper.services.tamiyo.normal import normal_cdf

_MAD_TO_SIGMA: Final = 1.4826
_TINY: Final = 1e-12


@dataclass(frozen=True, kw_only=True, slots=True)
class CurveConfig:
    """How soon the tests speak."""

    min_points: int = 4
    """Epochs with a control loss before anything is said, at least 3."""
    worthwhile_errors: float = 1.5
    """``a``: improvement per epoch worth waiting for, in standard errors. > 0."""
    worthwhile_share: float = 0.001
    """``b``: the same as a share of the loss. >= 0."""
    plateau_threshold: float = 1.25
    """``h``: missing improvement that makes a plateau, in standard errors. > 0."""
    rise_threshold: float = 2.0
    """``h_u``: rise above the best control loss that counts as overfitting, in standard errors. > 0."""
    rise_drift: float = 0.1
    """Rise per epoch that is forgiven, in standard errors. >= 0."""
    jump_errors: float = 8.0
    """Rise in one epoch that counts as a jump, in standard errors. > 0."""
    jump_share: float = 0.5
    """The same as a share of the level before. > 0."""
    window: int = 5
    """Epochs over which slopes are taken, at least 3."""

    def __post_init__(self) -> None:
        for name in ("min_points", "window"):
            if getattr(self, name) < 3:
                raise InvalidInputError.of(name, "be >= 3 epochs", getattr(self, name))
        for name in ("worthwhile_errors", "plateau_threshold", "rise_threshold", "jump_errors", "jump_share"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise InvalidInputError.of(name, "be finite and > 0", getattr(self, name))
        for name in ("worthwhile_share", "rise_drift"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise InvalidInputError.of(name, "be finite and >= 0", getattr(self, name))


@dataclass(frozen=True, kw_only=True, slots=True)
class CurvePoint:
    """One epoch of the curve; a loss nobody measured is ``None``, one that diverged is not finite."""

    epoch: int
    """Epochs completed."""
    train_loss: float | None = None
    """Mean training loss of the epoch."""
    control_loss: float | None = None
    """Mean loss on the control split."""
    control_loss_se: float | None = None
    """Standard error of that mean over examples."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CurveReading:
    """What the tests say after the newest point."""

    state: CurveState
    """Which of the states holds."""
    evidence: tuple[Evidence, ...] = ()
    """Figures behind it."""
    stretch_epochs: int = 0
    """Epochs for which the plateau or the rise has lasted; 0 in other states."""
    probability: float = 0.5
    """Probability that the state holds, from the slope over the window and its error."""
    capacity_lacks: float = 0.5
    """Probability that capacity, and not generalisation, holds the run back."""


def read_curve(points: Sequence[CurvePoint], config: CurveConfig | None = None) -> CurveReading:
    """Give what the curve looks like after its newest point; a pure function of the points.

    Runs without a control split are read by their training loss; overfitting cannot be seen then.
    """
    chosen = config or CurveConfig()
    jump = _instability(points, chosen)
    if jump is not None:
        return CurveReading(state=CurveState.UNSTABLE, evidence=(jump,), probability=0.95, capacity_lacks=0.5)
    levels = _judged(points)
    if len(levels) < chosen.min_points:
        figure = Evidence(name="epochs_seen", value=len(levels), detail=f"needs {chosen.min_points} to judge")
        return CurveReading(state=CurveState.WARMING_UP, evidence=(figure,))
    return _Reader(levels, chosen).read()


@dataclass(frozen=True, slots=True)
class _Level:
    """One point as it is judged: all finite."""

    epoch: int
    loss: float
    error: float
    train: float | None


class _Reader:
    """The tests over one curve of finite levels."""

    def __init__(self, levels: Sequence[_Level], config: CurveConfig) -> None:
        self._levels = levels
        self._config = config

    def read(self) -> CurveReading:
        cusum, flat_epochs = self._missing_improvement([level.loss for level in self._levels])
        rise, rising_epochs, train_fell = self._rise()
        slope, slope_error = least_squares_slope([level.loss for level in self._window()])
        worth = self._worthwhile(self._levels[-1])
        evidence = [
            Evidence(name="cusum", value=cusum, detail=f"missing improvement; plateau from {self._threshold():g}"),
            Evidence(name="page_hinkley", value=rise, detail=f"rise over the best; overfitting from {self._rises():g}"),
            Evidence(name="improvement_per_epoch", value=-slope, detail=f"worth waiting for: {worth:.3g}"),
            *self._gap_evidence(),
        ]
        spread = max(slope_error, self._levels[-1].error / len(self._window()), _TINY)
        if rise >= self._rises() and train_fell:
            state, stretch = CurveState.OVERFITTING, rising_epochs
            probability = normal_cdf(rise - self._rises() + 1.0)
        elif cusum >= self._threshold() and not self._gathers_pace():
            state, stretch = CurveState.PLATEAU, flat_epochs
            probability = normal_cdf((worth + slope) / spread)
        else:
            state, stretch = CurveState.IMPROVING, 0
            probability = normal_cdf((-slope - worth) / spread)
        return CurveReading(
            state=state,
            evidence=tuple(evidence),
            stretch_epochs=stretch,
            probability=probability,
            capacity_lacks=self._capacity_lacks(),
        )

    def _threshold(self) -> float:
        return self._config.plateau_threshold

    def _rises(self) -> float:
        return self._config.rise_threshold

    def _window(self) -> Sequence[_Level]:
        return self._levels[-self._config.window :]

    def _worthwhile(self, level: _Level) -> float:
        return max(self._config.worthwhile_errors * level.error, self._config.worthwhile_share * abs(level.loss))

    def _missing_improvement(self, losses: Sequence[float]) -> tuple[float, int]:
        """Give S and the epochs for which it has been above its threshold, the newest included."""
        total, epochs = 0.0, 0
        for before, loss, level in zip(losses, losses[1:], self._levels[1:], strict=False):
            missing = (self._worthwhile(level) - (before - loss)) / level.error
            # One epoch's noise never makes a plateau: an epoch counts for at most three quarters of the threshold.
            total += min(missing, 0.75 * self._threshold())
            total = min(max(0.0, total), 2.0 * self._threshold())
            epochs = epochs + 1 if total >= self._threshold() else 0
        return total, epochs

    def _gathers_pace(self) -> bool:
        """Say whether the last two epochs brought more than any two before them."""
        losses = [level.loss for level in self._levels]
        gains = [before - after for before, after in zip(losses, losses[2:], strict=False)]
        return gains[-1] > 0 and all(gains[-1] > gain for gain in gains[:-1])

    def _rise(self) -> tuple[float, int, bool]:
        """Give U, the epochs since the best control loss, and whether training loss fell since then."""
        best = min(range(len(self._levels)), key=lambda place: self._levels[place].loss)
        low, last = self._levels[best], self._levels[-1]
        epochs = len(self._levels) - 1 - best
        rise = (last.loss - low.loss) / last.error - self._config.rise_drift * epochs
        fell = low.train is not None and last.train is not None and last.train < low.train
        return max(0.0, rise), epochs, fell

    def _gap(self) -> tuple[float, float] | None:
        """Give control minus training loss and its error, as means over the window; ``None`` without both."""
        pairs = [(level.loss - level.train, level.error) for level in self._window() if level.train is not None]
        if not pairs:
            return None
        return fmean(gap for gap, _ in pairs), fmean(error for _, error in pairs)

    def _gap_evidence(self) -> list[Evidence]:
        gap = self._gap()
        if gap is None:
            return []
        share = self._capacity_lacks()
        return [
            Evidence(name="generalisation_gap", value=gap[0], detail="control minus training loss"),
            Evidence(name="capacity_lacks", value=share, detail="probability that capacity holds the run back"),
        ]

    def _capacity_lacks(self) -> float:
        """Give the probability that capacity lacks: the gap is small, or training loss is flat as well.

        A gap of two errors or a quarter of the loss is ordinary; beyond that, capacity is not what lacks unless
        training loss has stopped falling too.
        """
        gap = self._gap()
        if gap is None:
            return 0.5
        ordinary = max(2.0 * gap[1], 0.25 * self._levels[-1].loss)
        small = normal_cdf((ordinary - gap[0]) / max(gap[1], _TINY))
        trains = [level.train for level in self._levels]
        known = [train for train in trains if train is not None]
        if len(known) < len(trains):
            return small
        flat = 1.0 if self._missing_improvement(known)[0] >= self._threshold() else 0.0
        return 1.0 - (1.0 - small) * (1.0 - 0.8 * flat)


def least_squares_slope(values: Sequence[float]) -> tuple[float, float]:
    """Give the slope per step of a straight line through the values, and its standard error (0 below three values)."""
    count = len(values)
    if count < 2:
        return 0.0, 0.0
    centre, mean = (count - 1) / 2.0, fmean(values)
    spread = sum((place - centre) ** 2 for place in range(count))
    slope = sum((place - centre) * (value - mean) for place, value in enumerate(values)) / spread
    if count == 2:
        return slope, 0.0
    residual = sum((value - mean - slope * (place - centre)) ** 2 for place, value in enumerate(values))
    return slope, math.sqrt(residual / (count - 2) / spread)


def robust_noise(values: Sequence[float]) -> float:
    """Give the noise of a smooth series: the scaled median of its second differences; 0 below four values."""
    seconds = [first - 2 * second + third for first, second, third in zip(values, values[1:], values[2:], strict=False)]
    if len(seconds) < 2:
        return 0.0
    return _MAD_TO_SIGMA * median(abs(value) for value in seconds) / math.sqrt(6.0)


def _judged(points: Sequence[CurvePoint]) -> list[_Level]:
    """Give the finite levels after the last point that was not finite."""
    controlled = any(point.control_loss is not None for point in points)
    kept: list[CurvePoint] = []
    for point in points:
        loss = point.control_loss if controlled else point.train_loss
        if loss is None:
            continue
        if not math.isfinite(loss):
            kept.clear()
            continue
        kept.append(point)
    losses = [_loss(point, controlled) for point in kept]
    noise = robust_noise(losses)
    return [
        _Level(point.epoch, loss, _error(point, loss, noise), _finite(point.train_loss) if controlled else None)
        for point, loss in zip(kept, losses, strict=True)
    ]


def _loss(point: CurvePoint, controlled: bool) -> float:
    loss = point.control_loss if controlled else point.train_loss
    assert loss is not None
    return loss


def _error(point: CurvePoint, loss: float, noise: float) -> float:
    """Give the unit of the tests: the standard error where there is one, else the noise; never below 0.1 %."""
    measured = point.control_loss_se
    if measured is None or not math.isfinite(measured) or measured <= 0:
        measured = noise
    return max(measured, 1e-3 * abs(loss), _TINY)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _instability(points: Sequence[CurvePoint], config: CurveConfig) -> Evidence | None:
    """Give the figure that makes the newest point unstable, or ``None``."""
    if not points:
        return None
    last = points[-1]
    for name, loss in (("train_loss", last.train_loss), ("control_loss", last.control_loss)):
        if loss is not None and not math.isfinite(loss):
            return Evidence(name="non_finite", value=1.0, detail=f"{name} is {loss}")
    for name in ("train_loss", "control_loss"):
        series = [loss for point in points if (loss := _finite(getattr(point, name))) is not None]
        jump = _jump(series, _finite(last.control_loss_se) if name == "control_loss" else None, config)
        if jump is not None:
            return Evidence(name="jump", value=jump, detail=f"rise of {name} in one epoch, in units of its spread")
    return None


def _jump(series: Sequence[float], error: float | None, config: CurveConfig) -> float | None:
    """Give the newest rise in units of the spread when it is a jump."""
    if len(series) < 4:
        return None
    rise = series[-1] - series[-2]
    changes = [abs(after - before) for before, after in pairwise(series[:-1])]
    spread = max(_MAD_TO_SIGMA * median(changes[-8:]), error or 0.0, 0.01 * abs(series[-2]), _TINY)
    jumped = rise > config.jump_errors * spread and rise > config.jump_share * abs(series[-2])
    return rise / spread if jumped else None

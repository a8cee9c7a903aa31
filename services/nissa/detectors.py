"""Detectors of anomalies: each is fed one kind of figure and gives an anomaly when one opens, lasts or passes.

    x      newest value                     m, MAD   median of the window, median absolute deviation from it
    z      robust z score 0.6745 (x - m) / MAD (Iglewicz and Hoaglin, 1993); 0.6745 makes MAD a standard deviation for
           normal values. MAD is kept above a share of |m|, so that a flat window does not make every change infinite.
    g      CUSUM, max(0, g + reference - x) (Page, 1954; with a known reference it is the Page-Hinkley test)

Every detector opens at one threshold and closes at a lower one. All are deterministic: equal figures at equal times
give equal anomalies. None is thread-safe.
"""

from __future__ import annotations

import math
from collections import deque
from datetime import datetime
from statistics import median
from typing import Final

from esper.contracts.decision import Anomaly, AnomalySeverity, Evidence
from esper.services.nissa.alarm import Alarm, AlarmRule

_NORMAL: Final = 0.6745


class RobustWindow:
    """The last values of a figure, by median and MAD."""

    def __init__(self, size: int, *, floor_share: float) -> None:
        self.values: deque[float] = deque(maxlen=size)
        self._floor_share = floor_share

    def __len__(self) -> int:
        return len(self.values)

    @property
    def middle(self) -> float:
        """Median; the window must not be empty."""
        return median(self.values)

    def z(self, value: float) -> float:
        """Give the robust z score of a value against the window, which must not be empty."""
        middle = self.middle
        spread = median(abs(one - middle) for one in self.values)
        floor = max(self._floor_share * abs(middle), 1e-12)
        return _NORMAL * (value - middle) / max(spread, floor)


class NonFiniteDetector:
    """A figure or a layer's activations are NaN or infinite: opens at the first, closes after 3 that are finite."""

    RULE: Final = AlarmRule(detector="non_finite", severity=AnomalySeverity.CRITICAL, close_after=3)

    def __init__(self, *, run_id: str, subject: str) -> None:
        self.alarm = Alarm(self.RULE, run_id=run_id, subject=subject)

    def observe(self, value: float, at: datetime) -> Anomaly | None:
        """Take a figure."""
        evidence = (Evidence(name="value", value=value, detail="must be finite"),)
        return self.alarm.observe(not math.isfinite(value), evidence, at)

    def observe_share(self, share: float, at: datetime) -> Anomaly | None:
        """Take the share of non-finite activations, 0 to 1."""
        evidence = (Evidence(name="nonfinite_share", value=share, detail="share of sampled activations, must be 0"),)
        return self.alarm.observe(share > 0, evidence, at)


class LossSpikeDetector:
    """Loss far above its recent values: opens at z >= 6 and 10 % over the median, closes at z <= 3.

    Window 20 values, silent before 8. A spike stays out of the window; one that lasts 5 values is the new level and is
    let in, so that the alarm can close. Falling loss is never a spike: the side is upper.
    """

    RULE: Final = AlarmRule(detector="loss_spike", severity=AnomalySeverity.WARNING, close_after=1)
    WINDOW: Final = 20
    WARM_UP: Final = 8
    OPEN_Z: Final = 6.0
    CLOSE_Z: Final = 3.0
    LEAST_RISE: Final = 0.1
    NEW_LEVEL: Final = 5

    def __init__(self, *, run_id: str, subject: str) -> None:
        self.alarm = Alarm(self.RULE, run_id=run_id, subject=subject)
        self._window = RobustWindow(self.WINDOW, floor_share=0.01)
        self._lasted = 0

    def observe(self, loss: float, at: datetime) -> Anomaly | None:
        """Take a loss; one that is not finite belongs to another detector and is passed over."""
        if not math.isfinite(loss):
            return None
        if len(self._window) < self.WARM_UP:
            self._window.values.append(loss)
            return None
        z, middle = self._window.z(loss), self._window.middle
        high = z >= self.OPEN_Z and loss - middle >= self.LEAST_RISE * abs(middle)
        self._lasted = self._lasted + 1 if high else 0
        if not high or self._lasted > self.NEW_LEVEL:
            self._window.values.append(loss)
        evidence = (
            Evidence(name="robust_z", value=z, detail=f"opens at {self.OPEN_Z:g}"),
            Evidence(name="loss", value=loss, detail="loss observed"),
            Evidence(name="median", value=middle, detail=f"median of the last {len(self._window)} losses"),
        )
        return self.alarm.observe(_between(high, z <= self.CLOSE_Z), evidence, at)


class GradientExplosionDetector:
    """Gradient norm far above its recent values: log10 norm at least 1 over the median and z >= 6; closes below 0.5.

    Norms are compared as logarithms because they scatter by factors, not by differences. Window 20, silent before 5.
    """

    RULE: Final = AlarmRule(detector="gradient_explosion", severity=AnomalySeverity.CRITICAL, close_after=2)
    WINDOW: Final = 20
    WARM_UP: Final = 5
    OPEN_DECADES: Final = 1.0
    CLOSE_DECADES: Final = 0.5
    OPEN_Z: Final = 6.0

    def __init__(self, *, run_id: str, subject: str) -> None:
        self.alarm = Alarm(self.RULE, run_id=run_id, subject=subject)
        self._window = RobustWindow(self.WINDOW, floor_share=0.01)

    def observe(self, norm: float, at: datetime) -> Anomaly | None:
        """Take a gradient norm; 0 and what is not finite belong to other detectors."""
        if not math.isfinite(norm) or norm <= 0:
            return None
        level = math.log10(norm)
        if len(self._window) < self.WARM_UP:
            self._window.values.append(level)
            return None
        decades, z = level - self._window.middle, self._window.z(level)
        bad = decades >= self.OPEN_DECADES and z >= self.OPEN_Z
        if not bad:
            self._window.values.append(level)
        evidence = (
            Evidence(name="decades", value=decades, detail="log10 of norm over its median, opens at 1"),
            Evidence(name="robust_z", value=z, detail=f"of log10 of the norm, opens at {self.OPEN_Z:g}"),
            Evidence(name="norm", value=norm, detail="norm observed"),
        )
        return self.alarm.observe(_between(bad, decades <= self.CLOSE_DECADES), evidence, at)


class GradientVanishingDetector:
    """Gradient norm gone: below 1e-4 of the median of its first 5 values, or below 1e-12, 3 times in a row.

    Compared with the start, not with the recent past: gradients that fade slowly must not carry their baseline along.
    A norm of a converging run falls by a decade or two, not by four. Closes at ten times the threshold.
    """

    RULE: Final = AlarmRule(
        detector="gradient_vanishing", severity=AnomalySeverity.WARNING, open_after=3, close_after=2
    )
    WARM_UP: Final = 5
    SHARE: Final = 1e-4
    LEAST: Final = 1e-12

    def __init__(self, *, run_id: str, subject: str) -> None:
        self.alarm = Alarm(self.RULE, run_id=run_id, subject=subject)
        self._first: list[float] = []

    def observe(self, norm: float, at: datetime) -> Anomaly | None:
        """Take a gradient norm, >= 0."""
        if not math.isfinite(norm):
            return None
        if len(self._first) < self.WARM_UP:
            self._first.append(norm)
            return None
        threshold = max(self.SHARE * median(self._first), self.LEAST)
        evidence = (
            Evidence(name="norm", value=norm, detail="norm observed"),
            Evidence(name="threshold", value=threshold, detail="1e-4 of the median of the first norms"),
        )
        return self.alarm.observe(_between(norm < threshold, norm >= 10 * threshold), evidence, at)


class DeadUnitsDetector:
    """Most activations of a layer are exact zeros: share >= 0.95 in 5 batches in a row; closes below 0.8 in 5.

    Half of a rectified layer is zero when it is healthy; 0.95 is far outside of that.
    """

    RULE: Final = AlarmRule(detector="dead_units", severity=AnomalySeverity.WARNING, open_after=5, close_after=5)
    OPEN_SHARE: Final = 0.95
    CLOSE_SHARE: Final = 0.8

    def __init__(self, *, run_id: str, subject: str) -> None:
        self.alarm = Alarm(self.RULE, run_id=run_id, subject=subject)

    def observe(self, dead_share: float, at: datetime) -> Anomaly | None:
        """Take the mean share of exact zeros in one batch, 0 to 1."""
        if not math.isfinite(dead_share):
            return None
        evidence = (Evidence(name="dead_share", value=dead_share, detail=f"opens at {self.OPEN_SHARE:g}"),)
        return self.alarm.observe(_between(dead_share >= self.OPEN_SHARE, dead_share < self.CLOSE_SHARE), evidence, at)


class PlateauDetector:
    """Control loss no longer falls: CUSUM of missing progress per epoch reaches 8 epochs' worth; closes at 0.

    Progress of an epoch is the fall of the best loss so far, as a share of it, so that noise around a level neither
    counts as progress nor as its opposite. Reference 0.002: progress below 0.2 % an epoch counts as missing. An
    epoch without progress adds 1 (in units of the reference); progress pays back, at most all that is owed.
    """

    RULE: Final = AlarmRule(detector="plateau", severity=AnomalySeverity.INFO, close_after=1)
    REFERENCE: Final = 0.002
    OPEN_EPOCHS: Final = 8.0

    def __init__(self, *, run_id: str, subject: str) -> None:
        self.alarm = Alarm(self.RULE, run_id=run_id, subject=subject)
        self._best: float | None = None
        self._owed = 0.0

    def observe(self, control_loss: float, at: datetime) -> Anomaly | None:
        """Take the control loss of an epoch."""
        if not math.isfinite(control_loss):
            return None
        if self._best is None:
            self._best = control_loss
            return None
        best = min(self._best, control_loss)
        progress = (self._best - best) / max(abs(self._best), 1e-12)
        self._best = best
        self._owed = min(2 * self.OPEN_EPOCHS, max(0.0, self._owed + 1.0 - progress / self.REFERENCE))
        evidence = (
            Evidence(name="cusum", value=self._owed, detail="epochs' worth of missing progress, opens at 8"),
            Evidence(name="best_loss", value=best, detail="lowest control loss so far"),
        )
        return self.alarm.observe(_between(self._owed >= self.OPEN_EPOCHS, self._owed == 0.0), evidence, at)


class LatencyShiftDetector:
    """A layer's forward pass has become slower: z >= 6 and 1.5 times the median, 5 batches in a row; closes at 1.2.

    Window 50 batch medians, silent before 20. After 50 slow batches the new speed is let into the window.
    """

    RULE: Final = AlarmRule(detector="latency_shift", severity=AnomalySeverity.INFO, open_after=5, close_after=5)
    WINDOW: Final = 50
    WARM_UP: Final = 20
    OPEN_RATIO: Final = 1.5
    CLOSE_RATIO: Final = 1.2
    OPEN_Z: Final = 6.0
    NEW_LEVEL: Final = 50

    def __init__(self, *, run_id: str, subject: str) -> None:
        self.alarm = Alarm(self.RULE, run_id=run_id, subject=subject)
        self._window = RobustWindow(self.WINDOW, floor_share=0.02)
        self._lasted = 0

    def observe(self, latency_ms: float, at: datetime) -> Anomaly | None:
        """Take the median latency of one batch, in milliseconds, > 0."""
        if not math.isfinite(latency_ms) or latency_ms <= 0:
            return None
        if len(self._window) < self.WARM_UP:
            self._window.values.append(latency_ms)
            return None
        ratio, z = latency_ms / self._window.middle, self._window.z(latency_ms)
        bad = ratio >= self.OPEN_RATIO and z >= self.OPEN_Z
        self._lasted = self._lasted + 1 if bad else 0
        if not bad or self._lasted > self.NEW_LEVEL:
            self._window.values.append(latency_ms)
        evidence = (
            Evidence(name="ratio", value=ratio, detail=f"to the median, opens at {self.OPEN_RATIO:g}"),
            Evidence(name="robust_z", value=z, detail=f"opens at {self.OPEN_Z:g}"),
            Evidence(name="latency_ms", value=latency_ms, detail="median of the batch, in milliseconds"),
        )
        return self.alarm.observe(_between(bad, ratio <= self.CLOSE_RATIO), evidence, at)


class SilenceDetector:
    """A component that should speak has not: nothing for ``limit_s``, or for 5 of its longest pauses if that is longer.

    Looked at on a clock. Pauses are learned from what is heard, so a run with long epochs and no health batches is
    not called silent between them.
    """

    RULE: Final = AlarmRule(detector="silent_component", severity=AnomalySeverity.CRITICAL, close_after=1)
    PAUSES: Final = 5.0

    def __init__(self, *, run_id: str, subject: str, limit_s: float) -> None:
        self.alarm = Alarm(self.RULE, run_id=run_id, subject=subject)
        self._limit_s = limit_s
        self._last: datetime | None = None
        self._longest_s = 0.0

    def hear(self, at: datetime) -> Anomaly | None:
        """Note that the component spoke; closes the anomaly."""
        if self._last is not None and self.alarm.current is None:
            self._longest_s = max(self._longest_s, (at - self._last).total_seconds())
        self._last = at if self._last is None else max(at, self._last)
        return self.alarm.observe(False, (), at)

    def forgive(self, at: datetime) -> None:
        """Start the clock anew without learning a pause: it had no reason to speak until now."""
        self._last = at

    def observe(self, now: datetime) -> Anomaly | None:
        """Look at the clock; nothing opens before the component was heard once."""
        if self._last is None:
            return None
        silent_s = (now - self._last).total_seconds()
        allowed_s = max(self._limit_s, self.PAUSES * self._longest_s)
        if silent_s <= allowed_s:
            return None
        evidence = (
            Evidence(name="silent_s", value=silent_s, detail="seconds since it was heard"),
            Evidence(name="allowed_s", value=allowed_s, detail="seconds it may be silent"),
        )
        return self.alarm.observe(True, evidence, now)


class DropBurstDetector:
    """Telemetry is lost: at least 1 % of the last 20 batches' signals, or any whole batch; closes at none in 20.

    Counters come as totals since the run began; a total that shrinks belongs to a new process and starts over.
    """

    RULE: Final = AlarmRule(detector="drop_burst", severity=AnomalySeverity.WARNING, close_after=1)
    WINDOW: Final = 20
    OPEN_SHARE: Final = 0.01

    def __init__(self, *, run_id: str, subject: str) -> None:
        self.alarm = Alarm(self.RULE, run_id=run_id, subject=subject)
        self._totals: tuple[int, int] | None = None
        self._window: deque[tuple[int, int, int]] = deque(maxlen=self.WINDOW)

    def observe(self, num_signals: int, ring_dropped: int, batches_dropped: int, at: datetime) -> Anomaly | None:
        """Take the counts of one batch."""
        before = self._totals or (ring_dropped, batches_dropped)
        self._totals = (ring_dropped, batches_dropped)
        lost_signals = ring_dropped - before[0] if ring_dropped >= before[0] else ring_dropped
        lost_batches = batches_dropped - before[1] if batches_dropped >= before[1] else batches_dropped
        self._window.append((num_signals, lost_signals, lost_batches))
        arrived, signals, batches = (sum(column) for column in zip(*self._window, strict=True))
        share = signals / max(1, signals + arrived)
        evidence = (
            Evidence(name="lost_share", value=share, detail=f"of the signals of {len(self._window)} batches"),
            Evidence(name="lost_signals", value=float(signals), detail="dropped in the ring"),
            Evidence(name="lost_batches", value=float(batches), detail="dropped by the publisher"),
        )
        bad = share >= self.OPEN_SHARE or batches > 0
        return self.alarm.observe(_between(bad, signals == 0 and batches == 0), evidence, at)


def _between(bad: bool, good: bool) -> bool | None:
    """Give bad, good, or neither, for a figure between the two thresholds."""
    if bad:
        return True
    return False if good else None

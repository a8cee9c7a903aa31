"""Hysteresis: turns a detector's observations into anomalies that open once, last, and pass."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Final

from esper.contracts.decision import Anomaly, AnomalySeverity, Evidence
from esper.contracts.errors import InvalidInputError

_REFRESH: Final = timedelta(seconds=10)
"""How often a lasting anomaly is given again with a later ``last_seen_at``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AlarmRule:
    """When an alarm opens and closes."""

    detector: str
    """Name of the detector."""
    severity: AnomalySeverity
    """How bad it is."""
    open_after: int = 1
    """Bad observations in a row that open it, at least 1."""
    close_after: int = 3
    """Good observations in a row that close it, at least 1."""

    def __post_init__(self) -> None:
        for name in ("open_after", "close_after"):
            if getattr(self, name) < 1:
                raise InvalidInputError.of(name, "be >= 1", getattr(self, name))


class Alarm:
    """One condition of one subject. An observation is bad, good, or (between two thresholds) neither."""

    def __init__(self, rule: AlarmRule, *, run_id: str, subject: str) -> None:
        self.rule = rule
        self.run_id = run_id
        self.subject = subject
        self.current: Anomaly | None = None
        """The anomaly while it is open."""
        self._bad = 0
        self._good = 0
        self._given_at: datetime | None = None

    def observe(self, bad: bool | None, evidence: tuple[Evidence, ...], at: datetime) -> Anomaly | None:
        """Give the anomaly when it opened, lasts for another while, or has passed; else ``None``."""
        self._bad = self._bad + 1 if bad else 0
        self._good = self._good + 1 if bad is False else 0
        if self.current is None:
            return self._open(evidence, at) if self._bad >= self.rule.open_after else None
        if bad:
            self.current = replace(self.current, last_seen_at=at, evidence=evidence)
            return self._refreshed(at)
        return self.close() if self._good >= self.rule.close_after else None

    def close(self) -> Anomaly | None:
        """Say that the condition has passed; gives the resolved anomaly, or ``None`` when none was open."""
        passed, self.current = self.current, None
        self._bad = self._good = 0
        return None if passed is None else replace(passed, resolved=True)

    def resume(self, anomaly: Anomaly) -> None:
        """Go on with an anomaly that was open before a restart."""
        if self.current is None:
            self.current, self._given_at = anomaly, anomaly.last_seen_at

    def _open(self, evidence: tuple[Evidence, ...], at: datetime) -> Anomaly:
        self._given_at = at
        self.current = Anomaly(
            anomaly_id=_identity(self.run_id, self.rule.detector, self.subject, at),
            run_id=self.run_id,
            detector=self.rule.detector,
            subject=self.subject,
            severity=self.rule.severity,
            evidence=evidence,
            first_seen_at=at,
            last_seen_at=at,
        )
        return self.current

    def _refreshed(self, at: datetime) -> Anomaly | None:
        if self._given_at is not None and at - self._given_at < _REFRESH:
            return None
        self._given_at = at
        return self.current


def _identity(run_id: str, detector: str, subject: str, first_seen_at: datetime) -> str:
    """Give an id that the same events give again, so that a replay opens no second anomaly."""
    text = f"{run_id}\n{detector}\n{subject}\n{first_seen_at.isoformat()}"
    return "n" + hashlib.sha256(text.encode()).hexdigest()[:32]

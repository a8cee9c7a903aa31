"""The governor: watches every step, and says when training must be taken back.

Legend: l = loss of a step; m, s = median and scaled MAD (1.4826 * MAD) of the last ``window`` accepted losses.

A step does harm when its loss is not finite, or when l > m + ``spike_sigmas`` * s and l > ``spike_factor`` * m for
``spike_patience`` steps in a row (one wild batch is no spike). The robust z-score is Iglewicz and Hoaglin (1993).
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass
from enum import Enum
from typing import Final

from esper.contracts.errors import InvalidInputError

_MAD_TO_SIGMA: Final = 1.4826
_MIN_HISTORY: Final = 16


class Verdict(Enum):
    """What the governor says of a step."""

    FINE = "fine"
    """Go on."""
    NON_FINITE = "non_finite"
    """The loss is not finite: the step must not be taken."""
    SPIKE = "spike"
    """The loss has jumped and stays up."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GovernorConfig:
    """How the governor judges.

    Raises:
        InvalidInputError: A value breaks its rule.
    """

    window: int = 64
    """Accepted losses remembered, at least 16."""
    spike_sigmas: float = 12.0
    """Robust standard deviations above the median that count as a spike, > 0."""
    spike_factor: float = 3.0
    """Multiple of the median that a spike must also exceed, > 1."""
    spike_patience: int = 3
    """Steps in a row that make a spike, at least 1."""
    max_rollbacks: int = 8
    """Times the whole training state may be taken back in one run; then the error is raised."""

    def __post_init__(self) -> None:
        rules = (
            ("window", f"be at least {_MIN_HISTORY} steps", self.window >= _MIN_HISTORY),
            ("spike_sigmas", "be > 0", self.spike_sigmas > 0),
            ("spike_factor", "be > 1", self.spike_factor > 1),
            ("spike_patience", "be at least 1 step", self.spike_patience >= 1),
            ("max_rollbacks", "be >= 0", self.max_rollbacks >= 0),
        )
        for name, rule, holds in rules:
            if not holds:
                raise InvalidInputError.of(f"governor.{name}", rule, getattr(self, name))


class Governor:
    """Judges losses one by one; belongs to the training thread."""

    def __init__(self, config: GovernorConfig | None = None) -> None:
        self.config = config or GovernorConfig()
        self._accepted: deque[float] = deque(maxlen=self.config.window)
        self._high_in_a_row = 0

    def judge(self, loss: float) -> Verdict:
        """Say what to make of one step's loss, and remember it when it is fine."""
        if not math.isfinite(loss):
            self._high_in_a_row = 0
            return Verdict.NON_FINITE
        if self._is_high(loss):
            self._high_in_a_row += 1
            if self._high_in_a_row >= self.config.spike_patience:
                self._high_in_a_row = 0
                return Verdict.SPIKE
            return Verdict.FINE
        self._high_in_a_row = 0
        self._accepted.append(loss)
        return Verdict.FINE

    def forget(self) -> None:
        """Start the history afresh, as after a roll-back."""
        self._accepted.clear()
        self._high_in_a_row = 0

    def _is_high(self, loss: float) -> bool:
        if len(self._accepted) < _MIN_HISTORY or loss <= self.config.spike_factor * self._accepted[-1]:
            # The cheap test first: the median costs a sort, and nearly no step gets that far.
            return False
        median = statistics.median(self._accepted)
        spread = _MAD_TO_SIGMA * statistics.median(abs(value - median) for value in self._accepted)
        return loss > median + self.config.spike_sigmas * spread and loss > self.config.spike_factor * median

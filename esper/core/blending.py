"""How alpha goes from 0 to its hold value, and back: schedules ticked once per optimizer step.

Legend: t = share of the ramp done, in [0, 1]; r(t) = share of the way, r(0) = 0, r(1) = 1, non-decreasing.

    linear    r = t
    cosine    r = (1 - cos(pi t)) / 2
    sigmoid   r = (s(t) - s(0)) / (s(1) - s(0)),  s(t) = 1 / (1 + exp(-12 (t - 1/2)))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from esper.contracts.errors import InvalidInputError

BlendKind = Literal["linear", "cosine", "sigmoid"]
_STEEPNESS: Final = 12.0


def _sigmoid(share: float) -> float:
    def raw(at: float) -> float:
        return 1.0 / (1.0 + math.exp(-_STEEPNESS * (at - 0.5)))

    return (raw(share) - raw(0.0)) / (raw(1.0) - raw(0.0))


_SHAPES: Final[Mapping[str, Callable[[float], float]]] = {
    "linear": lambda share: share,
    "cosine": lambda share: (1.0 - math.cos(math.pi * share)) / 2.0,
    "sigmoid": _sigmoid,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class BlendSchedule:
    """A ramp of ``num_steps`` optimizer steps from ``start`` to ``end``.

    Raises:
        InvalidInputError: The kind is unknown, a bound leaves [0, 1], or there is no step.
    """

    kind: BlendKind = "cosine"
    """Shape of the ramp."""
    start: float = 0.0
    """Alpha before the first step, 0 to 1."""
    end: float
    """Alpha from the last step on, 0 to 1."""
    num_steps: int
    """Steps of the ramp, at least 1."""

    def __post_init__(self) -> None:
        if self.kind not in _SHAPES:
            raise InvalidInputError.of("blend.kind", f"be one of {', '.join(_SHAPES)}", self.kind)
        for name in ("start", "end"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise InvalidInputError.of(f"blend.{name}", "lie in [0, 1]", getattr(self, name))
        if self.num_steps < 1:
            raise InvalidInputError.of("blend.num_steps", "be at least 1 step", self.num_steps)

    def alpha_at(self, step: int) -> float:
        """Give alpha after ``step`` steps; clamped to the ramp's ends."""
        if step >= self.num_steps:
            return self.end
        share = max(0, step) / self.num_steps
        return self.start + (self.end - self.start) * _SHAPES[self.kind](share)

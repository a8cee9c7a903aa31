"""A circuit breaker: after a row of failures calls fail at once for a while, instead of each at its deadline."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Final

import grpc

from esper.contracts.errors import UnavailableError

log = logging.getLogger(__name__)

TRIPPING_CODES: Final = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED})
"""Outcomes that say the other side is away, frozen or drowned; every other answer proves that it lives."""


class CircuitBreaker:
    """Closed until ``failures`` calls in a row failed; then open, but for one call per ``cooldown_s`` that may try.

    The first answer closes it. A try that gives none (a quiet stream, a cancelled call) does not stand in the way of
    the next. Belongs to one event loop.
    """

    def __init__(
        self, target: str, *, failures: int, cooldown_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Make a closed breaker; ``failures`` of 0 makes one that never opens."""
        self._target = target
        self._bound = failures
        self._cooldown_s = cooldown_s
        self._clock = clock
        self._in_a_row = 0
        self._open_until_s: float | None = None

    @property
    def is_open(self) -> bool:
        """Whether calls fail at once now."""
        return self._open_until_s is not None and self._clock() < self._open_until_s

    def admit(self) -> None:
        """Let one call through.

        Raises:
            UnavailableError: the breaker is open.
        """
        if self._open_until_s is None:
            return
        left_s = self._open_until_s - self._clock()
        if left_s > 0:
            raise UnavailableError(
                f"{self._target} must answer again before it is called, got {self._in_a_row} failures in a row; "
                f"next try in {left_s:.2f} s",
                parameter="target",
            )
        self._open_until_s = self._clock() + self._cooldown_s

    def record(self, code: grpc.StatusCode) -> None:
        """Take the outcome of a call over; a call that its own caller cancelled says nothing."""
        if code is grpc.StatusCode.CANCELLED:
            return
        if code not in TRIPPING_CODES:
            if self._open_until_s is not None:
                log.info("breaker_closed", extra={"target": self._target})
            self._in_a_row, self._open_until_s = 0, None
            return
        self._in_a_row += 1
        if self._bound and self._in_a_row >= self._bound:
            if self._open_until_s is None:
                log.warning("breaker_opened", extra={"target": self._target, "failures": self._in_a_row})
            self._open_until_s = self._clock() + self._cooldown_s

"""What the slower cache tiers are asked for, and the circuit breaker before each of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import Enum
from typing import Protocol

from esper.contracts.errors import InvalidInputError


class KernelReader(Protocol):
    """A tier that gives artefact bytes; it proves nothing about them."""

    @property
    def bytes_held(self) -> int | None:
        """Bytes held; ``None`` where the tier does not say."""

    async def read(self, artifact_id: str) -> bytes:
        """Give the serialised artefact.

        Raises:
            NotFoundError: The tier has no such entry.
            CorruptDataError: The entry arrived damaged.
            UnavailableError: The tier cannot be reached.
        """

    async def close(self) -> None:
        """Let go of connections. Idempotent."""


class KernelTier(KernelReader, Protocol):
    """A tier that can also be written."""

    async def write(self, artifact_id: str, data: bytes) -> None:
        """Keep an artefact, all of it or nothing.

        Raises:
            StorageFullError: No room is left.
            CapacityExceededError: It is larger than the tier takes.
            UnavailableError: The tier cannot be reached.
        """

    async def erase(self, artifact_id: str) -> None:
        """Drop an entry; no error when there is none.

        Raises:
            UnavailableError: The tier cannot be reached.
        """


class BreakerState(Enum):
    """What a breaker lets through."""

    CLOSED = "closed"
    """Everything."""
    OPEN = "open"
    """Nothing, until its time is over."""
    HALF_OPEN = "half_open"
    """One call, to see whether the tier is back."""


class CircuitBreaker:
    """Keeps calls away from what failed several times in a row; opens for longer each time a trial call fails.

    Belongs to one event loop; reading ``state`` is safe from any thread.
    """

    def __init__(
        self,
        *,
        failures_to_open: int = 3,
        open_s: float = 1.0,
        max_open_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if failures_to_open < 1:
            raise InvalidInputError.of("failures_to_open", "be >= 1", failures_to_open)
        if not 0 < open_s <= max_open_s:
            raise InvalidInputError.of("open_s", "be > 0 seconds and at most max_open_s", open_s)
        self._failures_to_open = failures_to_open
        self._first_open_s = open_s
        self._max_open_s = max_open_s
        self._clock = clock
        self._failures = 0
        self._open_s = open_s
        self._opened_at: float | None = None
        self._trial_running = False

    @property
    def state(self) -> BreakerState:
        """What it lets through now."""
        if self._opened_at is None:
            return BreakerState.CLOSED
        if self._clock() - self._opened_at < self._open_s:
            return BreakerState.OPEN
        return BreakerState.HALF_OPEN

    def allow(self) -> bool:
        """Say whether a call may go through; one that may must end in `succeeded`, `failed` or `abandoned`."""
        state = self.state
        if state is BreakerState.CLOSED:
            return True
        if state is BreakerState.OPEN or self._trial_running:
            return False
        self._trial_running = True
        return True

    def succeeded(self) -> None:
        """The call got an answer: close."""
        self._failures = 0
        self._opened_at = None
        self._open_s = self._first_open_s
        self._trial_running = False

    def failed(self) -> bool:
        """The call got none; say whether this opened the breaker."""
        self._failures += 1
        was_open = self._opened_at is not None
        if was_open and self._trial_running:
            self._open_s = min(self._max_open_s, self._open_s * 2)
        if self._trial_running or (not was_open and self._failures >= self._failures_to_open):
            self._opened_at = self._clock()
        self._trial_running = False
        return not was_open and self._opened_at is not None

    def abandoned(self) -> None:
        """The call was given up by its caller; says nothing about the tier."""
        self._trial_running = False

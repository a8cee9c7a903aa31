"""Kernels that are at hand before their seeds are born."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from typing import Final

from esper.core.link import KernelArrival

MAX_EARLY: Final = 64
"""Kernels kept of adaptations that nobody has decided on yet."""
EPOCH_SHARE: Final = 4
"""A race begins within one part in so many of an epoch, if its kernels are at hand."""
MAX_REFUSED: Final = 256
"""Refused adaptations that are remembered: their kernels may still come."""


class KernelShelf:
    """Keeps kernels until their turn. Belongs to the training thread."""

    def __init__(self) -> None:
        self._early: dict[str, KernelArrival] = {}
        self._refused: deque[str] = deque(maxlen=MAX_REFUSED)
        self._in_turn: dict[str, KernelArrival] = {}

    @property
    def waiting(self) -> frozenset[str]:
        """Adaptations whose kernel waits for its turn."""
        return frozenset(self._in_turn)

    @property
    def early(self) -> frozenset[str]:
        """Adaptations that nobody has decided on yet, and whose kernel is here."""
        return frozenset(self._early)

    def keep_early(self, arrival: KernelArrival) -> None:
        """Keep the kernel of an adaptation that is not known yet; one that was refused is let go."""
        if arrival.ready.adaptation_id in self._refused:
            return
        self._early[arrival.ready.adaptation_id] = arrival
        while len(self._early) > MAX_EARLY:
            del self._early[next(iter(self._early))]

    def take_early(self, adaptation_id: str, *, refused: bool) -> KernelArrival | None:
        """Give the kernel that came before its decision, if it did; one that is refused gets none, now or later."""
        early = self._early.pop(adaptation_id, None)
        if refused:
            self._refused.append(adaptation_id)
            return None
        return early

    def keep_in_turn(self, arrival: KernelArrival) -> None:
        """Keep the kernel of a seed that is to be born when it is its turn."""
        self._in_turn[arrival.ready.adaptation_id] = arrival

    def num_due(self, steps_per_epoch: int) -> int:
        """Give how many seeds are born in this step: one, or more where a race would take most of an epoch to begin."""
        return math.ceil(len(self._in_turn) / max(1, steps_per_epoch // EPOCH_SHARE))

    def take_next(self, loading: Iterable[str]) -> KernelArrival | None:
        """Give the kernel of the first of these adaptations that has one; those of all others are let go."""
        order = [one for one in loading if one in self._in_turn]
        self._in_turn = {one: self._in_turn[one] for one in order}
        return self._in_turn.pop(order[0]) if order else None

"""The states of a seed; the legal steps between them live in the native table."""

from __future__ import annotations

from enum import IntEnum
from typing import Final


class SeedLifecycleState(IntEnum):
    """State of one seed; the numbers are those of the wire and of ``csrc/include/esper/lifecycle.h``."""

    DORMANT = 1
    LOADING = 2
    ACTIVE = 3
    EVALUATING = 4
    FOSSILIZED = 5
    ERROR = 6
    CULLED = 7
    EMBARGOED = 8


LIVE_STATES: Final = frozenset(
    {SeedLifecycleState.ACTIVE, SeedLifecycleState.EVALUATING, SeedLifecycleState.FOSSILIZED}
)
"""States in which a kernel stands in the layer."""

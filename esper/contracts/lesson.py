"""What a policy takes along from one adaptation: raw enough that another policy, or a later one, learns it anew."""

from __future__ import annotations

from dataclasses import dataclass

from esper.contracts.decision import AdaptationDecision
from esper.contracts.run import FieldReport


@dataclass(frozen=True, kw_only=True, slots=True)
class Lesson:
    """What the policy knows of one adaptation that has ended."""

    report: FieldReport
    """What became of it, as it was reported."""
    family: str = ""
    """Family of its blueprint's operators; empty when the blueprint was not known."""
    decision: AdaptationDecision | None = None
    """The decision that began it; ``None`` when it is not known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """What a policy has learned."""

    lessons: tuple[Lesson, ...]
    """In the order in which it was learned."""
    model_version: int
    """Version of the model of rewards that learned it; another learns it anew."""
    calibration_version: int
    """Version of the calibration that learned it."""
    num_unreadable: int = 0
    """Lessons that no longer read in its store, and are missing here."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportedMemory:
    """What became of lessons given to a policy; the three add up to them."""

    learned: int
    """New ones."""
    known: int
    """Known ones."""
    differing: int
    """Those whose report id is known with another content, which stands."""

"""What decisions hung on, as it is recorded, and what they come to when they are taken again."""

from __future__ import annotations

from dataclasses import dataclass

from esper.contracts.decision import AdaptationDecision


@dataclass(frozen=True, kw_only=True, slots=True)
class CandidatePlace:
    """One place of a run at which something could have grown."""

    layer: str
    """Dotted module name."""
    source: str = ""
    """Layer whose input would have been read; empty for its own."""
    menu: str
    """The place's ``CandidateMenu``: SHA-256 of its bytes, 64 hex digits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CandidateList:
    """What could have grown on one packet."""

    places: tuple[CandidatePlace, ...]
    """In the order in which they were offered."""
    layers: tuple[str, ...]
    """Layers for which candidates were asked for, sorted; at some there may be none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CandidateMenu:
    """What could have grown at one place."""

    blueprints: tuple[str, ...]
    """In the order in which they were offered: SHA-256 of the bytes of each, 64 hex digits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One setting of the policy."""

    name: str
    """Name, with those of the parts it belongs to before it, joined by dots."""
    values: tuple[float, ...]
    """Its numbers; one, unless it is a row of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SoftwareVersion:
    """Version of something that decisions are worked out with."""

    name: str
    """Name."""
    version: str
    """Version."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicySettings:
    """What the policy decided with."""

    settings: tuple[Setting, ...]
    """Its settings."""
    versions: tuple[SoftwareVersion, ...]
    """What it was worked out with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplayDifference:
    """Something that differs between then and now."""

    field: str
    """What, as a path of names."""
    recorded: str
    """What it was, in words; empty where there was nothing."""
    replayed: str
    """What it is now, in words; empty where there is nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplayedPacket:
    """The decisions on one packet, taken again."""

    sequence: int
    """Sequence of the state packet."""
    epoch: int
    """Epoch of that packet."""
    recorded: tuple[AdaptationDecision, ...]
    """What was decided then: one decision, or those of a race in order."""
    replayed: tuple[AdaptationDecision, ...]
    """What is decided now."""
    differences: tuple[ReplayDifference, ...] = ()
    """What differs between them; empty where all is equal to the bit."""
    num_candidates: int = 0
    """Candidates they were drawn from; 0 where none were asked for."""
    num_lessons: int = 0
    """Lessons the policy knew."""
    changes: tuple[ReplayDifference, ...] = ()
    """Settings and versions that are others now, told once for as long as those that are recorded stay."""

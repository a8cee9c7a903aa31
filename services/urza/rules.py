"""What the library takes: blueprint drafts, queries and pages, checked where they are made."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Final, Generic, TypeVar

from esper.contracts.blueprint import (
    BlueprintBounds,
    BlueprintIR,
    BlueprintMetadata,
    BlueprintState,
    Lineage,
    SiteKind,
)
from esper.contracts.errors import InvalidInputError
from esper.contracts.tag_expression import TagExpression
from esper.mesh.validation import require_name, require_range
from esper.services.urza.models import REGISTRY

T = TypeVar("T")

MAX_TAGS: Final = 32
MAX_PAGE_SIZE: Final = 500
DEFAULT_PAGE_SIZE: Final = 50
MAX_PAGE_BYTES: Final = 12 * 1024 * 1024
"""Most bytes of entries in one answer; a gRPC message holds 16 MiB."""
MAX_LINEAGE_DEPTH: Final = 100
MAX_PARENTS: Final = 16
MAX_ACTOR_CHARS: Final = 128
MAX_REASON_CHARS: Final = 500
MAX_FIGURE: Final = 2**63 - 1
"""Largest whole number that bounds a figure."""
_ENTRY_OVERHEAD_BYTES: Final = 8 * 1024
"""Allowance for what an entry holds beside its largest part, in bytes."""

NAME: Final = re.compile(r"[a-z0-9][a-z0-9_.-]{0,127}", re.ASCII)
"""Name of a blueprint."""
TAG: Final = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}", re.ASCII)
"""One tag."""
CONTENT_ID: Final = re.compile(r"[0-9a-f]{64}", re.ASCII)
"""Content id of a blueprint, or content key of a kernel."""
ARTIFACT_ID: Final = re.compile(r"k[0-9a-f]{32}", re.ASCII)
"""Id of a kernel."""
OPERATORS: Final = ("template", "mutation", "crossover", "simplification", "manual")
"""Ways to make a blueprint."""
FIRST_STATES: Final = (BlueprintState.DRAFT, BlueprintState.VALIDATED, BlueprintState.ACTIVE)
"""States in which a blueprint may be stored."""
NEXT_STATES: Final = {
    BlueprintState.DRAFT: (BlueprintState.VALIDATED,),
    BlueprintState.VALIDATED: (BlueprintState.ACTIVE,),
    BlueprintState.ACTIVE: (BlueprintState.DEPRECATED,),
    BlueprintState.DEPRECATED: (BlueprintState.RETIRED, BlueprintState.ACTIVE),
    BlueprintState.RETIRED: (),
}
"""Where each state leads; the library itself takes the way back from DEPRECATED for templates alone (`seeding`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BlueprintDraft:
    """A blueprint to be stored."""

    name: str
    """Name; the library gives the version."""
    ir: BlueprintIR
    """The graph; checked when it is stored."""
    metadata: BlueprintMetadata = field(default_factory=BlueprintMetadata)
    """Description, citation, tags, kinds."""
    lineage: Lineage = field(default_factory=Lineage)
    """Where it comes from."""
    state: BlueprintState = BlueprintState.DRAFT
    """State to store it in: DRAFT, VALIDATED or ACTIVE."""

    def __post_init__(self) -> None:
        require_blueprint_name("name", self.name)
        _check_metadata(self.metadata)
        _check_lineage(self.lineage)
        if self.state not in FIRST_STATES:
            allowed = ", ".join(state.name for state in FIRST_STATES)
            raise InvalidInputError.of("state", f"be one of {allowed} for a new blueprint", self.state.name)


@dataclass(frozen=True, kw_only=True, slots=True)
class BlueprintQuery:
    """Conditions that must all hold; an empty one always does."""

    all_tags: tuple[str, ...] = ()
    """Tags that must all be there."""
    any_tags: tuple[str, ...] = ()
    """Tags of which one must be there."""
    no_tags: tuple[str, ...] = ()
    """Tags that must not be there."""
    tags: TagExpression | None = None
    """Expression over tags that must hold."""
    states: tuple[BlueprintState, ...] = ()
    """States of which one must hold."""
    text: str = ""
    """Text that name or description must contain, in any case."""
    site_kind: SiteKind | None = None
    """Kind it must be meant for; a blueprint meant for every kind is meant for this one."""
    bounds: BlueprintBounds = field(default_factory=BlueprintBounds)
    """Bounds on figures; parameters and FLOPs at the reference site of ``site_kind``, or of any one kind without it."""

    def __post_init__(self) -> None:
        for name in ("all_tags", "any_tags", "no_tags"):
            require_tags(name, getattr(self, name))
        require_text("text", self.text, max_chars=128)
        if len(self.states) > len(BlueprintState):
            raise InvalidInputError.of("states", f"be at most {len(BlueprintState)}", len(self.states))
        _check_bounds(self.bounds)

    @property
    def scope(self) -> str:
        """What a page token of this query is bound to; equal for equal conditions in any order."""
        figures = (getattr(self.bounds, one.name) for one in fields(self.bounds))
        parts = (
            sorted(set(self.all_tags)),
            sorted(set(self.any_tags)),
            sorted(set(self.no_tags)),
            sorted({int(state) for state in self.states}),
            self.text.casefold(),
            int(self.site_kind or 0),
            str(self.tags or ""),
            [None if value is None else float(value) for value in figures],
        )
        return f"SearchBlueprints|{hashlib.sha256(repr(parts).encode()).hexdigest()}"


@dataclass(frozen=True, kw_only=True, slots=True)
class PageRequest:
    """Which page of a listing."""

    size: int = 0
    """Entries a page, 1 to 500; 0 means 50."""
    token: str = ""
    """Token of the page before; empty for the first."""

    def __post_init__(self) -> None:
        if not 0 <= self.size <= MAX_PAGE_SIZE:
            raise InvalidInputError.of("page_size", f"be 1 to {MAX_PAGE_SIZE}, or 0 for the default", self.size)

    @property
    def limit(self) -> int:
        """Entries to give."""
        return self.size or DEFAULT_PAGE_SIZE


@dataclass(frozen=True, kw_only=True, slots=True)
class Page(Generic[T]):
    """One page of a listing."""

    items: tuple[T, ...]
    """Its entries, in the listing's order."""
    next_token: str
    """Token of the next page; empty at the end."""


def fitting(sizes_bytes: Sequence[int]) -> int:
    """Give how many entries from the start fit one message; at least one where there is one."""
    held = 0
    for count, size in enumerate(sizes_bytes):
        held += size + _ENTRY_OVERHEAD_BYTES
        if count and held > MAX_PAGE_BYTES:
            return count
    return len(sizes_bytes)


def require_blueprint_name(parameter: str, value: str) -> str:
    """Give a name back if a blueprint may have it; one that reads as a content id would be ambiguous."""
    require_name(parameter, value, max_len=128, pattern=NAME)
    if CONTENT_ID.fullmatch(value):
        raise InvalidInputError.of(parameter, "not look like a content id", value)
    return value


def require_content_id(parameter: str, value: str) -> str:
    """Give a content id or content key back if it is one."""
    if not CONTENT_ID.fullmatch(value):
        raise InvalidInputError.of(parameter, "be 64 lower-case hex digits", value)
    return value


def require_artifact_id(parameter: str, value: str) -> str:
    """Give a kernel's id back if it is one."""
    if not ARTIFACT_ID.fullmatch(value):
        raise InvalidInputError.of(parameter, "be 'k' and 32 lower-case hex digits", value)
    return value


def require_tags(parameter: str, values: Sequence[str]) -> None:
    """Make sure there are at most 32 tags, each well formed and none twice."""
    if len(values) > MAX_TAGS:
        raise InvalidInputError(
            f"{parameter} must hold at most {MAX_TAGS} tags, got {len(values)}", parameter=parameter
        )
    for index, tag in enumerate(values):
        require_name(f"{parameter}[{index}]", tag, max_len=64, pattern=TAG)
    if len(set(values)) != len(values):
        twice = sorted({tag for tag in values if list(values).count(tag) > 1})
        raise InvalidInputError.of(parameter, "name every tag once", twice)


def person(actor: str) -> str:
    """Give the actor of a step back unless it is the library itself, whose steps its next release may take back."""
    if actor == REGISTRY:
        raise InvalidInputError.of("actor", f"not be {REGISTRY!r}, which is the library itself", actor)
    return actor


def require_text(parameter: str, value: str, *, max_chars: int) -> str:
    """Give text for people back if it is short enough and holds no control characters but new lines and tabs."""
    if len(value) > max_chars:
        raise InvalidInputError(
            f"{parameter} must be at most {max_chars} characters, got {len(value)}", parameter=parameter
        )
    for char in value:
        if (ord(char) < 0x20 and char not in "\n\t") or 0x7F <= ord(char) < 0xA0 or 0xD800 <= ord(char) < 0xE000:
            raise InvalidInputError.of(parameter, "hold no control characters", char)
    return value


def _check_metadata(metadata: BlueprintMetadata) -> None:
    require_tags("metadata.tags", metadata.tags)
    require_text("metadata.description", metadata.description, max_chars=2_000)
    require_text("metadata.citation", metadata.citation, max_chars=500)
    if len(set(metadata.site_kinds)) != len(metadata.site_kinds):
        raise InvalidInputError.of("metadata.site_kinds", "name every kind once", metadata.site_kinds)


def _check_bounds(bounds: BlueprintBounds) -> None:
    for figure, most in (("parameters", MAX_FIGURE), ("flops", MAX_FIGURE), ("latency_ms", None), ("success_rate", 1)):
        low, high = getattr(bounds, f"min_{figure}"), getattr(bounds, f"max_{figure}")
        for end, value in (("min", low), ("max", high)):
            if value is not None:
                require_range(f"bounds.{end}_{figure}", value, low=0, high=most)
        if low is not None and high is not None and low > high:
            raise InvalidInputError.of(f"bounds.min_{figure}", f"be at most bounds.max_{figure} ({high})", low)


def _check_lineage(lineage: Lineage) -> None:
    if len(lineage.parent_ids) > MAX_PARENTS:
        raise InvalidInputError.of("lineage.parent_ids", f"be at most {MAX_PARENTS}", len(lineage.parent_ids))
    for index, parent_id in enumerate(lineage.parent_ids):
        require_content_id(f"lineage.parent_ids[{index}]", parent_id)
    if len(set(lineage.parent_ids)) != len(lineage.parent_ids):
        raise InvalidInputError.of("lineage.parent_ids", "name every parent once", lineage.parent_ids)
    if lineage.operator not in OPERATORS:
        raise InvalidInputError.of("lineage.operator", f"be one of {', '.join(OPERATORS)}", lineage.operator)
    require_text("lineage.author", lineage.author, max_chars=MAX_ACTOR_CHARS)

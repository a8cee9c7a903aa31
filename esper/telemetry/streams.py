"""The streams of the bus, declared once: what is kept, where it is found, and within which bounds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

from esper.contracts.errors import InvalidInputError
from esper.telemetry.subjects import PREFIX, Kind, check_name, check_pattern, dead_subject, kind_patterns

_MIB: Final = 1024 * 1024
_DAY_S: Final = 86_400.0


class Retention(StrEnum):
    """When a stream lets a message go."""

    LIMITS = "limits"
    """Kept until the bounds push it out; any number of consumers read it."""
    WORK_QUEUE = "workqueue"
    """Kept until one consumer acknowledged it."""


class WhenFull(StrEnum):
    """What a full stream does with a new message."""

    DROP_OLDEST = "old"
    """Lets the oldest go."""
    REFUSE = "new"
    """Refuses the new one; the publisher gets ``CapacityExceededError``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamSpec:
    """One durable stream; two adapters build the same thing from it."""

    name: str
    """Its name, one token."""
    subjects: tuple[str, ...]
    """Patterns of the subjects it keeps."""
    retention: Retention = Retention.LIMITS
    """When it lets a message go."""
    when_full: WhenFull = WhenFull.DROP_OLDEST
    """What it does at its bounds."""
    max_bytes: int = 256 * _MIB
    """Most bytes it holds."""
    max_age_s: float = 30 * _DAY_S
    """Oldest message it holds, in seconds."""
    duplicate_window_s: float = 3600.0
    """How long a message id is remembered, in seconds; longer than any outage a publisher is to bridge."""
    replicas: int = 1
    """Copies on different servers: 1, 3 or 5."""

    def __post_init__(self) -> None:
        check_name("stream name", self.name)
        if not self.subjects:
            raise InvalidInputError.of("subjects", "name at least one pattern", self.subjects)
        for pattern in self.subjects:
            check_pattern(pattern)
        if self.max_bytes <= 0:
            raise InvalidInputError.of("max_bytes", "be > 0", self.max_bytes)
        if not 0 < self.duplicate_window_s <= self.max_age_s:
            raise InvalidInputError.of("duplicate_window_s", "be > 0 and at most max_age_s", self.duplicate_window_s)
        if self.replicas not in (1, 3, 5):
            raise InvalidInputError.of("replicas", "be 1, 3 or 5", self.replicas)

    def describe(self) -> str:
        """Give every setting in one line, for messages that show two specs side by side."""
        return (
            f"subjects={sorted(self.subjects)} retention={self.retention.value} when_full={self.when_full.value} "
            f"max_bytes={self.max_bytes} max_age_s={self.max_age_s:g} "
            f"duplicate_window_s={self.duplicate_window_s:g} replicas={self.replicas}"
        )


def _event_subjects() -> tuple[str, ...]:
    return tuple(pattern for kind in Kind if kind.durable for pattern in kind_patterns(kind))


EVENTS: Final = StreamSpec(name="EVENTS", subjects=_event_subjects(), max_bytes=1024 * _MIB)
"""What must not be lost about runs: states, decisions, plans, kernels, seeds, reports, alerts, control."""

COMPILE: Final = StreamSpec(
    name="COMPILE",
    subjects=(f"{PREFIX}.jobs.compile.>",),
    retention=Retention.WORK_QUEUE,
    when_full=WhenFull.REFUSE,
    max_age_s=_DAY_S,
)
"""Work queue of compile jobs: each goes to one worker until one acknowledged it."""

DEAD: Final = StreamSpec(
    name="DEAD", subjects=(dead_subject(EVENTS.name), dead_subject(COMPILE.name)), max_bytes=128 * _MIB
)
"""Messages nobody could process, with the reason in their headers."""

STREAMS: Final = (DEAD, EVENTS, COMPILE)
"""Every stream; DEAD first, so that a message always finds its last place."""


def streams_with_replicas(replicas: int) -> tuple[StreamSpec, ...]:
    """Give every stream with this many copies: 1 on one server, 3 or 5 on a cluster."""
    return tuple(replace(spec, replicas=replicas) for spec in STREAMS)

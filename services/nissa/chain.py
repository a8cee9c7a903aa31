"""The hash chain over a run's events: whoever changes, drops, adds or swaps one breaks every hash after it.

    hash(i) = SHA-256(domain || hash(i-1) || run id || position || kind || key || time || SHA-256(payload))

with every part preceded by its length in 8 bytes, and 32 zero bytes before the first. A chain cut short at its end is
still a chain: compare its head with one noted elsewhere, as a run report does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

GENESIS: Final = bytes(32)
"""Hash before the first event."""

_DOMAIN: Final = b"esper-audit-v1"


@dataclass(frozen=True, kw_only=True, slots=True)
class ChainedEvent:
    """One stored event with its place in the chain."""

    run_id: str
    """Run."""
    position: int
    """Place in the run's chain, from 1."""
    kind: str
    """Kind of the event, as in its subject."""
    key: str
    """Identity of the message in its stream."""
    recorded_us: int
    """When the stream or Nissa took it, in microseconds since 1970."""
    payload: bytes
    """The message's bytes."""
    previous: bytes
    """Hash of the event before, 32 bytes."""
    digest: bytes
    """Its own hash, 32 bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChainVerdict:
    """What became of a check."""

    intact: bool
    """Whether every hash holds."""
    length: int
    """Events that hold, from the first on."""
    head: bytes
    """Hash of the last event that holds; `GENESIS` for none."""
    reason: str = ""
    """What is wrong, in words; empty when intact."""


def seal(
    previous: bytes, *, run_id: str, position: int, kind: str, key: str, recorded_us: int, payload: bytes
) -> bytes:
    """Give the hash of an event that follows ``previous``."""
    digest = hashlib.sha256()
    parts = (
        _DOMAIN,
        previous,
        run_id.encode(),
        str(position).encode(),
        kind.encode(),
        key.encode(),
        str(recorded_us).encode(),
        hashlib.sha256(payload).digest(),
    )
    for part in parts:
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.digest()


def verify_chain(events: Iterable[ChainedEvent]) -> ChainVerdict:
    """Check a run's events in the order of their positions."""
    head, length = GENESIS, 0
    for event in events:
        expected = length + 1
        if event.position != expected:
            return _broken(length, head, f"position must be {expected}, got {event.position}")
        if event.previous != head:
            return _broken(length, head, f"event {expected} must follow {head.hex()}, got {event.previous.hex()}")
        digest = seal(
            head,
            run_id=event.run_id,
            position=event.position,
            kind=event.kind,
            key=event.key,
            recorded_us=event.recorded_us,
            payload=event.payload,
        )
        if event.digest != digest:
            return _broken(length, head, f"event {expected} must hash to {digest.hex()}, got {event.digest.hex()}")
        head, length = digest, expected
    return ChainVerdict(intact=True, length=length, head=head)


def _broken(length: int, head: bytes, reason: str) -> ChainVerdict:
    return ChainVerdict(intact=False, length=length, head=head, reason=reason)

"""What a checkpoint must know of a live seed to build it again: plain data, and its bytes."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from esper.contracts.blueprint import BlueprintIR, Site
from esper.contracts.errors import CorruptDataError
from esper.contracts.lifecycle import SeedLifecycleState
from esper.contracts.run import SeedStatus
from esper.contracts.wire import parse, serialize

_MAGIC: Final = b"esper-seed-2\n"
_FIRST_MAGIC: Final = b"esper-seed-1\n"
"""Of the format without a source."""
_LENGTH: Final = struct.Struct("<I")


@dataclass(frozen=True, kw_only=True, slots=True)
class GrownSeed:
    """One live seed as plain data; its weights travel in the model's ``state_dict``."""

    layer: str
    """Dotted module name."""
    seed_index: int
    """Seed within its layer."""
    state: SeedLifecycleState
    """Life-cycle state: one in which a kernel stands in the layer."""
    alpha: float
    """Blend factor, 0 to 1."""
    ir: bytes
    """Deterministic bytes of the blueprint's graph."""
    site: Site
    """Site the kernel was built for."""
    blueprint_id: str = ""
    """Content id of the blueprint; empty where none was given."""
    artifact_id: str = ""
    """Kernel it was loaded from; empty where it was built in place."""
    adaptation_id: str = ""
    """Adaptation it belongs to; empty where none was named."""
    source: str = ""
    """Layer whose input it reads as x; empty for its own."""

    def blueprint_ir(self) -> BlueprintIR:
        """Give the graph.

        Raises:
            CorruptDataError: The bytes are not a graph.
        """
        return parse(self.ir, BlueprintIR)

    def to_bytes(self) -> bytes:
        """Give the versioned bytes: magic, then six length-prefixed parts, the messages in deterministic form."""
        status = SeedStatus(
            seed_index=self.seed_index,
            state=self.state,
            alpha=self.alpha,
            blueprint_id=self.blueprint_id,
            adaptation_id=self.adaptation_id,
        )
        site, names = serialize(self.site), (self.artifact_id.encode(), self.source.encode())
        parts = (self.layer.encode(), serialize(status), self.ir, site, *names)
        return _MAGIC + b"".join(_LENGTH.pack(len(part)) + part for part in parts)

    @classmethod
    def from_bytes(cls, data: bytes) -> GrownSeed:
        """Read what :meth:`to_bytes` gave, or the first format did, which knew no source.

        Raises:
            CorruptDataError: The bytes are cut short, of another format, or a part does not parse.
        """
        is_first = data.startswith(_FIRST_MAGIC)
        found = _parts(data, _FIRST_MAGIC, 5) if is_first else _parts(data, _MAGIC, 6)
        layer, status_bytes, ir, site, artifact_id, source = (*found, b"")[:6]
        status = parse(status_bytes, SeedStatus)
        return cls(
            layer=_text(layer),
            seed_index=status.seed_index,
            state=status.state,
            alpha=status.alpha,
            ir=ir,
            site=parse(site, Site),
            blueprint_id=status.blueprint_id,
            artifact_id=_text(artifact_id),
            adaptation_id=status.adaptation_id,
            source=_text(source),
        )


def _parts(data: bytes, magic: bytes, count: int) -> list[bytes]:
    if not data.startswith(magic):
        raise CorruptDataError(f"a grown seed must begin with {magic!r}, got {data[: len(magic)]!r}")
    parts: list[bytes] = []
    at = len(magic)
    for _ in range(count):
        if at + _LENGTH.size > len(data):
            raise CorruptDataError(f"a grown seed must hold {count} parts, got {len(parts)} in {len(data)} bytes")
        (length,) = _LENGTH.unpack_from(data, at)
        at += _LENGTH.size
        if at + length > len(data):
            raise CorruptDataError(f"part {len(parts)} of a grown seed must have {length} bytes, got {len(data) - at}")
        parts.append(data[at : at + length])
        at += length
    if at != len(data):
        raise CorruptDataError(f"a grown seed must end after its parts, got {len(data) - at} more bytes")
    return parts


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise CorruptDataError(f"a grown seed's text must be UTF-8: {error}") from error

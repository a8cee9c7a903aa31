"""The envelope of a kernel, read where it lies: its parts are views of the serialised bytes, and none is copied.

A copy of some megabytes costs as much as hashing them, most of it spent on fresh pages. The one form that is read is
the deterministic serialisation of ``KernelArtifact``: fields in the order of their numbers, each once, empty ones left
out, sizes as short as they can be. Bytes that say the same in another way are refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from esper.contracts.errors import CorruptDataError
from esper.v1 import kernel_pb2

_LENGTH_DELIMITED: Final = 2
_TAGS: Final = tuple(
    (field.name, field.number << 3 | _LENGTH_DELIMITED)
    for field in sorted(kernel_pb2.KernelArtifact.DESCRIPTOR.fields, key=lambda field: field.number)
)
"""Names of the fields with the byte that each begins with; numbers above 15 would need another byte."""
assert all(tag < 0x80 for _, tag in _TAGS)
_VARINT_MASK: Final = 0x7F
_VARINT_MORE: Final = 0x80
_MAX_SIZE_BYTES: Final = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Envelope:
    """A kernel as it travels, nothing of it proven; the large parts hold on to the bytes that they were read from."""

    manifest: bytes
    """Serialised manifest, as signed."""
    signature: bytes
    """Ed25519 signature."""
    key_id: str
    """Id of the signing key."""
    ir: bytes
    """Canonical bytes of the IR."""
    weights: memoryview
    """Initial weights in safetensors format."""
    binary: memoryview
    """Compiled bytes."""


def read_envelope(data: bytes) -> Envelope:
    """Give the envelope of a serialised kernel, with nothing inside it parsed or proven.

    Raises:
        CorruptDataError: The data is no artefact, or not in its one form.
    """
    parts = _parts(data)
    try:
        key_id = str(parts["key_id"], "utf-8")
    except UnicodeDecodeError as error:
        raise CorruptDataError(f"key_id of an artefact must be text, got other bytes: {error.reason}") from error
    return Envelope(
        manifest=bytes(parts["manifest"]),
        signature=bytes(parts["signature"]),
        key_id=key_id,
        ir=bytes(parts["ir"]),
        weights=parts["weights"],
        binary=parts["binary"],
    )


def _parts(data: bytes) -> dict[str, memoryview]:
    whole = memoryview(data)
    parts: dict[str, memoryview] = {}
    place = 0
    for name, tag in _TAGS:
        end = place
        if place < len(data) and data[place] == tag:
            place, end = _extent(data, place + 1)
        parts[name] = whole[place:end]
        place = end
    if place != len(data):
        raise _not_its_form(place)
    return parts


def _extent(data: bytes, place: int) -> tuple[int, int]:
    """Give where the bytes of a field begin and end, from the place of its size on."""
    size = 0
    for index, byte in enumerate(data[place : place + _MAX_SIZE_BYTES]):
        size |= (byte & _VARINT_MASK) << 7 * index
        if not byte & _VARINT_MORE:
            begin = place + index + 1
            if byte == 0 or size > len(data) - begin:  # empty or drawn out, or more than there is
                break
            return begin, begin + size
    raise _not_its_form(place)


def _not_its_form(place: int) -> CorruptDataError:
    return CorruptDataError(f"artefact must be in its one serialised form, got bytes that are not, at {place}")

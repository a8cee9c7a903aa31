"""What a search reads of one blueprint, and the two forms it leaves in: a message for the wire, a value for the rest.

A blueprint rests as its wire bytes, so its message is put together without a dataclass between; a page of fifty takes
a millisecond, not twenty. The graph's bytes are held against the content id that they are known by.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Final, NamedTuple

from google.protobuf.message import DecodeError, Message
from google.protobuf.timestamp_pb2 import Timestamp

from esper.contracts import wire
from esper.contracts.blueprint import (
    Blueprint,
    BlueprintIR,
    BlueprintMetadata,
    BlueprintState,
    BlueprintStatistics,
    Lineage,
)
from esper.contracts.errors import CorruptDataError
from esper.services.urza.clock import moment_of
from esper.v1 import blueprint_pb2
from esper.v1 import urza_service_pb2 as pb

_MICROSECONDS: Final = 1_000_000
_LENGTH_DELIMITED: Final = 2
_MAX_TAG_NUMBER: Final = 15
_VARINT_MASK: Final = 0x7F
_VARINT_MORE: Final = 0x80
_PARTS: Final = tuple(
    (part, blueprint_pb2.Blueprint.DESCRIPTOR.fields_by_name[part].number) for part in ("ir", "metadata", "lineage")
)
"""Parts that rest as their wire bytes, with the numbers of their fields."""
_MESSAGES: Final[Mapping[str, type[Message]]] = {
    "metadata": blueprint_pb2.BlueprintMetadata,
    "lineage": blueprint_pb2.Lineage,
}
_MAX_KEPT_BYTES: Final = 4_096
"""Largest blueprint whose wire bytes are kept for the next answer that holds it."""
_BLUEPRINTS: Final = pb.SearchBlueprintsResponse.DESCRIPTOR.fields_by_name["blueprints"].number


class BlueprintRecord(NamedTuple):
    """One blueprint at rest, with what its reports add up to; fields in the order of `FIELDS`."""

    id: str
    name: str
    version: int
    state: int
    ir: bytes
    metadata: bytes
    lineage: bytes
    created_at_us: int
    trials: int | None
    """``None`` where no report came; then so are the rest."""
    kept: int | None
    contribution_sum: float | None
    contribution_count: int | None
    latency_ms_sum: float | None
    latency_count: int | None


FIELDS: Final = (
    "b.id, b.name, b.version, b.state, b.ir, b.metadata, b.lineage, b.created_at_us, "
    "s.trials, s.kept, s.contribution_sum, s.contribution_count, s.latency_ms_sum, s.latency_count"
)
"""Columns of a `BlueprintRecord`, in its order."""

SOURCE: Final = "urza_blueprints b LEFT JOIN urza_statistics s ON s.blueprint_id = b.id"
"""Tables in which `FIELDS` are found."""

LISTED: Final = "b.set_aside_at_us IS NULL"
"""Condition for those that a listing may hold: all that nobody has found to have rotted."""


def blueprint_of(record: BlueprintRecord) -> Blueprint:
    """Give the blueprint of a record.

    Raises:
        CorruptDataError: The graph is not the one that the id names, or a part does not parse.
    """
    return Blueprint(
        id=record.id,
        name=record.name,
        version=record.version,
        ir=_ir_of(_sound(record).ir),
        metadata=wire.from_wire(readable_part(record, "metadata"), BlueprintMetadata),
        lineage=wire.from_wire(readable_part(record, "lineage"), Lineage),
        state=BlueprintState(record.state),
        created_at=moment_of(record.created_at_us),
        statistics=_statistics_of(record),
    )


def message_of(record: BlueprintRecord) -> blueprint_pb2.Blueprint:
    """Give the message of a record: the one that `blueprint_of`'s value has on the wire.

    Raises:
        CorruptDataError: The graph is not the one that the id names, or a part does not parse.
    """
    try:
        return blueprint_pb2.Blueprint.FromString(_wire_of(record))
    except DecodeError as error:
        raise CorruptDataError(f"a part of {record.name}@{record.version} does not parse: {error}") from error


def page_message(records: Sequence[BlueprintRecord], next_page_token: str) -> pb.SearchBlueprintsResponse:
    """Give the answer of a search, parsed once from the stored bytes of all its blueprints.

    Raises:
        CorruptDataError: As `message_of`, of one of them.
    """
    try:
        answer = pb.SearchBlueprintsResponse.FromString(b"".join(_field(_BLUEPRINTS, _wire_of(one)) for one in records))
    except DecodeError:
        answer = pb.SearchBlueprintsResponse(blueprints=map(message_of, records))  # says which one is damaged
    answer.next_page_token = next_page_token
    return answer


def rot_of(record: BlueprintRecord) -> CorruptDataError | None:
    """Give what does not hold of a record; ``None`` for a sound one.

    A part that parses and breaks a rule is no rot: a newer build, which knows more kinds, may have written it.
    """
    try:
        _sound(record)
        for part in ("metadata", "lineage"):
            readable_part(record, part)
    except CorruptDataError as error:
        return error
    return None


def readable_part(record: BlueprintRecord, part: str) -> Message:
    """Give the message of a record's ``metadata`` or ``lineage``.

    Raises:
        CorruptDataError: It does not parse.
    """
    message_type = _MESSAGES[part]
    try:
        return message_type.FromString(getattr(record, part))
    except DecodeError as error:
        raise CorruptDataError(
            f"{part} of {record.name}@{record.version} must be as it was stored, it does not parse: {error}",
            parameter=part,
        ) from error


def mean(total: float, count: int) -> float | None:
    """Give the mean of ``count`` figures that add up to ``total``; ``None`` of none."""
    return total / count if count else None


def _sound(record: BlueprintRecord) -> BlueprintRecord:
    if hashlib.sha256(record.ir).hexdigest() != record.id:
        raise CorruptDataError(
            f"ir of {record.name}@{record.version} must be the graph that {record.id} names, it has changed at rest",
            parameter="ir",
        )
    return record


@lru_cache(maxsize=2_048)
def _ir_of(data: bytes) -> BlueprintIR:
    """Give the graph of stored bytes; the values are frozen, so sharing them is safe."""
    return wire.parse(data, BlueprintIR)


def _wire_of(record: BlueprintRecord) -> bytes:
    """Give the wire bytes of a record's message, with the proof that its graph is the one that its id names."""
    is_small = len(record.ir) + len(record.metadata) + len(record.lineage) <= _MAX_KEPT_BYTES
    return _kept_wire_of(record) if is_small else _new_wire_of(record)


def _new_wire_of(record: BlueprintRecord) -> bytes:
    """Put the wire bytes together: the parts as they rest, each behind its field's tag and size."""
    seconds, microseconds = divmod(_sound(record).created_at_us, _MICROSECONDS)
    rest = blueprint_pb2.Blueprint(
        id=record.id,
        name=record.name,
        version=record.version,
        state=blueprint_pb2.BlueprintState.ValueType(record.state),
        created_at=Timestamp(seconds=seconds, nanos=microseconds * 1_000),
        statistics=_statistics_message(record),
    )
    parts = (_field(number, getattr(record, part)) for part, number in _PARTS)
    return b"".join((rest.SerializeToString(), *parts))


# What is found here is equal to what was proven, to the byte, so one that rotted since is proven anew, and refused.
_kept_wire_of = lru_cache(maxsize=2_048)(_new_wire_of)


def _field(number: int, data: bytes) -> bytes:
    """Give a length-delimited field as the wire has it; numbers above 15 would need another byte."""
    assert number <= _MAX_TAG_NUMBER
    size = bytearray()
    left = len(data)
    while left > _VARINT_MASK:
        size.append(left & _VARINT_MASK | _VARINT_MORE)
        left >>= 7
    size.append(left)
    return bytes((number << 3 | _LENGTH_DELIMITED,)) + size + data


def _statistics_message(record: BlueprintRecord) -> blueprint_pb2.BlueprintStatistics | None:
    statistics = _statistics_of(record)
    if statistics is None:
        return None
    return blueprint_pb2.BlueprintStatistics(
        trials=statistics.trials,
        kept=statistics.kept,
        mean_contribution=statistics.mean_contribution,
        mean_latency_ms=statistics.mean_latency_ms,
    )


def _statistics_of(record: BlueprintRecord) -> BlueprintStatistics | None:
    if record.trials is None:
        return None
    return BlueprintStatistics(
        trials=record.trials,
        kept=record.kept or 0,
        mean_contribution=mean(record.contribution_sum or 0.0, record.contribution_count or 0),
        mean_latency_ms=mean(record.latency_ms_sum or 0.0, record.latency_count or 0),
    )

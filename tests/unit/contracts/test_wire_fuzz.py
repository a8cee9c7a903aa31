"""Bytes off the wire that nobody of ours wrote: they become a sound value, or a typed error; nothing else."""

from __future__ import annotations

import math
from typing import Any, Final

import pytest
from google.protobuf.message import Message
from hypothesis import given, settings
from hypothesis import strategies as st

from esper.contracts.errors import CorruptDataError, EsperError, InvalidInputError
from esper.contracts.run import SystemStatePacket
from esper.contracts.wire import from_wire, message_types, parse, serialize

CLASSES: Final = sorted(message_types(), key=lambda cls: cls.__name__)
_INTEGERS: Final = {
    "int32": (-(2**31), 2**31 - 1),
    "int64": (-(2**63), 2**63 - 1),
    "uint32": (0, 2**32 - 1),
    "uint64": (0, 2**64 - 1),
}
_MAX_DEPTH: Final = 4


def integers_of(kind: str) -> st.SearchStrategy[int]:
    low, high = _INTEGERS[kind]
    return st.one_of(st.integers(low, high), st.sampled_from((low, high, 0, 1)))


def scalars_of(fld: Any) -> st.SearchStrategy[Any]:
    """Give values of every kind that the field's type can carry, its ends among them."""
    if fld.enum_type is not None:
        return st.integers(-3, 12)
    if fld.type in (fld.TYPE_DOUBLE, fld.TYPE_FLOAT):
        return st.sampled_from((0.0, -0.0, 1.5, -1e30, math.inf, -math.inf, math.nan))
    if fld.type == fld.TYPE_BOOL:
        return st.booleans()
    if fld.type == fld.TYPE_STRING:
        return st.sampled_from(("", "a", "../k", "\x00", "é" * 9, "x" * 200))
    if fld.type == fld.TYPE_BYTES:
        return st.binary(max_size=16)
    unsigned = fld.type in (fld.TYPE_UINT32, fld.TYPE_UINT64, fld.TYPE_FIXED32, fld.TYPE_FIXED64)
    wide = fld.cpp_type in (fld.CPPTYPE_INT64, fld.CPPTYPE_UINT64)
    return integers_of(f"{'u' if unsigned else ''}int{'64' if wide else '32'}")


def fill(message: Message, data: st.DataObject, depth: int = 0) -> None:
    """Set some fields of a message to anything their types allow."""
    for fld in message.DESCRIPTOR.fields:
        is_map = fld.message_type is not None and fld.message_type.GetOptions().map_entry
        if is_map or not data.draw(st.integers(0, 3)):
            continue
        if fld.is_repeated:
            for _ in range(data.draw(st.integers(0, 2))):
                if fld.message_type is None:
                    getattr(message, fld.name).append(data.draw(scalars_of(fld)))
                elif depth < _MAX_DEPTH:
                    fill(getattr(message, fld.name).add(), data, depth + 1)
        elif fld.message_type is None:
            setattr(message, fld.name, data.draw(scalars_of(fld)))
        elif depth < _MAX_DEPTH:
            getattr(message, fld.name).SetInParent()
            fill(getattr(message, fld.name), data, depth + 1)


def taken(payload: bytes, cls: type) -> object | None:
    """Give the value of the bytes, which can be sent on as it was read; ``None`` where they are refused by type."""
    try:
        value: object = parse(payload, cls)
    except EsperError:
        return None
    assert serialize(parse(serialize(value), cls)) == serialize(value)
    return value


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_a_message_of_any_values_becomes_a_value_or_a_typed_error(cls: type, data: st.DataObject) -> None:
    message = message_types()[cls]()
    fill(message, data)
    taken(message.SerializeToString(), cls)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_damaged_bytes_become_a_value_or_a_typed_error(cls: type, data: st.DataObject) -> None:
    message = message_types()[cls]()
    fill(message, data)
    payload = bytearray(message.SerializeToString() or b"\x00")
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(payload)))
        match data.draw(st.sampled_from(("flip", "cut", "insert", "repeat"))):
            case "flip" if at < len(payload):
                payload[at] ^= 1 << data.draw(st.integers(0, 7))
            case "cut":
                del payload[at:]
            case "insert":
                payload[at:at] = data.draw(st.binary(min_size=1, max_size=8))
            case _:
                payload += payload[at:]
    taken(bytes(payload), cls)


@settings(max_examples=60, deadline=None)
@given(payload=st.binary(max_size=64))
def test_bytes_of_nothing_become_a_value_or_a_typed_error(payload: bytes) -> None:
    for cls in CLASSES:
        taken(payload, cls)


@pytest.mark.parametrize(
    ("seconds", "nanos"), [(2**62, 0), (-(2**62), 0), (0, -1), (0, 10**9), (253402300800, 0), (-62135596801, 0)]
)
def test_a_moment_outside_the_calendar_is_refused(seconds: int, nanos: int) -> None:
    message = message_types()[SystemStatePacket]()
    message.created_at.seconds = seconds
    message.created_at.nanos = nanos
    message.phase = 2
    with pytest.raises(InvalidInputError, match=r"SystemStatePacket.created_at must be a moment"):
        from_wire(message, SystemStatePacket)


def test_bytes_that_do_not_parse_are_corrupt() -> None:
    with pytest.raises(CorruptDataError, match="does not parse"):
        parse(b"\xff" * 9, SystemStatePacket)

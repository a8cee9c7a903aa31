"""The envelope read in place: exactly the bytes that are their own deterministic serialisation, and the same parts."""

from __future__ import annotations

import random

import pytest
from google.protobuf.message import DecodeError

from esper.contracts.errors import CorruptDataError
from esper.execution.envelope import read_envelope
from esper.v1 import kernel_pb2

PARTS = ("manifest", "signature", "key_id", "ir", "weights", "binary")


def message(**parts: object) -> kernel_pb2.KernelArtifact:
    given = {"manifest": b"m" * 300, "signature": b"s" * 64, "key_id": "0" * 16, "ir": b"ir", "weights": b"w" * 20_000}
    return kernel_pb2.KernelArtifact(**{**given, **parts})


def parsed(data: bytes) -> kernel_pb2.KernelArtifact | None:
    """Give the message of bytes in their one form, as protobuf itself sees them."""
    try:
        read = kernel_pb2.KernelArtifact.FromString(data)
    except DecodeError:
        return None
    plain = kernel_pb2.KernelArtifact(**{name: getattr(read, name) for name in PARTS})
    return read if plain.SerializeToString(deterministic=True) == data else None


@pytest.mark.parametrize("left_out", [(), ("weights",), ("binary", "weights"), PARTS])
def test_the_parts_are_those_of_the_message(left_out: tuple[str, ...]) -> None:
    whole = message(binary=b"b" * 200)
    for name in left_out:
        whole.ClearField(name)  # type: ignore[arg-type]
    read = read_envelope(whole.SerializeToString(deterministic=True))
    assert [(name, getattr(read, name)) for name in PARTS] == [(name, getattr(whole, name)) for name in PARTS]


def test_large_parts_lie_where_they_lay() -> None:
    data = message().SerializeToString(deterministic=True)
    assert read_envelope(data).weights.obj is data


@pytest.mark.parametrize(
    "data",
    [
        b"\x0a\x00",  # an empty field, said
        b"\x0a\x81\x00m",  # a size drawn out
        b"\x12\x01s\x0a\x01m",  # fields out of order
        b"\x0a\x01m\x0a\x01m",  # one field twice
        b"\x0a\x02m",  # more than there is
        b"\x0a\xff\xff\xff\xff\xff\x01m",  # a size beyond any
        b"\x0a",  # no size
        b"\x08\x01",  # a number for bytes
        b"\x3a\x01x",  # a field that nobody knows
        b"\x1a\x02\xff\xfe",  # text that is none
    ],
)
def test_another_form_is_refused(data: bytes) -> None:
    assert parsed(data) is None
    with pytest.raises(CorruptDataError, match=r"must be (in its one serialised form|text)"):
        read_envelope(data)


def test_it_takes_what_protobuf_gives_back_unchanged_and_nothing_else() -> None:
    drawn = random.Random(0)
    whole = message(weights=b"w" * 40, manifest=b"m" * 30, binary=b"b").SerializeToString(deterministic=True)
    taken = 0
    for _ in range(20_000):
        data = bytearray(whole)
        for _ in range(drawn.randint(0, 2)):
            place = drawn.randrange(len(data))
            data[place : place + drawn.randint(0, 2)] = drawn.randbytes(drawn.randint(0, 2))
        expected = parsed(bytes(data))
        if expected is None:
            with pytest.raises(CorruptDataError):
                read_envelope(bytes(data))
            continue
        read = read_envelope(bytes(data))
        assert [getattr(read, name) for name in PARTS] == [getattr(expected, name) for name in PARTS]
        taken += 1
    assert 1_000 < taken < 19_000

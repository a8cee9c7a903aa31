"""Chunks: what is cut comes back whole, and every kind of damage is found and named."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.contracts.chunks import Assembler, Chunk, split
from esper.contracts.errors import CapacityExceededError, CorruptDataError, InvalidInputError
from esper.v1 import urza_service_pb2

PAYLOAD = bytes(range(256)) * 5


def assembled(chunks: list[Chunk], *, max_bytes: int = 1 << 20) -> bytes:
    assembler = Assembler(max_bytes=max_bytes)
    for chunk in chunks:
        assembler.add(chunk)
    return assembler.finish()


@given(payload=st.binary(min_size=1, max_size=500), chunk_bytes=st.integers(1, 64))
def test_a_payload_comes_back_whole(payload: bytes, chunk_bytes: int) -> None:
    chunks = list(split(payload, chunk_bytes=chunk_bytes))
    assert all(len(chunk.data) <= chunk_bytes for chunk in chunks)
    assert assembled(chunks) == payload


@given(payload=st.binary(min_size=1, max_size=300), share=st.floats(0, 1), chunk_bytes=st.integers(1, 64))
def test_a_transfer_goes_on_where_it_broke(payload: bytes, share: float, chunk_bytes: int) -> None:
    first = list(split(payload, chunk_bytes=chunk_bytes))
    assembler = Assembler(max_bytes=len(payload))
    for chunk in first[: int(share * len(first))]:
        assembler.add(chunk)
    for chunk in split(payload, chunk_bytes=chunk_bytes, offset=assembler.offset):
        assembler.add(chunk)
    assert assembler.finish() == payload


def test_nothing_left_is_one_empty_chunk() -> None:
    (chunk,) = split(PAYLOAD, offset=len(PAYLOAD))
    assert (chunk.offset, chunk.data, chunk.total_bytes) == (len(PAYLOAD), b"", len(PAYLOAD))


def test_wire_messages_are_chunks() -> None:
    assembler = Assembler(max_bytes=len(PAYLOAD))
    for chunk in split(PAYLOAD, chunk_bytes=100):
        assembler.add(urza_service_pb2.UploadKernelRequest(**dataclasses.asdict(chunk)))
    assert assembler.complete
    assert assembler.finish() == PAYLOAD


def test_the_bytes_of_a_chunk_are_taken_out_once() -> None:
    """A message copies them every time: five times a chunk cost more than to hash it."""

    class Counted:
        total_bytes, offset = len(PAYLOAD), 0
        times = 0

        def __init__(self, chunk: Chunk) -> None:
            self.sha256, self.crc32, self._data = chunk.sha256, chunk.crc32, chunk.data

        @property
        def data(self) -> bytes:
            self.times += 1
            return self._data

    [chunk] = split(PAYLOAD)
    counted = Counted(chunk)
    assembler = Assembler(max_bytes=len(PAYLOAD))
    assembler.add(counted)
    assert assembler.finish() == PAYLOAD
    assert counted.times == 1


def test_a_flipped_bit_is_found_in_its_chunk() -> None:
    chunks = list(split(PAYLOAD, chunk_bytes=512))
    chunks[1] = dataclasses.replace(chunks[1], data=bytes([chunks[1].data[0] ^ 1]) + chunks[1].data[1:])
    with pytest.raises(CorruptDataError, match="crc32 must match the data of the chunk at offset 512"):
        assembled(chunks)


def test_a_false_digest_is_found_at_the_end() -> None:
    chunks = [dataclasses.replace(chunk, sha256=bytes(32)) for chunk in split(PAYLOAD)]
    with pytest.raises(CorruptDataError, match="sha256 must match the 1280 bytes of the whole"):
        assembled(chunks)


def test_a_lost_chunk_is_found() -> None:
    chunks = list(split(PAYLOAD, chunk_bytes=512))
    with pytest.raises(CorruptDataError, match="offset must be 512, where the chunk before ended, got 1024"):
        assembled([chunks[0], chunks[2]])


def test_a_repeated_chunk_is_found() -> None:
    chunks = list(split(PAYLOAD, chunk_bytes=512))
    with pytest.raises(CorruptDataError, match="offset must be 512"):
        assembled([chunks[0], chunks[0]])


def test_a_missing_end_is_found() -> None:
    with pytest.raises(CorruptDataError, match="must hold 1280 bytes as announced, got 512"):
        assembled(list(split(PAYLOAD, chunk_bytes=512))[:1])


def test_no_chunk_at_all_is_not_a_payload() -> None:
    with pytest.raises(CorruptDataError, match="must hold an unknown number of bytes as announced, got 0"):
        assembled([])


def test_more_than_announced_is_refused() -> None:
    chunks = [dataclasses.replace(chunk, total_bytes=600) for chunk in split(PAYLOAD, chunk_bytes=512)]
    with pytest.raises(CorruptDataError, match="must hold 600 bytes as announced, got more at offset 512"):
        assembled(chunks)


def test_a_whole_beyond_the_bound_is_refused_at_its_first_chunk() -> None:
    with pytest.raises(CapacityExceededError, match="total_bytes must be at most 1279 bytes, got 1280"):
        assembled(list(split(PAYLOAD)), max_bytes=1279)


def test_a_chunk_beyond_the_bound_is_refused() -> None:
    assembler = Assembler(max_bytes=len(PAYLOAD), max_chunk_bytes=100)
    with pytest.raises(InvalidInputError, match="data must be at most 100 bytes a chunk, got 1280 bytes"):
        assembler.add(next(split(PAYLOAD)))


def test_the_first_chunk_must_name_size_and_digest() -> None:
    (chunk,) = split(PAYLOAD)
    with pytest.raises(InvalidInputError, match="total_bytes must be > 0 in the first chunk, got 0"):
        assembled([dataclasses.replace(chunk, total_bytes=0)])
    with pytest.raises(InvalidInputError, match="sha256 must be 32 bytes in the first chunk"):
        assembled([dataclasses.replace(chunk, sha256=b"short")])


@pytest.mark.parametrize(("chunk_bytes", "offset"), [(0, 0), (1024 * 1024 + 1, 0)])
def test_a_chunk_size_out_of_range_is_refused(chunk_bytes: int, offset: int) -> None:
    with pytest.raises(InvalidInputError, match=r"chunk_bytes must be within \[1, 1048576\] bytes"):
        split(PAYLOAD, chunk_bytes=chunk_bytes, offset=offset)


def test_an_offset_beyond_the_payload_is_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"offset must be within \[0, 1280\] bytes, got 1281"):
        split(PAYLOAD, offset=1281)

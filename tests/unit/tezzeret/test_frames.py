"""Frames between pool and worker: whole, bounded, of a known kind."""

from __future__ import annotations

import io

import pytest

from esper.contracts.errors import CapacityExceededError, CorruptDataError
from esper.services.tezzeret import frames
from esper.services.tezzeret.frames import HEADER, FrameKind, pack_frame, parse_header, read_frame


def test_frames_come_back_in_order() -> None:
    stream = io.BytesIO(pack_frame(FrameKind.JOB, b"spec") + pack_frame(FrameKind.READY))
    assert read_frame(stream) == (FrameKind.JOB, b"spec")
    assert read_frame(stream) == (FrameKind.READY, b"")
    assert read_frame(stream) is None


def test_a_stream_that_ends_within_a_frame_is_damage() -> None:
    whole = pack_frame(FrameKind.ARTIFACT, b"kernel")
    with pytest.raises(CorruptDataError, match="ended within its header"):
        read_frame(io.BytesIO(whole[:3]))
    with pytest.raises(CorruptDataError, match="must hold 6 bytes, the stream ended after 2"):
        read_frame(io.BytesIO(whole[:7]))


def test_what_is_no_frame_is_refused() -> None:
    with pytest.raises(CorruptDataError, match="must be one of J, S, R, P, A, E, got b'h'"):
        parse_header(b"hello")
    with pytest.raises(CorruptDataError, match="must be at most"):
        parse_header(HEADER.pack(b"A", frames.MAX_FRAME_BYTES + 1))


def test_a_payload_beyond_the_bound_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "MAX_FRAME_BYTES", 4)
    with pytest.raises(CapacityExceededError, match="at most 4 bytes, got 5 bytes"):
        pack_frame(FrameKind.JOB, b"12345")

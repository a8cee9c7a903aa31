"""Messages between the pool and a worker process: one byte of kind, four of length, one protobuf message.

J  CompileSpec       pool to worker: compile this
S  ValidationCheck   worker to pool: one protection, and whether the system enforces it
R  (empty)           worker to pool: warm and ready
P  CompileJob        worker to pool: a phase begins (``phase``)
A  KernelArtifact    worker to pool: the kernel, without a signature
E  CompileJob        worker to pool: it failed (``error``, ``error_reason``)
"""

from __future__ import annotations

import struct
from enum import Enum
from typing import BinaryIO, Final

from esper.contracts.errors import CapacityExceededError, CorruptDataError

MAX_FRAME_BYTES: Final = 258 * 1024 * 1024
"""Longest message, in bytes; a little more than the largest artefact."""
HEADER: Final = struct.Struct(">cI")
"""Kind and length."""


class FrameKind(Enum):
    """What a frame holds."""

    JOB = b"J"
    SANDBOX = b"S"
    READY = b"R"
    PHASE = b"P"
    ARTIFACT = b"A"
    ERROR = b"E"


def pack_frame(kind: FrameKind, payload: bytes = b"") -> bytes:
    """Give the bytes of one frame.

    Raises:
        CapacityExceededError: The payload is longer than ``MAX_FRAME_BYTES``.
    """
    if len(payload) > MAX_FRAME_BYTES:
        raise CapacityExceededError(f"frame must be at most {MAX_FRAME_BYTES} bytes, got {len(payload)} bytes")
    return HEADER.pack(kind.value, len(payload)) + payload


def parse_header(header: bytes) -> tuple[FrameKind, int]:
    """Give kind and payload length.

    Raises:
        CorruptDataError: The kind is unknown or the length beyond the bound.
    """
    kind, size = HEADER.unpack(header)
    try:
        found = FrameKind(kind)
    except ValueError as error:
        raise CorruptDataError(f"frame kind must be one of J, S, R, P, A, E, got {kind!r}") from error
    if size > MAX_FRAME_BYTES:
        raise CorruptDataError(f"frame must be at most {MAX_FRAME_BYTES} bytes, got {size} bytes")
    return found, size


def read_frame(stream: BinaryIO) -> tuple[FrameKind, bytes] | None:
    """Give the next frame of a blocking stream, ``None`` at its end.

    Raises:
        CorruptDataError: The stream ends within a frame, or holds something else.
    """
    header = stream.read(HEADER.size)
    if not header:
        return None
    if len(header) < HEADER.size:
        raise CorruptDataError("frame must be whole, the stream ended within its header")
    kind, size = parse_header(header)
    payload = stream.read(size)
    if len(payload) < size:
        raise CorruptDataError(f"frame must hold {size} bytes, the stream ended after {len(payload)}")
    return kind, payload

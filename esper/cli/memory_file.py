"""What a policy has learned, as a file: one line of JSON, then every lesson after its length (4 bytes, big-endian).

    {"format": "esper-memory", "version": 1, "model_version": 2, "calibration_version": 2, "lessons": 17, "sha256": "…"}

Lessons are ``esper.v1.Lesson`` as protobuf writes them. The digest is over the whole file with an empty ``sha256``, so
that a file that was changed anywhere, or cut, is refused before anything of it is used.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import BinaryIO, Final

from esper.contracts.errors import CorruptDataError, InvalidInputError
from esper.contracts.lesson import Lesson, Memory
from esper.contracts.wire import parse, serialize

FORMAT: Final = "esper-memory"
"""What stands as ``format`` in the first line."""
VERSION: Final = 1
"""Version of the file's form; of what it holds, the models' versions tell."""

_MAX_LINE: Final = 1_024
_LENGTH: Final = struct.Struct(">I")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Header:
    """The first line."""

    format: str = FORMAT
    version: int = VERSION
    model_version: int
    calibration_version: int
    lessons: int
    sha256: str = ""

    def line(self) -> bytes:
        return json.dumps(asdict(self)).encode() + b"\n"

    def signed(self, body: bytes) -> _Header:
        """Give the header with the digest of the file that it would head without."""
        unsigned = replace(self, sha256="").line()
        return replace(self, sha256=hashlib.sha256(unsigned + body).hexdigest())


def encode_memory(memory: Memory) -> bytes:
    """Give the file of a memory; equal memories give equal bytes."""
    lessons = [serialize(lesson) for lesson in memory.lessons]
    body = b"".join(_LENGTH.pack(len(data)) + data for data in lessons)
    header = _Header(
        model_version=memory.model_version, calibration_version=memory.calibration_version, lessons=len(lessons)
    )
    return header.signed(body).line() + body


def decode_memory(file: BinaryIO) -> Memory:
    """Give the memory that a file holds; reads no further than the first line where that says it is another file.

    Raises:
        CorruptDataError: It is no memory file, or one that was changed or cut.
        InvalidInputError: Its form is of another version; or a lesson breaks a rule.
    """
    line = file.readline(_MAX_LINE)
    header = _read_header(line)
    body = file.read()
    if header.line() != line or header.signed(body) != header:
        raise CorruptDataError(
            f"memory file must have the SHA-256 it names, {header.sha256!r}, got another: it is damaged"
        )
    return Memory(
        lessons=tuple(parse(data, Lesson) for data in _cut(body, header.lessons)),
        model_version=header.model_version,
        calibration_version=header.calibration_version,
    )


def _read_header(line: bytes) -> _Header:
    try:
        found = json.loads(line)
        if found["format"] != FORMAT:
            raise CorruptDataError(f"memory file must have format {FORMAT!r}, got {found['format']!r}")
        if found["version"] != VERSION:
            raise InvalidInputError.of("version of the memory file", f"be {VERSION}", found["version"])
        return _Header(**{field.name: found[field.name] for field in fields(_Header)})
    except (CorruptDataError, InvalidInputError):
        raise
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise CorruptDataError(f"memory file must begin with its line of JSON, got {line[:80]!r}") from error


def _cut(body: bytes, num_lessons: int) -> Iterator[bytes]:
    """Give the bytes of each lesson."""
    place = 0
    for number in range(num_lessons):
        start = place + _LENGTH.size
        place = start + int.from_bytes(body[place:start], "big")
        if place > len(body) or start > len(body):
            raise CorruptDataError(f"memory file must hold {num_lessons} lessons, got {number} whole ones")
        yield body[start:place]
    if place != len(body):
        raise CorruptDataError(f"memory file must end after {num_lessons} lessons, got {len(body) - place} bytes more")

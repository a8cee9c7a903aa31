"""Memory files: what was written comes back, and what was changed, cut or never was one is refused."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from esper.cli.memory_file import decode_memory, encode_memory
from esper.contracts.blueprint import Site, SiteKind
from esper.contracts.decision import AdaptationDecision, AdaptationType, CurveState
from esper.contracts.errors import CorruptDataError, InvalidInputError
from esper.contracts.lesson import Lesson, Memory
from esper.contracts.run import AdaptationOutcome, Contribution, FieldReport

MOMENT = datetime(2026, 1, 1, tzinfo=UTC)
REPORT = FieldReport(
    report_id="r1",
    adaptation_id="a1",
    run_id="run-1",
    layer="head",
    seed_index=0,
    site=Site(kind=SiteKind.LINEAR, input_shape=(8,), output_shape=(4,)),
    outcome=AdaptationOutcome.KEPT,
    contribution=Contribution(estimate=0.1, low=0.05, high=0.15, num_examples=9),
    created_at=MOMENT,
)
DECISION = AdaptationDecision(
    adaptation_id="a1",
    run_id="run-1",
    state_sequence=3,
    epoch=3,
    adaptation_type=AdaptationType.ADD_SEED,
    confidence=0.5,
    urgency=0.5,
    curve_state=CurveState.PLATEAU,
    created_at=MOMENT,
)
MEMORY = Memory(
    lessons=(
        Lesson(report=REPORT, family="conv", decision=DECISION),
        Lesson(report=replace(REPORT, report_id="r2")),
    ),
    model_version=2,
    calibration_version=3,
)


def read(data: bytes) -> Memory:
    return decode_memory(io.BytesIO(data))


def written(header: dict[str, object], body: bytes) -> bytes:
    """Give a file whose digest holds, whatever else it says."""
    line = json.dumps({**header, "sha256": ""}).encode() + b"\n"
    return json.dumps({**header, "sha256": hashlib.sha256(line + body).hexdigest()}).encode() + b"\n" + body


def parts(data: bytes) -> tuple[dict[str, object], bytes]:
    line, _, body = data.partition(b"\n")
    return json.loads(line), body


@pytest.mark.parametrize("memory", [MEMORY, replace(MEMORY, lessons=())])
def test_what_was_written_comes_back(memory: Memory) -> None:
    data = encode_memory(memory)
    assert read(data) == memory
    assert encode_memory(read(data)) == data
    header, body = parts(data)
    assert list(header) == ["format", "version", "model_version", "calibration_version", "lessons", "sha256"]
    assert header["lessons"] == len(memory.lessons)
    assert written(header, body) == data


@pytest.mark.parametrize("mask", [0x01, 0x20, 0xFF])
def test_a_file_with_any_byte_changed_is_refused(mask: int) -> None:
    data = encode_memory(MEMORY)
    for place in range(len(data)):
        damaged = data[:place] + bytes([data[place] ^ mask]) + data[place + 1 :]
        with pytest.raises((CorruptDataError, InvalidInputError), match="memory file must"):
            read(damaged)


def test_a_file_cut_anywhere_or_made_longer_is_refused() -> None:
    data = encode_memory(MEMORY)
    for size in range(len(data)):
        with pytest.raises(CorruptDataError, match="memory file must"):
            read(data[:size])
    with pytest.raises(CorruptDataError, match="must have the SHA-256 it names"):
        read(data + b"\0")


@pytest.mark.parametrize("version", [0, 2, "1"])
def test_a_form_of_another_version_is_refused_by_name(version: object) -> None:
    header, body = parts(encode_memory(MEMORY))
    with pytest.raises(InvalidInputError, match=f"version of the memory file must be 1, got {version!r}"):
        read(written({**header, "version": version}, body))


@pytest.mark.parametrize("version", [1, 99])
def test_models_of_another_version_are_no_matter(version: int) -> None:
    header, body = parts(encode_memory(MEMORY))
    found = read(written({**header, "model_version": version, "calibration_version": version}, body))
    assert found == replace(MEMORY, model_version=version, calibration_version=version)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header, body: (header | {"lessons": 3}, body), "must hold 3 lessons, got 2 whole ones"),
        (lambda header, body: (header, body[:-1]), "must hold 2 lessons, got 1 whole ones"),
        (lambda header, body: (header, body[:2]), "must hold 2 lessons, got 0 whole ones"),
        (lambda header, body: (header | {"lessons": 0}, body[:5]), "must end after 0 lessons, got 5 bytes more"),
        (lambda header, _: (header | {"lessons": 1}, b"\0\0\0\2\xff\xff"), "does not parse"),
    ],
)
def test_a_body_that_is_not_what_its_header_says_is_refused(
    change: Callable[..., tuple[dict[str, object], bytes]], message: str
) -> None:
    with pytest.raises(CorruptDataError, match=message):
        read(written(*change(*parts(encode_memory(MEMORY)))))


@pytest.mark.parametrize(
    "data", [b"", b"\n", b"null\n", b"[1]\n", b'{"version": 1}\n', b"[" * 5_000, b"\x89PNG\r\n", b'{"format": "x"}\n']
)
def test_another_file_is_refused_by_its_first_line(data: bytes) -> None:
    file = io.BytesIO(data + b"\n" + b"x" * 10_000)
    with pytest.raises(CorruptDataError, match=r"memory file must (begin with its line of JSON|have format)"):
        decode_memory(file)
    assert file.tell() <= 1_024

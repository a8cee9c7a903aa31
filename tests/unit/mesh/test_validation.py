"""Rules for request fields: what passes, and what the refusal says."""

from __future__ import annotations

import enum
from typing import Any

import pytest
from google.protobuf import descriptor_pb2

from esper.contracts.errors import InvalidInputError
from esper.mesh import (
    require_enum,
    require_id,
    require_name,
    require_page_size,
    require_range,
    require_size,
    require_tags,
)
from esper.mesh.validation import MAX_PAGE_SIZE

LABEL = descriptor_pb2.FieldDescriptorProto.Label


def test_good_names_and_ids_pass_unchanged() -> None:
    assert require_name("layer", "features.0 conv/a") == "features.0 conv/a"
    assert require_id("artifact_id", "kernel_123:v2") == "kernel_123:v2"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("", "layer must be 1 to 8 characters long, got ''"),
        ("x" * 9, "layer must be 1 to 8 characters long, got 'xxxxxxxxx'"),
        ("a\nb", r"layer must match .*, got 'a\\nb'"),
        ("ü", "layer must match"),
        ("../etc", "layer must match"),
    ],
)
def test_bad_names_are_refused(value: str, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message) as caught:
        require_name("layer", value, max_len=8)
    assert caught.value.parameter == "layer"


@pytest.mark.parametrize("value", ["../../etc/passwd", "a/b", ".hidden", "a b", "a\x00", "-rf"])
def test_ids_that_could_be_paths_or_options_are_refused(value: str) -> None:
    with pytest.raises(InvalidInputError, match="artifact_id must match"):
        require_id("artifact_id", value)


def test_known_enum_value_passes() -> None:
    assert require_enum("label", LABEL, 1) == 1


@pytest.mark.parametrize(("value", "shown"), [(0, "got 0"), (99, "got 99"), (-1, "got -1")])
def test_zero_and_unknown_enum_values_are_refused(value: int, shown: str) -> None:
    with pytest.raises(InvalidInputError, match=f"label must be one of LABEL_OPTIONAL, .*{shown}"):
        require_enum("label", LABEL, value)


def test_unspecified_is_shown_by_its_name() -> None:
    class Kind(enum.IntEnum):
        KIND_UNSPECIFIED = 0
        KIND_A = 1

        @classmethod
        def items(cls) -> Any:
            return [(kind.name, kind.value) for kind in cls]

    with pytest.raises(InvalidInputError, match="kind must be one of KIND_A, got 'KIND_UNSPECIFIED'"):
        require_enum("kind", Kind, 0)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (None, 1.0), (0.0, None), (None, None)])
def test_value_in_range_passes(low: float | None, high: float | None) -> None:
    assert require_range("alpha", 0.5, low=low, high=high) == 0.5


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (-0.1, r"alpha must be finite and within \[0.0, 1.0\] s, got -0.1"),
        (1.1, r"got 1.1"),
        (float("nan"), "got nan"),
        (float("inf"), "got inf"),
    ],
)
def test_value_out_of_range_is_refused(value: float, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        require_range("alpha", value, low=0.0, high=1.0, unit="s")


def test_infinite_is_refused_even_with_open_ends() -> None:
    with pytest.raises(InvalidInputError, match=r"alpha must be finite and within \(-inf, inf\), got inf"):
        require_range("alpha", float("inf"))


@pytest.mark.parametrize(("asked", "given"), [(0, 100), (1, 1), (10**9, MAX_PAGE_SIZE)])
def test_page_size_is_defaulted_and_capped(asked: int, given: int) -> None:
    assert require_page_size(asked) == given


def test_negative_page_size_is_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"page_size must be at least 0 .*, got -1"):
        require_page_size(-1)


def test_good_tags_pass_in_order() -> None:
    assert require_tags(["conv2d", "optimized"]) == ("conv2d", "optimized")


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        (["a"] * 33, "tags must hold at most 32 tags, got 33"),
        (["ok", "NOT OK"], r"tags\[1\] must match"),
        (["a", "b", "a"], r"tags must name every tag once, got \['a'\]"),
    ],
)
def test_bad_tags_are_refused(tags: list[str], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        require_tags(tags)


def test_size_counts_bytes() -> None:
    require_size("note", "üü", max_bytes=4)
    with pytest.raises(InvalidInputError, match="note must be at most 3 bytes, got 4 bytes"):
        require_size("note", "üü", max_bytes=3)
    with pytest.raises(InvalidInputError, match="chunk must be at most 1 bytes, got 2 bytes"):
        require_size("chunk", b"ab", max_bytes=1)

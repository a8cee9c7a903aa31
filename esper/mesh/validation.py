"""Rules for request fields, to be applied before any work; each breach is an `InvalidInputError` naming the field."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any, Final, TypeVar

from esper.contracts.errors import InvalidInputError

MAX_NAME_LENGTH: Final = 128
MAX_PAGE_SIZE: Final = 1000
DEFAULT_PAGE_SIZE: Final = 100
MAX_TAGS: Final = 32

NAME_PATTERN: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:/ -]*")
"""Names given by people: layers, blueprints, runs."""

ID_PATTERN: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:-]*")
"""Identities: no slash, no space, no leading dot, so none can be read as a path."""

TAG_PATTERN: Final = re.compile(r"[a-z0-9][a-z0-9_.:-]*")

_Number = TypeVar("_Number", int, float)


def require_name(
    parameter: str, value: str, *, max_len: int = MAX_NAME_LENGTH, pattern: re.Pattern[str] = NAME_PATTERN
) -> str:
    """Give ``value`` back when it is a name of 1 to ``max_len`` characters that ``pattern`` matches as a whole."""
    if not 0 < len(value) <= max_len:
        raise InvalidInputError.of(parameter, f"be 1 to {max_len} characters long", value)
    if pattern.fullmatch(value) is None:
        raise InvalidInputError.of(parameter, f"match {pattern.pattern}", value)
    return value


def require_id(parameter: str, value: str, *, max_len: int = MAX_NAME_LENGTH) -> str:
    """Give ``value`` back when it is a well-formed identity."""
    return require_name(parameter, value, max_len=max_len, pattern=ID_PATTERN)


def require_enum(parameter: str, enum_cls: Any, value: int) -> int:
    """Give ``value`` back when the generated protobuf enum knows it and it is not the ``_UNSPECIFIED`` zero."""
    names = {number: name for name, number in enum_cls.items()}
    if value == 0 or value not in names:
        allowed = ", ".join(name for number, name in sorted(names.items()) if number != 0)
        raise InvalidInputError.of(parameter, f"be one of {allowed}", names.get(value, value))
    return value


def require_range(
    parameter: str, value: _Number, *, low: float | None = None, high: float | None = None, unit: str = ""
) -> _Number:
    """Give ``value`` back when it is finite and within ``[low, high]``; an end that is ``None`` is open."""
    finite = math.isfinite(value)
    if not finite or (low is not None and value < low) or (high is not None and value > high):
        lower = "(-inf" if low is None else f"[{low}"
        upper = "inf)" if high is None else f"{high}]"
        suffix = f" {unit}" if unit else ""
        raise InvalidInputError.of(parameter, f"be finite and within {lower}, {upper}{suffix}", value)
    return value


def require_page_size(
    value: int, *, parameter: str = "page_size", default: int = DEFAULT_PAGE_SIZE, maximum: int = MAX_PAGE_SIZE
) -> int:
    """Give the page size to use: ``default`` for 0 (unset), ``maximum`` for anything above it; below 0 is refused."""
    if value < 0:
        raise InvalidInputError.of(parameter, "be at least 0 (0 asks for the default)", value)
    return default if value == 0 else min(value, maximum)


def require_tags(
    values: Iterable[str], *, parameter: str = "tags", max_count: int = MAX_TAGS, max_len: int = 64
) -> tuple[str, ...]:
    """Give the tags as a tuple when there are at most ``max_count``, each well formed and none twice."""
    tags = tuple(values)
    if len(tags) > max_count:
        raise InvalidInputError(f"{parameter} must hold at most {max_count} tags, got {len(tags)}", parameter=parameter)
    for index, tag in enumerate(tags):
        require_name(f"{parameter}[{index}]", tag, max_len=max_len, pattern=TAG_PATTERN)
    if len(set(tags)) != len(tags):
        twice = sorted({tag for tag in tags if tags.count(tag) > 1})
        raise InvalidInputError.of(parameter, "name every tag once", twice)
    return tags


def require_size(parameter: str, value: bytes | str, *, max_bytes: int) -> None:
    """Make sure a payload or text has at most ``max_bytes`` bytes (UTF-8 for text)."""
    size = len(value.encode("utf-8")) if isinstance(value, str) else len(value)
    if size > max_bytes:
        raise InvalidInputError(f"{parameter} must be at most {max_bytes} bytes, got {size} bytes", parameter=parameter)

"""Where two rows of decisions differ, field by field and to the bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from itertools import islice
from typing import Final

from esper.contracts.decision import AdaptationDecision
from esper.contracts.replay import ReplayDifference

MAX_DIFFERENCES: Final = 50
"""Fields that are named of one packet."""

_MAX_WORDS: Final = 200


def differences_between(
    recorded: Sequence[AdaptationDecision], replayed: Sequence[AdaptationDecision]
) -> tuple[ReplayDifference, ...]:
    """Give the first fields that differ, as paths of names; none where all is equal to the bit."""
    return tuple(islice(_differing(tuple(recorded), tuple(replayed), "decisions"), MAX_DIFFERENCES))


def _differing(recorded: object, replayed: object, path: str) -> Iterator[ReplayDifference]:
    if isinstance(recorded, tuple) and isinstance(replayed, tuple):
        if len(recorded) != len(replayed):
            yield ReplayDifference(field=f"num_{path}", recorded=str(len(recorded)), replayed=str(len(replayed)))
        for place, pair in enumerate(zip(recorded, replayed, strict=False)):
            yield from _differing(*pair, f"{path}[{place}]")
    elif is_dataclass(recorded) and type(recorded) is type(replayed):
        for field in fields(recorded):
            mine, other = getattr(recorded, field.name), getattr(replayed, field.name)
            yield from _differing(mine, other, f"{path}.{field.name}")
    elif not _same(recorded, replayed):
        yield ReplayDifference(field=path, recorded=_words(recorded), replayed=_words(replayed))


def _same(recorded: object, replayed: object) -> bool:
    if isinstance(recorded, float) and isinstance(replayed, float):
        return recorded.hex() == replayed.hex()  # tells the zeros apart, and holds of what is no number
    return recorded == replayed


def _words(value: object) -> str:
    """Give a value in words, cut to a line's length."""
    if value is None:
        return "nothing"
    if is_dataclass(value):
        name = getattr(value, "name", "")
        text = f"{type(value).__name__} {name}".rstrip()
    else:
        text = value.name.lower() if isinstance(value, Enum) else str(value)
    return text if len(text) <= _MAX_WORDS else f"{text[: _MAX_WORDS - 3]}..."

"""Bounds on figures as the command line takes them: ``parameters<=5000``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

import typer

from esper.v1 import blueprint_pb2

FIGURES: Final = ("parameters", "flops", "latency_ms", "success_rate")
"""Figures that may be bounded."""

_CONDITION: Final = re.compile(r"\s*([a-z_]+)\s*(<=|>=)\s*(\S+)\s*", re.ASCII)


def bounds_of(conditions: Sequence[str]) -> blueprint_pb2.BlueprintBounds:
    """Give the bounds that conditions of the form ``FIGURE<=NUMBER`` or ``FIGURE>=NUMBER`` stand for.

    Raises:
        typer.BadParameter: One is of another form, or bounds the same end of the same figure again.
    """
    found = blueprint_pb2.BlueprintBounds()
    for condition in conditions:
        match = _CONDITION.fullmatch(condition)
        if match is None or match[1] not in FIGURES:
            rule = f"must be FIGURE<=NUMBER or FIGURE>=NUMBER with one of {', '.join(FIGURES)}"
            raise typer.BadParameter(f"{rule}, got {condition!r}", param_hint="--where")
        name = f"{'max' if match[2] == '<=' else 'min'}_{match[1]}"
        if found.HasField(name):  # type: ignore[arg-type]
            raise typer.BadParameter(f"must bound {name} once, got {condition!r} as well", param_hint="--where")
        setattr(found, name, _number(match[3], condition, whole=match[1] in ("parameters", "flops")))
    return found


def _number(text: str, condition: str, *, whole: bool) -> int | float:
    try:
        number = int(text) if whole else float(text)
    except ValueError:
        kind = "a whole number" if whole else "a number"
        raise typer.BadParameter(f"must compare with {kind}, got {condition!r}", param_hint="--where") from None
    if whole and abs(number) >= 2**63:
        raise typer.BadParameter(f"must compare with less than 2**63, got {condition!r}", param_hint="--where")
    return number

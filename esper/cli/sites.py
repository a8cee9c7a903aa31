"""Sites as the command line takes and shows them: ``linear:64:32``, ``conv2d:3x32x32:16x32x32``."""

from __future__ import annotations

import re
from typing import Final

import typer

from esper.contracts.blueprint import Site, SiteKind

_SITE: Final = re.compile(r"([a-z0-9_]+):(\d{1,9}(?:x\d{1,9})*):(\d{1,9}(?:x\d{1,9})*)", re.ASCII)


def site_of(text: str) -> Site:
    """Give the site that ``KIND:IN:OUT`` stands for; the sizes of a shape are joined by ``x``, without the batch.

    Raises:
        typer.BadParameter: The text is of another form, or names no kind of site.
        InvalidInputError: A shape is none: too many sizes, or one that is 0.
    """
    kinds = {kind.name.lower(): kind for kind in SiteKind}
    match = _SITE.fullmatch(text)
    if match is None or match[1] not in kinds:
        rule = f"must be KIND:IN:OUT with sizes joined by x and KIND one of {', '.join(kinds)}"
        raise typer.BadParameter(f"{rule} (linear:64:32, conv2d:3x32x32:16x32x32), got {text!r}", param_hint="--site")
    return Site(kind=kinds[match[1]], input_shape=_sizes(match[2]), output_shape=_sizes(match[3]))


def site_text(site: Site) -> str:
    """Give a site in the form that ``site_of`` reads."""
    shapes = ("x".join(map(str, shape)) for shape in (site.input_shape, site.output_shape))
    return ":".join([site.kind.name.lower(), *shapes])


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split("x"))

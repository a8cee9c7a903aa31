"""The site a blueprint is compiled for when nobody names one: the first plain site at which it is legal."""

from __future__ import annotations

from typing import Final

from esper.blueprints.plan import is_legal
from esper.contracts.blueprint import Blueprint, Site, SiteKind
from esper.contracts.errors import InvalidBlueprintError

DEFAULT_SITES: Final = (
    Site(kind=SiteKind.LINEAR, input_shape=(64,), output_shape=(64,)),
    Site(kind=SiteKind.CONV2D, input_shape=(16, 16, 16), output_shape=(16, 16, 16)),
    Site(kind=SiteKind.CONV1D, input_shape=(16, 32), output_shape=(16, 32)),
    Site(kind=SiteKind.ATTENTION, input_shape=(16, 64), output_shape=(16, 64)),
    Site(kind=SiteKind.LAYER_NORM, input_shape=(16, 64), output_shape=(16, 64)),
    Site(kind=SiteKind.BATCH_NORM1D, input_shape=(64,), output_shape=(64,)),
    Site(kind=SiteKind.BATCH_NORM2D, input_shape=(16, 16, 16), output_shape=(16, 16, 16)),
)
"""Sites that are tried, in this order."""


def default_site(blueprint: Blueprint) -> Site:
    """Give the first of ``DEFAULT_SITES`` whose kind the blueprint is meant for and at which it is legal.

    Raises:
        InvalidBlueprintError: It is legal at none of them.
    """
    kinds = blueprint.metadata.site_kinds or tuple(SiteKind)
    meant = (site for site in DEFAULT_SITES if site.kind in kinds)
    found = next((site for site in meant if is_legal(blueprint.ir, site)), None)
    if found is None:
        names = ", ".join(kind.name for kind in kinds)
        raise InvalidBlueprintError(
            f"blueprint {blueprint.name} must be legal at a default site of {names}, or a site be named; it is at none",
            parameter="site",
        )
    return found

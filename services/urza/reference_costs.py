"""What a blueprint costs at plain reference sites, so that blueprints can be searched for by their figures.

A blueprint has no cost of its own: most graphs are written in the dims of the site they come to stand at. So each is
costed at one site of every kind that it is meant for and legal at; the sites are those that the compiler takes when
nobody names one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from esper.blueprints.cost import cost
from esper.contracts.blueprint import BlueprintCost, BlueprintIR, BlueprintMetadata, Site, SiteKind
from esper.contracts.errors import InvalidBlueprintError

REFERENCE_SITES: Final = (
    Site(kind=SiteKind.LINEAR, input_shape=(64,), output_shape=(64,)),
    Site(kind=SiteKind.CONV2D, input_shape=(16, 16, 16), output_shape=(16, 16, 16)),
    Site(kind=SiteKind.CONV1D, input_shape=(16, 32), output_shape=(16, 32)),
    Site(kind=SiteKind.ATTENTION, input_shape=(16, 64), output_shape=(16, 64)),
    Site(kind=SiteKind.LAYER_NORM, input_shape=(16, 64), output_shape=(16, 64)),
    Site(kind=SiteKind.BATCH_NORM1D, input_shape=(64,), output_shape=(64,)),
    Site(kind=SiteKind.BATCH_NORM2D, input_shape=(16, 16, 16), output_shape=(16, 16, 16)),
)
"""One site of every kind; a change needs a migration that costs every blueprint anew."""


def reference_costs(ir: BlueprintIR, metadata: BlueprintMetadata) -> Mapping[SiteKind, BlueprintCost]:
    """Give the exact cost at the reference site of every kind the blueprint is meant for, where it is legal there.

    It is empty for a blueprint that is legal at other shapes alone.
    """
    found: dict[SiteKind, BlueprintCost] = {}
    for site in REFERENCE_SITES:
        if metadata.site_kinds and site.kind not in metadata.site_kinds:
            continue
        try:
            found[site.kind] = cost(ir, site)
        except InvalidBlueprintError:  # not legal there: it has no cost at this kind
            continue
    return found

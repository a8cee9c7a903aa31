"""Reference costs are those of the compiler's own default sites."""

from __future__ import annotations

from esper.blueprints.cost import cost
from esper.blueprints.registry import default_registry
from esper.contracts.blueprint import BlueprintMetadata, SiteKind
from esper.services.tezzeret.default_sites import DEFAULT_SITES
from esper.services.urza.reference_costs import REFERENCE_SITES, reference_costs


def test_reference_sites_are_the_compiler_s_and_one_of_every_kind() -> None:
    assert REFERENCE_SITES == DEFAULT_SITES
    assert sorted(site.kind for site in REFERENCE_SITES) == sorted(SiteKind)


def test_a_blueprint_is_costed_where_it_is_meant_for_and_legal() -> None:
    conv = default_registry().create_blueprint("conv3x3").ir
    (site,) = (site for site in REFERENCE_SITES if site.kind is SiteKind.CONV2D)
    meant = BlueprintMetadata(site_kinds=(SiteKind.LINEAR, SiteKind.CONV2D))
    assert reference_costs(conv, meant) == {SiteKind.CONV2D: cost(conv, site)}
    assert SiteKind.LINEAR not in reference_costs(conv, BlueprintMetadata())
    assert reference_costs(conv, BlueprintMetadata(site_kinds=(SiteKind.LINEAR,))) == {}

"""Every template at every kind of layer, at awkward sizes: it passes its contract test, or is refused with a reason."""

from __future__ import annotations

import re

import pytest
import torch

from esper.blueprints import BlueprintRegistry, check_blueprint, plan
from esper.blueprints.check import CheckReport
from esper.blueprints.templates import TEMPLATES
from esper.contracts.blueprint import Site, SiteKind
from esper.contracts.errors import InvalidBlueprintError

Shape = tuple[int, ...]

_SAME: dict[SiteKind, tuple[Shape, ...]] = {
    SiteKind.ATTENTION: ((6, 16), (1, 8), (7, 5), (3, 1), (16, 64)),
    SiteKind.LAYER_NORM: ((16,), (1,), (5, 7), (3, 4, 6), (1, 8)),
    SiteKind.BATCH_NORM1D: ((16,), (1,), (7, 9), (4, 1), (1, 9)),
    SiteKind.BATCH_NORM2D: ((8, 6, 6), (1, 6, 6), (7, 5, 9), (6, 1, 1)),
}
_PAIRS: dict[SiteKind, tuple[tuple[Shape, Shape], ...]] = {
    SiteKind.LINEAR: (
        ((1,), (1,)),
        ((9,), (1,)),
        ((1,), (5,)),
        ((7,), (13,)),
        ((144,), (33,)),
        ((1, 8), (1, 12)),
        ((7, 5), (7, 11)),
        ((5, 1), (5, 1)),
        ((3, 4, 16), (3, 4, 9)),
    ),
    SiteKind.CONV1D: (((1, 16), (1, 16)), ((3, 21), (7, 11)), ((4, 1), (6, 1)), ((3, 20), (8, 18))),
    SiteKind.CONV2D: (
        ((1, 8, 8), (1, 8, 8)),
        ((3, 9, 5), (7, 9, 5)),
        ((4, 16, 12), (8, 8, 6)),
        ((5, 1, 1), (6, 1, 1)),
        ((3, 12, 10), (8, 10, 8)),
        ((2, 1, 7), (4, 1, 7)),
    ),
}
SITES = [Site(kind=kind, input_shape=x, output_shape=h) for kind, pairs in _PAIRS.items() for x, h in pairs]
SITES += [Site(kind=kind, input_shape=h, output_shape=h) for kind, shapes in _SAME.items() for h in shapes]
CELLS = [(template.name, site) for site in SITES for template in TEMPLATES]

HALVES = (torch.bfloat16, torch.float16)
EXACT = {"finite_float32", "finite_float64", "finite_bfloat16", "finite_float64_parameters"}
"""Ways to compute in which no template may be refused; half precision parameters and float16 may overflow."""


def named(cell: object) -> str:
    if isinstance(cell, Site):
        return (
            f"{cell.kind.name.lower()}-{'x'.join(map(str, cell.input_shape))}-{'x'.join(map(str, cell.output_shape))}"
        )
    return str(cell)


def test_the_matrix_holds_every_kind_and_template(registry: BlueprintRegistry) -> None:
    assert {site.kind for site in SITES} == set(SiteKind)
    offered = {blueprint.name for site in SITES for blueprint in registry.for_site(site)}
    assert offered == set(registry.names())


@pytest.mark.parametrize("site", SITES, ids=named)
def test_what_is_not_offered_is_refused_with_a_reason(registry: BlueprintRegistry, site: Site) -> None:
    offered = {blueprint.name for blueprint in registry.for_site(site)}
    assert len(offered) >= 4
    for name in set(registry.names()) - offered:
        blueprint = registry.create_blueprint(name)
        if not blueprint.metadata.site_kinds or site.kind in blueprint.metadata.site_kinds:
            with pytest.raises(InvalidBlueprintError, match=r"must .+, got"):
                plan(blueprint.ir, site)


@pytest.mark.parametrize(
    "site", [site for site in SITES if 1 in site.output_shape or site.input_shape == (1,)], ids=named
)
def test_templates_pass_at_the_smallest_sizes(registry: BlueprintRegistry, site: Site) -> None:
    for blueprint in registry.for_site(site):
        check_blueprint(blueprint.ir, site).require()


def refusals(report: CheckReport) -> dict[str, str]:
    return {row.name: row.detail for row in report.checks if not row.passed}


@pytest.mark.slow
@pytest.mark.parametrize(("template", "site"), CELLS, ids=named)
def test_every_template_in_every_dtype(registry: BlueprintRegistry, template: str, site: Site) -> None:
    """Everything holds in float32, float64 and under autocast; where half precision overflows, the node is named."""
    blueprint = next((one for one in registry.for_site(site) if one.name == template), None)
    if blueprint is None:
        return  # the test above says why
    report = check_blueprint(
        blueprint.ir,
        site,
        dtypes=(torch.float32, torch.float64, *HALVES),
        parameter_dtypes=(torch.float64, *HALVES),
    )
    assert {row.name for row in report.checks} >= EXACT
    refused = refusals(report)
    assert set(refused) <= {"finite_float16", "finite_float16_parameters"}
    for detail in refused.values():
        assert re.search(r"not finite: .*(at node '|gradient of )", detail)

"""Every template at every kind of layer, at awkward sizes: it passes its contract test, or is refused with a reason."""

from __future__ import annotations

import re
from functools import partial

import pytest
import torch

from esper.blueprints import BlueprintRegistry, check_blueprint, cost, is_legal, plan, to_module
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

COLUMNS = (
    *("norm_shift", "lora", "bottleneck_adapter", "gated_mlp", "glu", "widen", "deepen"),
    *("conv1x1", "conv3x3", "depthwise_separable_conv", "dilated_conv", "widen_conv", "deepen_conv", "squeeze_excite"),
    *("signal_conv", "image_conv"),
    *("low_rank_attention", "causal_attention", "causal_token_conv", "token_channel_mixer"),
)
MATRIX = """
linear-1-1               .x.xxxx ....... .. ....
linear-9-1               .x.xxxx ....... x. ....
linear-1-5               xxxxxxx ....... .. ....
linear-7-13              xxxxxxx ....... x. ....
linear-144-33            xxxxxxx ....... xx ....
linear-1x8-1x12          xxxxxxx ......x .. ..xx
linear-7x5-7x11          xxxxxxx ......x .. xxxx
linear-5x1-5x1           .x.xxxx ......x .. ..xx
linear-3x4x16-3x4x9      xxxxxxx ......x .. xxxx
conv1d-1x16-1x16         xxxxx-x xxxxxxx .. x..x
conv1d-3x21-7x11         xxxxx-x xxxxxxx .. x..x
conv1d-4x1-6x1           xxxxx-x xxxxxxx .. ...x
conv1d-3x20-8x18         xxxxx-x xxxxxxx .. x..x
conv2d-1x8x8-1x8x8       xxxxx-x xxxxxxx .. x..x
conv2d-3x9x5-7x9x5       xxxxx-x xxxxxxx .. x..x
conv2d-4x16x12-8x8x6     xxxxx-x xxxxxxx .. x..x
conv2d-5x1x1-6x1x1       xxxxx-x xxxxxxx .. ...x
conv2d-3x12x10-8x10x8    xxxxx-x xxxxxxx .. x..x
conv2d-2x1x7-4x1x7       xxxxx-x xxxxxxx .. x..x
attention-6x16-6x16      xxxxxxx ......x .. xxxx
attention-1x8-1x8        xxxxxxx ......x .. ..xx
attention-7x5-7x5        xxxxxxx ......x .. xxxx
attention-3x1-3x1        .x.xxxx ......x .. ..xx
attention-16x64-16x64    xxxxxxx ......x .. xxxx
layer_norm-16-16         xxxxxxx ....... xx ....
layer_norm-1-1           .x.xxxx ....... .. ....
layer_norm-5x7-5x7       xxxxxxx ......x .. xxxx
layer_norm-3x4x6-3x4x6   xxxxxxx ......x .. xxxx
layer_norm-1x8-1x8       xxxxxxx ......x .. ..xx
batch_norm1d-16-16       xxxxxxx ....... xx ....
batch_norm1d-1-1         .x.xxxx ....... .. ....
batch_norm1d-7x9-7x9     xxxxxxx xxxxxxx .. x..x
batch_norm1d-4x1-4x1     xxxxxxx xxxxxxx .. ...x
batch_norm1d-1x9-1x9     xxxxxxx xxxxxxx .. x..x
batch_norm2d-8x6x6-8x6x6 xxxxx-x xxxxxxx .. x..x
batch_norm2d-1x6x6-1x6x6 xxxxx-x xxxxxxx .. x..x
batch_norm2d-7x5x9-7x5x9 xxxxx-x xxxxxxx .. x..x
batch_norm2d-6x1x1-6x1x1 xxxxx-x xxxxxxx .. ...x
"""
"""What is offered where, a column a template: ``x`` offered, ``.`` illegal, ``-`` legal and not meant for the kind.

A norm needs two values, attention two tokens, a convolution or a pooling positions, a view of a vector a vector that it
divides, and what is causal an order of the positions.
"""

HALVES = (torch.bfloat16, torch.float16)
EXACT = {"finite_float32", "finite_float64", "finite_bfloat16", "finite_float64_parameters"}
"""Ways to compute in which no template may be refused; half precision parameters and float16 may overflow."""


def named(cell: object) -> str:
    if isinstance(cell, Site):
        return (
            f"{cell.kind.name.lower()}-{'x'.join(map(str, cell.input_shape))}-{'x'.join(map(str, cell.output_shape))}"
        )
    return str(cell)


ROWS = {
    row.split()[0]: dict(zip(COLUMNS, "".join(row.split()[1:]), strict=True)) for row in MATRIX.strip().splitlines()
}


def cells(mark: str) -> list[tuple[str, Site]]:
    return [(name, site) for site in SITES for name, found in ROWS[named(site)].items() if found == mark]


def test_the_matrix_holds_every_kind_site_and_template(registry: BlueprintRegistry) -> None:
    assert {site.kind for site in SITES} == set(SiteKind)
    assert list(ROWS) == [named(site) for site in SITES]
    assert COLUMNS == registry.names() == tuple(template.name for template in TEMPLATES)
    assert {name for name, _ in cells("x")} == set(COLUMNS)
    assert sum(map(len, map(cells, "x.-"))) == len(SITES) * len(COLUMNS)


@pytest.mark.parametrize("site", SITES, ids=named)
def test_exactly_what_the_matrix_says_is_offered(registry: BlueprintRegistry, site: Site) -> None:
    offered = {blueprint.name for blueprint in registry.for_site(site)}
    assert offered == {name for name, mark in ROWS[named(site)].items() if mark == "x"}


@pytest.mark.parametrize(("template", "site"), cells("."), ids=named)
def test_what_is_not_legal_is_refused_with_a_reason(registry: BlueprintRegistry, template: str, site: Site) -> None:
    ir = registry.create_blueprint(template).ir
    for refusing in (plan, cost, check_blueprint, partial(to_module, seed=0)):
        with pytest.raises(InvalidBlueprintError, match=r"node '\w+' .+ must .+, got"):
            refusing(ir, site)


@pytest.mark.parametrize(("template", "site"), cells("-"), ids=named)
def test_what_is_not_meant_for_a_kind_is_legal_there(registry: BlueprintRegistry, template: str, site: Site) -> None:
    blueprint = registry.create_blueprint(template)
    assert blueprint.metadata.site_kinds
    assert site.kind not in blueprint.metadata.site_kinds
    assert is_legal(blueprint.ir, site)


@pytest.mark.parametrize(
    "site", [site for site in SITES if 1 in site.output_shape or site.input_shape == (1,)], ids=named
)
def test_templates_pass_at_the_smallest_sizes(registry: BlueprintRegistry, site: Site) -> None:
    for blueprint in registry.for_site(site):
        check_blueprint(blueprint.ir, site).require()


def refusals(report: CheckReport) -> dict[str, str]:
    return {row.name: row.detail for row in report.checks if not row.passed}


@pytest.mark.slow
@pytest.mark.parametrize(("template", "site"), cells("x"), ids=named)
def test_every_template_in_every_dtype(registry: BlueprintRegistry, template: str, site: Site) -> None:
    """Everything holds in float32, float64 and under autocast; where half precision overflows, the node is named."""
    report = check_blueprint(
        registry.create_blueprint(template).ir,
        site,
        dtypes=(torch.float32, torch.float64, *HALVES),
        parameter_dtypes=(torch.float64, *HALVES),
    )
    assert {row.name for row in report.checks} >= EXACT
    refused = refusals(report)
    assert set(refused) <= {"finite_float16", "finite_float16_parameters"}
    for detail in refused.values():
        assert re.search(r"not finite: .*(at node '|gradient of )", detail)

"""Random changes to blueprints: each is refused by name, or builds, runs, and costs what it says."""

from __future__ import annotations

import contextlib
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esper.blueprints import (
    canonical_bytes,
    check_blueprint,
    cost,
    default_registry,
    ir_from_bytes,
    parse_text,
    plan,
    to_module,
    to_text,
)
from esper.blueprints.flops import count_flops
from esper.blueprints.operators import OPERATORS, Attribute
from esper.blueprints.rewrite import insert_node, remove_node, replace_input, set_attribute, splice
from esper.contracts.blueprint import AttributeValue, Blueprint, BlueprintIR, Expression, Site, SiteKind
from esper.contracts.errors import InvalidBlueprintError

SITES = (
    Site(kind=SiteKind.LINEAR, input_shape=(16,), output_shape=(12,)),
    Site(kind=SiteKind.LINEAR, input_shape=(5, 16), output_shape=(5, 12)),
    Site(kind=SiteKind.CONV1D, input_shape=(4, 12), output_shape=(8, 6)),
    Site(kind=SiteKind.CONV2D, input_shape=(4, 7, 7), output_shape=(8, 5, 5)),
)
EXPRESSIONS = ("C", "I", "C // 2", "max(2, I // 4)", "C - 12", "L", "H * 2", "C // 0", "I * I * I * I * I")
NONSENSE: tuple[AttributeValue, ...] = (-1, 0, True, 0.5, "nonsense", float("inf"), 10**9)
ROWS = {"identity", "learning", "gradients", "finite_float32", "finite_bfloat16"}
"""Rows by which a legal graph may still be refused; the others state that Esper itself is right."""


def value_of(attribute: Attribute, rng: random.Random) -> AttributeValue:
    """Draw a value, sometimes illegal."""
    if rng.random() < 0.1:
        return rng.choice(NONSENSE)
    if attribute.kind is bool:
        return rng.random() < 0.5
    if attribute.kind is str:
        return rng.choice(attribute.words)
    if attribute.kind is float:
        return rng.choice([0.0, 1.0, -0.5, 1e3, 1e-3])
    return Expression(rng.choice(EXPRESSIONS)) if rng.random() < 0.4 else rng.choice([1, 2, 3, 4, 5, 7, 8, 12, 31, 64])


def change(ir: BlueprintIR, donor: BlueprintIR, rng: random.Random) -> BlueprintIR:
    """Make one random change, legal or not."""
    node = rng.choice(ir.nodes)
    kind = rng.randrange(5)
    if kind == 0 and OPERATORS[node.op].attributes:
        attribute = rng.choice(OPERATORS[node.op].attributes)
        return set_attribute(ir, node.name, attribute.name, value_of(attribute, rng))
    if kind == 1:
        return remove_node(ir, node.name)
    if kind == 2:
        source = rng.choice(["x", "h", *(other.name for other in ir.nodes)])
        return replace_input(ir, node.name, rng.randrange(len(node.inputs)), source)
    if kind == 3:
        return splice(ir, node.name, donor, rng.choice(donor.nodes).name)
    operator = OPERATORS[rng.choice(sorted(OPERATORS))]
    names = ["x", "h", *(other.name for other in ir.nodes)]
    others = [rng.choice(names) for _ in range(operator.arity - 1)]
    attributes = {a.name: value_of(a, rng) for a in operator.attributes if rng.random() < 0.5}
    return insert_node(ir, rng.choice(names), operator.name, attributes, others=others)


def grow(seed: int, site: Site, changes: int) -> BlueprintIR:
    """Apply random changes to a random template; a refused change names its reason and is left out."""
    rng = random.Random(seed)
    offered: list[Blueprint] = default_registry().for_site(site)
    ir, donor = rng.choice(offered).ir, rng.choice(offered).ir
    for _ in range(changes):
        with contextlib.suppress(InvalidBlueprintError):
            ir = change(ir, donor, rng)
    return ir


def is_small(ir: BlueprintIR, site: Site) -> bool:
    price = cost(ir, site)
    return price.parameters < 200_000 and price.flops < 20_000_000


@settings(max_examples=80)
@given(seed=st.integers(0, 2**32), site=st.sampled_from(SITES), changes=st.integers(1, 6))
def test_changed_graphs_are_refused_or_run_as_they_are_described(seed: int, site: Site, changes: int) -> None:
    ir = grow(seed, site, changes)
    assert ir_from_bytes(canonical_bytes(ir)) == ir
    assert parse_text(to_text(ir)) == ir
    try:
        layout = plan(ir, site)
    except InvalidBlueprintError:
        return
    if not is_small(ir, site):
        return
    module = to_module(ir, site, seed=seed)
    x, h = torch.randn(1, *site.input_shape), torch.randn(1, *site.output_shape)
    assert module(x, h).shape == h.shape
    assert sum(parameter.numel() for parameter in module.parameters()) == cost(ir, site).parameters
    assert count_flops(lambda: module(x, h)) == cost(ir, site).flops
    if layout.is_size_free and layout.h.positions:
        larger = layout.resized(3)
        assert larger is not None
        there = [torch.randn(2, *shape) for shape in (larger.site.input_shape, larger.site.output_shape)]
        assert module(*there).shape == there[1].shape


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32), site=st.sampled_from(SITES), changes=st.integers(1, 3))
def test_contract_test_of_changed_graphs_never_finds_esper_itself_wrong(seed: int, site: Site, changes: int) -> None:
    ir = grow(seed, site, changes)
    try:
        plan(ir, site)
    except InvalidBlueprintError:
        return
    if is_small(ir, site):
        report = check_blueprint(ir, site)
        assert {check.name for check in report.checks if not check.passed} <= ROWS


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32), changes=st.integers(1, 4))
def test_no_information_flows_further_than_a_graph_says(seed: int, changes: int) -> None:
    site = SITES[1]
    ir = grow(seed, site, changes)
    try:
        layout = plan(ir, site)
    except InvalidBlueprintError:
        return
    if not is_small(ir, site):
        return
    module = to_module(ir, site, seed=0)
    x, h = torch.randn(1, *site.input_shape), torch.randn(1, *site.output_shape)
    other_x, other_h = x.clone(), h.clone()
    other_x[:, 3:], other_h[:, 3:] = torch.randn(1, 2, 16), torch.randn(1, 2, 12)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
        earlier, later = module(x, h)[:, :3], module(other_x, other_h)[:, :3]
    if layout.mixing <= 1:
        torch.testing.assert_close(earlier, later, equal_nan=True)


def test_attributes_of_every_operator_have_legal_defaults() -> None:
    for operator in OPERATORS.values():
        for attribute in operator.attributes:
            assert isinstance(attribute.default, Expression) or attribute.accepts(attribute.default)


@pytest.mark.parametrize("site", SITES, ids=lambda site: site.kind.name)
def test_some_changed_graphs_pass_the_contract(site: Site) -> None:
    legal = passed = 0
    for seed in range(40):
        ir = grow(seed, site, 2)
        try:
            plan(ir, site)
        except InvalidBlueprintError:
            continue
        legal += 1
        passed += is_small(ir, site) and check_blueprint(ir, site).passed
    assert legal >= 10
    assert passed >= 5

"""Variations: always legal, always new, always within the operators allowed."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from esper.blueprints import cost, default_registry, parse_text, structure_id, validate
from esper.services.karn.grammar import CROSSOVER, MUTATION, SIMPLIFICATION, Grammar


def designs(site):
    return [one.ir for one in default_registry().for_site(site)]


def test_every_variation_is_legal_and_new(any_site):
    random = np.random.default_rng(0)
    base = designs(any_site)
    grammar = Grammar(any_site)
    found = Counter()
    for place in range(60):
        pair = [base[place % len(base)], base[(7 * place + 1) % len(base)]]
        known = {structure_id(one) for one in pair}
        made = grammar.vary(pair, random, known)
        assert made is not None
        validate(made.ir, any_site)
        assert made.structure == structure_id(made.ir)
        assert made.structure not in known
        assert made.change
        assert len(made.parents) == (2 if made.operator == CROSSOVER else 1)
        found[made.operator] += 1
    assert set(found) == {MUTATION, CROSSOVER, SIMPLIFICATION}


def test_equal_streams_give_equal_variations(linear_site):
    base = designs(linear_site)
    one, other = (Grammar(linear_site).vary(base[:2], np.random.default_rng(4)) for _ in range(2))
    assert one == other


def test_one_design_alone_is_never_crossed(linear_site):
    random = np.random.default_rng(1)
    grammar = Grammar(linear_site)
    made = [grammar.vary(designs(linear_site)[:1], random) for _ in range(40)]
    assert all(one.operator != CROSSOVER for one in made if one is not None)


def test_only_allowed_operators_are_used(linear_site):
    random = np.random.default_rng(2)
    allowed = frozenset({"linear", "activation", "align"})
    grammar = Grammar(linear_site, allowed)
    widen = next(one for one in designs(linear_site) if grammar.permits(one))
    made = [grammar.vary([widen], random) for _ in range(30)]
    found = [one for one in made if one is not None]
    assert found
    assert all({node.op for node in one.ir.nodes} <= allowed for one in found)


def test_where_nothing_is_allowed_nothing_is_made(linear_site):
    grammar = Grammar(linear_site, frozenset({"attention"}))
    assert grammar.vary(designs(linear_site)[:1], np.random.default_rng(0)) is None


def test_a_gate_multiplies_an_inner_value(linear_site):
    ir = parse_text("blueprint 1\na = linear(x, features=8)\nb = activation(a)\nc = linear(b, init=zero)\nreturn c\n")
    random = np.random.default_rng(0)
    made = [Grammar(linear_site).vary([ir], random) for _ in range(80)]
    gated = [one for one in made if one is not None and "gate" in one.change]
    assert gated
    assert all(any(node.op == "mul" for node in one.ir.nodes) for one in gated)


def test_shrinking_lowers_the_cost_until_nothing_is_left_to_take(linear_site):
    random = np.random.default_rng(0)
    grammar = Grammar(linear_site)
    ir = default_registry().create_blueprint("signal_conv").ir
    costs = [cost(ir, linear_site)]
    for _ in range(4):
        smaller = grammar.shrink(ir, random)
        assert smaller is not None
        ir = smaller.ir
        costs.append(cost(ir, linear_site))
    sizes = [(one.parameters, one.flops) for one in costs]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == len(sizes)
    bare = parse_text("blueprint 1\nout = scale(h, value=0.0)\nreturn out\n")
    assert grammar.shrink(bare, random) is None


@pytest.mark.parametrize("seed", range(5))
def test_chains_of_variations_stay_legal(linear_site, seed):
    random = np.random.default_rng(seed)
    grammar = Grammar(linear_site)
    base = designs(linear_site)
    ir = base[seed]
    for _ in range(25):
        made = grammar.vary([ir, base[int(random.integers(len(base)))]], random)
        if made is not None and len(made.ir.nodes) < 40:
            ir = made.ir
    validate(ir, linear_site)
    assert structure_id(ir) != structure_id(base[seed])

"""Proposals: within bounds, through the contract test, repeatable, and better with every report."""

from __future__ import annotations

import numpy as np
import pytest

from esper.blueprints import (
    BlueprintRegistry,
    allowed_mixing,
    check_blueprint,
    content_id,
    default_registry,
    parse_text,
    plan,
    structure_id,
)
from esper.blueprints.cost import cost
from esper.blueprints.tags import is_allowed
from esper.contracts.blueprint import Site, SiteKind
from esper.contracts.errors import InvalidInputError, InvalidStateError
from esper.contracts.tag_expression import parse_tags
from esper.services.karn import proposer as proposer_module
from esper.services.karn.archive import Archive, Look
from esper.services.karn.design import view
from esper.services.karn.proposer import Constraints, Proposer, passes_contract
from esper.services.karn.surrogate import Sample, Surrogate


def proposer(**changes):
    return Proposer(
        default_registry(), changes.pop("archive", Archive()), changes.pop("surrogate", Surrogate()), **changes
    )


def test_every_proposal_passes_the_contract_test_and_tells_its_cost(any_site):
    found = proposer().propose(any_site, 4, Constraints(), 0)
    assert len(found) == 4
    assert len({structure_id(one.blueprint.ir) for one in found}) == 4
    for one in found:
        check_blueprint(one.blueprint.ir, any_site).require()
        assert one.cost == cost(one.blueprint.ir, any_site)
        assert one.blueprint.id == content_id(one.blueprint.ir)
        assert plan(one.blueprint.ir, any_site).mixing <= allowed_mixing(any_site)
        assert one.blueprint.lineage.author == "karn"
        assert one.blueprint.lineage.parent_ids
        assert one.expected_reward is None
        assert 0 <= one.novelty <= 1


def test_bounds_are_hard(linear_site):
    bounds = Constraints(
        max_parameters=400, max_flops=900, allowed_ops=frozenset({"linear", "activation", "layer_norm"})
    )
    for one in proposer().propose(linear_site, 6, bounds, 3):
        assert one.cost.parameters <= 400
        assert one.cost.flops <= 900
        assert {node.op for node in one.blueprint.ir.nodes} <= bounds.allowed_ops


@pytest.mark.parametrize("text", ["dense", "!conv & !attention", "conv | attention", "dense & !linear"])
def test_every_proposal_is_of_an_allowed_kind(any_site, text):
    rule = parse_tags(text)
    found = proposer().propose(any_site, 4, Constraints(allowed_blueprints=rule), 0)
    assert len(found) == 4, "there are designs enough of such a kind"
    assert {structure_id(one.blueprint.ir) for one in found}.isdisjoint(
        structure_id(one.ir) for one in default_registry().for_site(any_site)
    ), "and they are new"
    assert all(is_allowed(one.blueprint, rule) for one in found)


def test_kinds_that_no_known_design_has_may_come_of_crossing_others():
    site = Site(kind=SiteKind.CONV2D, input_shape=(6, 8, 8), output_shape=(8, 8, 8))
    both = Constraints(allowed_blueprints=parse_tags("conv & attention"))
    found = proposer().propose(site, 4, both, 0)
    assert found
    for one in found:
        assert {"attention"} < {node.op for node in one.blueprint.ir.nodes} & {"attention", "conv", "depthwise_conv"}


def test_a_kind_that_nothing_can_have_is_an_error_that_says_so(linear_site):
    nothing = Constraints(allowed_blueprints=parse_tags("attention"))
    with pytest.raises(InvalidStateError, match="9 known designs are legal, 0 keep them, 0 new ones were made"):
        proposer().propose(linear_site, 4, nothing, 0)


def test_costly_kinds_are_made_small_enough(linear_site):
    convolutions = [one for one in default_registry().for_site(linear_site) if "conv" in one.name]
    cheapest = min(cost(one.ir, linear_site).parameters for one in convolutions)
    bounds = Constraints(max_parameters=1_500)
    assert cheapest > 1_500
    found = proposer(check=lambda *_: True).propose(linear_site, 32, bounds, 0)
    assert "conv" in {view(one.blueprint.ir, linear_site).kind for one in found}
    assert all(one.cost.parameters <= 1_500 for one in found)


def test_bounds_that_nothing_can_keep_are_an_error_that_says_so(linear_site):
    with pytest.raises(InvalidStateError, match="no design keeps the constraints at this LINEAR site: 9 known designs"):
        proposer().propose(linear_site, 4, Constraints(max_parameters=0, allowed_ops=frozenset({"linear"})), 0)


def test_what_fails_the_contract_test_is_never_proposed(linear_site):
    with pytest.raises(InvalidStateError, match="none passed the contract test"):
        proposer(check=lambda *_: False).propose(linear_site, 1, Constraints(), 0)


def test_a_broken_blueprint_is_refused_by_the_one_contract_test(linear_site, monkeypatch):
    """Only what the contract test lets pass is proposed: with none but a dead design at hand there is nothing."""
    dead = parse_text("blueprint 1\nu = linear(x, init=zero)\na = activation(u, fn=relu)\nreturn a")
    assert not check_blueprint(dead, linear_site).passed
    assert not passes_contract(dead, linear_site)
    registry = BlueprintRegistry()
    registry.register_template("dead", lambda: dead)
    monkeypatch.setattr(proposer_module.Proposer, "_children", lambda *_: [])
    with pytest.raises(InvalidStateError, match=r"1 known designs are legal, .* none passed the contract test"):
        Proposer(registry, Archive(), Surrogate()).propose(linear_site, 1, Constraints(), 0)


def test_every_proposal_went_through_check_blueprint(linear_site, monkeypatch):
    seen = []

    def watched(ir, site):
        report = check_blueprint(ir, site)
        seen.append((content_id(ir), site, report.passed))
        return report

    monkeypatch.setattr(proposer_module, "check_blueprint", watched)
    for one in proposer().propose(linear_site, 6, Constraints(), 0):
        assert (one.blueprint.id, linear_site, True) in seen


def test_equal_requests_on_an_equal_archive_give_equal_proposals(linear_site):
    assert proposer().propose(linear_site, 4, Constraints(), 5) == proposer().propose(linear_site, 4, Constraints(), 5)


def test_another_seed_gives_other_proposals(linear_site):
    first, second = (
        {one.blueprint.id for one in proposer().propose(linear_site, 6, Constraints(), seed)} for seed in (1, 2)
    )
    assert first != second


def test_one_cell_fills_at_most_half_of_the_answer(linear_site):
    found = proposer().propose(linear_site, 6, Constraints(), 0)
    cells = [view(one.blueprint.ir, linear_site).cell for one in found]
    assert max(cells.count(cell) for cell in cells) <= 3


def test_what_was_tried_comes_again_only_where_it_is_the_best_of_its_cell(linear_site):
    archive = Archive()

    def asked(count=32, check=lambda *_: True):
        found = proposer(archive=archive, check=check).propose(linear_site, count, Constraints(), 0)
        return {structure_id(one.blueprint.ir): one.blueprint for one in found}

    first = asked()
    best, *others = sorted(first)
    for structure, design in first.items():
        seen = view(design.ir, linear_site)
        reward = 0.2 if structure == best else -0.1
        archive.learn(linear_site.kind, design, f"r-{structure}", reward, Look(seen.cell, seen.figures))
    assert list(asked(1, lambda ir, _: structure_id(ir) == best)) == [best]
    assert not set(asked()) & set(others)


@pytest.mark.parametrize("count", [0, 33])
def test_counts_out_of_range_are_refused(linear_site, count):
    with pytest.raises(InvalidInputError, match=f"count must be 1 to 32, got {count}"):
        proposer().propose(linear_site, count, Constraints(), 0)


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"max_parameters": -1}, r"constraints\.max_parameters must be >= 0, got -1"),
        ({"max_flops": -5}, r"constraints\.max_flops must be >= 0, got -5"),
        ({"max_latency_ms": 0.0}, r"constraints\.max_latency_ms must be finite and > 0 ms, got 0\.0"),
        ({"max_latency_ms": float("nan")}, r"constraints\.max_latency_ms must be finite and > 0 ms, got nan"),
        ({"max_latency_ms": float("inf")}, r"constraints\.max_latency_ms must be finite and > 0 ms, got inf"),
        ({"allowed_ops": frozenset({"magic"})}, r"constraints\.allowed_ops must be among .*got \['magic'\]"),
    ],
)
def test_bounds_that_break_a_rule_are_refused(bounds, message):
    with pytest.raises(InvalidInputError, match=message):
        Constraints(**bounds)


def planted_reward(ir, site):
    """A site class with a planted optimum: gated convolutions six nodes deep earn 0.17, and it falls off from there."""
    seen = view(ir, site)
    operators = [step.node.op for step in seen.layout.steps]
    reward = -0.05 + (0.1 if seen.kind == "conv" else 0.0) + (0.12 if "mul" in operators else 0.0)
    return reward - 0.03 * abs(seen.depth - 6)


def rounds_of(site, seed, *, learns, rounds=10, count=4):
    """Give the mean true reward of the proposals of every round; noisy reports are learned where ``learns``."""
    noise = np.random.default_rng(seed)
    archive, surrogate, means = Archive(), Surrogate(), []
    for turn in range(rounds):
        maker = proposer(archive=archive, surrogate=surrogate, check=lambda *_: True)
        found = maker.propose(site, count, Constraints(max_parameters=20_000), 1_000 * seed + turn)
        rewards = [planted_reward(one.blueprint.ir, site) for one in found]
        means.append(float(np.mean(rewards)))
        for place, (one, reward) in enumerate(zip(found, rewards, strict=True)):
            if learns:
                seen, observed = view(one.blueprint.ir, site), reward + noise.normal(0.0, 0.02)
                name = f"{turn}-{place}"
                surrogate.learn(Sample(report_id=name, figures=seen.figures, reward=observed, variance=0.0004))
                archive.learn(site.kind, one.blueprint, name, observed, Look(seen.cell, seen.figures))
    return means


def test_with_reports_proposals_beat_random_generation_on_a_planted_optimum(linear_site):
    learned = rounds_of(linear_site, 0, learns=True)
    random = rounds_of(linear_site, 0, learns=False, rounds=5)
    assert np.mean(learned[-4:]) > np.mean(random) + 0.05
    assert np.mean(learned[-4:]) > np.mean(learned[:4]) + 0.03

"""Designs measured, kept in cells, and what they are expected to earn."""

from __future__ import annotations

import math

import numpy as np
import pytest

from esper.blueprints import Mixing, allowed_mixing, default_registry
from esper.contracts.blueprint import SiteKind
from esper.contracts.errors import InvalidInputError
from esper.services.karn.archive import Archive, Look
from esper.services.karn.design import NUM_FIGURES, novelty, view
from esper.services.karn.surrogate import Sample, Surrogate, SurrogateConfig


def template(name):
    return default_registry().create_blueprint(name)


def figures(name, site):
    return view(template(name).ir, site).figures


def sample(name, row, reward, variance=1e-6):
    return Sample(report_id=name, figures=row, reward=reward, variance=variance)


def test_figures_are_within_their_range(any_site):
    for blueprint in default_registry().for_site(any_site):
        row = view(blueprint.ir, any_site).figures
        assert row.shape == (NUM_FIGURES,)
        assert ((row >= 0) & (row <= 1)).all()


def test_cells_name_cost_kind_and_depth(linear_site):
    assert view(template("lora").ir, linear_site).cell == "cost=2/linear/depth=2"
    assert view(template("norm_shift").ir, linear_site).cell == "cost=0/pointwise/depth=3"
    assert view(template("image_conv").ir, linear_site).kind == "conv"


def test_novelty_is_the_distance_to_the_nearest(linear_site):
    lora, glu = figures("lora", linear_site), figures("glu", linear_site)
    assert novelty(lora, []) == 1.0
    assert novelty(lora, [glu, lora]) == 0.0
    assert novelty(lora, [glu]) == pytest.approx(float(np.linalg.norm(lora - glu)) / math.sqrt(NUM_FIGURES))


def test_sequence_layers_never_look_ahead(any_site):
    sequence = any_site.kind is SiteKind.LINEAR and len(any_site.output_shape) > 1
    assert allowed_mixing(any_site) is (Mixing.CAUSAL if sequence else Mixing.FULL)


def test_the_best_shrunk_mean_holds_the_cell(linear_site):
    archive = Archive()
    look = Look("cell", figures("lora", linear_site))
    rewards = {"lora": [0.1], "glu": [0.08] * 9, "widen": [-0.2]}
    for name, earned in rewards.items():
        for place, reward in enumerate(earned):
            archive.learn(SiteKind.LINEAR, template(name), f"r{place}", reward, look)
    (elite,) = archive.elites(SiteKind.LINEAR)
    assert elite.blueprint.name == "glu"
    assert archive.entry(SiteKind.LINEAR, template("lora").id).standing == pytest.approx(0.05)
    assert archive.entry(SiteKind.LINEAR, template("widen").id).standing == pytest.approx(-0.1)


def test_a_harmful_design_gives_way_to_an_untried_one(linear_site):
    archive = Archive()
    look = Look("cell", figures("lora", linear_site))
    archive.learn(SiteKind.LINEAR, template("lora"), "r", -0.1, look)
    archive.add(SiteKind.LINEAR, template("glu"), look)
    assert [one.blueprint.name for one in archive.elites(SiteKind.LINEAR)] == ["glu"]
    assert archive.elites(SiteKind.CONV2D) == []


def test_a_design_goes_with_its_last_report_and_a_template_goes_home(linear_site):
    archive, kind = Archive(), SiteKind.LINEAR
    row = figures("lora", linear_site)
    archive.add(kind, template("glu"), Look("home", row))
    for name in ("lora", "glu"):
        archive.learn(kind, template(name), "r1", 0.1, Look("first", row))
        archive.learn(kind, template(name), "r2", 0.3, Look("second", row))
        archive.forget(kind, template(name).id, "r1")
    assert [(one.cell, one.rewards) for one in archive.entries(kind)] == [("second", {"r2": 0.3})] * 2
    for name in ("lora", "glu"):
        archive.forget(kind, template(name).id, "r2")
    assert [(one.blueprint.name, one.cell, one.mean_reward) for one in archive.entries(kind)] == [("glu", "home", None)]


def test_a_cell_must_be_named(linear_site):
    with pytest.raises(InvalidInputError, match="cell must be named, got ''"):
        Look("", figures("lora", linear_site))


def test_the_surrogate_is_bayesian_ridge(linear_site):
    config = SurrogateConfig(weight_deviation=0.3, noise_deviation=0.1)
    surrogate = Surrogate(config)
    rows = [figures(name, linear_site) for name in ("lora", "glu", "widen")]
    for place, row in enumerate(rows):
        surrogate.learn(sample(f"r{place}", row, 0.1 * place))
    wide = np.stack([np.concatenate(([1.0], row, row**2)) for row in rows])
    noise = 0.1**2 + 1e-6
    kernel = 0.3**2 * wide @ wide.T
    expected = kernel @ np.linalg.solve(kernel + noise * np.eye(3), np.array([0.0, 0.1, 0.2]))
    found = surrogate.estimate(rows, np.random.default_rng(0))
    assert found.means == pytest.approx(expected)
    variance = np.diag(kernel - kernel @ np.linalg.solve(kernel + noise * np.eye(3), kernel))
    assert found.deviations == pytest.approx(np.sqrt(variance), rel=1e-6)


def test_the_surrogate_is_unsure_of_what_it_never_saw(linear_site):
    surrogate = Surrogate()
    for place in range(30):
        surrogate.learn(sample(f"r{place}", figures("lora", linear_site), 0.1))
    found = surrogate.estimate(
        [figures("lora", linear_site), figures("image_conv", linear_site)], np.random.default_rng(0)
    )
    assert found.means[0] == pytest.approx(0.1, abs=0.01)
    assert found.deviations[1] > 5 * found.deviations[0]


def test_samples_count_once_and_in_any_order(linear_site):
    rows = [figures(name, linear_site) for name in ("lora", "glu")]
    samples = [sample(f"r{place}", row, 0.1 * place) for place, row in enumerate(rows)]
    one, other = Surrogate(), Surrogate()
    assert [one.learn(each) for each in (*samples, samples[0])] == [True, True, False]
    for each in reversed(samples):
        other.learn(each)
    first, second = (each.estimate(rows, np.random.default_rng(0)) for each in (one, other))
    assert (first.draws == second.draws).all()
    assert one.num_samples == 2


def test_a_forgotten_sample_leaves_no_trace(linear_site):
    rows = [figures(name, linear_site) for name in ("lora", "glu")]
    one, other = Surrogate(), Surrogate()
    for place, row in enumerate(rows):
        one.learn(sample(f"r{place}", row, 0.1 + place))
    other.learn(sample("r1", rows[1], 1.1))
    one.estimate(rows, np.random.default_rng(0))
    one.forget("r0")
    first, second = (each.estimate(rows, np.random.default_rng(0)) for each in (one, other))
    assert (first.means == second.means).all()
    assert one.num_samples == 1


def test_settings_that_break_their_rule_are_refused():
    with pytest.raises(InvalidInputError, match=r"weight_deviation must be finite and > 0, got 0"):
        SurrogateConfig(weight_deviation=0.0)

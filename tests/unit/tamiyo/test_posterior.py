"""The reward posterior against the closed form, and what it learns from reports."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from esper.contracts.blueprint import BlueprintCost, SiteKind
from esper.contracts.errors import InvalidInputError
from esper.contracts.run import AdaptationOutcome, Contribution
from esper.services.tamiyo.normal import join_evidence, normal_cdf, option_value
from esper.services.tamiyo.posterior import (
    MAX_OBSERVATIONS,
    Features,
    Observation,
    PosteriorConfig,
    RewardPosterior,
    contribution_variance,
    family_of,
    observation_of,
    phase_of,
    size_class,
)

CONV = Features(
    site_kind=SiteKind.LINEAR,
    blueprint_id="conv",
    family="conv",
    size_class="s",
    phase="early",
    layer="a",
    reach="own",
)
OTHER = Features(
    site_kind=SiteKind.CONV2D,
    blueprint_id="mlp",
    family="linear",
    size_class="m",
    phase="late",
    layer="b",
    reach="skip",
)


def observe(name, features=CONV, reward=0.2, variance=0.0001):
    return Observation(report_id=name, features=features, reward=reward, variance=variance)


def belief(posterior, features=CONV):
    return posterior.believe([features], np.random.default_rng(0))[0]


def test_without_reports_the_prior_speaks():
    config = PosteriorConfig()
    found = belief(RewardPosterior(config))
    assert found.mean == pytest.approx(config.prior_mean)
    assert found.deviation == pytest.approx(config.total_deviation)


def test_one_report_gives_the_conjugate_normal_update():
    config = PosteriorConfig()
    posterior = RewardPosterior(config)
    posterior.learn(observe("r1"))
    prior, noise = config.total_deviation**2, 0.0001 + config.noise_deviation**2
    gain = prior / (prior + noise)
    found = belief(posterior)
    assert found.mean == pytest.approx(config.prior_mean + gain * (0.2 - config.prior_mean))
    assert found.deviation == pytest.approx(math.sqrt(prior * (1 - gain)))


def test_the_dual_form_equals_weights_on_indicators():
    config = PosteriorConfig()
    posterior = RewardPosterior(config)
    observations = [observe("r1"), observe("r2", OTHER, -0.1), observe("r3", replace(CONV, phase="late"), 0.1)]
    for one in observations:
        posterior.learn(one)
    rows, deviations = _indicators([one.features for one in observations] + [CONV], config)
    seen, asked = rows[:-1], rows[-1]
    noise = np.diag([one.variance + config.noise_deviation**2 for one in observations])
    prior = np.diag(deviations**2)
    gain = prior @ seen.T @ np.linalg.inv(seen @ prior @ seen.T + noise)
    residual = np.array([one.reward - config.mean_of(one.features) for one in observations])
    assert belief(posterior).mean == pytest.approx(config.mean_of(CONV) + asked @ gain @ residual)
    variance = asked @ (prior - gain @ seen @ prior) @ asked
    assert belief(posterior).deviation == pytest.approx(math.sqrt(variance))


def _indicators(features, config):
    named = {
        "site_kind": config.kind_deviation,
        "blueprint_id": config.blueprint_deviation,
        "family": config.family_deviation,
        "size_class": config.size_deviation,
        "phase": config.phase_deviation,
        "layer": config.layer_deviation,
        "reach": config.reach_deviation,
    }
    columns = [("level", None, config.level_deviation)]
    for name, deviation in named.items():
        columns += [(name, value, deviation) for value in sorted({str(getattr(one, name)) for one in features})]
    pairs = sorted({(str(one.site_kind), one.blueprint_id) for one in features})
    columns += [("pair", pair, config.pair_deviation) for pair in pairs]

    def holds(one, name, value):
        if name == "level":
            return True
        if name == "pair":
            return (str(one.site_kind), one.blueprint_id) == value
        return str(getattr(one, name)) == value

    matrix = [[float(holds(one, name, value)) for name, value, _ in columns] for one in features]
    return np.array(matrix), np.array([deviation for _, _, deviation in columns])


def test_what_is_learned_of_one_place_reaches_its_likes_more_than_strangers():
    posterior = RewardPosterior()
    before_like, before_other = belief(posterior, replace(CONV, layer="c")), belief(posterior, OTHER)
    posterior.learn(observe("r1"))
    like, other = belief(posterior, replace(CONV, layer="c")), belief(posterior, OTHER)
    assert like.mean - before_like.mean > 2 * (other.mean - before_other.mean) > 0


def test_reports_count_once():
    posterior = RewardPosterior()
    assert posterior.learn(observe("r1"))
    assert not posterior.learn(observe("r1", reward=5.0))
    assert posterior.num_observations == 1


def test_the_order_of_reports_changes_no_bit():
    observations = [observe(f"r{i}", replace(CONV, layer=str(i % 3)), 0.01 * i) for i in range(9)]
    one, other = RewardPosterior(), RewardPosterior()
    for each in observations:
        one.learn(each)
    for each in reversed(observations):
        other.learn(each)
    assert belief(one) == belief(other)


def test_precise_reports_weigh_more_than_vague_ones():
    precise, vague = RewardPosterior(), RewardPosterior()
    precise.learn(observe("r", variance=1e-6))
    vague.learn(observe("r", variance=0.01))
    assert belief(precise).mean > belief(vague).mean


def test_draws_scatter_as_the_posterior_says():
    posterior = RewardPosterior()
    posterior.learn(observe("r1"))
    random = np.random.default_rng(1)
    draws = np.array([[b.draw for b in posterior.believe([CONV, OTHER], random)] for _ in range(3000)])
    expected = posterior.believe([CONV, OTHER], random)
    assert draws.mean(axis=0) == pytest.approx([b.mean for b in expected], abs=0.003)
    assert draws.std(axis=0) == pytest.approx([b.deviation for b in expected], rel=0.06)


def test_equal_candidates_are_drawn_alike_whatever_basis_the_processor_gives(monkeypatch):
    """Eigenvectors of equal eigenvalues, and every sign, are free: another library's answer must change no decision."""
    places = [replace(CONV, layer=layer, blueprint_id=name) for layer in "abc" for name in ("m", "n")]

    def drawn():
        return RewardPosterior().draw(places, np.random.default_rng(7), count=4).draws

    expected, eigh = drawn(), np.linalg.eigh

    def turned(matrix):
        values, vectors = eigh(matrix)
        same = np.isclose(values[:, None], values[None, :])
        first = int(np.argmax(same.sum(1)))
        block = np.flatnonzero(same[first])
        assert len(block) > 1, "there is a basis to be chosen"
        turn = np.linalg.qr(np.random.default_rng(3).standard_normal((len(block), len(block))))[0]
        vectors = -vectors
        vectors[:, block] = vectors[:, block] @ turn
        return values, vectors

    monkeypatch.setattr(np.linalg, "eigh", turned)
    assert drawn() == pytest.approx(expected, abs=1e-9)


def test_arms_come_best_first_and_by_kind():
    posterior = RewardPosterior()
    for place in range(3):
        posterior.learn(observe(f"a{place}"))
    posterior.learn(observe("b", OTHER, -0.2))
    arms = posterior.arms()
    assert [(arm.blueprint_id, arm.num_reports) for arm in arms] == [("conv", 3), ("mlp", 1)]
    assert [arm.blueprint_id for arm in posterior.arms(SiteKind.CONV2D)] == ["mlp"]
    assert RewardPosterior().arms() == []


def test_only_the_newest_observations_are_worked_with():
    posterior = RewardPosterior()
    for place in range(MAX_OBSERVATIONS + 3):
        posterior.learn(observe(f"r{place}"))
    assert posterior.num_observations == MAX_OBSERVATIONS
    assert posterior.learn(observe("r0")), "an observation let go may be learned again"


@pytest.mark.parametrize(("reward", "variance"), [(math.nan, 0.1), (0.1, -1.0), (0.1, math.inf)])
def test_figures_that_are_none_are_refused(reward, variance):
    with pytest.raises(InvalidInputError, match="must be finite"):
        RewardPosterior().learn(observe("r", reward=reward, variance=variance))


def test_a_report_teaches_contribution_minus_price_with_its_error(make_report):
    report = make_report(price=0.02, cost=BlueprintCost(parameters=300, flops=600, activation_bytes=0))
    learned = observation_of(report, family="conv")
    assert learned is not None
    assert learned.reward == pytest.approx(0.03)
    assert math.sqrt(learned.variance) == pytest.approx(0.01 / 1.96, rel=1e-3)
    assert learned.features.size_class == "s"
    assert learned.features.layer == "run-1/hidden"
    assert learned.features.family == "conv"


def test_nothing_is_learned_where_nothing_was_measured(make_report):
    assert observation_of(make_report(reward=None, outcome=AdaptationOutcome.FAILED)) is None
    assert observation_of(make_report(site=None)) is None
    assert observation_of(make_report(blueprint_id="")) is None
    assert observation_of(make_report(adaptation_type="optimize_parameters")) is None


def test_a_rollback_counts_as_harm_of_unknown_size(make_report):
    learned = observation_of(make_report(reward=None, outcome=AdaptationOutcome.ROLLED_BACK))
    assert learned is not None
    assert learned.reward == -PosteriorConfig().total_deviation
    assert learned.variance == pytest.approx(learned.reward**2)


def test_intervals_of_other_coverage_are_read_by_their_own_quantile(make_report):
    report = make_report()
    narrow = replace(report.contribution, confidence_level=0.6826894921)
    assert contribution_variance(replace(report, contribution=narrow)) == pytest.approx(0.01**2, rel=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"low": 1.0, "high": 0.0}, "contribution must be finite with low <= high"),
        ({"estimate": math.nan}, "contribution must be finite with low <= high"),
        ({"confidence_level": 0.2}, r"confidence_level must be within \[0.5, 1\), got 0.2"),
    ],
)
def test_intervals_that_are_none_are_refused(make_report, change, message):
    figures = {"estimate": 0.0, "low": -1.0, "high": 1.0, "num_examples": 10} | change
    with pytest.raises(InvalidInputError, match=message):
        contribution_variance(make_report(contribution=Contribution(**figures)))


def test_families_sizes_and_phases(make_candidates):
    families = {one.blueprint.name: family_of(one.blueprint.ir) for one in make_candidates()}
    assert families["lora"] == "linear"
    assert [size_class(count) for count in (1, 256, 5_000, 20_000, 10**6)] == ["xs", "s", "m", "l", "xl"]
    assert [phase_of(share) for share in (0.0, 0.5, 0.9)] == ["early", "middle", "late"]


def test_prior_settings_that_break_their_rule_are_refused():
    with pytest.raises(InvalidInputError, match=r"kind_deviation must be > 0, got 0\.0"):
        PosteriorConfig(kind_deviation=0.0)
    with pytest.raises(InvalidInputError, match="prior_mean must be finite, got nan"):
        PosteriorConfig(prior_mean=math.nan)


def test_normal_figures():
    assert normal_cdf(0.0) == 0.5
    assert option_value(0.0, 1.0) == pytest.approx(0.39894, abs=1e-5)
    assert option_value(10.0, 1.0) == pytest.approx(10.0)
    assert 0 < option_value(-100.0, 1.0) < 1e-300


def test_evidence_joins_by_log_odds_within_its_bounds():
    assert join_evidence(0.7, 0.5) == pytest.approx(0.7)
    assert join_evidence(0.5, 0.7) == pytest.approx(0.7)
    assert join_evidence(0.36, 1.0) < 0.7 < join_evidence(0.38, 1.0)
    assert join_evidence(0.8, 0.1) < 0.8

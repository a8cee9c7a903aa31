"""Seed selection: what is drawn, what rests, and what is refused."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from esper.contracts.errors import InvalidInputError, InvalidStateError
from esper.services.tamiyo.seed_selection import SeedHistory, SeedSelector, SelectionConfig, read_histories


def test_untried_seeds_have_positive_reward_and_bonus():
    chosen = SeedSelector(0).select_seed_for_adaptation("layer1", {index: [] for index in range(4)})
    assert chosen.seed_index in range(4)
    assert chosen.expected_reward > 0
    assert chosen.exploration_bonus > 0
    assert "never tried" in chosen.explanation


def test_even_a_bad_history_leaves_a_positive_option_value():
    chosen = SeedSelector(0).select_seed_for_adaptation("layer1", {0: [-0.5] * 20})
    assert 0 < chosen.expected_reward < 0.01
    assert chosen.exploration_bonus > 0


def test_equal_seed_and_history_give_equal_draws():
    data = {0: [0.1, 0.2], 1: [], 2: [-0.1]}
    first, second = SeedSelector(5), SeedSelector(5)
    for _ in range(10):
        one, other = (each.select_seed_for_adaptation("l", data) for each in (first, second))
        assert one == other


def test_a_seed_that_pays_is_drawn_more_often_than_one_that_does_not():
    selector = SeedSelector(1)
    data = {0: [0.2, 0.22, 0.19, 0.21], 1: [-0.2, -0.19, -0.21, -0.2]}
    drawn = Counter(selector.select_seed_for_adaptation("l", data).seed_index for _ in range(200))
    assert drawn[0] > 180


def test_uncertain_seeds_are_explored():
    selector = SeedSelector(2)
    data = {0: [0.02] * 50, 1: []}
    drawn = Counter(selector.select_seed_for_adaptation("l", data).seed_index for _ in range(200))
    assert drawn[1] > 50


def test_the_posterior_mean_approaches_the_mean_of_the_rewards():
    chosen = SeedSelector(0).select_seed_for_adaptation("l", {0: [0.3] * 400})
    assert chosen.expected_reward == pytest.approx(0.3, abs=0.01)
    assert chosen.num_rewards == 400


def test_seeds_that_cool_down_are_left_out():
    selector = SeedSelector(0, SelectionConfig(cooldown_steps=100))
    data = [SeedHistory(seed_index=0, steps_since_attempt=99), SeedHistory(seed_index=1, steps_since_attempt=100)]
    assert {selector.select_seed_for_adaptation("l", data).seed_index for _ in range(20)} == {1}


def test_seeds_that_are_taken_are_left_out():
    data = {0: {"rewards": [1.0], "available": False}, 1: {"rewards": [-1.0]}}
    assert SeedSelector(0).select_seed_for_adaptation("l", data).seed_index == 1


def test_no_available_seed_is_an_error_that_says_why():
    selector = SeedSelector(0, SelectionConfig(cooldown_steps=10))
    data = [SeedHistory(seed_index=0, available=False), SeedHistory(seed_index=1, steps_since_attempt=3)]
    with pytest.raises(InvalidStateError, match="got 2 seeds: 1 taken, 1 cooling down"):
        selector.select_seed_for_adaptation("l", data)


def test_numpy_rows_are_histories():
    found = read_histories({0: np.array([0.5, 0.25]), 1: np.array([1, 2])})
    assert found[0].rewards == (0.5, 0.25)
    assert found[1].rewards == (1.0, 2.0)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "performance_data must hold at least one seed"),
        (None, "performance_data must map seeds to their histories, got None"),
        ("abc", "performance_data must map seeds to their histories, got 'abc'"),
        ({"a": []}, "performance_data must have whole numbers as keys, got 'a'"),
        ({0: "x"}, r"performance_data\[0\] must be a row of numbers, got 'x'"),
        ({0: [True]}, r"performance_data\[0\] must be a row of numbers, got True"),
        ({0: [math.nan]}, "rewards of seed 0 must be finite, got nan"),
        ({0: [0.0] * 1001}, "rewards of seed 0 must be <= 1000, got 1001"),
        ({0: {"reward": []}}, r"performance_data\[0\] must hold only available, rewards, steps_since_attempt"),
        ({1: SeedHistory(seed_index=0)}, "performance_data must hold seed 1 under its own key, got 0"),
        ([SeedHistory(seed_index=0)] * 2, "performance_data must name every seed once"),
        ([1, 2], "performance_data must hold SeedHistory entries, got 1"),
        ({-1: []}, "seed_index must be >= 0, got -1"),
    ],
)
def test_bad_data_is_refused_with_the_reason(data, message):
    with pytest.raises(InvalidInputError, match=message):
        SeedSelector(0).select_seed_for_adaptation("l", data)


def test_a_layer_must_be_named():
    with pytest.raises(InvalidInputError, match="layer_name must name a layer, got ''"):
        SeedSelector(0).select_seed_for_adaptation("", {0: []})


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("prior_shape", 1.0, "prior_shape must be finite and > 1, got 1.0"),
        ("prior_trials", 0.0, "prior_trials must be finite and > 0, got 0.0"),
        ("prior_mean", math.inf, "prior_mean must be finite, got inf"),
        ("cooldown_steps", -1, "cooldown_steps must be >= 0 steps, got -1"),
    ],
)
def test_settings_that_break_their_rule_are_refused(setting, value, message):
    with pytest.raises(InvalidInputError, match=message):
        SelectionConfig(**{setting: value})

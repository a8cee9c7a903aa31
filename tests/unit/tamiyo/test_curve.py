"""The learning curve's tests: what they call each shape, and when."""

from __future__ import annotations

import math
import random

import pytest

from esper.contracts.decision import CurveState
from esper.contracts.errors import InvalidInputError
from esper.services.tamiyo.curve import CurveConfig, CurvePoint, least_squares_slope, read_curve, robust_noise


def curve(losses, train=None, se=0.02):
    train = losses if train is None else train
    return [
        CurvePoint(epoch=place, train_loss=t, control_loss=c, control_loss_se=se)
        for place, (c, t) in enumerate(zip(losses, train, strict=True), start=1)
    ]


def states(points):
    return [read_curve(points[:count]).state for count in range(1, len(points) + 1)]


def test_few_epochs_say_nothing():
    reading = read_curve(curve([2.0, 1.0, 0.5]))
    assert reading.state is CurveState.WARMING_UP
    assert reading.evidence[0].name == "epochs_seen"
    assert reading.evidence[0].value == 3


def test_no_points_say_nothing():
    assert read_curve([]).state is CurveState.WARMING_UP


def test_steady_fall_is_improving_throughout():
    found = states(curve([2.0 * 0.85**epoch for epoch in range(15)]))
    assert set(found[3:]) == {CurveState.IMPROVING}


def test_flat_loss_becomes_a_plateau_and_stays_one():
    losses = [2.0, 1.2, 0.8, 0.6] + [0.5] * 12
    found = states(curve(losses))
    first = found.index(CurveState.PLATEAU)
    assert first <= 7
    assert set(found[first:]) == {CurveState.PLATEAU}


def test_plateau_counts_its_epochs_and_grows_more_probable():
    points = curve([2.0, 1.2, 0.8, 0.6] + [0.5] * 12)
    early, late = read_curve(points[:8]), read_curve(points)
    assert late.stretch_epochs > early.stretch_epochs >= 1
    assert late.probability > 0.95


def test_one_epoch_of_noise_is_no_plateau():
    losses = [2.0, 1.6, 1.3, 1.05, 0.85, 0.87, 0.62, 0.5]
    assert CurveState.PLATEAU not in states(curve(losses))


def test_improvement_after_a_plateau_is_seen_within_a_few_epochs():
    losses = [2.0, 1.2, 0.8, 0.6] + [0.5] * 12 + [0.42, 0.34, 0.27, 0.2]
    assert states(curve(losses))[-1] is CurveState.IMPROVING


def test_a_run_that_gathers_pace_is_no_plateau():
    losses = [2.30, 2.299, 2.297, 2.294, 2.289, 2.282, 2.272, 2.258, 2.238, 2.21]
    assert CurveState.PLATEAU not in states(curve(losses, se=0.005))


def test_rising_control_loss_with_falling_training_loss_is_overfitting():
    control = [1.0, 0.7, 0.5, 0.45, 0.44, 0.46, 0.49, 0.53, 0.57]
    train = [1.0, 0.7, 0.45, 0.35, 0.28, 0.22, 0.17, 0.13, 0.1]
    reading = read_curve(curve(control, train))
    assert reading.state is CurveState.OVERFITTING
    assert reading.stretch_epochs == 4


def test_control_and_training_loss_rising_together_is_not_overfitting():
    control = [1.0, 0.7, 0.5, 0.45, 0.44, 0.46, 0.49, 0.53, 0.57]
    assert read_curve(curve(control)).state is not CurveState.OVERFITTING


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_unstable(bad):
    reading = read_curve([*curve([1.0, 0.9]), CurvePoint(epoch=3, train_loss=bad)])
    assert reading.state is CurveState.UNSTABLE
    assert reading.evidence[0].name == "non_finite"
    assert "train_loss" in reading.evidence[0].detail


def test_a_jump_is_unstable_and_an_ordinary_rise_is_not():
    losses = [1.0, 0.8, 0.65, 0.55, 0.5]
    assert read_curve(curve([*losses, 2.0])).state is CurveState.UNSTABLE
    assert read_curve(curve([*losses, 0.53])).state is not CurveState.UNSTABLE


def test_judgement_begins_anew_after_a_divergence():
    points = [*curve([1.0, 0.9, 0.8]), CurvePoint(epoch=4, control_loss=math.nan), *curve([0.8, 0.7])]
    assert read_curve(points).state is CurveState.WARMING_UP


def test_a_wide_gap_with_falling_training_loss_says_capacity_does_not_lack():
    control = [1.0, 0.7, 0.5] + [0.45] * 8
    train = [1.0, 0.6, 0.4, 0.33, 0.27, 0.22, 0.17, 0.13, 0.09, 0.05, 0.01]
    assert read_curve(curve(control, train)).capacity_lacks < 0.3


def test_a_small_gap_says_capacity_lacks():
    assert read_curve(curve([1.0, 0.7, 0.5] + [0.45] * 8)).capacity_lacks > 0.9


def test_a_wide_gap_with_flat_training_loss_still_lets_capacity_lack():
    control = [1.0, 0.7, 0.5] + [0.45] * 8
    train = [0.9, 0.5, 0.3] + [0.15] * 8
    assert read_curve(curve(control, train)).capacity_lacks > 0.7


def test_without_a_control_split_training_loss_is_read():
    points = [CurvePoint(epoch=e, train_loss=loss) for e, loss in enumerate([2.0, 1.2, 0.8, 0.6] + [0.5] * 10)]
    assert read_curve(points).state is CurveState.PLATEAU


def test_noise_around_a_flat_loss_rarely_passes_for_improvement():
    draw = random.Random(3)
    calls = []
    for _ in range(40):
        losses = [2.0, 1.2, 0.8, 0.6] + [0.5 + draw.gauss(0, 0.01) for _ in range(12)]
        calls.append(read_curve(curve(losses)).state)
    assert calls.count(CurveState.PLATEAU) >= 34


def test_readings_are_a_function_of_the_points_alone():
    points = curve([2.0, 1.2, 0.8, 0.6] + [0.5] * 6)
    assert read_curve(points) == read_curve(tuple(points))


def test_slope_and_its_error_are_those_of_least_squares():
    slope, error = least_squares_slope([1.0, 3.0, 5.0, 7.0])
    assert slope == pytest.approx(2.0)
    assert error == pytest.approx(0.0, abs=1e-12)
    assert least_squares_slope([4.0]) == (0.0, 0.0)


def test_robust_noise_ignores_a_straight_trend():
    assert robust_noise([5.0, 4.0, 3.0, 2.0, 1.0]) == 0.0
    assert robust_noise([1.0, 2.0]) == 0.0


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("min_points", 2, "min_points must be >= 3 epochs, got 2"),
        ("plateau_threshold", 0.0, "plateau_threshold must be finite and > 0, got 0.0"),
        ("rise_drift", math.nan, "rise_drift must be finite and >= 0, got nan"),
    ],
)
def test_settings_that_break_their_rule_are_refused(setting, value, message):
    with pytest.raises(InvalidInputError, match=message):
        CurveConfig(**{setting: value})

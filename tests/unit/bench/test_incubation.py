"""The incubation measure in its smallest form: figures from given outcomes, one toy, one host."""

from __future__ import annotations

import pytest

from bench.incubation import COSTS as CASES
from bench.incubation import by_seed, cost_figures, figures_of
from bench.incubation_arms import ARMS, STRAIGHT_THROUGH, WHOLE, SiteOutcome, run_digits, run_toy


def outcome(seed: int, layer: str, whole: float, other: float, *, is_untouched: bool = True) -> SiteOutcome:
    shares = {WHOLE: whole, "local, reach 1": other}
    return SiteOutcome(
        host="mlp", layer=layer, template="widen", seed=seed, control=shares, sealed=shares, is_untouched=is_untouched
    )


FOUND = [outcome(seed, layer, 0.1 + 0.01 * seed, 0.05) for seed in range(3) for layer in ("0", "2")]


def test_a_seed_counts_once_however_many_sites_it_has() -> None:
    assert by_seed(FOUND, WHOLE) == pytest.approx([10.0, 11.0, 12.0])


def test_differences_are_paired_by_seed() -> None:
    figures = {figure.name: figure for figure in figures_of(FOUND)}
    over = figures[f"mlp: local, reach 1 minus {WHOLE}, control"]
    assert over.value == pytest.approx(-6.0)
    assert over.spread is not None
    assert over.spread.low == pytest.approx(-6.0 - 4.303 / 3**0.5, abs=1e-3)


def test_a_host_that_was_touched_misses_the_goal() -> None:
    assert figures_of(FOUND)[0].holds is True
    assert figures_of([*FOUND, outcome(3, "0", 0.1, 0.1, is_untouched=False)])[0].holds is False


def test_on_the_toy_every_way_comes_closer_and_the_negative_control_goes_past() -> None:
    found = run_toy(0, stretch=1.0, num_steps=200, arms=(WHOLE, "local, reach measured", STRAIGHT_THROUGH))
    assert found[WHOLE] < 0.3
    assert found["local, reach measured"] < 0.5
    assert found[STRAIGHT_THROUGH] > 1.0


@pytest.mark.slow
def test_all_arms_learn_beside_an_untouched_host() -> None:
    found = list(run_digits("cnn", seed=0, pretrain=1, epochs=1))
    assert [(one.layer, one.template) for one in found][:2] == [("1", "conv3x3"), ("1", "widen_conv")]
    assert all(one.is_untouched for one in found)
    assert all(set(one.control) == set(one.sealed) == set(ARMS) for one in found)


@pytest.mark.slow
def test_a_quarter_of_the_batch_costs_a_quarter() -> None:
    name, case = next(iter(CASES.items()))
    found = {figure.name: figure.value for figure in cost_figures(name, case, seconds=0.0)}
    whole, quarter = found[f"{name}: {WHOLE}, FLOPs"], found[f"{name}: trial, quarter, FLOPs"]
    assert whole is not None
    assert quarter is not None
    assert quarter - 1.0 == pytest.approx((whole - 1.0) / 4)

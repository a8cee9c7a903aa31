"""G2 in its smallest form: candidates, their true gains, and what a predictor is held against."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from bench.g2_selection import (
    WARM_EPOCHS,
    Selection,
    best_of,
    candidates_of,
    effects_of,
    figures_of,
    rank_correlation,
    select,
    share_recovered,
    trained_out,
)
from bench.growth_hosts import make_cell, make_net, num_parameters
from bench.growth_tasks import load
from bench.growth_training import Recipe, evaluate, train_shape
from esper.contracts.errors import InvalidInputError

CELL = make_cell("digits", "mlp")
SMALL = replace(CELL, settings=replace(CELL.settings, epochs=WARM_EPOCHS + 2))


def row(*values: float) -> np.ndarray:
    return np.array(values)


def test_candidates_are_every_template_at_every_place_that_fits_the_budget() -> None:
    found = candidates_of(CELL)
    room = CELL.max_parameters - num_parameters(make_net(CELL, CELL.host, 0))
    assert {(one.layer, one.source) for one in found} == {("0", ""), ("2", ""), ("2", "0")}
    assert all(0 < one.cost.parameters <= room for one in found)
    assert len({str(one) for one in found}) == len(found)
    assert "image_conv at 0" in map(str, found)
    tight = replace(CELL, max_parameters=CELL.max_parameters - room + 100)
    assert {one.name for one in candidates_of(tight)} == {"norm_shift"}


def test_the_host_alone_is_trained_as_a_static_net_is() -> None:
    trained = train_shape(SMALL, SMALL.host, Recipe(settings=SMALL.settings), seed=1)
    assert trained_out(SMALL, None, seed=1) == evaluate(trained.model, load("digits").sealed)[1]


def test_a_seed_gives_effects_and_gains_and_gives_them_again() -> None:
    candidates = [one for one in candidates_of(SMALL) if str(one) in ("norm_shift at 0", "widen at 2 from 0")]
    once, again = (select(SMALL, candidates, seed=0) for _ in range(2))
    assert once == again
    assert len(set(once.gains)) == len(set(once.effects)) == 2
    assert once.gains[0] == trained_out(SMALL, None, seed=0) - trained_out(SMALL, candidates[0], seed=0)
    assert min(once.effects) > 0, "both help behind this host, and it is said with the right sign"
    assert effects_of(SMALL, candidates, seed=1) != once.effects


def test_one_candidate_is_no_choice() -> None:
    with pytest.raises(InvalidInputError, match="candidates must hold at least two, got 1"):
        select(SMALL, candidates_of(SMALL)[:1], seed=0)


def test_a_predictor_is_right_wrong_or_says_nothing() -> None:
    true = row(0.1, -0.1, 0.6, 0.2)
    assert rank_correlation(10 * true, true) == pytest.approx(1.0)
    assert rank_correlation(-true, true) == pytest.approx(-1.0)
    assert rank_correlation(row(1, 1, 1, 1), true) == 0.0
    assert rank_correlation(row(0, 0, 1, 1), row(0, 1, 2, 3)) == pytest.approx(4 / np.sqrt(20))
    assert share_recovered(true, true) == 1.0
    assert share_recovered(row(0, 0, 0, 1), true) == pytest.approx(0.0)
    assert share_recovered(row(0, 1, 0, 0), true) == pytest.approx(-0.3 / 0.4)
    assert share_recovered(true, row(1, 1, 1, 1)) == 0.0


def test_figures_are_means_over_seeds_beside_what_costs_nothing() -> None:
    candidates = candidates_of(CELL)[:3]
    runs = [Selection(effects=(3.0, 2.0, 1.0), gains=(0.3, 0.2, 0.1)), Selection(effects=(1, 2, 3), gains=(3, 2, 1))]
    figures = {one.name: one for one in figures_of("cell", candidates, runs)}
    assert len(figures) == 6
    ranks = figures["cell: race, rank correlation with the true gain"]
    assert (ranks.value, ranks.spread) == (pytest.approx(0.0), pytest.approx((-1.0, 1.0)))
    assert figures["cell: race, of what the best brings above the mean"].value == pytest.approx(0.0)
    said = best_of("cell", candidates, runs)
    assert f"{candidates[0]} +1.650, first 1 times" in said

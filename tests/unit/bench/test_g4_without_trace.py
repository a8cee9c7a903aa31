"""G4 in its smallest form: a perceptron on a few digits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from bench import g4_without_trace as g4
from bench.growth_tasks import Examples, Task, load
from esper.contracts.errors import InvalidStateError
from esper.core.incubator import Incubator


@pytest.fixture(scope="module")
def task() -> Task:
    def some(examples: Examples) -> Examples:
        return Examples(examples.inputs[:96], examples.targets[:96])

    whole = load("digits")
    return replace(whole, train=some(whole.train), control=some(whole.control))


def test_what_went_left_nothing(task: Task) -> None:
    differ, gone, drawn = g4.host_figures("host", task, [g4.hosts()["digits/norm, dropout"](0)])
    assert (differ.value, differ.holds) == (0, True)
    assert gone.value is not None
    assert gone.value >= 2 * 8, "two races"
    assert drawn.value is not None
    assert drawn.value > 1_000, "from the draw on nothing is alike"


def test_a_seed_that_draws_from_the_run_is_seen(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    learn = Incubator.learn

    def drawing(self: Incubator, *batch: Any) -> None:
        torch.rand(1)
        learn(self, *batch)

    monkeypatch.setattr(Incubator, "learn", drawing)
    differ, *_ = g4.host_figures("host", task, [g4.hosts()["digits/mlp"](0)], epochs=5)
    assert differ.value is not None
    assert differ.value > 1_000
    assert differ.holds is False


def test_a_run_in_which_a_seed_was_blended_in_is_no_measure(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(g4, "LEARNS_EPOCHS", 2)
    with pytest.raises(InvalidStateError, match="no seed may be blended in"):
        g4.run_asked(task, g4.hosts()["digits/mlp"](0), 0, epochs=9)


def test_what_one_run_lacks_differs_in_every_bit() -> None:
    one = {"both": torch.zeros(2), "left": torch.zeros(1)}
    assert g4.bits_apart(one, {"both": torch.zeros(2), "right": torch.zeros(3, dtype=torch.int64)}) == 32 + 3 * 64

"""Figures, goals, and what is printed and written of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.report import Figure, Result, Spread, at_least, at_most, commit, machine, publish


def figure(**changes: object) -> Figure:
    fields: dict[str, object] = {"name": "f", "value": 1.0, "unit": "ratio"}
    return Figure(**(fields | changes))  # type: ignore[arg-type]


def test_a_goal_is_held_or_not() -> None:
    assert figure(goal=at_most(1.0)).holds is True
    assert figure(goal=at_most(0.99)).holds is False
    assert figure(goal=at_least(1.01)).holds is False


def test_without_goal_or_value_nothing_is_claimed() -> None:
    assert figure().holds is None
    assert figure(value=None, goal=at_most(1.0)).holds is None


def test_a_goal_inside_the_interval_is_undecided() -> None:
    assert figure(goal=at_most(1.0), certain=Spread(0.9, 1.1)).holds is None
    assert figure(goal=at_most(1.2), certain=Spread(0.9, 1.1)).holds is True
    assert figure(goal=at_most(0.8), certain=Spread(0.9, 1.1)).holds is False


def test_a_claim_must_hold_over_its_whole_interval() -> None:
    assert figure(goal=at_least(0.0), certain=Spread(-0.1, 2.1), is_claim=True).holds is False
    assert figure(goal=at_least(0.0), certain=Spread(0.1, 2.1), is_claim=True).holds is True


def test_json_has_exactly_the_agreed_fields(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = Result(name="m", figures=(figure(goal=at_most(2.0), spread=Spread(0.5, 1.5)),), notes=("a note",))
    path = publish(result, json_alone=True, directory=tmp_path)
    printed = json.loads(capsys.readouterr().out)
    assert set(printed) == {"name", "commit", "machine", "figures"}
    assert printed["figures"] == [
        {"name": "f", "value": 1.0, "unit": "ratio", "goal": "<= 2", "holds": True, "spread": [0.5, 1.5]}
    ]
    assert json.loads(path.read_text()) == printed


def test_the_table_comes_before_the_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = Result(name="m", figures=(figure(goal=at_most(0.5)),), notes=("why it is so",))
    publish(result, json_alone=False, directory=tmp_path)
    printed = capsys.readouterr().out.splitlines()
    assert any("NO" in line for line in printed)
    assert "- why it is so" in printed
    assert json.loads(printed[-1])["name"] == "m"


def test_figures_that_are_not_finite_have_no_place_in_json() -> None:
    assert figure(value=float("nan")).to_plain()["value"] is None


def test_commit_and_machine_are_named() -> None:
    assert len(commit().removesuffix("-dirty")) == 40
    found = machine()
    assert found["cores"] >= 1
    assert found["cpu"]

"""The tutorial's program runs from its first cell to its last, and what it leaves behind is what its page says."""

from __future__ import annotations

import contextlib
import io
import json
import runpy
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import colors
from matplotlib.image import imread

import esper
from esper.core.randomness import capture_random_state, restore_random_state
from examples.render import PROGRAM, cells_of, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

WITHOUT_ESPER = """
import sys, torch
torch.save(torch.export.load("model.pt2").module()(torch.load("inputs.pt")), "outputs.pt")
sys.exit("esper" in sys.modules)
"""


@dataclass(frozen=True)
class Ran:
    """A run of the program."""

    names: dict[str, Any]
    printed: str
    files: Path


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    directory, printed, random = tmp_path_factory.mktemp("tutorial"), io.StringIO(), capture_random_state()
    try:
        with contextlib.chdir(directory), contextlib.redirect_stdout(printed):
            names = runpy.run_path(str(PROGRAM))
    finally:
        restore_random_state(random)  # the program seeds this whole process
    return Ran(names, printed.getvalue(), directory / "grown")


@pytest.fixture
def inputs() -> torch.Tensor:
    return torch.randn(37, 40, generator=torch.Generator().manual_seed(5))


def outputs(model: torch.nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(inputs)
    return found


def test_the_model_grows_within_its_budget_and_does_better_than_its_host(ran: Ran) -> None:
    report = json.loads((ran.files / "report.json").read_text())
    assert len(report["history"]) == ran.names["EPOCHS"]
    assert report["host_params"] == 40 * 32 + 32 + 32 * 10 + 10
    assert report["host_params"] < report["final_params"] <= 3 * report["host_params"]
    kept = [item for item in report["adaptations"] if item["outcome"] == "kept" and item["parameters"]]
    assert kept
    assert all(item["interval"][0] > item["price"] for item in kept), "the lower end pays the price"
    assert sum(item["parameters"] for item in kept) == report["final_params"] - report["host_params"]
    results = ran.names["results"]
    assert len(results) == len(ran.names["SEEDS"])
    assert sum(one["grown"] - one["host"] for one in results) / len(results) > 10.0


def test_what_was_tried_is_printed_and_explained(ran: Ran) -> None:
    report = ran.names["report"]
    assert f"{len(report.kept)} of {len(report.adaptations)} adaptations kept" in ran.printed
    rows = [line for line in ran.printed.splitlines() if line.startswith("  epoch ")]
    assert len(rows) == len(report.adaptations)
    most = ran.names["most"]
    assert f"{most.id}, run {report.run_id}, epoch {most.begun_epoch}" in ran.printed
    assert f"came to: kept, brought {most.contribution:+.4f}" in ran.printed


def test_the_grown_model_comes_back_to_the_bit(ran: Ran, inputs: torch.Tensor) -> None:
    names = ran.names
    expected = outputs(names["model"], inputs)
    reloaded = esper.wrap(names["SignalNet"]())
    assert not torch.equal(outputs(reloaded, inputs), expected)
    reloaded.load_state_dict(torch.load(ran.files / "model.pt", weights_only=True))
    for found in (reloaded, names["fresh"]):
        assert found.grown_structure() == names["model"].grown_structure() != []
        assert torch.equal(outputs(found, inputs), expected)
    assert ran.printed.count("equal to the bit: True") == 3


def test_the_exported_model_is_equal_and_runs_without_esper(ran: Ran, inputs: torch.Tensor) -> None:
    expected = outputs(ran.names["model"], inputs)
    assert torch.equal(outputs(ran.names["plain"], inputs), expected)
    torch.save(inputs, ran.files / "inputs.pt")
    subprocess.run([sys.executable, "-c", WITHOUT_ESPER], cwd=ran.files, check=True, timeout=150)
    assert torch.allclose(torch.load(ran.files / "outputs.pt"), expected, atol=1e-5)


def test_a_topology_from_scratch_has_the_grown_size_and_none_of_its_weights(ran: Ran) -> None:
    grown = ran.names["plain"]
    fresh, again, other = (ran.names["from_scratch"](ran.names["model"], seed) for seed in (0, 0, 1))
    shapes = [{name: value.shape for name, value in net.named_parameters()} for net in (grown, fresh)]
    assert shapes[0] == shapes[1]
    trained, drawn = dict(grown.named_parameters()), dict(fresh.named_parameters())
    assert [name for name, value in drawn.items() if value.std() > 0 and torch.equal(value, trained[name])] == []
    assert all(torch.equal(value, drawn[name]) for name, value in again.named_parameters())
    seeds = [name for name, value in drawn.items() if ".seeds." in name and value.ndim > 1]
    assert seeds
    assert not any(torch.equal(dict(other.named_parameters())[name], drawn[name]) for name in seeds)


@pytest.mark.parametrize("name", ["accuracy.png", "contributions.png"])
def test_the_pictures_show_what_was_kept(ran: Ran, name: str) -> None:
    picture = imread(ran.files / name)[:, :, :3]
    assert picture.shape[0] > 150
    assert picture.shape[1] > 600
    is_green = np.abs(picture - np.array(colors.to_rgb("tab:green"))).max(axis=2) < 0.02
    is_black = picture.max(axis=2) < 0.05
    assert is_green.sum() > 20
    assert is_black.sum() > 200


def test_what_a_cell_prints_is_told_apart_from_its_neighbours(tmp_path: Path) -> None:
    program = '# %%\nprint("one")\n\n# %%\nx = 1\n\n# %% [markdown]\n# text\n\n# %%\nprint("two", x)\n'
    assert len(cells_of(program)) == 4
    assert run(program, tmp_path) == ["one\n", "", "two 1\n"]
    with pytest.raises(subprocess.CalledProcessError):
        run("# %%\nraise SystemExit(3)\n", tmp_path)

"""A grown run that is taken up in a fresh process, over another mesh, goes on as the one that was not interrupted."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.integration.grown_run import OPTIMIZERS, main

ROOT = Path(__file__).parents[2]
STATES = {
    "incubating": ("ACTIVE", "DORMANT"),
    "grafting": ("EVALUATING", "DORMANT"),
    "kept": ("FOSSILIZED", "ACTIVE"),
    "culled": ("FOSSILIZED", "EMBARGOED"),
}
SAVED_AT = {"incubating": "33", "grafting": "53", "kept": "133", "culled": "153"}


def take_up(directory: Path, mesh: str, *optimizers: str) -> Any:
    """Take the runs up in one process, to its end; give what it printed."""
    command = [sys.executable, "-m", "tests.integration.grown_run", "resume", str(directory), mesh, *optimizers]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def assert_goes_on(whole: Any, resumed: Any) -> None:
    whole = json.loads(json.dumps(whole))  # the other side came as JSON
    assert set(resumed) == set(STATES)
    for name, found in resumed.items():
        at = SAVED_AT[name]
        states = tuple(state for state, _ in whole["seeds"][at])
        assert states == STATES[name], name
        if name == "grafting":
            assert 0.0 < whole["seeds"][at][0][1] < 1.0, "the ramp is under way"
        assert found["seeds_at_once"] == whole["seeds"][at], name
        assert found["at_once"] == whole["digests"][at], f"{name}: what was loaded is what was saved"
        assert len(found["losses"]) >= 27
        assert found["losses"] == {step: whole["losses"][step] for step in found["losses"]}, name
        for step, digests in found["digests"].items():
            assert digests == whole["digests"][step], f"{name}, step {step}"
        assert len(found["digests"]) >= 2, "an epoch's end or two are in it"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path, str], Any]:
    """Gives what a run with an optimizer found that was not interrupted, and puts its checkpoints into a directory."""
    found: dict[str, Any] = {}
    kept = tmp_path_factory.mktemp("whole")

    def give(directory: Path, optimizer: str) -> Any:
        if optimizer not in found:
            found.update(main("whole", kept, "embedded", optimizer))
        shutil.copytree(kept / optimizer, directory / optimizer)
        return found[optimizer]

    return give


@pytest.mark.timeout(600)
@pytest.mark.parametrize("optimizer", [pytest.param("adamw", marks=pytest.mark.slow), "both"])
def test_a_run_goes_on_to_the_bit_in_a_fresh_process(tmp_path: Path, optimizer: str, whole: Any) -> None:
    uninterrupted = whole(tmp_path, optimizer)
    assert_goes_on(uninterrupted, take_up(tmp_path, "embedded", optimizer)[optimizer])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_runs_go_on_to_the_bit_over_processes_and_nats(tmp_path: Path, whole: Any) -> None:
    """With SGD, AdamW and a pair with Muon in turn, over one mesh: bringing that up takes far longer than the runs."""
    uninterrupted = {optimizer: whole(tmp_path, optimizer) for optimizer in OPTIMIZERS}
    resumed = take_up(tmp_path, "local", *OPTIMIZERS)
    assert set(resumed) == {"sgd", "adamw", "both"}
    for optimizer, found in resumed.items():
        assert_goes_on(uninterrupted[optimizer], found)

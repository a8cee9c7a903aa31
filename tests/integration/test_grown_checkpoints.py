"""A grown run that is taken up in a fresh process, over another mesh, goes on as the one that was not interrupted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.integration.grown_run import main

ROOT = Path(__file__).parents[2]
STATES = {
    "incubating": ("ACTIVE", "DORMANT"),
    "grafting": ("EVALUATING", "DORMANT"),
    "kept": ("FOSSILIZED", "ACTIVE"),
    "culled": ("FOSSILIZED", "EMBARGOED"),
}
SAVED_AT = {"incubating": "33", "grafting": "53", "kept": "133", "culled": "153"}


def run(action: str, directory: Path, optimizer: str, mesh: str) -> Any:
    """Run one process to its end; give what it printed."""
    command = [sys.executable, "-m", "tests.integration.grown_run", action, str(directory), optimizer, mesh]
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


@pytest.mark.timeout(600)
@pytest.mark.parametrize("optimizer", [pytest.param("adamw", marks=pytest.mark.slow), "both"])
def test_a_run_goes_on_to_the_bit_in_a_fresh_process(tmp_path: Path, optimizer: str) -> None:
    whole = main("whole", tmp_path, optimizer, "embedded")
    assert_goes_on(whole, run("resume", tmp_path, optimizer, "embedded"))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_goes_on_to_the_bit_over_processes_and_nats(tmp_path: Path) -> None:
    whole = main("whole", tmp_path, "sgd", "embedded")
    assert_goes_on(whole, run("resume", tmp_path, "sgd", "local"))

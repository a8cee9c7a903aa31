"""A training process that is ended takes its local mesh along: no child or grandchild is left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from esper.mesh.process_state import read_state
from tests.chaos.conftest import EVERYTHING

pytestmark = [pytest.mark.chaos, pytest.mark.slow, pytest.mark.timeout(400)]

TRAINING = """
import sys
from pathlib import Path
import esper
from tests.chaos.conftest import training
with esper.Mesh.local(Path(sys.argv[1])) as mesh, training(mesh) as loop:
    loop.epoch()
    print("training", flush=True)
    while True:
        loop.epoch()
"""


@contextlib.contextmanager
def training_process(state_dir: Path) -> Iterator[tuple[subprocess.Popen[str], list[psutil.Process]]]:
    """Run a training with a local mesh of its own; gives it and all processes below it once it trains."""
    with (state_dir / "training.log").open("w") as errors:
        running = subprocess.Popen(
            [sys.executable, "-c", TRAINING, str(state_dir)],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    assert running.stdout is not None
    below: list[psutil.Process] = []
    try:
        line = running.stdout.readline()
        assert line == "training\n", (state_dir / "training.log").read_text()
        below = psutil.Process(running.pid).children(recursive=True)
        assert {record.pid for record in read_state(state_dir).processes} <= {process.pid for process in below}
        assert len(below) > len(EVERYTHING)  # the NATS server stands below its keeper, compilers below theirs
        yield running, below
    finally:
        running.kill()
        running.wait(30)
        running.stdout.close()
        for process in below:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_nothing_stays_behind(tmp_path: Path, number: signal.Signals) -> None:
    with training_process(tmp_path) as (running, below):
        running.send_signal(number)
        running.wait(60)
        psutil.wait_procs(below, timeout=20)
        left = [process.cmdline() for process in below if process.is_running()]
        assert not left
    assert (running.returncode == -number) if number is not signal.SIGINT else (running.returncode != 0)

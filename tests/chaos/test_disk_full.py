"""A disk that is full when a checkpoint is due costs that checkpoint and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from esper.recovery import CheckpointManager

pytestmark = [pytest.mark.chaos, pytest.mark.slow]

# The limit on the size of files stands for the full device: the kernel refuses the write in the middle of the file.
TRAINING = """
import logging, resource, sys
from datetime import timedelta
from pathlib import Path
import esper
from esper.recovery import CheckpointConfig, CheckpointManager
from tests.chaos.conftest import training
logging.basicConfig(level=logging.ERROR, format="%(message)s")
manager = CheckpointManager(CheckpointConfig(directory=Path(sys.argv[1]), interval=timedelta(microseconds=1)))
with esper.Mesh.embedded() as mesh, training(mesh, checkpoints=manager) as loop:
    loop.epochs(2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, resource.RLIM_INFINITY))
    loop.epochs(3)
    full = len(manager.list_checkpoints())
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    loop.epochs(1)
report = loop.session.report()
losses = [record.control_loss for record in report.history]
print(report.phase, len(losses), losses[-1] < losses[0], full, len(manager.list_checkpoints()), report.rollbacks)
"""


def test_training_outlives_a_full_disk_and_earlier_checkpoints_load(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", TRAINING, str(tmp_path)],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["finished", "6", "True", "2", "3", "0"]
    assert done.stderr.split().count("checkpoint_failed") == 3
    manager = CheckpointManager(tmp_path)
    epochs = [manager.load_state(name)["tolaria"]["epoch"] for name in manager.list_checkpoints()]
    assert epochs == [1, 2, 6]
    assert not [path.name for path in tmp_path.rglob("*") if path.name.endswith(".tmp")]

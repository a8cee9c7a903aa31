"""The mark of a mesh that is up is believed as long as the process that made it lives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from esper.mesh.ready_mark import MARK, clear_ready, find_supervisor, mark_ready


def test_a_mark_names_its_maker_until_it_is_taken_away(tmp_path: Path) -> None:
    assert find_supervisor(tmp_path) is None
    mark_ready(tmp_path)
    found = find_supervisor(tmp_path)
    assert found is not None
    assert found.pid == os.getpid()
    clear_ready(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_mark_outlives_its_maker_in_vain(tmp_path: Path) -> None:
    code = f"import pathlib; from esper.mesh.ready_mark import mark_ready; mark_ready(pathlib.Path({str(tmp_path)!r}))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert (tmp_path / MARK).is_file()
    assert find_supervisor(tmp_path) is None


def test_a_pid_that_is_somebody_elses_now_is_not_believed(tmp_path: Path) -> None:
    parent = psutil.Process(os.getppid())
    (tmp_path / MARK).write_text(json.dumps({"pid": parent.pid, "created_at_s": parent.create_time() - 60}))
    assert find_supervisor(tmp_path) is None


def test_another_ones_mark_is_left_alone(tmp_path: Path) -> None:
    parent = psutil.Process(os.getppid())
    (tmp_path / MARK).write_text(json.dumps({"pid": parent.pid, "created_at_s": parent.create_time()}))
    clear_ready(tmp_path)
    assert find_supervisor(tmp_path) == parent


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"pid": "x", "created_at_s": 1}'])
def test_what_is_no_mark_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / MARK).write_text(text)
    assert find_supervisor(tmp_path) is None

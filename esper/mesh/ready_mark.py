"""The mark of a mesh that is up: ``<state_dir>/mesh.ready`` names the process that watches over it.

The state file says which processes run; this says that all of them were ready. It is believed as long as the process
that wrote it lives, so that one left behind by a crash means nothing.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Final

import psutil

from esper.mesh.process_state import ProcessRecord

MARK: Final = "mesh.ready"


def mark_ready(state_dir: Path) -> None:
    """Note that the mesh in ``state_dir`` is up, and that the calling process watches over it."""
    own = {"pid": os.getpid(), "created_at_s": psutil.Process().create_time()}
    temporary = state_dir / f".{MARK}.{own['pid']}"
    temporary.write_text(json.dumps(own), encoding="utf-8")
    temporary.replace(state_dir / MARK)


def find_supervisor(state_dir: Path) -> psutil.Process | None:
    """Give the live process that has marked the mesh as up; ``None`` where there is none."""
    try:
        raw = json.loads((state_dir / MARK).read_bytes())
        pid, created_at_s = int(raw["pid"]), float(raw["created_at_s"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # no mark, or none of ours
    record = ProcessRecord(name="mesh", pid=pid, created_at_s=created_at_s, argv=(), log_path="")
    return record.process()


def clear_ready(state_dir: Path) -> None:
    """Take the calling process's mark away; another's stays."""
    found = find_supervisor(state_dir)
    if found is None or found.pid == os.getpid():
        (state_dir / MARK).unlink(missing_ok=True)

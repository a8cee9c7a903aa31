"""Which processes of a mesh run on this machine, in a file that any process of the same user can read and act on.

``<state_dir>/processes.json`` is replaced in one step at every change. A pid is believed only together with the moment
its process was created, so that a pid that went to somebody else is never signalled.
"""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import psutil

from esper.contracts.errors import AlreadyExistsError, CorruptDataError

STATE_FILE: Final = "processes.json"
LOCK_FILE: Final = "processes.lock"
LEAST_STOP_S: Final = 2.0
"""Seconds that a level has to end by itself, however long those above it took."""
_VERSION: Final = 1
_CLOCK_SLACK_S: Final = 0.05  # the kernel counts starts in ticks of 10 ms


@dataclass(frozen=True, kw_only=True)
class ProcessRecord:
    """One process that was started."""

    name: str
    """Name of the service."""

    pid: int
    """Process id."""

    created_at_s: float
    """When the process was created, in seconds since the epoch, as the kernel says."""

    argv: tuple[str, ...]
    """What was run."""

    log_path: str
    """Where its output goes."""

    address: str | None = None
    """``host:port`` it serves, when it serves one."""

    restarts: int = 0
    """How often it was started again."""

    level: int = 0
    """Those of a level were started after all of lower ones, which they need, and are stopped before them."""

    def process(self) -> psutil.Process | None:
        """Give the running process, or ``None`` when it has ended or the pid belongs to another one now."""
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.created_at_s) <= _CLOCK_SLACK_S
            return process if same and process.status() != psutil.STATUS_ZOMBIE else None
        except psutil.NoSuchProcess:
            return None

    @property
    def running(self) -> bool:
        """Whether the process is alive."""
        return self.process() is not None


@dataclass(frozen=True, kw_only=True)
class MeshState:
    """All processes of one state directory."""

    processes: tuple[ProcessRecord, ...] = ()
    """In order of start."""

    stopping: bool = False
    """Whether somebody is taking the mesh down; supervisors start nothing again then."""

    extra: dict[str, str] = field(default_factory=dict)
    """What the starter wants to find again, e.g. the bus's URL."""

    def find(self, name: str) -> ProcessRecord | None:
        """Give the record of a name, or ``None``."""
        return next((record for record in self.processes if record.name == name), None)

    @property
    def running(self) -> tuple[ProcessRecord, ...]:
        """Records whose process is alive."""
        return tuple(record for record in self.processes if record.running)


def read_state(state_dir: Path) -> MeshState:
    """Read the state; an empty one when nothing was ever started.

    Raises:
        CorruptDataError: the file is not one of ours.
    """
    path = state_dir / STATE_FILE
    try:
        raw: Any = json.loads(path.read_bytes())
        if raw["version"] != _VERSION:
            raise CorruptDataError(f"{path} must have version {_VERSION}, got {raw['version']!r}")
        records = [{**record, "argv": tuple(record["argv"])} for record in raw["processes"]]
        return MeshState(
            processes=tuple(ProcessRecord(**record) for record in records),
            stopping=bool(raw["stopping"]),
            extra={str(key): str(value) for key, value in raw["extra"].items()},
        )
    except FileNotFoundError:
        return MeshState()
    except CorruptDataError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptDataError(
            f"{path} must be a state file of the mesh, got {type(error).__name__}: {error}"
        ) from error


def write_state(state_dir: Path, state: MeshState) -> None:
    """Replace the state file in one step; readable by this user only."""
    state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    content = {
        "version": _VERSION,
        "stopping": state.stopping,
        "extra": state.extra,
        "processes": [asdict(record) for record in state.processes],
    }
    descriptor, temporary = tempfile.mkstemp(dir=state_dir, prefix=f".{STATE_FILE}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(state_dir / STATE_FILE)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextmanager
def state_lock(state_dir: Path) -> Iterator[None]:
    """Hold the directory against a second starter.

    Raises:
        AlreadyExistsError: another process is starting a mesh there right now.
    """
    state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (state_dir / LOCK_FILE).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise AlreadyExistsError(
                f"state_dir must not be in use by another starter, got {str(state_dir)!r}", parameter="state_dir"
            ) from error
        yield


def stop_recorded(state_dir: Path, *, deadline_s: float = 20.0) -> tuple[ProcessRecord, ...]:
    """Take down whatever runs in ``state_dir``, level by level from the highest, and give what was stopped.

    Each process gets SIGTERM and, if it is still there at the deadline, SIGKILL; a level waits until those above it
    have ended, since they need it to finish what they do. Supervisors of these processes, in whatever process they
    live, see ``stopping`` and start nothing again. Blocks for about ``deadline_s`` seconds at most.
    """
    state = read_state(state_dir)
    running = state.running
    if running:
        write_state(state_dir, MeshState(processes=state.processes, stopping=True, extra=state.extra))
        _end(running, deadline_s)
        # The mark stays until the next start: a supervisor may look only after the last process has gone.
        write_state(state_dir, MeshState(stopping=True, extra=state.extra))
    return running


def _end(records: Sequence[ProcessRecord], deadline_s: float) -> None:
    end_s = time.monotonic() + deadline_s
    for level in sorted({record.level for record in records}, reverse=True):
        chosen = [record for record in reversed(records) if record.level == level]
        processes = [process for record in chosen if (process := record.process()) is not None]
        for process in processes:
            _signal(process, kill=False)
        _, alive = psutil.wait_procs(processes, timeout=max(LEAST_STOP_S, end_s - time.monotonic()))
        for process in alive:
            _signal(process, kill=True)
        psutil.wait_procs(alive, timeout=5.0)


def _signal(process: psutil.Process, *, kill: bool) -> None:
    """Signal a process that may have ended meanwhile; psutil checks once more that the pid is still its own."""
    try:
        process.kill() if kill else process.terminate()
    except psutil.NoSuchProcess:
        return

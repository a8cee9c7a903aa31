"""``esper up`` and ``esper down`` as a user types them: the whole mesh, twice over, with nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from esper.contracts.kernel import ValidationCheck
from esper.contracts.wire import parse
from esper.mesh.ports import LOOPBACK, free_ports
from esper.mesh.process_state import read_state
from esper.mesh.ready_mark import find_supervisor
from esper.mesh.settings import SERVICES
from esper.services.local import LocalMesh

pytestmark = pytest.mark.slow


# Gives up Landlock as a system gives it that has none (the call that asks for it is refused), then becomes the program.
WITHOUT_LANDLOCK = """
import ctypes, os, sys
from esper.services.tezzeret import sandbox
known = sandbox._DENIED[os.uname().machine]
sandbox._DENIED[os.uname().machine] = (known[0], (sandbox._LANDLOCK_CREATE_RULESET,))
assert sandbox._prctl(sandbox._PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) and sandbox._deny_syscalls().passed
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


class Shell:
    """Runs the command line with settings of its own, and sees to it that nothing stays."""

    def __init__(self, directory: Path) -> None:
        self.state_dir = directory / "state"
        ports = free_ports(len(SERVICES) + 3)
        lines = [f'{name}_address = "{LOOPBACK}:{port}"' for name, port in zip(SERVICES, ports, strict=False)]
        lines += [f'nats_url = "nats://{LOOPBACK}:{ports[-3]}"', f"nissa_http_port = {ports[-2]}"]
        self.config = directory / "esper.toml"
        self.config.write_text("\n".join([*lines, f"urza_rest_port = {ports[-1]}", ""]))
        self.address = f"{LOOPBACK}:{ports[0]}"

    def command(self, *words: str) -> list[str]:
        where = ["--state-dir", str(self.state_dir), "--config", str(self.config)]
        return [sys.executable, "-m", "esper.cli.main", *words, *where]

    def run(self, *words: str, state_dir: Path | None = None) -> subprocess.CompletedProcess[str]:
        argv = self.command(*words)
        if state_dir is not None:
            argv[argv.index("--state-dir") + 1] = str(state_dir)
        return subprocess.run(argv, capture_output=True, text=True, timeout=170, check=False)

    def run_without_landlock(self, *words: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-c", WITHOUT_LANDLOCK, *self.command(*words)[1:]]
        return subprocess.run(argv, capture_output=True, text=True, timeout=170, check=False)

    def serving(self) -> dict[str, str]:
        rows = json.loads(self.run("status", "--json").stdout)
        return {row["service"]: row["health"] for row in rows}


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    one = Shell(tmp_path)
    yield one
    one.run("down")


def eventually(condition: Callable[[], bool]) -> None:
    deadline_s, tick = time.monotonic() + 60.0, threading.Event()
    while not condition():
        assert time.monotonic() < deadline_s, "the condition did not come about in time"
        tick.wait(0.1)


def everything_of(state_dir: Path) -> list[psutil.Process]:
    """Give every process started on behalf of a state directory."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("ESPER_STATE_DIR") == str(state_dir) and process.pid != os.getpid():
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def sandbox_of_this_system(directory: Path) -> list[ValidationCheck]:
    """Give what a process of its own finds that this system enforces."""
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from esper.contracts.wire import serialize\n"
        "from esper.services.tezzeret.config import WorkerLimits\n"
        "from esper.services.tezzeret.sandbox import enter\n"
        "print(*(serialize(row).hex() for row in enter(WorkerLimits(), Path(sys.argv[1]))))\n"
    )
    found = subprocess.run([sys.executable, "-c", code, directory], capture_output=True, text=True, check=True)
    return [parse(bytes.fromhex(row), ValidationCheck) for row in found.stdout.split()]


@pytest.mark.timeout(600)
def test_what_the_system_cannot_enforce_stands_in_the_status(shell: Shell) -> None:
    up = shell.run_without_landlock("up")
    assert up.returncode == 0, up.stderr
    assert shell.serving() == dict.fromkeys(SERVICES, "SERVING") | {"nats": "RUNNING"}
    why = "NOT ENFORCED: this kernel has no Landlock"
    for printed in (up.stdout, shell.run("status").stdout):
        assert f"compile workers: files: {why}" in printed
        assert f"compile workers: scope: {why}" in printed
    [tezzeret] = [row for row in json.loads(shell.run("status", "--json").stdout) if row["service"] == "tezzeret"]
    assert {door.partition(":")[0] for door in tezzeret["not_enforced"]} == {"files", "scope"}


@pytest.mark.timeout(600)
def test_the_mesh_comes_up_heals_goes_down_and_comes_up_again(shell: Shell) -> None:
    up = shell.run("up")
    assert up.returncode == 0, up.stderr
    assert all(name in up.stdout for name in (*SERVICES, "nats"))
    assert shell.serving() == dict.fromkeys(SERVICES, "SERVING") | {"nats": "RUNNING"}

    again = shell.run("up")
    assert again.returncode == 2
    assert "must hold no running mesh" in again.stderr

    other = shell.run("up", state_dir=shell.state_dir.parent / "other")
    assert other.returncode == 1
    assert "is in use by another process" in other.stderr

    lacking = [row.name for row in sandbox_of_this_system(shell.state_dir) if not row.passed]
    said = {row["service"]: row["not_enforced"] for row in json.loads(shell.run("status", "--json").stdout)}
    assert [door.partition(":")[0] for door in said.pop("tezzeret")] == lacking
    assert set(said.values()) == {None}

    karn = read_state(shell.state_dir).find("karn")
    assert karn is not None
    os.kill(karn.pid, signal.SIGKILL)
    eventually(lambda: (found := read_state(shell.state_dir).find("karn")) is not None and found.restarts == 1)
    assert find_supervisor(shell.state_dir) is not None, "a restart leaves the mark of a mesh that is up"

    down = shell.run("down")
    assert down.returncode == 0
    assert "stopped" in down.stdout
    assert everything_of(shell.state_dir) == []
    assert find_supervisor(shell.state_dir) is None
    assert "service_started" in shell.run("logs", "urza").stdout

    second = shell.run("up")
    assert second.returncode == 0, second.stderr
    assert second.stdout.count("SERVING") == len(SERVICES)
    assert shell.run("down").returncode == 0
    assert everything_of(shell.state_dir) == []


def test_an_interrupted_start_stops_what_it_began(tmp_path: Path) -> None:
    mesh = LocalMesh(tmp_path)
    before = set(threading.enumerate())
    main = threading.get_ident()
    began = threading.Event()

    def interrupt() -> None:
        eventually(lambda: any(record.name == "urza" for record in read_state(tmp_path).processes))
        began.set()
        signal.pthread_kill(main, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        mesh.start()
    thread.join(10)
    assert began.is_set()
    assert everything_of(tmp_path) == []
    assert set(threading.enumerate()) <= before

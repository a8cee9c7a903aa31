"""What a worker process cannot do any more, tried from inside one; a protection that is absent is said to be."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ATTEMPTS = """
import json, os, resource, socket, sys
from pathlib import Path
from esper.services.tezzeret.config import WorkerLimits
from esper.services.tezzeret.sandbox import enter

def tried(work):
    try:
        work()
    except OSError as error:
        return type(error).__name__
    except MemoryError:
        return "MemoryError"
    return "done"

def connect():
    with socket.socket() as one:
        one.connect(("127.0.0.1", 9))

scratch, secret, parent = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
rows = enter(WorkerLimits(address_space_bytes=1 << 30, file_bytes=1 << 16, open_files=32), scratch)
report = {row.name: (row.passed, row.detail) for row in rows}
report["tried"] = {
    "read_secret": tried(secret.read_text),
    "write_outside": tried(lambda: (secret.parent / "new").write_text("x")),
    "write_scratch": tried(lambda: (scratch / "own").write_text("x")),
    "write_large": tried(lambda: (scratch / "large").write_bytes(bytes(1 << 17))),
    "read_python": tried(lambda: Path(os.__file__).read_text()),
    "environ_of_parent": tried(Path(f"/proc/{parent}/environ").read_bytes),
    "socket": tried(connect),
    "unix_socket": tried(lambda: socket.socket(socket.AF_UNIX).close()),
    "memory": tried(lambda: bytes(1 << 31)),
    "raise_limit": tried(lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))),
    "signal_parent": tried(lambda: os.kill(parent, 0)),
}
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    scratch = tmp_path_factory.mktemp("scratch")
    secret = tmp_path_factory.mktemp("state") / "kernel-signing.pem"
    secret.write_text("private")
    import os

    done = subprocess.run(
        [sys.executable, "-c", ATTEMPTS, str(scratch), str(secret), str(os.getpid())],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, str]] = json.loads(done.stdout)
    return found


def test_every_protection_says_whether_it_holds(report: dict[str, dict[str, str]]) -> None:
    assert set(report) == {"parent", "limits", "files", "network", "tried"}
    for name in ("parent", "limits", "files", "network"):
        enforced, detail = report[name]
        assert bool(enforced) != detail.startswith("NOT ENFORCED")


def test_limits_hold(report: dict[str, dict[str, str]]) -> None:
    assert report["tried"]["write_large"] == "OSError"
    assert report["tried"]["memory"] == "MemoryError"


def test_files_outside_are_out_of_reach(report: dict[str, dict[str, str]]) -> None:
    if not report["files"][0]:  # type: ignore[index]
        pytest.skip(report["files"][1])  # type: ignore[index]
    tried = report["tried"]
    assert (tried["read_secret"], tried["write_outside"]) == ("PermissionError", "PermissionError")
    assert (tried["write_scratch"], tried["read_python"]) == ("done", "done")
    assert tried["environ_of_parent"] == "PermissionError"


def test_the_network_is_out_of_reach(report: dict[str, dict[str, str]]) -> None:
    if not report["network"][0]:  # type: ignore[index]
        pytest.skip(report["network"][1])  # type: ignore[index]
    assert (report["tried"]["socket"], report["tried"]["unix_socket"]) == ("PermissionError", "PermissionError")


def test_the_parent_cannot_be_signalled(report: dict[str, dict[str, str]]) -> None:
    if "signals" not in report["files"][1]:  # type: ignore[index]
        pytest.skip("this kernel's Landlock does not scope signals")
    assert report["tried"]["signal_parent"] == "PermissionError"


def test_what_the_system_lacks_is_said(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from esper.services.tezzeret import sandbox\n"
        "from esper.services.tezzeret.config import WorkerLimits\n"
        "sandbox._DENIED.clear()\n"
        "rows = {row.name: row for row in sandbox.enter(WorkerLimits(), Path(sys.argv[1]))}\n"
        "assert not rows['network'].passed\n"
        "print(rows['network'].detail)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.startswith("NOT ENFORCED: no list of system calls for"), done.stderr

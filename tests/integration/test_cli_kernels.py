"""Blueprints, kernels, jobs and dead letters as a user types them, against the processes of a real local mesh."""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from esper.blueprints import content_id, parse_text
from esper.cli.main import main
from esper.mesh.process_state import read_state
from esper.services.local import LocalMesh

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

TEXT = """blueprint 1
down = linear(x, features={max(4, C // 4)})
act = activation(down, fn=gelu)
up = linear(act, init=zero)
return up
"""
NONZERO = "blueprint 1\nout = linear(h)\nreturn out\n"

Esper = Callable[..., tuple[int, str, str]]


@dataclass(frozen=True)
class Running:
    """A local mesh and where it is."""

    state_dir: Path

    def workers(self) -> list[psutil.Process]:
        """Give the compile workers that live."""
        record = read_state(self.state_dir).find("tezzeret")
        process = None if record is None else record.process()
        return [] if process is None else process.children()


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    local = LocalMesh(tmp_path_factory.mktemp("cli") / "state")
    local.start()
    try:
        yield Running(local.state_dir)
    finally:
        local.stop()


@pytest.fixture
def esper(mesh: Running, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Esper:
    """Run a command line in this process against the mesh; gives exit code, output and errors."""
    monkeypatch.setenv("ESPER_STATE_DIR", str(mesh.state_dir))
    monkeypatch.setenv("COLUMNS", "250")

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["esper", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return run


@pytest.fixture
def stored(esper: Esper, tmp_path: Path) -> str:
    """Have the bottleneck in the library; gives its name."""
    return store(esper, tmp_path, "narrow", TEXT)


def store(esper: Esper, directory: Path, name: str, text: str) -> str:
    path = directory / f"{name}.txt"
    path.write_text(text)
    code, _, err = esper("blueprints", "create", str(path))
    assert code == 0, err
    return name


def compiled(esper: Esper, *words: str) -> dict[str, Any]:
    code, out, err = esper("kernels", "compile", *words, "--json")
    assert code == 0, err
    found: dict[str, Any] = json.loads(out)
    return found


def eventually(condition: Callable[[], bool]) -> None:
    deadline_s, tick = time.monotonic() + 60.0, threading.Event()
    while not condition():
        assert time.monotonic() < deadline_s, "the condition did not come about in time"
        tick.wait(0.05)


def test_a_blueprint_is_stored_with_what_is_said_of_it_and_shown_in_forms_that_create_reads(
    esper: Esper, tmp_path: Path
) -> None:
    path = tmp_path / "wide.txt"
    path.write_text(TEXT.replace("C // 4", "C // 2"))
    said = ("--tags", "cheap, linear", "--description", "Half as wide.", "--citation", "A paper\nof two lines")
    code, out, err = esper("blueprints", "create", str(path), "--name", "wide", *said, "--kinds", "linear,attention")
    blueprint_id = content_id(parse_text(path.read_text()))
    assert (code, out, err) == (0, f"wide@1  {blueprint_id}\n", "")

    found = json.loads(esper("blueprints", "show", "wide", "--json")[1])["blueprint"]
    assert found["metadata"] == {
        "description": "Half as wide.",
        "citation": "A paper\nof two lines",
        "tags": ["cheap", "linear"],
        "site_kinds": ["SITE_KIND_LINEAR", "SITE_KIND_ATTENTION"],
    }
    assert found["state"] == "BLUEPRINT_STATE_DRAFT"
    assert found["lineage"]["operator"] == "manual"

    for number, form in enumerate([(), ("--json",)]):
        again = tmp_path / f"again{number}"
        again.write_text(esper("blueprints", "show", "wide", *form)[1])
        code, out, err = esper("blueprints", "create", str(again), "--name", "wide", "--json")
        assert code == 0, err
        assert json.loads(out)["created"] is False
        assert json.loads(out)["id"] == blueprint_id


def test_the_same_graph_under_another_name_is_an_error_that_says_so(esper: Esper, stored: str, tmp_path: Path) -> None:
    path = tmp_path / "twin.txt"
    path.write_text(TEXT)
    code, _, err = esper("blueprints", "create", str(path))
    assert code == 1
    assert err.startswith("esper: ALREADY_EXISTS: ")
    assert stored in err


def test_a_kernel_is_compiled_shown_taken_along_and_verified_without_the_mesh(
    esper: Esper, mesh: Running, stored: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, err = esper("kernels", "compile", stored, "--site", "linear:8:6")
    assert code == 0, err
    assert "torchscript for linear:8:6" in out
    artifact_id = out.split()[0]
    assert err.splitlines()[-1].endswith(" succeeded")
    assert "it was there already" not in out
    assert "it was there already" in esper("kernels", "compile", stored, "--site", "linear:8:6")[1]

    manifest = json.loads(esper("kernels", "show", artifact_id, "--json")[1])["manifest"]
    table = esper("kernels", "show", artifact_id)[1]
    for check in manifest["checks"]:
        assert check["name"] in table
    assert artifact_id in table
    assert "linear:8:6" in table

    assert esper("kernels", "verify", artifact_id)[0] == 0
    path = tmp_path / "kernel.bin"
    assert esper("kernels", "download", artifact_id, str(path))[0] == 0
    code, _, err = esper("kernels", "download", artifact_id, str(path))
    assert (code, err.split(":")[1]) == (1, " ALREADY_EXISTS")
    assert esper("kernels", "download", artifact_id, str(path), "--force")[0] == 0

    keys = mesh.state_dir / "keys"
    monkeypatch.setenv("ESPER_STATE_DIR", str(tmp_path / "no mesh"))
    code, out, err = esper("kernels", "verify", str(path), "--key", str(keys))
    assert (code, err) == (0, "")
    assert out.endswith(f"{artifact_id} verifies\n")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert esper("kernels", "verify", str(path), "--key", str(keys))[0] == 1


def test_a_kernel_that_is_not_there_is_exit_code_1(esper: Esper) -> None:
    for command in ("show", "verify"):
        code, out, err = esper("kernels", command, "k" + "0" * 32)
        assert (code, out) == (1, "")
        assert err.startswith("esper: NOT_FOUND: ")


def test_a_draft_goes_through_its_life_cycle_step_by_step(esper: Esper, stored: str) -> None:
    code, _, errors = esper("blueprints", "state", stored, "active", "--reason", "in a hurry")
    assert (code, "DRAFT leads to VALIDATED" in errors) == (1, True)
    for state in ("validated", "active"):
        code, output, _ = esper("blueprints", "state", stored, state, "--reason", "it was tried")
        assert (code, output.split()[-1]) == (0, state)
    assert esper("blueprints", "state", stored, "active", "--reason", "again")[0] == 0
    shown = json.loads(esper("blueprints", "show", stored, "--json")[1])
    assert [step["reason"] for step in shown["history"]] == ["stored", "it was tried", "it was tried"]
    for state in ("deprecated", "active"):
        code, output, _ = esper("blueprints", "state", stored, state, "--reason", f"now {state}")
        assert (code, output.split()[-1]) == (0, state)
    shown = json.loads(esper("blueprints", "show", stored, "--json")[1])
    assert [(step["actor"], step["reason"]) for step in shown["history"][-2:]] == [
        (getpass.getuser(), "now deprecated"),
        (getpass.getuser(), "now active"),
    ]
    reason = "over\ntwo lines, of which\treturn nothing"
    assert esper("blueprints", "state", stored, "deprecated", "--reason", reason)[0] == 0
    code, text, _ = esper("blueprints", "show", stored)
    assert (code, "# by manual" in text) == (0, True)
    steps = [line.split("  ")[1:] for line in text.splitlines() if line.startswith("# 20")]
    assert [state for state, _ in steps] == ["draft", "validated", "active", "deprecated", "active", "deprecated"]
    assert steps[-1][1] == f"{getpass.getuser()}: over two lines, of which return nothing"
    assert content_id(parse_text(text)) == shown["blueprint"]["id"]
    assert esper("blueprints", "state", stored, "active", "--reason", "as it was")[0] == 0
    assert esper("blueprints", "state", "no-such", "active", "--reason", "x")[0] == 1


def test_a_kernel_is_pinned_and_unpinned_and_the_library_swept(esper: Esper, stored: str) -> None:
    compiled = json.loads(esper("kernels", "compile", stored, "--site", "linear:8:8", "--seed", "9", "--json")[1])
    kernel = compiled["job"]["artifact_id"]
    assert esper("kernels", "pin", kernel, "--reason", "a baseline")[1].strip() == f"{kernel} pinned"
    assert esper("kernels", "pin", kernel, "--reason", "a baseline")[1].strip() == f"{kernel} was pinned already"
    swept = json.loads(esper("kernels", "sweep", "--dry-run", "--json")[1])
    assert kernel not in swept.get("artifact_ids", [])
    code, output, _ = esper("kernels", "sweep")
    assert (code, "0 kernels of 0 bytes went" in output) == (0, True)
    assert json.loads(esper("kernels", "unpin", kernel, "--json")[1]) == {
        "artifact_id": kernel,
        "pinned": False,
        "changed": True,
    }
    code, _, errors = esper("kernels", "pin", "k" + "0" * 32, "--reason", "none")
    assert (code, "must name a stored kernel" in errors) == (1, True)


def test_a_target_that_was_given_up_is_said_with_its_reason(esper: Esper, stored: str) -> None:
    code, out, err = esper("kernels", "compile", stored, "--site", "linear:8:6", "--target", "aot_inductor")
    assert code == 0, err
    assert "exported_program for linear:8:6" in out
    assert "\nnot aot_inductor: " in out


def test_a_site_that_does_not_fit_is_exit_code_2_with_the_node(esper: Esper, tmp_path: Path) -> None:
    name = store(esper, tmp_path, "image", "blueprint 1\nup = conv(x, kernel=3, init=zero)\nreturn up\n")
    code, out, err = esper("kernels", "compile", name, "--site", "linear:8:8")
    assert (code, out) == (2, "")
    assert err.startswith("esper: INVALID_BLUEPRINT: node 'up' ")


def test_a_blueprint_that_fails_its_checks_is_exit_code_1_with_the_check(esper: Esper, tmp_path: Path) -> None:
    name = store(esper, tmp_path, "loud", NONZERO)
    code, out, err = esper("kernels", "compile", name, "--site", "linear:8:8", "--json")
    job = json.loads(out)["job"]
    assert (code, job["phase"]) == (1, "JOB_PHASE_FAILED")
    last = err.splitlines()[-1]
    assert last.startswith(f"esper: COMPILATION: job {job['job_id']} must come to a kernel, it is failed: ")
    assert "identity" in last
    failed = json.loads(esper("jobs", "list", "--phase", "failed", "--json")[1])
    assert job["job_id"] in {row["job"] for row in failed}
    assert {row["phase"] for row in failed} == {"failed"}
    assert "identity" in esper("jobs", "show", job["job_id"])[1]


def test_jobs_are_listed_newest_first_up_to_a_limit(esper: Esper, stored: str) -> None:
    jobs = [compiled(esper, stored, "--site", f"linear:4:{size}")["job"]["job_id"] for size in (2, 3, 4)]
    code, out, err = esper("jobs", "list", "-n", "2", "--json")
    assert code == 0
    assert [row["job"] for row in json.loads(out)] == jobs[:0:-1]
    assert err == "there are more than 2: --limit shows them\n"
    shown = esper("jobs", "show", jobs[0])[1]
    assert "linear:4:2" in shown
    assert "compiling_s" in shown


def test_a_job_that_nobody_knows_is_exit_code_1(esper: Esper) -> None:
    for words in (("jobs", "show"), ("jobs", "watch"), ("dead-letters", "show"), ("dead-letters", "requeue")):
        code, out, err = esper(*words, "j" + "0" * 32)
        assert (code, out) == (1, "")
        assert err.startswith("esper: NOT_FOUND: ")
        assert err.count("\n") == 1


def test_a_job_that_lives_is_no_dead_letter(esper: Esper, stored: str) -> None:
    job_id = compiled(esper, stored, "--site", "linear:8:5")["job"]["job_id"]
    code, _, err = esper("dead-letters", "show", job_id)
    assert (code, err) == (
        1,
        f"esper: NOT_FOUND: job_id must be a dead job's, got {job_id}, which is succeeded\n",
    )


def test_ctrl_c_ends_the_waiting_and_not_the_job(esper: Esper, mesh: Running, stored: str) -> None:
    eventually(lambda: bool(mesh.workers()))
    workers = mesh.workers()
    for worker in workers:
        worker.suspend()
    try:
        command = [sys.executable, "-m", "esper.cli.main", "kernels", "compile", stored, "--site", "linear:8:7"]
        environment = {**os.environ, "ESPER_STATE_DIR": str(mesh.state_dir)}
        waiting = subprocess.Popen(command, env=environment, stdout=-1, stderr=-1, text=True)
        assert waiting.stderr is not None
        job_id, phase = waiting.stderr.readline().split()
        assert phase == "queued"
        waiting.send_signal(signal.SIGINT)
        out, err = waiting.communicate(timeout=60)
    finally:
        for worker in workers:
            worker.resume()
    assert (waiting.returncode, out) == (130, "")
    told = f"job {job_id} is not stopped by this; to follow it: esper jobs watch {job_id}"
    assert err.splitlines()[-1] == told
    code, out, err = esper("jobs", "watch", job_id)
    assert code == 0, err
    assert out.startswith("k")


def test_a_job_is_cancelled_and_its_worker_with_it(esper: Esper, mesh: Running, stored: str) -> None:
    eventually(lambda: bool(mesh.workers()))
    (worker,) = mesh.workers()
    worker.suspend()
    code, out, err = esper("kernels", "compile", stored, "--site", "linear:8:9", "--no-wait", "--json")
    job_id = json.loads(out)["job"]["job_id"]
    code, out, err = esper("jobs", "cancel", job_id, "--json")
    assert (code, json.loads(out)) == (0, [{"job": job_id, "phase": "cancelled"}]), err
    eventually(lambda: not worker.is_running())
    code, out, err = esper("jobs", "watch", job_id)
    assert (code, out) == (1, "")
    assert err.splitlines()[-1].endswith(
        f"it is cancelled: cancelled on request; esper dead-letters requeue {job_id} tries it again"
    )
    other = compiled(esper, stored, "--site", "linear:8:10")["job"]["job_id"]
    code, out, err = esper("jobs", "cancel", job_id, other)
    assert (code, out.count(job_id), out.count(other)) == (1, 1, 0)
    assert err.startswith("esper: INVALID_STATE: ")


def test_a_kernel_is_asked_for_with_a_priority_and_hurried_by_a_higher_one(
    esper: Esper, mesh: Running, stored: str
) -> None:
    eventually(lambda: bool(mesh.workers()))
    (worker,) = mesh.workers()
    worker.suspend()
    try:
        first = asked(esper, stored, "--site", "linear:8:11")
        assert first["priority"] == "JOB_PRIORITY_NORMAL"
        eventually(lambda: phase_of(esper, first["job_id"]) == "JOB_PHASE_COMPILING")
        waits = asked(esper, stored, "--site", "linear:8:12", "--priority", "bulk")
        assert (waits["priority"], waits["phase"]) == ("JOB_PRIORITY_BULK", "JOB_PHASE_QUEUED")
        assert "bulk" in esper("jobs", "show", waits["job_id"])[1]
        hurried = asked(esper, stored, "--site", "linear:8:12", "--priority", "interactive")
        assert (hurried["job_id"], hurried["priority"]) == (waits["job_id"], "JOB_PRIORITY_INTERACTIVE")
        lowered = asked(esper, stored, "--site", "linear:8:12", "--priority", "bulk")
        assert lowered["priority"] == "JOB_PRIORITY_INTERACTIVE", "nobody is put back"
    finally:
        worker.resume()
    for job_id in (first["job_id"], waits["job_id"]):
        assert esper("jobs", "watch", job_id)[0] == 0


def asked(esper: Esper, *words: str) -> dict[str, Any]:
    """Ask for a kernel and give the job as it stands."""
    code, out, err = esper("kernels", "compile", *words, "--no-wait", "--json")
    assert code == 0, err
    job: dict[str, Any] = json.loads(out)["job"]
    return job


def phase_of(esper: Esper, job_id: str) -> str:
    return str(json.loads(esper("jobs", "show", job_id, "--json")[1])["job"]["phase"])


def test_a_job_whose_workers_die_is_a_dead_letter_that_can_be_put_back(
    esper: Esper, mesh: Running, stored: str
) -> None:
    job_id = _with_every_worker_killed(esper, mesh, stored)
    (row,) = json.loads(esper("dead-letters", "list", "--json")[1])
    assert (row["job"], row["phase"], row["deliveries"]) == (job_id, "dead", 3)
    assert row["error"]
    assert job_id in esper("dead-letters", "show", job_id)[1]
    code, _, err = esper("jobs", "watch", job_id)
    assert code == 1
    assert f"esper dead-letters requeue {job_id} tries it again" in err

    code, out, err = esper("dead-letters", "requeue", "--all", "--json")
    assert (code, json.loads(out)) == (0, [{"job": job_id, "phase": "queued"}]), err
    code, out, err = esper("jobs", "watch", job_id)
    assert code == 0, err
    assert out.startswith("k")
    assert json.loads(esper("dead-letters", "list", "--json")[1]) == []


def _with_every_worker_killed(esper: Esper, mesh: Running, stored: str) -> str:
    """Kill each worker that the job is handed to, until the queue gives the job up; a site that takes seconds."""
    code, out, err = esper("kernels", "compile", stored, "--site", "linear:4096:4096", "--no-wait", "--json")
    assert code == 0, err
    job_id: str = json.loads(out)["job"]["job_id"]

    def dead() -> bool:
        phase = json.loads(esper("jobs", "show", job_id, "--json")[1])["job"]["phase"]
        # Not while it is COMPILING: it is said to be from when it is taken up, and may wait for a worker that starts.
        if phase == "JOB_PHASE_VALIDATING":
            for worker in mesh.workers():
                with contextlib.suppress(psutil.NoSuchProcess):
                    worker.kill()
        assert phase != "JOB_PHASE_SUCCEEDED", "the job was quicker than this test"
        return bool(phase == "JOB_PHASE_DEAD")

    deadline_s = time.monotonic() + 180.0
    while not dead():
        assert time.monotonic() < deadline_s, "the job did not die in time"
    return job_id

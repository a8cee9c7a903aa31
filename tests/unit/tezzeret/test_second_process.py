"""The process beside a worker: what it answers, and what becomes of it when it fails, dies, hangs or loses its worker.

A fork needs a process without other threads, which a test runner is not: each test runs a script of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

PRELUDE = """
import hashlib, os, resource, signal, sys, time

from esper.services.tezzeret.second_process import SecondProcess

def work(request):
    if request == b"fail":
        raise ValueError("work fell over")
    if request == b"die":
        os._exit(0)
    if request == b"hang":
        signal.pause()
    if request == b"cpu":
        return repr(resource.getrlimit(resource.RLIMIT_CPU)).encode().ljust(32)
    return hashlib.sha256(request).digest()

def asked(request):
    second.ask(request)
    return second.answer()

def right(request):
    return asked(request) == hashlib.sha256(request).digest()

second = SecondProcess(work, deadline_s=1.0)
"""


def run(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PRELUDE + script],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env=dict(os.environ),
    )


def test_one_process_answers_every_request_however_long() -> None:
    done = run(
        """
assert second.pid is None
assert right(b"short") and right(b"") and right(os.urandom(3_000_000))
pid = second.pid
assert pid not in (None, os.getpid())
assert right(b"again") and second.pid == pid
second.end()
second.end()
assert second.pid is None
"""
    )
    assert done.stderr == ""


def test_a_failure_is_said_and_costs_one_answer() -> None:
    done = run(
        """
assert right(b"first")
pid = second.pid
assert asked(b"fail") == b"" and second.pid is None
assert right(b"next") and second.pid != pid
"""
    )
    assert "ValueError: work fell over" in done.stderr


def test_a_process_that_died_between_two_requests_is_replaced() -> None:
    run(
        """
assert right(b"first")
pid = second.pid
os.kill(pid, signal.SIGKILL)
os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
assert right(b"next") and second.pid != pid
assert asked(b"die") == b"" and right(b"and after that")
"""
    )


def test_one_that_hangs_is_given_up() -> None:
    run(
        """
begun = time.monotonic()
assert asked(b"hang") == b"" and 0.9 < time.monotonic() - begun < 20
assert second.pid is None and right(b"next")
"""
    )


def test_an_answer_that_nobody_fetched_is_not_taken_for_the_next() -> None:
    run(
        """
second.ask(b"given up")
assert right(b"next")
"""
    )


def test_its_processor_time_is_not_that_of_one_job() -> None:
    """It serves many jobs: the worker's own limit is raised with each, and would kill it in the midst of one."""
    run(
        """
_, hard = resource.getrlimit(resource.RLIMIT_CPU)
resource.setrlimit(resource.RLIMIT_CPU, (60, hard))
assert asked(b"cpu").decode().strip() == repr((hard, hard))
"""
    )


def test_it_ends_with_its_worker_even_in_the_midst_of_work() -> None:
    script = """
second.ask(b"hang")
print(second.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    with subprocess.Popen(
        [sys.executable, "-c", PRELUDE + script], stdout=subprocess.PIPE, text=True, env=dict(os.environ)
    ) as worker:
        said, _ = worker.communicate(timeout=20)  # to its end: nobody holds the worker's output open any more
        assert worker.returncode < 0
    status = Path(f"/proc/{int(said)}/status")
    deadline = time.monotonic() + 20
    while _runs(status):
        assert time.monotonic() < deadline, "the second process outlived its worker"


def _runs(status: Path) -> bool:
    try:
        return "\nState:\tZ" not in status.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_process_that_the_system_does_not_give_leaves_nothing_open() -> None:
    done = run(
        """
def open_files():
    return sorted(os.listdir("/proc/self/fd"))

fork, pipe, before = os.fork, os.pipe, open_files()

def refuse():
    raise BlockingIOError(11, "Resource temporarily unavailable")

def one_pipe():
    os.pipe = refuse
    return pipe()

def refused():
    try:
        second.ask(b"x")
    except BlockingIOError:
        return second.pid is None and open_files() == before

os.fork = refuse
assert refused() and refused()
os.fork, os.pipe = fork, one_pipe
assert refused()
os.pipe = pipe
assert right(b"next")
with_it = len(open_files())
second.end()
assert with_it == len(before) + 2 and open_files() == before
"""
    )
    assert done.stderr == ""

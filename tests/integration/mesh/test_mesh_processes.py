"""Real child processes: order, readiness, restarts, and an end by pid."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from esper.contracts.errors import (
    AlreadyExistsError,
    CorruptDataError,
    InvalidInputError,
    InvalidStateError,
    UnavailableError,
)
from esper.mesh import ProcessSpec, ProcessSupervisor, free_port, read_state, stop_recorded
from esper.mesh.process_state import state_lock

# Listens, so that "ready" is something a probe can see; ends on SIGTERM as any program does.
LISTEN = (
    "import os, socket, sys, time\n"
    "print('start', os.environ.get('GREETING', ''), flush=True)\n"
    "s = socket.create_server(('127.0.0.1', int(sys.argv[1])))\n"
    "while True: s.accept()[0].close()\n"
)
# Writes its name once it has ended in order; a service takes a while and needs its bus until then.
TELLING = (
    "import pathlib, signal, socket, sys\n"
    "def end(*_):\n"
    "    signal.sigtimedwait([], float(sys.argv[2]))\n"
    "    with pathlib.Path(sys.argv[4]).open('a') as file: file.write(sys.argv[3] + ' ')\n"
    "    sys.exit()\n"
    "signal.signal(signal.SIGTERM, end)\n"
    "s = socket.create_server(('127.0.0.1', int(sys.argv[1])))\n"
    "while True: s.accept()[0].close()\n"
)
# Takes a while until it listens.
SLOW = "import signal\nsignal.sigtimedwait([], 0.5)\n" + LISTEN
# Ends at once where what it needs is not there.
NEEDY = "import socket, sys\nsocket.create_connection(('127.0.0.1', int(sys.argv[2]))).close()\n" + LISTEN
STUBBORN = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + LISTEN


def connect(port: int) -> Callable[[], Any]:
    async def ready() -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.close()

    return ready


def spec(tmp_path: Path, name: str, script: str = LISTEN, **options: Any) -> ProcessSpec:
    port = free_port()
    return ProcessSpec(
        name=name,
        argv=(sys.executable, "-S", "-c", script, str(port)),
        log_path=tmp_path / "logs" / f"{name}.log",
        address=f"127.0.0.1:{port}",
        **{"ready": connect(port), "ready_deadline_s": 20.0, **options},
    )


async def answers(ready: Callable[[], Any]) -> bool:
    try:
        await ready()
    except OSError:
        return False
    return True


@pytest.fixture
async def supervisor(tmp_path: Path) -> AsyncIterator[ProcessSupervisor]:
    made = ProcessSupervisor(tmp_path, stop_deadline_s=5.0, restart_backoff_s=(0.01, 0.05))
    yield made
    await made.stop()


async def until(condition: Callable[[], bool]) -> None:
    """Look again and again, each time after the loop had its turn, for at most ten seconds."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 -- what is watched is another process, no event tells of it
            await asyncio.sleep(0.005)


async def test_started_processes_are_ready_and_recorded(supervisor: ProcessSupervisor, tmp_path: Path) -> None:
    one = spec(tmp_path, "one", env={"GREETING": "hello"})
    await supervisor.start([one], extra={"nats_url": "nats://x"})
    state = read_state(tmp_path)
    record = state.find("one")
    assert record is not None
    assert record.running
    assert record.address == one.address
    assert state.extra == {"nats_url": "nats://x"}
    assert one.log_path.read_text() == "start hello\n"
    assert (tmp_path / "processes.json").stat().st_mode & 0o777 == 0o600


async def test_dependencies_are_ready_first(supervisor: ProcessSupervisor, tmp_path: Path) -> None:
    bus = spec(tmp_path, "bus")
    order: list[str] = []

    async def bus_up_at_first_ask() -> None:
        if not order:
            assert bus.ready is not None
            await bus.ready()
            order.append("bus was up")

    service = spec(tmp_path, "service", ready=bus_up_at_first_ask, after=("bus",))
    await supervisor.start([service, bus])
    assert [record.name for record in supervisor.records] == ["bus", "service"]
    assert order == ["bus was up"]


async def test_stop_ends_all_and_clears_the_state(supervisor: ProcessSupervisor, tmp_path: Path) -> None:
    await supervisor.start([spec(tmp_path, "one"), spec(tmp_path, "two", after=("one",))])
    records = supervisor.records
    await supervisor.stop()
    assert not any(record.running for record in records)
    assert read_state(tmp_path).processes == ()


def telling(tmp_path: Path, name: str, takes_s: float, **options: Any) -> ProcessSpec:
    made = spec(tmp_path, name, TELLING, **options)
    return replace(made, argv=(*made.argv, str(takes_s), name, str(tmp_path / "ended")))


@pytest.mark.parametrize("by_state_file", [False, True])
async def test_what_others_need_is_stopped_last(
    supervisor: ProcessSupervisor, tmp_path: Path, by_state_file: bool
) -> None:
    bus = telling(tmp_path, "bus", 0.0)
    await supervisor.start([bus, telling(tmp_path, "service", 0.5, after=("bus",))])
    if by_state_file:
        await asyncio.to_thread(stop_recorded, tmp_path)
    else:
        await supervisor.stop()
    assert (tmp_path / "ended").read_text() == "service bus "


async def test_stubborn_process_is_killed_at_the_deadline(tmp_path: Path) -> None:
    supervisor = ProcessSupervisor(tmp_path, stop_deadline_s=0.2)
    await supervisor.start([spec(tmp_path, "stubborn", STUBBORN)])
    (record,) = supervisor.records
    await supervisor.stop()
    assert not record.running


async def test_process_that_ends_early_is_reported_with_its_output(
    supervisor: ProcessSupervisor, tmp_path: Path
) -> None:
    good = spec(tmp_path, "good")
    bad = spec(tmp_path, "bad", "import sys; sys.exit('no such database')", after=("good",))
    with pytest.raises(UnavailableError, match=r"(?s)bad must be ready .* ended with code 1.*no such database"):
        await supervisor.start([good, bad])
    assert supervisor.records == ()
    with socket.create_server(("127.0.0.1", int(str(good.address).split(":")[1]))):
        pass  # its port is free again: it was stopped


async def test_process_that_never_gets_ready(supervisor: ProcessSupervisor, tmp_path: Path) -> None:
    async def never() -> None:
        raise ConnectionError("not yet")

    with pytest.raises(UnavailableError, match=r"slow must be ready within 0.3 s, got: it was not"):
        await supervisor.start([spec(tmp_path, "slow", ready=never, ready_deadline_s=0.3)])


async def test_program_that_does_not_exist(supervisor: ProcessSupervisor, tmp_path: Path) -> None:
    missing = ProcessSpec(name="ghost", argv=("/no/such/program",), log_path=tmp_path / "ghost.log")
    with pytest.raises(UnavailableError, match="ghost must be a program that can run"):
        await supervisor.start([missing])


async def test_killed_process_is_started_again(supervisor: ProcessSupervisor, tmp_path: Path) -> None:
    await supervisor.start([spec(tmp_path, "one")])
    (before,) = supervisor.records
    os.kill(before.pid, signal.SIGKILL)
    await until(lambda: supervisor.records[0].restarts == 1)
    (after,) = supervisor.records
    assert after.pid != before.pid
    recorded = read_state(tmp_path).find("one")
    assert recorded is not None
    assert recorded.pid == after.pid


async def test_a_process_is_started_again_once_what_it_needs_is_there(
    supervisor: ProcessSupervisor, tmp_path: Path
) -> None:
    bus = spec(tmp_path, "bus", SLOW)
    service = spec(tmp_path, "service", NEEDY, after=("bus",))
    await supervisor.start([bus, replace(service, argv=(*service.argv, bus.address.rpartition(":")[2]))])
    died = supervisor.records
    for record in died:
        os.kill(record.pid, signal.SIGKILL)
    assert service.ready is not None
    await until(lambda: all(new.pid != old.pid for new, old in zip(supervisor.records, died, strict=True)))
    async with asyncio.timeout(10):
        while not await answers(service.ready):  # noqa: ASYNC110 -- as in `until`
            await asyncio.sleep(0.005)
    assert [record.restarts for record in supervisor.records] == [1, 1]


async def test_process_that_keeps_dying_is_given_up(supervisor: ProcessSupervisor, tmp_path: Path) -> None:
    once = tmp_path / "was-here"
    script = f"import pathlib,sys\np=pathlib.Path({str(once)!r})\nif p.exists(): sys.exit(3)\np.touch()\n{LISTEN}"
    await supervisor.start([spec(tmp_path, "weak", script, max_restarts=2)])
    os.kill(supervisor.records[0].pid, signal.SIGKILL)
    await asyncio.wait_for(supervisor.wait_all_ended(), 10)
    assert supervisor.given_up == {"weak"}
    assert supervisor.records[0].restarts == 2


async def test_detached_processes_live_on_and_are_found_again(tmp_path: Path) -> None:
    supervisor = ProcessSupervisor(tmp_path)
    await supervisor.start([spec(tmp_path, "one")])
    await supervisor.detach()
    (record,) = read_state(tmp_path).running
    stopped = await asyncio.to_thread(stop_recorded, tmp_path, deadline_s=5.0)
    assert stopped == (record,)
    assert not record.running
    assert read_state(tmp_path).running == ()


async def test_taken_down_from_elsewhere_nothing_is_restarted(supervisor: ProcessSupervisor, tmp_path: Path) -> None:
    await supervisor.start([spec(tmp_path, "one"), spec(tmp_path, "two")])
    pids = [record.pid for record in supervisor.records]
    await asyncio.to_thread(stop_recorded, tmp_path, deadline_s=5.0)
    await asyncio.wait_for(supervisor.wait_all_ended(), 10)
    assert [record.pid for record in supervisor.records] == pids
    assert not any(record.running for record in supervisor.records)


async def test_second_mesh_in_one_directory_is_refused(supervisor: ProcessSupervisor, tmp_path: Path) -> None:
    await supervisor.start([spec(tmp_path, "one")])
    with pytest.raises(AlreadyExistsError, match=r"state_dir must hold no running mesh, got one \(pid \d+\)"):
        await ProcessSupervisor(tmp_path).start([spec(tmp_path, "two")])


async def test_two_starters_at_once_are_refused(tmp_path: Path) -> None:
    with state_lock(tmp_path), pytest.raises(AlreadyExistsError, match="must not be in use by another starter"):
        await ProcessSupervisor(tmp_path).start([spec(tmp_path, "one")])


async def test_pid_of_somebody_else_is_not_touched(tmp_path: Path) -> None:
    supervisor = ProcessSupervisor(tmp_path)
    await supervisor.start([spec(tmp_path, "one")])
    path = tmp_path / "processes.json"
    raw = json.loads(path.read_text())
    raw["processes"][0]["created_at_s"] -= 100
    path.write_text(json.dumps(raw))
    assert stop_recorded(tmp_path) == ()
    assert supervisor.records[0].running
    await supervisor.stop()


def test_children_die_with_their_parent_when_asked(tmp_path: Path) -> None:
    parent = f"""
import asyncio, pathlib, sys
from esper.mesh import ProcessSpec, ProcessSupervisor
async def main():
    path = pathlib.Path({str(tmp_path)!r})
    supervisor = ProcessSupervisor(path, die_with_parent=True)
    argv = (sys.executable, "-S", "-c", "import signal; signal.pause()")
    await supervisor.start([ProcessSpec(name="one", argv=argv, log_path=path / "one.log")])
    print(supervisor.records[0].pid, flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE) as started:
        assert started.stdout is not None
        child = psutil.Process(int(started.stdout.readline()))
        started.kill()
        started.wait(10)
        gone, alive = psutil.wait_procs([child], timeout=10)
    assert (len(gone), alive) == (1, [])


async def test_detach_needs_children_that_may_stay(tmp_path: Path) -> None:
    with pytest.raises(InvalidStateError, match="detach needs children that outlive their parent"):
        await ProcessSupervisor(tmp_path, die_with_parent=True).detach()


@pytest.mark.parametrize(
    ("after", "message"),
    [
        (("nobody",), r"a\.after must name processes among \['a', 'b'\]"),
        (("b",), "not depend on each other in a circle"),
    ],
)
async def test_impossible_orders_are_refused(tmp_path: Path, after: tuple[str, ...], message: str) -> None:
    specs = [spec(tmp_path, "a", after=after), spec(tmp_path, "b", after=("a",))]
    with pytest.raises(InvalidInputError, match=message):
        await ProcessSupervisor(tmp_path).start(specs)


def test_damaged_state_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "processes.json").write_text("{]")
    with pytest.raises(CorruptDataError, match=r"processes\.json must be a state file of the mesh"):
        read_state(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": ""}, "name must not be empty"),
        ({"argv": ()}, "argv must hold a program"),
        ({"ready_deadline_s": 0.0}, "ready_deadline_s must be above 0 seconds"),
        ({"max_restarts": -1}, "max_restarts must be at least 0"),
    ],
)
def test_bad_specs_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        ProcessSpec(**{"name": "a", "argv": ("true",), "log_path": Path("x.log"), **change})

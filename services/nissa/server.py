"""Nissa put together: store, service, bus loop, health, gRPC and HTTP faces, with one start and one close.

node = await NissaNode.open(NissaNodeConfig(database_url="sqlite:///nissa.db", http_port=8080), bus=bus)
node.add_to(server)
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any, Self

from esper.contracts.errors import ConfigError
from esper.contracts.metrics import HealthReport, SystemMetrics
from esper.mesh.channel import ChannelConfig
from esper.mesh.handlers import Registrar
from esper.mesh.http_server import HttpServer
from esper.mesh.ports import LOOPBACK
from esper.mesh.server import MeshServer
from esper.services.nissa.bus_loop import NissaBusLoop
from esper.services.nissa.exposition import MetricsPage
from esper.services.nissa.health import HealthBoard, prober_over
from esper.services.nissa.http_face import build_app
from esper.services.nissa.service import Nissa, NissaConfig
from esper.services.nissa.servicer import NissaServicer
from esper.services.nissa.store import NissaStore
from esper.telemetry.bus import Bus
from esper.v1.nissa_service_pb2_grpc import add_NissaServiceServicer_to_server

REGISTRAR: Registrar = add_NissaServiceServicer_to_server
"""Registers the servicer with a `MeshServer` or an `InProcessChannel`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NissaNodeConfig:
    """Where Nissa keeps its state, what it asks, and where it is read."""

    database_url: str = "sqlite://"
    """Store; by default in memory, gone at the end."""
    http_host: str = LOOPBACK
    """Address of the HTTP face; what it shows may be read by whoever reaches it."""
    http_port: int | None = None
    """TCP port of the HTTP face; 0 lets the system pick one, ``None`` serves none."""
    components: Mapping[str, str] = field(default_factory=dict)
    """Address (``host:port``) of every component that is to be asked, by name."""
    channel: ChannelConfig = field(default_factory=ChannelConfig)
    """How they are reached: TLS, or plain text on loopback."""
    watching: NissaConfig = field(default_factory=NissaConfig)
    """How runs are watched."""

    def __post_init__(self) -> None:
        if not self.database_url:
            raise ConfigError("database_url must name a store, got nothing", parameter="database_url")
        if self.http_port is not None and not 0 <= self.http_port <= 65535:
            raise ConfigError(f"http_port must be within [0, 65535], got {self.http_port}", parameter="http_port")
        for name, address in self.components.items():
            if not name or not address:
                raise ConfigError(
                    f"components must give every name an address, got {name!r}: {address!r}", parameter="components"
                )


class NissaNode:
    """A running Nissa. Belongs to one event loop."""

    def __init__(self, nissa: Nissa, loop: NissaBusLoop, board: HealthBoard, held: AsyncExitStack) -> None:
        self.nissa = nissa
        """What is known of the runs."""
        self.board = board
        """Health of every component."""
        self.servicer = NissaServicer(nissa, board)
        """The gRPC face."""
        self._ready: Sequence[Callable[[], Awaitable[None]]] = (nissa.store.database.ping, loop.ready)
        self._held = held
        self._http: HttpServer | None = None

    @classmethod
    async def open(cls, config: NissaNodeConfig | None = None, *, bus: Bus) -> Self:
        """Open the store, read live runs back, begin to consume and to serve HTTP.

        Raises:
            UnavailableError: The store or the bus cannot be reached.
            PortInUseError: Another process holds the HTTP port.
        """
        chosen = config or NissaNodeConfig()
        async with AsyncExitStack() as opening:
            store = await NissaStore.open(chosen.database_url)
            opening.push_async_callback(store.database.close)
            nissa = Nissa(store, chosen.watching)
            await nissa.start()
            loop = NissaBusLoop(nissa, bus)
            opening.push_async_callback(loop.close)
            await loop.start()
            board = HealthBoard(nissa, bus, loop.ready, chosen.components, prober=prober_over(chosen.channel))
            node = cls(nissa, loop, board, AsyncExitStack())
            if chosen.http_port is not None:
                await node._serve_http(chosen.http_host, chosen.http_port, opening)
            node._held = opening.pop_all()
        return node

    @property
    def http_url(self) -> str | None:
        """Where the HTTP face is; ``None`` where it is not served."""
        return None if self._http is None else self._http.url

    def add_to(self, server: Any) -> None:
        """Register with an `InProcessChannel`, or a `MeshServer`, which asks store and loop whether they are ready."""
        if not isinstance(server, MeshServer):
            server.add_servicer(REGISTRAR, self.servicer)
            return
        self.servicer.end_with(server.draining)
        server.add_servicer(REGISTRAR, self.servicer, ready=self._ready)

    async def get_current_metrics(self, run_id: str = "") -> SystemMetrics:
        """Give the figures of a run, or of the newest.

        Raises:
            NotFoundError: There is no such run, or none at all.
        """
        return await self.nissa.get_current_metrics(run_id)

    async def get_system_health(self) -> HealthReport:
        """Give the health of every component, at most a second old."""
        return await self.board.report()

    async def close(self) -> None:
        """End streams, stop consuming and serving, close the store; idempotent."""
        self.servicer.closing.set()
        await self._held.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _serve_http(self, host: str, port: int, opening: AsyncExitStack) -> None:
        app = build_app(MetricsPage(self.nissa, self.board), self._ready)
        self._http = HttpServer(app, host=host, port=port, name="nissa-http")
        opening.push_async_callback(self._http.close)
        await self._http.start()

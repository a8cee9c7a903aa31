"""The one place where services are built from configuration: embedded, local and ``esper serve`` all use it."""

from __future__ import annotations

import logging
import ssl
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

from esper.contracts.errors import InvalidInputError, InvalidStateError
from esper.execution.keys import KeyRing, SigningKey
from esper.mesh import LOOPBACK, MeshServer, open_channel
from esper.mesh.database import Database
from esper.mesh.settings import SERVICES, MeshSettings
from esper.mesh.stubs import STUBS
from esper.telemetry import Bus, NatsBus, NatsOptions
from esper.telemetry.streams import streams_with_replicas

if TYPE_CHECKING:
    from esper.services.tezzeret.pool import WorkerPool
    from esper.services.tezzeret.service import TezzeretService
    from esper.services.urza.server import UrzaService

log = logging.getLogger(__name__)


class Node(Protocol):
    """A running service."""

    def add_to(self, server: Any) -> object:
        """Register with a server or in-process channel."""

    async def close(self) -> None:
        """Stop, and let go of what it holds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Surroundings:
    """What a service is given to work with."""

    settings: MeshSettings
    """Configuration."""
    bus: Bus
    """Open bus with its streams; the caller closes it."""
    stubs: Mapping[str, Any]
    """Stub of every service by name."""
    key: SigningKey | None
    """Signing key; needed by the compiler alone."""
    ring: KeyRing
    """Keys of trusted compilers."""
    embedded: bool
    """Whether all services share this process: stores in memory, compiling in a thread, no HTTP."""

    def database_of(self, service: str) -> str:
        """Give the database URL of a service."""
        return "sqlite://" if self.embedded else self.settings.database_of(service)


async def open_node(service: str, given: Surroundings) -> Node:
    """Build and start one service.

    Raises:
        InvalidInputError: There is no such service.
        EsperError: Its store or the bus cannot be reached, or a port is taken.
    """
    opener = _OPENERS.get(service)
    if opener is None:
        raise InvalidInputError.of("service", f"be one of {', '.join(SERVICES)}", service)
    return await opener(given)


async def connect_bus(settings: MeshSettings) -> NatsBus:
    """Connect to the message bus of the settings; over TLS, with the own certificate, where the URL says so.

    Raises:
        UnavailableError: It cannot be reached.
    """
    files = settings.tls_config()
    if files is None or not settings.nats_url.startswith("tls://"):
        return await NatsBus.connect(settings.nats_url)
    context = ssl.create_default_context(cafile=files.ca_path)
    context.load_cert_chain(files.cert_path, files.key_path)
    return await NatsBus.connect(settings.nats_url, NatsOptions(tls=context))


async def serve(service: str, settings: MeshSettings) -> None:
    """Run one service until SIGTERM or SIGINT, then drain.

    Raises:
        EsperError: It cannot start; the message says why.
    """
    bus = await connect_bus(settings)
    channels: dict[str, Any] = {}
    try:
        await bus.ensure_streams(streams_with_replicas(settings.nats_replicas))
        channel_config = settings.channel_config()
        channels |= {
            name: open_channel(settings.address_of(name), channel_config) for name in SERVICES if name != service
        }
        key = SigningKey.load_or_create(settings.keys_dir) if service == "tezzeret" else None
        given = Surroundings(
            settings=settings,
            bus=bus,
            stubs={name: STUBS[name](channel) for name, channel in channels.items()},
            key=key,
            ring=key.ring() if key is not None else _trusted(settings),
            embedded=False,
        )
        await _serve_node(service, settings, await open_node(service, given))
    finally:
        for channel in channels.values():
            await channel.close()
        await bus.close()


async def _serve_node(service: str, settings: MeshSettings, node: Node) -> None:
    try:
        server = MeshServer(settings.server_config(service))
        node.add_to(server)
        await server.start()
        log.info("service_started", extra={"service": service, "address": server.address})
        await server.serve_until_signal()
    finally:
        await node.close()


def _trusted(settings: MeshSettings) -> KeyRing:
    # On one machine the compiler may start after its readers: making the key pair is idempotent.
    if not settings.trusted_dir.is_dir() and settings.trusted_keys_dir is None:
        SigningKey.load_or_create(settings.keys_dir)
    return KeyRing.from_dir(settings.trusted_dir)


async def _open_tolaria(given: Surroundings) -> Node:
    from esper.services.tolaria.server import TolariaNode, TolariaNodeConfig

    return await TolariaNode.open(TolariaNodeConfig(database_url=given.database_of("tolaria")), bus=given.bus)


async def _open_tamiyo(given: Surroundings) -> Node:
    from esper.services.tamiyo.forecast import ForecastConfig
    from esper.services.tamiyo.server import TamiyoNode, TamiyoNodeConfig

    # An embedded mesh compiles in the training process and forgets at its end: making kernels ready would only cost.
    forecast = ForecastConfig(size=0 if given.embedded else given.settings.tamiyo_forecast)
    config = TamiyoNodeConfig(database_url=given.database_of("tamiyo"), forecast=forecast)
    stubs = given.stubs
    return await TamiyoNode.open(
        config, bus=given.bus, urza=stubs["urza"], karn=stubs["karn"], tezzeret=stubs["tezzeret"]
    )


async def _open_karn(given: Surroundings) -> Node:
    from esper.services.karn.server import KarnNode, KarnNodeConfig

    config = KarnNodeConfig(database_url=given.database_of("karn"))
    return await KarnNode.open(config, bus=given.bus, urza=given.stubs["urza"])


async def _open_urza(given: Surroundings) -> Node:
    from esper.services.urza.retention import RetentionPolicy
    from esper.services.urza.server import UrzaConfig, UrzaService

    settings = given.settings
    config = UrzaConfig(
        database_url=given.database_of("urza"),
        rest_write_token=settings.rest_token(),
        blobs_url="" if given.embedded else settings.urza_blobs_url,
        retention=RetentionPolicy(
            keep_unreferenced_days=settings.urza_kernel_days,
            max_bytes=settings.urza_kernel_bytes,
            keep_reported_days=min(30.0, settings.urza_report_days or 30.0),
            keep_reports_days=settings.urza_report_days,
        ),
    )
    urza = UrzaService(config, bus=given.bus, key_ring=given.ring)
    await urza.start()
    if given.embedded:
        return urza
    node = _LibraryNode(urza, settings, write_token=config.rest_write_token)
    try:
        await node.start()
    except BaseException:
        await node.close()
        raise
    return node


class _LibraryNode:
    """The library with its REST face: over TLS, to callers with a certificate, wherever the mesh has certificates."""

    def __init__(self, urza: UrzaService, settings: MeshSettings, *, write_token: str | None) -> None:
        from esper.mesh.http_server import HttpServer
        from esper.services.urza.rest import build_app

        names = tuple(name.strip() for name in settings.urza_rest_names.split(",") if name.strip())
        self._urza = urza
        self._rest = HttpServer(
            build_app(urza.store, write_token=write_token, allowed_hosts=names),
            name="urza-rest",
            host=settings.urza_rest_host,
            port=settings.urza_rest_port,
            tls=settings.tls_config(),
        )

    async def start(self) -> None:
        """Serve REST; the library itself was started before."""
        await self._rest.start()

    def add_to(self, server: Any) -> None:
        """Register with a server."""
        self._urza.add_to(server)

    async def close(self) -> None:
        """Stop serving REST, then close the library."""
        await self._rest.close()
        await self._urza.close()


async def _open_tezzeret(given: Surroundings) -> Node:
    from esper.services.tezzeret.config import TezzeretConfig, worker_pool_config
    from esper.services.tezzeret.job_store import JobStore
    from esper.services.tezzeret.pool import WorkerPool
    from esper.services.tezzeret.service import TezzeretService

    if given.key is None:
        raise InvalidStateError("the compiler must be given a signing key, got none", parameter="key")
    database = Database.open(given.database_of("tezzeret"))
    pool = WorkerPool(worker_pool_config(given.settings, embedded=given.embedded))
    service = TezzeretService(JobStore(database), given.bus, pool, given.stubs["urza"], given.key, TezzeretConfig())
    node = _CompilerNode(service, pool, database)
    try:
        await service.start()
    except BaseException:
        await node.close()
        raise
    return node


class _CompilerNode:
    """The compiler with the pool and the store it works on."""

    def __init__(self, service: TezzeretService, pool: WorkerPool, database: Database) -> None:
        self._service = service
        self._pool = pool
        self._database = database

    def add_to(self, server: Any) -> None:
        """Register with a server or in-process channel."""
        from esper.services.tezzeret.server import register

        register(server, self._service)

    async def close(self) -> None:
        """Stop working, end the workers, close the store."""
        await self._service.close()
        await self._pool.close()
        await self._database.close()


async def _open_nissa(given: Surroundings) -> Node:
    from esper.services.nissa.server import NissaNode, NissaNodeConfig

    config = NissaNodeConfig(
        database_url=given.database_of("nissa"),
        http_host=given.settings.host or LOOPBACK,
        http_port=None if given.embedded else given.settings.nissa_http_port,
        components={} if given.embedded else {name: given.settings.address_of(name) for name in SERVICES},
        channel=given.settings.channel_config(),
    )
    return await NissaNode.open(config, bus=given.bus)


_OPENERS: Final[Mapping[str, Callable[[Surroundings], Awaitable[Node]]]] = {
    "tolaria": _open_tolaria,
    "tamiyo": _open_tamiyo,
    "karn": _open_karn,
    "urza": _open_urza,
    "tezzeret": _open_tezzeret,
    "nissa": _open_nissa,
}

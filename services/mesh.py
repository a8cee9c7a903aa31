"""The mesh as a training run sees it: embedded in this process, local on this machine, or deployed somewhere.

The three differ in where the services run and in nothing else: a run's line (:class:`~esper.core.link.RunLink`) is the
same publisher thread over the same bus port, and kernels come through the same tiers.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Protocol, Self

from esper.client import EsperClient
from esper.client.transport import AsyncStubTransport, Transport
from esper.contracts.errors import EsperError, InvalidStateError, UnavailableError
from esper.contracts.kernel import CompileSpec
from esper.contracts.run import CacheTierStatus
from esper.core.link import BusLink, RunLink, fresh_client
from esper.core.morphable import MorphableModel
from esper.execution._native import KernelCache
from esper.execution.artifact import VerifiedKernel
from esper.execution.keys import KeyRing, SigningKey
from esper.execution.tier_directory import DirectoryTier
from esper.execution.tier_redis import RedisTier
from esper.execution.tier_urza import UrzaTier
from esper.execution.tiers import TieredKernelSource
from esper.execution.withdrawals import WithdrawalFollower
from esper.mesh import InProcessChannel, open_channel, probe
from esper.mesh.loop_thread import LoopThread
from esper.mesh.settings import SERVICES, MeshSettings, resolve
from esper.mesh.stubs import STUBS
from esper.services.compose import Node, Surroundings, connect_bus, open_node
from esper.telemetry import Bus, MemoryBroker, MemoryBus
from esper.telemetry.streams import streams_with_replicas
from esper.telemetry.tracing import Tracing, join_tracing

log = logging.getLogger(__name__)

_L1_BYTES: Final = 256 * 1024 * 1024
_START_S: Final = 120.0
_STOP_S: Final = 20.0
_FETCH_S: Final = 60.0
_TRACED_AS: Final = "esper-training"
_START_ORDER: Final = ("urza", "tezzeret", "karn", "tamiyo", "nissa", "tolaria")


class LoopSource:
    """A tiered source that lives on one loop, asked from any other."""

    def __init__(self, source: TieredKernelSource, home: LoopThread) -> None:
        self._source = source
        self._home = home

    def __deepcopy__(self, memo: dict[int, object]) -> LoopSource:
        """Give itself: copies of a model take their kernels from the same place."""
        return self

    async def fetch(self, artifact_id: str, *, announced: bool = False) -> VerifiedKernel:
        """Give a verified kernel from the nearest tier that has it; one just announced, whatever was found before.

        What the first tier has is taken without a word to the home loop.
        """
        kernel = await self._source.near(artifact_id)
        if kernel is None:
            beyond = self._source.fetch_beyond(artifact_id, announced=announced)
            kernel = await asyncio.wrap_future(self._home.submit(beyond))
        if announced:
            self._source.learn(kernel.manifest)
        return kernel

    def at_hand(self, artifact_id: str) -> VerifiedKernel | None:
        """Give a small kernel that is in the first tier now, ``None`` for any other."""
        return self._source.at_hand(artifact_id)

    def answer_to(self, spec: CompileSpec) -> str | None:
        """Give the id of the kernel that the compiler named here for an equal request and has not taken back."""
        return self._source.answer_to(spec)

    def refuse(self, job_id: str) -> None:
        """Note that the compiler says of a job that it has no kernel."""
        self._source.refuse(job_id)

    async def warm(self, artifact_ids: Sequence[str]) -> tuple[str, ...]:
        """Bring kernels into the first tier; give those that are there now. Failures are logged, never raised."""
        return await asyncio.wrap_future(self._home.submit(self._source.warm(artifact_ids)))

    def name(self, name: str, artifact_id: str) -> None:
        """Let a kernel be fetched by a name of one's own.

        Raises:
            InvalidInputError: The name or the id is not well formed.
        """
        self._source.name(name, artifact_id)

    def stats(self) -> Sequence[CacheTierStatus]:
        """Give the statistics of every tier."""
        return self._source.stats()

    async def close(self) -> None:
        """End running fetches and let go of the tiers; on the home loop."""
        await self._source.close()


class MeshBackend(Protocol):
    """Where the services of a mesh are."""

    async def open(self) -> None:
        """Bring it up, or reach it."""

    async def close(self) -> None:
        """Take down what ``open`` brought up."""

    async def connect_bus(self) -> Bus:
        """Give a bus of its own to a publisher's loop."""

    def stub(self, service: str) -> Any:
        """Give the stub of a service, on the mesh's loop."""

    def ring(self) -> KeyRing:
        """Give the keys of trusted compilers."""

    def second_tier(self) -> DirectoryTier | RedisTier | None:
        """Give the second cache tier."""


class EmbeddedBackend:
    """All services in this process: no sockets, bus and stores in memory."""

    def __init__(self) -> None:
        self._broker = MemoryBroker()
        self._channel: InProcessChannel | None = None
        self._bus: MemoryBus | None = None
        self._nodes: list[Node] = []
        self._key = SigningKey.generate()

    async def open(self) -> None:
        """Start every service on the calling loop."""
        self._bus = MemoryBus(self._broker)
        await self._bus.ensure_streams()
        self._channel = InProcessChannel()
        given = Surroundings(
            settings=resolve().settings,
            bus=self._bus,
            stubs={name: self.stub(name) for name in SERVICES},
            key=self._key,
            ring=self.ring(),
            embedded=True,
        )
        for service in _START_ORDER:
            node = await open_node(service, given)
            self._nodes.append(node)
            node.add_to(_ChannelServer(self._channel))

    async def close(self) -> None:
        """Stop every service."""
        async with contextlib.AsyncExitStack() as leaving:  # one that fails to close keeps no other from it
            if self._bus is not None:
                leaving.push_async_callback(self._bus.close)
            for node in self._nodes:
                leaving.push_async_callback(node.close)
            self._nodes = []

    async def connect_bus(self) -> Bus:
        """Give a bus over the same broker."""
        return MemoryBus(self._broker)

    def stub(self, service: str) -> Any:
        """Give a stub that calls the servicer directly."""
        if self._channel is None:
            raise InvalidStateError("the mesh must be open, got one that is not")
        return STUBS[service](self._channel)

    def ring(self) -> KeyRing:
        """Trust this process's own compiler."""
        return self._key.ring()

    def second_tier(self) -> None:
        """Go without: the library is in the same memory."""


class _ChannelServer:
    """Lets a node register with an in-process channel as it does with a server."""

    def __init__(self, channel: InProcessChannel) -> None:
        self._channel = channel

    def add_servicer(self, registrar: Any, servicer: object, *, ready: Sequence[Any] = ()) -> tuple[str, ...]:
        """Take one servicer by its generated registrar."""
        del ready
        return self._channel.add_servicer(registrar, servicer)


class RemoteBackend:
    """Services that run elsewhere, at the addresses of the settings."""

    def __init__(self, settings: MeshSettings) -> None:
        self.settings = settings
        self._channels: dict[str, Any] = {}

    async def open(self) -> None:
        """Make sure that bus and library can be reached.

        Raises:
            UnavailableError: One of them cannot.
        """
        bus = await connect_bus(self.settings)
        try:
            await bus.ensure_streams(streams_with_replicas(self.settings.nats_replicas))
        finally:
            await bus.close()
        config = self.settings.channel_config()
        await probe(self.settings.address_of("urza"), 5.0, config=config)
        self._channels = {name: open_channel(self.settings.address_of(name), config) for name in SERVICES}
        for service in ("tamiyo", "tezzeret"):
            try:
                await probe(self.settings.address_of(service), 2.0, config=config)
            except UnavailableError as error:
                log.warning("service_away", extra={"service": service, "error": str(error)})

    async def close(self) -> None:
        """Close the channels."""
        for channel in self._channels.values():
            await channel.close()
        self._channels.clear()

    async def connect_bus(self) -> Bus:
        """Connect to NATS."""
        return await connect_bus(self.settings)

    def stub(self, service: str) -> Any:
        """Give a stub over a gRPC channel."""
        if service not in self._channels:
            raise InvalidStateError("the mesh must be open, got one that is not")
        return STUBS[service](self._channels[service])

    def ring(self) -> KeyRing:
        """Trust the keys of the configured directory."""
        return KeyRing.from_dir(self.settings.trusted_dir)

    def second_tier(self) -> DirectoryTier | RedisTier:
        """Give Redis where its URL is set, else a directory of the state directory."""
        if self.settings.redis_url:
            return RedisTier(self.settings.redis_url)
        return DirectoryTier(self.settings.state_dir / "kernels")


class _MeshTransport(AsyncStubTransport):
    """Calls through the stubs of a mesh."""

    def __init__(self, backend: MeshBackend) -> None:
        self._backend = backend

    def stub(self, service: str) -> Any:
        """Give the stub of a service."""
        return self._backend.stub(service)


class Mesh:
    """The services a training run grows with; a context manager.

    ``Mesh.embedded()`` runs them in this process, ``Mesh.local()`` as processes on this machine, ``Mesh.connect()``
    reaches a deployed mesh. One mesh serves any number of runs.
    """

    def __init__(self, backend: MeshBackend, *, on_close: Callable[[], None] | None = None) -> None:
        self._backend = backend
        self._on_close = on_close
        self._loop = LoopThread("esper-mesh")
        self._links: list[RunLink] = []
        self._source: LoopSource | None = None
        self._withdrawals: WithdrawalFollower | None = None
        self._closed = False
        self._tracing = Tracing()
        try:
            configured = self.settings or resolve().settings
            self._tracing = join_tracing(_TRACED_AS, configured.otlp_endpoint or None)
            self._loop.run(self._open(), _START_S)
        except BaseException:
            self.close()
            raise

    @classmethod
    def embedded(cls) -> Self:
        """Start every service in this process; the default of a session."""
        return cls(EmbeddedBackend())

    @classmethod
    def local(cls, state_dir: Path | str | None = None) -> Self:
        """Start every service as a process on loopback, with NATS from its wheel and SQLite, and stop them at the end.

        Args:
            state_dir: Where databases, keys, queues and logs rest; by default a directory of its own in
                ``~/.local/state/esper``. A mesh that runs there already (``esper up``) is an error.

        Raises:
            AlreadyExistsError: A mesh runs in this state directory.
            UnavailableError: A service did not come up; the message ends with its last output.
        """
        from esper.services.local import LocalMesh

        processes = LocalMesh(Path(state_dir) if state_dir is not None else None)
        settings = processes.start()
        return cls(RemoteBackend(settings), on_close=processes.stop)

    @classmethod
    def connect(cls, settings: MeshSettings | None = None) -> Self:
        """Reach a mesh that runs already; by default the one that file and environment name.

        Raises:
            UnavailableError: The bus or the library cannot be reached.
        """
        return cls(RemoteBackend(settings or resolve().settings))

    @property
    def settings(self) -> MeshSettings | None:
        """Where the services are; ``None`` when they are in this process."""
        return self._backend.settings if isinstance(self._backend, RemoteBackend) else None

    def open_link(self, run_id: str, model: MorphableModel) -> RunLink:
        """Give a run's line: its publisher, its mailboxes, and kernels through the tiers.

        Raises:
            InvalidStateError: The mesh is closed, or an earlier run of the model is not.
            UnavailableError: The bus cannot be reached.
        """
        if self._closed or self._source is None:
            raise InvalidStateError("mesh must be open, got a closed one", parameter="mesh")
        client = fresh_client(model, run_id)
        client.connect(self._backend.connect_bus)
        try:
            link = BusLink(client, self._source)
        except BaseException:
            client.close(0.0)
            raise
        for layer in model.kasmina_layers.values():
            layer.kernel_source = self._source
        self._links.append(link)
        return link

    @property
    def kernel_source(self) -> LoopSource:
        """Kernels through the cache tiers; what a layer takes as ``kernel_source``."""
        if self._closed or self._source is None:
            raise InvalidStateError("mesh must be open, got a closed one", parameter="mesh")
        return self._source

    def fetch_kernel(self, artifact_id: str) -> VerifiedKernel:
        """Fetch a kernel into memory and wait for it.

        Raises:
            NotFoundError: No tier has it.
            UnavailableError: The tiers that may have it cannot be reached.
        """
        return self._loop.run(self.kernel_source.fetch(artifact_id), _FETCH_S)

    def client(self) -> EsperClient:
        """Give a client of this mesh's services; it is of use until the mesh is closed."""
        return EsperClient(transport=Transport(_MeshTransport(self._backend), self._loop))

    def close(self) -> None:
        """End every line, then what this mesh brought up; idempotent."""
        if self._closed:
            return
        self._closed = True
        with contextlib.ExitStack() as leaving:
            if self._on_close is not None:
                leaving.callback(self._on_close)
            leaving.callback(self._tracing.flush)
            leaving.callback(self._loop.close)
            leaving.callback(self._close_services)
            for link in self._links:
                leaving.callback(link.close)

    def _close_services(self) -> None:
        try:
            self._loop.run(self._shut(), _STOP_S)
        except EsperError as error:
            log.warning("mesh_close_failed", extra={"error": str(error)})

    async def _shut(self) -> None:
        async with contextlib.AsyncExitStack() as leaving:
            leaving.push_async_callback(self._backend.close)
            if self._source is not None:
                leaving.push_async_callback(self._source.close)
            if self._withdrawals is not None:
                leaving.push_async_callback(self._withdrawals.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def _open(self) -> None:
        await self._backend.open()
        library = UrzaTier(self._backend.stub("urza"))
        cache = KernelCache(_L1_BYTES)
        source = TieredKernelSource(cache, self._backend.second_tier(), library, self._backend.ring())
        self._source = LoopSource(source, self._loop)
        self._withdrawals = WithdrawalFollower(await self._backend.connect_bus(), source)
        await self._withdrawals.start()

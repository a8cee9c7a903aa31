"""Karn put together: store, designer, report loop and servicer, with one start and one close.

node = await KarnNode.open(KarnNodeConfig(database_url="sqlite:///karn.db"), bus=bus, urza=urza_stub)
node.add_to(server)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Self

from esper.contracts.errors import ConfigError
from esper.mesh.handlers import Registrar
from esper.mesh.server import MeshServer
from esper.services.karn.library import Library
from esper.services.karn.memory import MAX_LESSONS
from esper.services.karn.report_loop import ReportLoop, ReportLoopConfig
from esper.services.karn.service import Karn
from esper.services.karn.servicer import KarnServicer
from esper.services.karn.store import open_store
from esper.services.karn.surrogate import SurrogateConfig
from esper.telemetry.bus import Bus
from esper.v1.karn_service_pb2_grpc import add_KarnServiceServicer_to_server

REGISTRAR: Registrar = add_KarnServiceServicer_to_server
"""Registers the servicer with a `MeshServer` or an `InProcessChannel`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KarnNodeConfig:
    """Where Karn keeps its state, and what it expects beforehand."""

    database_url: str = "sqlite://"
    """Store; by default in memory, gone at the end."""
    surrogate: SurrogateConfig = field(default_factory=SurrogateConfig)
    """Prior of the expected reward."""
    max_lessons: int = MAX_LESSONS
    """Newest reports that count, of those that teach something; older ones are kept and forgotten. At least 1."""
    report_loop: ReportLoopConfig = field(default_factory=ReportLoopConfig)
    """How field reports are taken off the bus."""

    def __post_init__(self) -> None:
        if not self.database_url:
            raise ConfigError("database_url must name a store, got nothing", parameter="database_url")


class KarnNode:
    """A running Karn. Belongs to one event loop."""

    def __init__(self, karn: Karn, loop: ReportLoop | None) -> None:
        self.karn = karn
        self.servicer = KarnServicer(karn)
        self._loop = loop

    @classmethod
    async def open(
        cls, config: KarnNodeConfig | None = None, *, bus: Bus | None = None, urza: Any | None = None
    ) -> Self:
        """Open the store, take in what it holds, and begin to consume.

        Args:
            config: Where and how.
            bus: Open bus with its streams; ``None`` takes reports over gRPC alone.
            urza: ``UrzaServiceStub``; ``None`` stores designs here alone.

        Raises:
            UnavailableError: The store or the bus cannot be reached.
        """
        chosen = config or KarnNodeConfig()
        store = await open_store(chosen.database_url)
        library = None if urza is None else Library(urza)
        try:
            karn = Karn(store, library, surrogate=chosen.surrogate, max_lessons=chosen.max_lessons)
            await karn.start()
            loop = None if bus is None else ReportLoop(karn, bus, chosen.report_loop)
            if loop is not None:
                await loop.start()
        except BaseException:
            await store.database.close()
            raise
        return cls(karn, loop)

    def add_to(self, server: Any) -> None:
        """Register with an `InProcessChannel`, or a `MeshServer`, which asks store and loop whether they are ready."""
        if not isinstance(server, MeshServer):
            server.add_servicer(REGISTRAR, self.servicer)
            return
        probes = [self.karn.store.ping]
        if self._loop is not None:
            probes.append(self._loop.ready)
        server.add_servicer(REGISTRAR, self.servicer, ready=probes)

    async def close(self) -> None:
        """Finish the report in hand and close the store; idempotent."""
        if self._loop is not None:
            await self._loop.close()
        await self.karn.store.database.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

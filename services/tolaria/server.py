"""Tolaria's control service put together: store, bus loop and servicer, with one start and one close."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from esper.contracts.errors import ConfigError
from esper.mesh.handlers import Registrar
from esper.services.tolaria.bus_loop import TolariaBusLoop
from esper.services.tolaria.servicer import TolariaServicer
from esper.services.tolaria.store import TolariaStore
from esper.telemetry.bus import Bus
from esper.v1.tolaria_service_pb2_grpc import add_TolariaServiceServicer_to_server

REGISTRAR: Registrar = add_TolariaServiceServicer_to_server
"""Registers the servicer with a `MeshServer` or an `InProcessChannel`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TolariaNodeConfig:
    """Where Tolaria keeps its state."""

    database_url: str = "sqlite://"
    """Store; by default in memory, gone at the end."""

    def __post_init__(self) -> None:
        if not self.database_url:
            raise ConfigError("database_url must name a store, got nothing", parameter="database_url")


class TolariaNode:
    """A running Tolaria. Belongs to one event loop."""

    def __init__(self, store: TolariaStore, loop: TolariaBusLoop) -> None:
        self.store = store
        self.servicer = TolariaServicer(store, loop)
        self._loop = loop

    @classmethod
    async def open(cls, config: TolariaNodeConfig | None = None, *, bus: Bus) -> Self:
        """Open the store and begin to consume.

        Raises:
            UnavailableError: The store or the bus cannot be reached.
        """
        store = await TolariaStore.open((config or TolariaNodeConfig()).database_url)
        loop = TolariaBusLoop(store, bus)
        try:
            await loop.start()
        except BaseException:
            await store.database.close()
            raise
        return cls(store, loop)

    def add_to(self, server: Any) -> None:
        """Register with a `MeshServer`, which asks store and loop whether they are ready."""
        server.add_servicer(REGISTRAR, self.servicer, ready=[self.store.database.ping, self._loop.ready])

    async def close(self) -> None:
        """Stop consuming and close the store; idempotent."""
        await self._loop.close()
        await self.store.database.close()

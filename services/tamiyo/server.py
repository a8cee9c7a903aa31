"""Tamiyo put together: store, policy, candidates, bus loop and servicer, with one start and one close.

config = TamiyoNodeConfig(database_url="sqlite:///tamiyo.db")
node = await TamiyoNode.open(config, bus=bus, urza=urza_stub, karn=karn_stub, tezzeret=tezzeret_stub)
node.add_to(server)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Self

from esper.contracts.errors import ConfigError
from esper.mesh.handlers import Registrar
from esper.mesh.server import MeshServer
from esper.services.tamiyo.bus_loop import BusLoopConfig, TamiyoBusLoop
from esper.services.tamiyo.candidates import CandidateConfig, CandidateSource
from esper.services.tamiyo.config import TamiyoConfig
from esper.services.tamiyo.forecast import ForecastConfig, KernelForecaster
from esper.services.tamiyo.policy import Policy
from esper.services.tamiyo.service import Tamiyo
from esper.services.tamiyo.servicer import TamiyoServicer
from esper.services.tamiyo.store import open_store
from esper.telemetry.bus import Bus
from esper.v1.tamiyo_service_pb2_grpc import add_TamiyoServiceServicer_to_server

REGISTRAR: Registrar = add_TamiyoServiceServicer_to_server
"""Registers the servicer with a `MeshServer` or an `InProcessChannel`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TamiyoNodeConfig:
    """Where Tamiyo keeps its state, and how it decides."""

    database_url: str = "sqlite://"
    """Store; by default in memory, gone at the end."""
    policy: TamiyoConfig = field(default_factory=TamiyoConfig)
    """When and how much to grow."""
    candidates: CandidateConfig = field(default_factory=CandidateConfig)
    """How fresh the candidates are."""
    bus_loop: BusLoopConfig = field(default_factory=BusLoopConfig)
    """How messages are treated."""
    forecast: ForecastConfig = field(default_factory=ForecastConfig)
    """How far ahead kernels are made ready."""
    random_seed: int = 0
    """Seed of the draws of SelectSeed."""

    def __post_init__(self) -> None:
        if not self.database_url:
            raise ConfigError("database_url must name a store, got nothing", parameter="database_url")


class TamiyoNode:
    """A running Tamiyo. Belongs to one event loop."""

    def __init__(self, tamiyo: Tamiyo, loop: TamiyoBusLoop | None) -> None:
        self.tamiyo = tamiyo
        self.servicer = TamiyoServicer(tamiyo)
        self._loop = loop

    @classmethod
    async def open(
        cls,
        config: TamiyoNodeConfig | None = None,
        *,
        bus: Bus | None,
        urza: Any | None = None,
        karn: Any | None = None,
        tezzeret: Any | None = None,
    ) -> Self:
        """Open the store, learn what it holds, and begin to consume.

        Args:
            config: Where and how.
            bus: Open bus with its streams; ``None`` serves gRPC alone.
            urza: ``UrzaServiceStub``; ``None`` leaves the library's blueprints out.
            karn: ``KarnServiceStub``; ``None`` leaves its designs out.
            tezzeret: ``TezzeretServiceStub``; ``None`` compiles nothing.

        Raises:
            UnavailableError: The store or the bus cannot be reached.
        """
        chosen = config or TamiyoNodeConfig()
        store = await open_store(chosen.database_url)
        candidates = CandidateSource(urza, karn, chosen.candidates)
        tamiyo = Tamiyo(store, Policy(chosen.policy), candidates, random_seed=chosen.random_seed)
        try:
            await tamiyo.start()
            forecaster = None
            if tezzeret is not None:
                forecaster = KernelForecaster(tamiyo.policy.posterior, candidates, tezzeret, chosen.forecast)
            loop = None
            if bus is not None:
                loop = TamiyoBusLoop(tamiyo, bus, tezzeret, chosen.bus_loop, forecaster=forecaster)
            if loop is not None:
                await loop.start()
        except BaseException:
            await store.database.close()
            raise
        return cls(tamiyo, loop)

    def add_to(self, server: Any) -> None:
        """Register with an `InProcessChannel`, or a `MeshServer`, which asks store and loop whether they are ready."""
        if not isinstance(server, MeshServer):
            server.add_servicer(REGISTRAR, self.servicer)
            return
        probes = [self.tamiyo.store.ping]
        if self._loop is not None:
            probes.append(self._loop.ready)
        server.add_servicer(REGISTRAR, self.servicer, ready=probes)

    async def close(self) -> None:
        """Finish the message in hand and close the store; idempotent."""
        if self._loop is not None:
            await self._loop.close()
        await self.tamiyo.store.database.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

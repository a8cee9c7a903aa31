"""A bus, a library with Urza's rules and Karn, in one process."""

from __future__ import annotations

import asyncio
from typing import Any

from esper.blueprints import content_id
from esper.contracts.blueprint import Blueprint, BlueprintIR, Site
from esper.contracts.errors import AlreadyExistsError, NotFoundError, UnavailableError
from esper.contracts.run import FieldReport
from esper.contracts.wire import from_wire, serialize, to_wire
from esper.mesh import InProcessChannel
from esper.services.karn.proposer import Constraints
from esper.services.karn.report_loop import ReportLoopConfig
from esper.services.karn.server import KarnNode, KarnNodeConfig
from esper.services.karn.service import Karn
from esper.services.karn.store import open_store
from esper.telemetry import DEAD, EVENTS, MemoryBus, build_subject, dead_subject
from esper.v1 import blueprint_pb2, karn_service_pb2, urza_service_pb2
from esper.v1.karn_service_pb2_grpc import KarnServiceStub
from esper.v1.urza_service_pb2_grpc import UrzaServiceServicer, UrzaServiceStub, add_UrzaServiceServicer_to_server


class Library(UrzaServiceServicer):
    """Keeps blueprints by id, with the library's rules on names and parents; away where it is told so."""

    def __init__(self) -> None:
        self.held: dict[str, Any] = {}
        self.is_away = False
        self.asked: list[str] = []

    def hold(self, design: Blueprint) -> None:
        """Have a design that somebody else stored."""
        self.held[design.id] = to_wire(design)

    async def CreateBlueprint(self, request: Any, context: Any) -> Any:
        """Store one."""
        self._be_there()
        unknown = [name for name in request.lineage.parent_ids if name not in self.held]
        if unknown:
            raise NotFoundError(f"parents must be stored, got {unknown}")
        identity = content_id(from_wire(request.ir, BlueprintIR))
        known = self.held.get(identity)
        if known is not None and known.name != request.name:
            raise AlreadyExistsError("the graph is stored under another name")
        parts = {"ir": request.ir, "metadata": request.metadata, "lineage": request.lineage, "state": request.state}
        self.held[identity] = blueprint_pb2.Blueprint(id=identity, name=request.name, version=1, **parts)
        return urza_service_pb2.CreateBlueprintResponse(blueprint=self.held[identity], created=known is None)

    async def GetBlueprint(self, request: Any, context: Any) -> Any:
        """Give one, and note that it was asked for."""
        self._be_there()
        self.asked.append(request.reference)
        if request.reference not in self.held:
            raise NotFoundError(f"reference must name a stored blueprint, got {request.reference!r}")
        return urza_service_pb2.GetBlueprintResponse(blueprint=self.held[request.reference])

    def _be_there(self) -> None:
        if self.is_away:
            raise UnavailableError("the library is away")


class Mesh:
    """A bus, a library and Karn; `open` starts Karn, again if it runs."""

    def __init__(self) -> None:
        self.bus = MemoryBus()
        self.library = Library()
        self._node: KarnNode | None = None
        self._channel: InProcessChannel | None = None

    @property
    def node(self) -> KarnNode:
        """The Karn that runs."""
        assert self._node is not None
        return self._node

    async def open(self, url: str = "sqlite://", **config: Any) -> Any:
        """Start Karn and give its stub."""
        await self._stop()
        self._channel = InProcessChannel()
        self._channel.add_servicer(add_UrzaServiceServicer_to_server, self.library)
        await self.bus.ensure_streams()
        chosen = KarnNodeConfig(database_url=url, report_loop=ReportLoopConfig(retry_delay_s=0.0), **config)
        urza: Any = UrzaServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._node = await KarnNode.open(chosen, bus=self.bus, urza=urza)
        self._node.add_to(self._channel)
        return KarnServiceStub(self._channel)  # type: ignore[no-untyped-call]

    async def send(self, report: FieldReport) -> None:
        """Publish a report as a trainer does."""
        await self.bus.publish(build_subject(report.run_id, "field_report"), serialize(report), durable=True)

    async def dead(self) -> Any:
        """Give the next message that was given up."""
        consumer = await self.bus.consume(DEAD.name, "test-dead", dead_subject(EVENTS.name))
        async with asyncio.timeout(10):
            return (await anext(consumer)).message

    async def close(self) -> None:
        """End everything."""
        await self._stop()
        await self.bus.close()

    async def _stop(self) -> None:
        if self._node is not None:
            await self._node.close()
        if self._channel is not None:
            await self._channel.close()


def request_for(site: Site, count: int = 3, random_seed: int = 1, **bounds: Any) -> Any:
    """Give a request of proposals."""
    asked = karn_service_pb2.ProposeBlueprintsRequest(count=count, random_seed=random_seed)
    asked.site.CopyFrom(to_wire(site))  # type: ignore[arg-type]
    asked.constraints.CopyFrom(karn_service_pb2.ProposalConstraints(**bounds))
    return asked


async def designs_of_another(site: Site, count: int) -> list[Blueprint]:
    """Give designs that another Karn made, whose store is gone."""
    karn = Karn(await open_store("sqlite://"))
    found = await karn.propose(site, count, Constraints(), 7)
    await karn.store.database.close()
    return [one.blueprint for one in found]

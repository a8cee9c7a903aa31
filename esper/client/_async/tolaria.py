"""Tolaria: training runs and the levers on them."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from esper.client.paging import decoded
from esper.client.transport import AsyncTransport
from esper.contracts.blueprint import Blueprint
from esper.contracts.decision import AdaptationDecision, AdaptationPlan, ControlAction, ControlCommand, ControlResult
from esper.contracts.run import FieldReport, LayerStatus, SeedEvent, SystemStatePacket
from esper.contracts.wire import from_timestamp, from_wire, to_message
from esper.v1 import decision_pb2, tolaria_service_pb2


@dataclass(frozen=True, kw_only=True, slots=True)
class RunInfo:
    """One run as it was last heard of."""

    state: SystemStatePacket
    """Last state packet."""
    started_at: datetime
    """When it was announced."""
    finished_at: datetime | None
    """When it ended; ``None`` until then."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaptationInfo:
    """One adaptation of a run."""

    adaptation_id: str
    """Adaptation."""
    decision: AdaptationDecision | None
    """Decision behind it; ``None`` for a command by hand."""
    events: tuple[SeedEvent, ...]
    """Its seed's steps, oldest first."""
    report: FieldReport | None
    """How it ended; ``None`` until then."""
    plan: AdaptationPlan | None
    """Plan as last reported."""


class AsyncTolariaClient:
    """Calls of ``TolariaService``."""

    def __init__(self, transport: AsyncTransport) -> None:
        self._transport = transport

    async def list_runs(self) -> AsyncIterator[RunInfo]:
        """Give runs, newest first."""
        request = tolaria_service_pb2.ListRunsRequest()
        async for page in self._transport.pages("tolaria", "ListRuns", request):
            for run in page.runs:
                yield _info(run)

    async def get_run(self, run_id: str) -> tuple[RunInfo, Sequence[AdaptationInfo]]:
        """Give one run with its adaptations, oldest first."""
        request = tolaria_service_pb2.GetRunRequest(run_id=run_id)
        response = await self._transport.call("tolaria", "GetRun", request)
        return _info(response.run), tuple(_adaptation(record) for record in response.adaptations)

    async def watch_run(
        self, run_id: str
    ) -> AsyncIterator[SystemStatePacket | AdaptationDecision | SeedEvent | FieldReport]:
        """Give a run's state now, and everything that happens in it until it has ended."""
        request = tolaria_service_pb2.WatchRunRequest(run_id=run_id)
        async for response in self._transport.stream("tolaria", "WatchRun", request):
            match response.WhichOneof("event"):
                case "state":
                    yield from_wire(response.state, SystemStatePacket)
                case "decision":
                    yield from_wire(response.decision, AdaptationDecision)
                case "seed":
                    yield from_wire(response.seed, SeedEvent)
                case _:
                    yield from_wire(response.report, FieldReport)

    async def control(
        self,
        run_id: str,
        action: ControlAction,
        *,
        actor: str = "client",
        layer: str = "",
        seed_index: int | None = None,
        blueprint: Blueprint | None = None,
        checkpoint_id: str = "",
        request_id: str = "",
    ) -> ControlResult:
        """Have a run do something and give its answer; a refusal is an answer, not an error.

        A command is carried out once for each ``request_id``; an empty one is made up.
        """
        command = ControlCommand(
            request_id=request_id or uuid.uuid4().hex,
            run_id=run_id,
            action=action,
            actor=actor,
            layer=layer,
            seed_index=seed_index,
            blueprint=blueprint,
            checkpoint_id=checkpoint_id,
            created_at=datetime.now(UTC),
        )
        message = to_message(command, decision_pb2.ControlCommand)
        request = tolaria_service_pb2.ControlRunRequest(command=message)
        return from_wire((await self._transport.call("tolaria", "ControlRun", request)).result, ControlResult)

    async def list_seeds(self, run_id: str, layer: str = "") -> Sequence[LayerStatus]:
        """Give the layers of a run with their seeds, as of its last state packet."""
        request = tolaria_service_pb2.ListSeedsRequest(run_id=run_id, layer=layer)
        return tuple(decoded((await self._transport.call("tolaria", "ListSeeds", request)).layers, LayerStatus))


def _info(run: tolaria_service_pb2.Run) -> RunInfo:
    return RunInfo(
        state=from_wire(run.state, SystemStatePacket),
        started_at=from_timestamp(run.started_at),
        finished_at=from_timestamp(run.finished_at) if run.HasField("finished_at") else None,
    )


def _adaptation(record: tolaria_service_pb2.AdaptationRecord) -> AdaptationInfo:
    return AdaptationInfo(
        adaptation_id=record.adaptation_id,
        decision=from_wire(record.decision, AdaptationDecision) if record.HasField("decision") else None,
        events=tuple(decoded(record.events, SeedEvent)),
        report=from_wire(record.report, FieldReport) if record.HasField("report") else None,
        plan=from_wire(record.plan, AdaptationPlan) if record.HasField("plan") else None,
    )

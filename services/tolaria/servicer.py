"""The gRPC face of Tolaria: checks requests, asks the store, sends commands."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Iterable
from datetime import UTC, datetime
from typing import Any, Final

from esper.contracts.decision import ControlCommand
from esper.contracts.errors import InvalidInputError, InvalidStateError, NotFoundError
from esper.contracts.run import ENDED_RUN_PHASES, RunPhase, SystemStatePacket
from esper.contracts.wire import enum_from_wire, from_wire, to_message, to_timestamp
from esper.mesh.auth import LOCAL_CALLER, current_caller
from esper.mesh.deadline import remaining_s
from esper.mesh.page_token import decode_page_token, encode_page_token
from esper.mesh.validation import require_enum, require_id, require_page_size
from esper.services.tolaria.bus_loop import TolariaBusLoop
from esper.services.tolaria.store import StoredEvent, StoredRun, TolariaStore
from esper.telemetry.subjects import check_run_id
from esper.v1 import decision_pb2, telemetry_pb2, tolaria_service_pb2
from esper.v1.tolaria_service_pb2_grpc import TolariaServiceServicer

_DEFAULT_ANSWER_S: Final = 10.0
_ANSWER_MARGIN_S: Final = 0.25
_MAX_PAGE: Final = 500
_ENDED: Final = frozenset(int(phase) for phase in ENDED_RUN_PHASES)


class TolariaServicer(TolariaServiceServicer):
    """Answers ``TolariaService``."""

    def __init__(self, store: TolariaStore, loop: TolariaBusLoop) -> None:
        self._store = store
        self._loop = loop

    async def ListRuns(
        self, request: tolaria_service_pb2.ListRunsRequest, context: Any
    ) -> tolaria_service_pb2.ListRunsResponse:
        """Give runs, newest first, page by page."""
        del context
        phases = [_phase(number) for number in request.phases]
        size = require_page_size(request.page_size, default=50, maximum=_MAX_PAGE)
        scope = f"ListRuns|{sorted(phases)}"
        after = decode_page_token(request.page_token, scope=scope, arity=2)
        rows = await self._store.list_runs(phases, size + 1, _position(after))
        token = ""
        if len(rows) > size:
            rows = rows[:size]
            token = encode_page_token((rows[-1].started_us, rows[-1].packet.run_id), scope=scope)
        return tolaria_service_pb2.ListRunsResponse(runs=[_run(row) for row in rows], next_page_token=token)

    async def GetRun(
        self, request: tolaria_service_pb2.GetRunRequest, context: Any
    ) -> tolaria_service_pb2.GetRunResponse:
        """Give one run with its adaptations."""
        del context
        run = await self._required(request.run_id)
        records = _records(await self._store.events(request.run_id))
        return tolaria_service_pb2.GetRunResponse(run=_run(run), adaptations=records)

    async def WatchRun(
        self, request: tolaria_service_pb2.WatchRunRequest, context: Any
    ) -> AsyncIterator[tolaria_service_pb2.WatchRunResponse]:
        """Give a run now and on every change, until it has ended."""
        del context
        check_run_id(request.run_id)
        with self._loop.watch(request.run_id) as news:
            run = await self._required(request.run_id)
            yield tolaria_service_pb2.WatchRunResponse(state=_state(run.packet))
            if run.packet.phase in ENDED_RUN_PHASES:
                return
            async for item in news:
                response = _watched(item.message)
                if response is None:
                    continue
                yield response
                if response.WhichOneof("event") == "state" and response.state.phase in _ENDED:
                    return

    async def ControlRun(
        self, request: tolaria_service_pb2.ControlRunRequest, context: Any
    ) -> tolaria_service_pb2.ControlRunResponse:
        """Send a command and wait for the run's answer."""
        del context
        command = _command(request.command)
        run = await self._required(command.run_id)
        if run.packet.phase in ENDED_RUN_PHASES:
            raise InvalidStateError(f"run {command.run_id} must be under way, got {run.packet.phase.name}")
        left_s = remaining_s()
        timeout_s = _DEFAULT_ANSWER_S if left_s is None else max(0.05, left_s - _ANSWER_MARGIN_S)
        result = await self._loop.command(command, timeout_s)
        return tolaria_service_pb2.ControlRunResponse(result=to_message(result, decision_pb2.ControlResult))

    async def ListSeeds(
        self, request: tolaria_service_pb2.ListSeedsRequest, context: Any
    ) -> tolaria_service_pb2.ListSeedsResponse:
        """Give the seeds of a run as of its last state packet."""
        del context
        run = await self._required(request.run_id)
        layers = [layer for layer in run.packet.layers if request.layer in ("", layer.layer)]
        if request.layer and not layers:
            raise NotFoundError(f"run {request.run_id} must have layer {request.layer!r}", parameter="layer")
        return tolaria_service_pb2.ListSeedsResponse(
            layers=[to_message(layer, telemetry_pb2.LayerStatus) for layer in layers]
        )

    async def _required(self, run_id: str) -> StoredRun:
        check_run_id(run_id)
        run = await self._store.run(run_id)
        if run is None:
            raise NotFoundError(f"run must be known, got {run_id!r}", parameter="run_id")
        return run


def _phase(number: int) -> RunPhase:
    descriptor = telemetry_pb2.RunPhase.DESCRIPTOR
    found = enum_from_wire(number, RunPhase, descriptor, "phases")
    assert isinstance(found, RunPhase)
    return found


def _position(after: Any) -> tuple[int, str] | None:
    if after is None:
        return None
    started_us, run_id = after
    if not isinstance(started_us, int) or not isinstance(run_id, str):
        raise InvalidInputError.of("page_token", "come from the page before", after)
    return started_us, run_id


def _command(message: decision_pb2.ControlCommand) -> ControlCommand:
    require_id("command.request_id", message.request_id)
    check_run_id(message.run_id)
    require_enum("command.action", decision_pb2.ControlAction, message.action)
    if len(message.actor) > 128:
        raise InvalidInputError.of("command.actor", "be at most 128 characters", message.actor)
    if not message.HasField("created_at"):
        message.created_at.CopyFrom(to_timestamp(datetime.now(UTC)))
    command = from_wire(message, ControlCommand)
    caller = current_caller()
    proven = caller.name if caller != LOCAL_CALLER else ""  # whoever showed a token or certificate speaks in that name
    return dataclasses.replace(command, actor=proven or command.actor or "operator")


def _run(row: StoredRun) -> tolaria_service_pb2.Run:
    run = tolaria_service_pb2.Run(
        run_id=row.packet.run_id, state=_state(row.packet), started_at=to_timestamp(row.started_at)
    )
    if row.finished_at is not None:
        run.finished_at.CopyFrom(to_timestamp(row.finished_at))
    return run


def _state(packet: SystemStatePacket) -> telemetry_pb2.SystemStatePacket:
    return to_message(packet, telemetry_pb2.SystemStatePacket)


def _records(events: Iterable[StoredEvent]) -> list[tolaria_service_pb2.AdaptationRecord]:
    records: dict[str, tolaria_service_pb2.AdaptationRecord] = {}
    for event in events:
        if not event.adaptation_id:
            continue
        record = records.setdefault(
            event.adaptation_id, tolaria_service_pb2.AdaptationRecord(adaptation_id=event.adaptation_id)
        )
        if event.kind == "decision":
            record.decision.ParseFromString(event.payload)
        elif event.kind == "plan":
            record.plan.ParseFromString(event.payload)
        elif event.kind == "field_report":
            record.report.ParseFromString(event.payload)
        else:
            record.events.add().ParseFromString(event.payload)
    return [
        record for record in records.values() if record.HasField("plan") or record.events or record.HasField("report")
    ]


def _watched(message: Any) -> tolaria_service_pb2.WatchRunResponse | None:
    match message:
        case telemetry_pb2.SystemStatePacket():
            return tolaria_service_pb2.WatchRunResponse(state=message)
        case decision_pb2.AdaptationDecision():
            return tolaria_service_pb2.WatchRunResponse(decision=message)
        case telemetry_pb2.SeedEvent():
            return tolaria_service_pb2.WatchRunResponse(seed=message)
        case telemetry_pb2.FieldReport():
            return tolaria_service_pb2.WatchRunResponse(report=message)
    return None

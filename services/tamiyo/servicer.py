"""The gRPC face of Tamiyo: checks requests, translates, and nothing else."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from esper.contracts.blueprint import Site, SiteKind
from esper.contracts.errors import InvalidInputError
from esper.contracts.lesson import Lesson
from esper.contracts.run import FieldReport, SystemStatePacket
from esper.contracts.wire import enum_from_wire, enum_to_wire, from_wire, to_message, to_wire
from esper.mesh.page_token import decode_page_token, encode_page_token
from esper.mesh.validation import require_page_size, require_size
from esper.services.tamiyo.calibration import CALIBRATION_VERSION
from esper.services.tamiyo.posterior import MODEL_VERSION
from esper.services.tamiyo.seed_selection import SeedHistory
from esper.services.tamiyo.service import Tamiyo
from esper.telemetry.subjects import check_run_id
from esper.v1 import blueprint_pb2, replay_pb2, tamiyo_service_pb2
from esper.v1.tamiyo_service_pb2_grpc import TamiyoServiceServicer

_SITE_KIND = blueprint_pb2.SiteKind.DESCRIPTOR
_MAX_LAYER_BYTES = 400
_MAX_SEEDS = 4_096
_MAX_LESSONS = 200
_PAGE_BYTES = 4 * 1024 * 1024


class TamiyoServicer(TamiyoServiceServicer):
    """Serves ``esper.v1.TamiyoService``; errors leave as Esper's and become statuses in the envelope."""

    def __init__(self, tamiyo: Tamiyo) -> None:
        self._tamiyo = tamiyo

    async def Analyze(  # noqa: N802 - the name is the RPC's
        self, request: tamiyo_service_pb2.AnalyzeRequest, context: Any
    ) -> tamiyo_service_pb2.AnalyzeResponse:
        """Decide on one packet; the first decision, and the others of its race."""
        del context
        _need(request, "state")
        first, *rivals = await self._tamiyo.analyze(from_wire(request.state, SystemStatePacket))
        response = tamiyo_service_pb2.AnalyzeResponse()
        response.decision.CopyFrom(to_wire(first))  # type: ignore[arg-type]
        for rival in rivals:
            response.rivals.add().CopyFrom(to_wire(rival))  # type: ignore[arg-type]
        return response

    async def SelectSeed(  # noqa: N802
        self, request: tamiyo_service_pb2.SelectSeedRequest, context: Any
    ) -> tamiyo_service_pb2.SelectSeedResponse:
        """Draw a seed of one layer."""
        del context
        require_size("layer", request.layer, max_bytes=_MAX_LAYER_BYTES)
        if not 1 <= len(request.seeds) <= _MAX_SEEDS:
            raise InvalidInputError.of("seeds", f"hold 1 to {_MAX_SEEDS} seeds", len(request.seeds))
        histories = [
            SeedHistory(
                seed_index=seed.seed_index,
                rewards=tuple(seed.rewards),
                steps_since_attempt=seed.steps_since_attempt if seed.HasField("steps_since_attempt") else None,
                available=seed.available,
            )
            for seed in request.seeds
        ]
        site = from_wire(request.site, Site) if request.HasField("site") else None
        chosen = await self._tamiyo.select_seed(request.layer, histories, site)
        return tamiyo_service_pb2.SelectSeedResponse(
            seed_index=chosen.seed_index,
            expected_reward=chosen.expected_reward,
            exploration_bonus=chosen.exploration_bonus,
            explanation=chosen.explanation,
        )

    async def SubmitFieldReport(  # noqa: N802
        self, request: tamiyo_service_pb2.SubmitFieldReportRequest, context: Any
    ) -> tamiyo_service_pb2.SubmitFieldReportResponse:
        """Learn from an outcome."""
        del context
        _need(request, "report")
        learned = await self._tamiyo.learn(from_wire(request.report, FieldReport))
        return tamiyo_service_pb2.SubmitFieldReportResponse(learned=learned)

    async def ListDecisions(  # noqa: N802
        self, request: tamiyo_service_pb2.ListDecisionsRequest, context: Any
    ) -> tamiyo_service_pb2.ListDecisionsResponse:
        """Give one page of decisions, newest first."""
        del context
        if request.run_id:
            check_run_id(request.run_id)
        size = require_page_size(request.page_size, default=50, maximum=500)
        scope = f"ListDecisions|run={request.run_id}"
        position = decode_page_token(request.page_token, scope=scope, arity=2)
        after = None if position is None else (int(position[0] or 0), str(position[1]))
        found = await self._tamiyo.decisions(request.run_id, size + 1, after)
        response = tamiyo_service_pb2.ListDecisionsResponse()
        for _, decision in found[:size]:
            response.decisions.add().CopyFrom(to_wire(decision))  # type: ignore[arg-type]
        if len(found) > size:
            response.next_page_token = encode_page_token(found[size - 1][0], scope=scope)
        return response

    async def Explain(  # noqa: N802
        self, request: tamiyo_service_pb2.ExplainRequest, context: Any
    ) -> tamiyo_service_pb2.ExplainResponse:
        """Explain one decision."""
        del context
        found = await self._tamiyo.explain(request.adaptation_id)
        response = tamiyo_service_pb2.ExplainResponse(lines=found.lines(self._tamiyo.policy.config))
        response.decision.CopyFrom(to_wire(found.decision))  # type: ignore[arg-type]
        for rival in found.rivals:
            response.rivals.add().CopyFrom(to_wire(rival))  # type: ignore[arg-type]
        for report in found.reports.values():
            response.reports.add().CopyFrom(to_wire(report))  # type: ignore[arg-type]
        return response

    async def ReplayRun(  # noqa: N802
        self, request: tamiyo_service_pb2.ReplayRunRequest, context: Any
    ) -> AsyncIterator[tamiyo_service_pb2.ReplayRunResponse]:
        """Take the decisions of a run again, packet by packet."""
        del context
        async with aclosing(self._tamiyo.replay(request.run_id, present_settings=request.present_settings)) as replayed:
            async for packet in replayed:
                yield tamiyo_service_pb2.ReplayRunResponse(packet=to_message(packet, replay_pb2.ReplayedPacket))

    async def GetPosterior(  # noqa: N802
        self, request: tamiyo_service_pb2.GetPosteriorRequest, context: Any
    ) -> tamiyo_service_pb2.GetPosteriorResponse:
        """Give every arm of the posterior, best mean first."""
        del context
        kind: SiteKind | None = None
        if request.site_kind:
            asked = enum_from_wire(request.site_kind, SiteKind, _SITE_KIND, "site_kind")
            assert isinstance(asked, SiteKind)
            kind = asked
        response = tamiyo_service_pb2.GetPosteriorResponse()
        for arm, name in self._tamiyo.posterior(kind):
            response.arms.add(
                site_kind=blueprint_pb2.SiteKind.ValueType(enum_to_wire(arm.site_kind, _SITE_KIND)),
                blueprint_id=arm.blueprint_id,
                blueprint_name=name,
                mean=arm.mean,
                standard_deviation=arm.deviation,
                reports=arm.num_reports,
            )
        return response

    async def ExportMemory(  # noqa: N802
        self, request: tamiyo_service_pb2.ExportMemoryRequest, context: Any
    ) -> tamiyo_service_pb2.ExportMemoryResponse:
        """Give one page of what was learned, in the order in which it was."""
        del context
        if request.run_id:
            check_run_id(request.run_id)
        size = require_page_size(request.page_size, default=100, maximum=_MAX_LESSONS)
        scope = f"ExportMemory|run={request.run_id}"
        position = decode_page_token(request.page_token, scope=scope, arity=2)
        after = None if position is None else (int(position[0] or 0), str(position[1]))
        found = await self._tamiyo.lessons(request.run_id, size + 1, after)
        response = tamiyo_service_pb2.ExportMemoryResponse(
            model_version=MODEL_VERSION, calibration_version=CALIBRATION_VERSION
        )
        num_bytes = num_given = 0
        while num_given < min(len(found), size) and num_bytes < _PAGE_BYTES:
            lesson = found[num_given][1]
            num_given += 1
            if lesson is None:
                response.unreadable += 1
                continue
            response.lessons.add().CopyFrom(to_wire(lesson))  # type: ignore[arg-type]
            num_bytes += response.lessons[-1].ByteSize()
        if len(found) > num_given:
            response.next_page_token = encode_page_token(found[num_given - 1][0], scope=scope)
        return response

    async def ImportMemory(  # noqa: N802
        self, request: tamiyo_service_pb2.ImportMemoryRequest, context: Any
    ) -> tamiyo_service_pb2.ImportMemoryResponse:
        """Learn what another policy learned."""
        del context
        if not 1 <= len(request.lessons) <= _MAX_LESSONS:
            raise InvalidInputError.of("lessons", f"hold 1 to {_MAX_LESSONS} lessons", len(request.lessons))
        found = await self._tamiyo.import_lessons([from_wire(one, Lesson) for one in request.lessons])
        return tamiyo_service_pb2.ImportMemoryResponse(
            learned=found.learned, known=found.known, differing=found.differing
        )


def _need(request: Any, name: str) -> None:
    if not request.HasField(name):
        raise InvalidInputError.of(name, "be set", "nothing")

"""The gRPC face of Karn: checks requests, translates, and nothing else."""

from __future__ import annotations

from typing import Any

from esper.contracts.blueprint import Site, SiteKind
from esper.contracts.errors import InvalidInputError
from esper.contracts.run import FieldReport
from esper.contracts.tag_expression import parse_tags
from esper.contracts.wire import enum_from_wire, from_wire, to_wire
from esper.services.karn.proposer import Constraints
from esper.services.karn.service import Karn
from esper.v1 import blueprint_pb2, karn_service_pb2
from esper.v1.karn_service_pb2_grpc import KarnServiceServicer

_DEFAULT_COUNT = 4


class KarnServicer(KarnServiceServicer):
    """Serves ``esper.v1.KarnService``; errors leave as Esper's and become statuses in the envelope."""

    def __init__(self, karn: Karn) -> None:
        self._karn = karn

    async def ProposeBlueprints(  # noqa: N802 - the name is the RPC's
        self, request: karn_service_pb2.ProposeBlueprintsRequest, context: Any
    ) -> karn_service_pb2.ProposeBlueprintsResponse:
        """Propose designs for a site."""
        del context
        _need(request, "site")
        bounds = request.constraints
        constraints = Constraints(
            max_parameters=bounds.max_parameters if bounds.HasField("max_parameters") else None,
            max_flops=bounds.max_flops if bounds.HasField("max_flops") else None,
            max_latency_ms=bounds.max_latency_ms if bounds.HasField("max_latency_ms") else None,
            allowed_ops=frozenset(bounds.allowed_ops),
            allowed_blueprints=parse_tags(bounds.allowed_blueprints, parameter="constraints.allowed_blueprints"),
        )
        found = await self._karn.propose(
            from_wire(request.site, Site), request.count or _DEFAULT_COUNT, constraints, request.random_seed
        )
        response = karn_service_pb2.ProposeBlueprintsResponse()
        for one in found:
            proposal = response.proposals.add(novelty=one.novelty)
            proposal.blueprint.CopyFrom(to_wire(one.blueprint))  # type: ignore[arg-type]
            proposal.cost.CopyFrom(to_wire(one.cost))  # type: ignore[arg-type]
            if one.expected_reward is not None:
                proposal.expected_reward = one.expected_reward
        return response

    async def SubmitFieldReport(  # noqa: N802
        self, request: karn_service_pb2.KarnServiceSubmitFieldReportRequest, context: Any
    ) -> karn_service_pb2.KarnServiceSubmitFieldReportResponse:
        """Learn from an outcome."""
        del context
        _need(request, "report")
        learned = await self._karn.learn(from_wire(request.report, FieldReport))
        return karn_service_pb2.KarnServiceSubmitFieldReportResponse(learned=learned)

    async def ListArchive(  # noqa: N802
        self, request: karn_service_pb2.ListArchiveRequest, context: Any
    ) -> karn_service_pb2.ListArchiveResponse:
        """Give the archive of one kind of site, by cell."""
        del context
        kind = enum_from_wire(request.site_kind, SiteKind, blueprint_pb2.SiteKind.DESCRIPTOR, "site_kind")
        assert isinstance(kind, SiteKind)
        response = karn_service_pb2.ListArchiveResponse()
        for entry in self._karn.elites(kind):
            cell = response.cells.add(cell=entry.cell, reports=len(entry.rewards))
            cell.blueprint.CopyFrom(to_wire(entry.blueprint))  # type: ignore[arg-type]
            if entry.mean_reward is not None:
                cell.mean_reward = entry.mean_reward
        return response


def _need(request: Any, name: str) -> None:
    if not request.HasField(name):
        raise InvalidInputError.of(name, "be set", "nothing")

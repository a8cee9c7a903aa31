# Generated from ../_async by esper.client.generate; edit that.
"""Karn: new blueprints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from esper.client.transport import Transport
from esper.contracts.blueprint import Blueprint, BlueprintCost, Site, SiteKind
from esper.contracts.run import FieldReport
from esper.contracts.wire import enum_to_wire, from_wire, to_message
from esper.v1 import blueprint_pb2, karn_service_pb2, telemetry_pb2


@dataclass(frozen=True, kw_only=True, slots=True)
class Proposal:
    """A blueprint that Karn proposes for a site."""

    blueprint: Blueprint
    """The blueprint; it has passed the blueprint contract test."""
    cost: BlueprintCost
    """Exact cost at the site."""
    novelty: float
    """Distance to the nearest design of the archive, 0 to 1."""
    expected_reward: float | None
    """Reward the surrogate expects; ``None`` until reports came."""


class KarnClient:
    """Calls of ``KarnService``."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def propose_blueprints(
        self,
        site: Site,
        *,
        count: int = 4,
        max_parameters: int | None = None,
        max_flops: int | None = None,
        max_latency_ms: float | None = None,
        allowed_ops: Sequence[str] = (),
        random_seed: int = 0,
    ) -> list[Proposal]:
        """Give proposals within the bounds, most promising first.

        With ``max_latency_ms``, which is measured anew each time, equal calls need not give equal proposals.
        """
        bounds = karn_service_pb2.ProposalConstraints(
            max_parameters=max_parameters,
            max_flops=max_flops,
            max_latency_ms=max_latency_ms,
            allowed_ops=allowed_ops,
        )
        request = karn_service_pb2.ProposeBlueprintsRequest(
            site=to_message(site, blueprint_pb2.Site), count=count, constraints=bounds, random_seed=random_seed
        )
        response = self._transport.call("karn", "ProposeBlueprints", request)
        return [
            Proposal(
                blueprint=from_wire(one.blueprint, Blueprint),
                cost=from_wire(one.cost, BlueprintCost),
                novelty=one.novelty,
                expected_reward=one.expected_reward if one.HasField("expected_reward") else None,
            )
            for one in response.proposals
        ]

    def submit_field_report(self, report: FieldReport) -> bool:
        """Teach an outcome; false when it had been learned before."""
        message = to_message(report, telemetry_pb2.FieldReport)
        request = karn_service_pb2.KarnServiceSubmitFieldReportRequest(report=message)
        return bool((self._transport.call("karn", "SubmitFieldReport", request)).learned)

    def list_archive(self, site_kind: SiteKind) -> Sequence[karn_service_pb2.ArchiveCell]:
        """Give the occupied cells of the archive for a kind of site, by name."""
        number = enum_to_wire(site_kind, blueprint_pb2.SiteKind.DESCRIPTOR)
        request = karn_service_pb2.ListArchiveRequest(site_kind=blueprint_pb2.SiteKind.ValueType(number))
        return tuple((self._transport.call("karn", "ListArchive", request)).cells)

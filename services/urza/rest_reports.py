"""Field reports over REST: counted once each, by the rules of those that come over gRPC and off the bus."""

from __future__ import annotations

from enum import StrEnum

from fastapi import APIRouter, Response
from pydantic import AwareDatetime, Field, StrictFloat, StrictInt

from esper.contracts.blueprint import BlueprintCost, Site, SiteKind
from esper.contracts.kernel import CompileFallback, CompileTarget
from esper.contracts.run import AdaptationOutcome, Contribution, FieldReport
from esper.services.urza.rest_models import Body, Kind
from esper.services.urza.store import UrzaStore

Outcome = StrEnum("Outcome", {outcome.name: outcome.name for outcome in AdaptationOutcome})  # type: ignore[misc]
"""Names of how an adaptation can end."""
Target = StrEnum("Target", {target.name: target.name for target in CompileTarget})  # type: ignore[misc]
"""Names of what a kernel can be compiled to."""


class SiteBody(Body):
    """A layer at which a seed stands; shapes without the batch dimension."""

    kind: Kind
    input_shape: list[StrictInt]
    output_shape: list[StrictInt]

    def to_domain(self) -> Site:
        """Give the domain value; its rules are checked here."""
        return Site(
            kind=SiteKind[self.kind.value],
            input_shape=tuple(self.input_shape),
            output_shape=tuple(self.output_shape),
        )


class ContributionBody(Body):
    """A measured effect: control loss with the seed off minus on; positive means it helps."""

    estimate: StrictFloat
    low: StrictFloat
    high: StrictFloat
    confidence_level: StrictFloat = 0.95
    num_examples: StrictInt


class CostBody(Body):
    """Exact cost of the blueprint at the site, for one example."""

    parameters: StrictInt
    flops: StrictInt
    activation_bytes: StrictInt


class FallbackBody(Body):
    """One target that the compile tried and gave up."""

    target: Target
    reason: str


class FieldReportBody(Body):
    """What became of one adaptation."""

    report_id: str = Field(description="Id of the report; a second one with the same id changes nothing")
    adaptation_id: str
    run_id: str
    layer: str = Field(description="Dotted module name")
    seed_index: StrictInt
    site: SiteBody | None = None
    blueprint_id: str = Field("", description="Content id of the blueprint; empty where none was used")
    artifact_id: str = Field("", description="Kernel; empty where none was loaded")
    outcome: Outcome
    contribution: ContributionBody | None = Field(None, description="Measured effect; null when nothing was measured")
    cost: CostBody | None = None
    price: StrictFloat | None = Field(None, description="Price of the cost, in units of loss")
    isolated_steps: StrictInt = 0
    graft_steps: StrictInt = 0
    begun_epoch: StrictInt = 0
    run_progress: StrictFloat | None = Field(None, description="Planned progress of the run when it began, 0 to 1")
    decision_confidence: StrictFloat = 0.0
    reason: str = Field("", description="Why it ended so")
    created_at: AwareDatetime
    adaptation_type: str = "add_seed"
    source: str = Field("", description="Layer whose input the seed read; empty for its own")
    race_id: str = Field("", description="Race it belonged to; empty where it stood alone")
    fallbacks: list[FallbackBody] = Field([], description="Targets that the compile gave up, in the order tried")

    def to_domain(self) -> FieldReport:
        """Give the domain value; the store checks its rules, but for those of the site."""
        apart = {"site", "outcome", "contribution", "cost", "fallbacks"}
        return FieldReport(
            **self.model_dump(exclude=apart),
            site=None if self.site is None else self.site.to_domain(),
            outcome=AdaptationOutcome[self.outcome.value],
            contribution=None if self.contribution is None else Contribution(**self.contribution.model_dump()),
            cost=None if self.cost is None else BlueprintCost(**self.cost.model_dump()),
            fallbacks=tuple(
                CompileFallback(target=CompileTarget[one.target.value], reason=one.reason) for one in self.fallbacks
            ),
        )


class RecordedReport(Body):
    """Whether a report was counted now; ``recorded`` is false when it had been before."""

    recorded: bool


def report_routes(store: UrzaStore) -> APIRouter:
    """Give the routes over a store."""
    router = APIRouter(prefix="/v1/field-reports", tags=["field reports"])

    @router.post("", status_code=201)
    async def record_field_report(body: FieldReportBody, response: Response) -> RecordedReport:
        """Count a report in the statistics of its blueprint and kernel (201), once by its id (200 from then on)."""
        result = await store.reports.record(body.to_domain())
        response.status_code = 201 if result.recorded else 200
        return RecordedReport(recorded=result.recorded)

    return router

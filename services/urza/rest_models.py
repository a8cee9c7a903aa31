"""What the REST face says and hears, and its conversion to and from domain values."""

from __future__ import annotations

import dataclasses
from datetime import datetime
from enum import StrEnum
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt

from esper.contracts.blueprint import (
    AttributeValue,
    Blueprint,
    BlueprintBounds,
    BlueprintIR,
    BlueprintMetadata,
    BlueprintState,
    BlueprintStateChange,
    BlueprintStatistics,
    Expression,
    IRNode,
    KernelStatistics,
    Lineage,
    SiteKind,
)
from esper.contracts.kernel import KernelManifest
from esper.contracts.tag_expression import parse_tags
from esper.services.urza.kernel_rows import KernelRecord
from esper.services.urza.rules import MAX_TAGS, BlueprintDraft, BlueprintQuery

State = StrEnum("State", {state.name: state.name for state in BlueprintState})  # type: ignore[misc]
"""Names of the states of a blueprint."""
Kind = StrEnum("Kind", {kind.name: kind.name for kind in SiteKind})  # type: ignore[misc]
"""Names of the kinds of site."""


class Body(BaseModel):
    """Base of every body; unknown fields are errors."""

    model_config = ConfigDict(extra="forbid")


class ExpressionBody(Body):
    """A whole number written in the site's dims."""

    expression: str = Field(max_length=64, examples=["max(4, C // 4)"])


AttributeBody = StrictBool | StrictInt | StrictFloat | str | ExpressionBody


class NodeBody(Body):
    """One node of a graph."""

    name: str
    op: str
    inputs: list[str] = []
    attributes: dict[str, AttributeBody] = {}


class GraphBody(Body):
    """A graph from the layer's input ``x`` and output ``h`` to the seed's delta."""

    format_version: int = 1
    nodes: Annotated[list[NodeBody], Field(min_length=1, max_length=64)]
    output: str

    def to_domain(self) -> BlueprintIR:
        """Give the domain value."""
        nodes = tuple(
            IRNode(
                name=node.name,
                op=node.op,
                inputs=tuple(node.inputs),
                attributes={key: _attribute(value) for key, value in node.attributes.items()},
            )
            for node in self.nodes
        )
        return BlueprintIR(nodes=nodes, output=self.output, format_version=self.format_version)

    @classmethod
    def of(cls, ir: BlueprintIR) -> GraphBody:
        """Give the body of a domain value."""
        nodes = [
            NodeBody(
                name=node.name,
                op=node.op,
                inputs=list(node.inputs),
                attributes={key: _attribute_body(value) for key, value in node.attributes.items()},
            )
            for node in ir.nodes
        ]
        return cls(format_version=ir.format_version, nodes=nodes, output=ir.output)


class MetadataBody(Body):
    """What people and policies say about a blueprint."""

    description: str = ""
    citation: str = ""
    tags: Annotated[list[str], Field(max_length=MAX_TAGS)] = []
    site_kinds: list[Kind] = []


class LineageBody(Body):
    """Where a blueprint comes from."""

    parent_ids: list[str] = []
    operator: str = "manual"
    author: str = ""


class StatisticsBody(Body):
    """What field reports say of a blueprint or kernel, over all runs; latency is that of one example."""

    trials: int
    kept: int
    mean_contribution: float | None
    mean_latency_ms: float | None

    @classmethod
    def of(cls, counted: BlueprintStatistics | KernelStatistics) -> StatisticsBody:
        """Give the body of a domain value."""
        return cls(**dataclasses.asdict(counted))


class BlueprintBody(Body):
    """One immutable version of a blueprint."""

    id: str
    name: str
    version: int
    state: State
    ir: GraphBody
    metadata: MetadataBody
    lineage: LineageBody
    created_at: datetime | None
    statistics: StatisticsBody | None

    @classmethod
    def of(cls, blueprint: Blueprint) -> BlueprintBody:
        """Give the body of a domain value."""
        said, made, counted = blueprint.metadata, blueprint.lineage, blueprint.statistics
        return cls(
            id=blueprint.id,
            name=blueprint.name,
            version=blueprint.version,
            state=State(blueprint.state.name),
            ir=GraphBody.of(blueprint.ir),
            metadata=MetadataBody(
                description=said.description,
                citation=said.citation,
                tags=list(said.tags),
                site_kinds=[Kind(kind.name) for kind in said.site_kinds],
            ),
            lineage=LineageBody(parent_ids=list(made.parent_ids), operator=made.operator, author=made.author),
            created_at=blueprint.created_at,
            statistics=None if counted is None else StatisticsBody.of(counted),
        )


class StateChangeBody(Body):
    """One step of a blueprint's life cycle."""

    from_state: State | None
    to_state: State
    actor: str
    reason: str
    changed_at: datetime

    @classmethod
    def of(cls, change: BlueprintStateChange) -> StateChangeBody:
        """Give the body of a domain value."""
        return cls(
            from_state=None if change.from_state is None else State(change.from_state.name),
            to_state=State(change.to_state.name),
            actor=change.actor,
            reason=change.reason,
            changed_at=change.changed_at,
        )


class BlueprintWithHistory(Body):
    """A blueprint with its life cycle so far, oldest first."""

    blueprint: BlueprintBody
    history: list[StateChangeBody]


class BlueprintPage(Body):
    """One page of blueprints."""

    blueprints: list[BlueprintBody]
    next_page_token: str


class SearchParameters(Body):
    """Conditions of a search, all of which must hold, and which page of what is found."""

    tags: str = Field("", description="Expression over tags, e.g. ``validated & conv2d & !deprecated``")
    all_tags: list[str] = Field([], description="Tags that must all be there")
    any_tags: list[str] = Field([], description="Tags of which one must be there")
    no_tags: list[str] = Field([], description="Tags that must not be there")
    states: list[State] = Field([], description="States of which one must hold")
    text: str = Field("", description="Text in name or description, in any case")
    site_kind: Kind | None = Field(None, description="Kind of site it is meant for")
    min_parameters: int | None = Field(None, description="Least parameters at a reference site")
    max_parameters: int | None = Field(None, description="Most parameters at a reference site")
    min_flops: int | None = Field(None, description="Least FLOPs of one example at the same reference site")
    max_flops: int | None = Field(None, description="Most FLOPs of one example at the same reference site")
    min_latency_ms: float | None = Field(None, description="Least mean latency of its kernels, in milliseconds")
    max_latency_ms: float | None = Field(None, description="Most mean latency of its kernels, in milliseconds")
    min_success_rate: float | None = Field(None, description="Least share of trials that were kept, 0 to 1")
    max_success_rate: float | None = Field(None, description="Most share of trials that were kept, 0 to 1")
    page_size: int = Field(0, description="Entries a page, 1 to 500; 0 means 50")
    page_token: str = Field("", description="Token of the page before; empty for the first")

    def to_query(self) -> BlueprintQuery:
        """Give the query; its rules are checked here."""
        return BlueprintQuery(
            tags=parse_tags(self.tags, parameter="tags"),
            all_tags=tuple(self.all_tags),
            any_tags=tuple(self.any_tags),
            no_tags=tuple(self.no_tags),
            states=tuple(BlueprintState[state.value] for state in self.states),
            text=self.text,
            site_kind=None if self.site_kind is None else SiteKind[self.site_kind.value],
            bounds=BlueprintBounds(
                **{bound.name: getattr(self, bound.name) for bound in dataclasses.fields(BlueprintBounds)}
            ),
        )


class CreateBlueprintBody(Body):
    """A blueprint to be stored."""

    name: str
    ir: GraphBody
    metadata: MetadataBody = MetadataBody()
    lineage: LineageBody = LineageBody()
    state: State = State("DRAFT")

    def to_draft(self) -> BlueprintDraft:
        """Give the draft; its rules are checked here."""
        said, made = self.metadata, self.lineage
        return BlueprintDraft(
            name=self.name,
            ir=self.ir.to_domain(),
            metadata=BlueprintMetadata(
                tags=list(said.tags),
                description=said.description,
                citation=said.citation,
                site_kinds=tuple(SiteKind[kind.value] for kind in said.site_kinds),
            ),
            lineage=Lineage(parent_ids=tuple(made.parent_ids), operator=made.operator, author=made.author),
            state=BlueprintState[self.state.value],
        )


class CreatedBlueprint(Body):
    """A blueprint as stored; ``created`` is false when it was there already."""

    blueprint: BlueprintBody
    created: bool


class SetStateBody(Body):
    """A step of the life cycle."""

    state: State
    actor: str
    reason: str


class RelativeBody(Body):
    """One relative, ``depth`` steps away."""

    blueprint: BlueprintBody
    depth: int


class LineageAnswer(Body):
    """One page of relatives by depth, then name, then version."""

    entries: list[RelativeBody]
    next_page_token: str


class CheckBody(Body):
    """One row of a kernel's validation."""

    name: str
    passed: bool
    figure: float | None
    limit: float | None
    unit: str
    detail: str


class KernelBody(Body):
    """What is said of a stored kernel."""

    artifact_id: str
    content_key: str
    blueprint_id: str
    site_kind: Kind
    input_shape: list[int]
    output_shape: list[int]
    target: str
    device: str
    optimizations: list[str]
    validated: bool
    checks: list[CheckBody]
    parameters: int
    flops: int
    compilation_time_s: float
    toolchain: dict[str, str]
    signed_by: str
    size_bytes: int
    sha256: str
    created_at: datetime
    stored_at: datetime

    @classmethod
    def of(cls, record: KernelRecord, manifest: KernelManifest) -> KernelBody:
        """Give the body of a record and its parsed manifest."""
        checks = [
            CheckBody(
                name=check.name,
                passed=check.passed,
                figure=check.figure,
                limit=check.limit,
                unit=check.unit,
                detail=check.detail,
            )
            for check in manifest.checks
        ]
        return cls(
            artifact_id=record.artifact_id,
            content_key=record.content_key,
            blueprint_id=record.blueprint_id,
            site_kind=Kind(manifest.site.kind.name),
            input_shape=list(manifest.site.input_shape),
            output_shape=list(manifest.site.output_shape),
            target=manifest.target.name,
            device=manifest.device.name,
            optimizations=list(manifest.optimizations),
            validated=manifest.validated,
            checks=checks,
            parameters=manifest.cost.parameters,
            flops=manifest.cost.flops,
            compilation_time_s=manifest.compilation_time.total_seconds(),
            toolchain=dict(manifest.toolchain),
            signed_by=record.key_id,
            size_bytes=record.size_bytes,
            sha256=record.sha256.hex(),
            created_at=manifest.created_at,
            stored_at=record.stored_at,
        )


class KernelPage(Body):
    """One page of kernels, newest first."""

    kernels: list[KernelBody]
    next_page_token: str


class UploadAnswer(Body):
    """How far an upload got: the bytes kept from the start, and the kernel's id once all of it is stored."""

    offset: int
    artifact_id: str | None


class UploadedKernel(Body):
    """The kernel that was uploaded; ``created`` is false when it was there already."""

    artifact_id: str
    created: bool


class PinBody(Body):
    """Who keeps a kernel from every sweep, or no longer, and why."""

    actor: str
    reason: str


class PinnedAnswer(Body):
    """Whether a kernel is pinned now; ``changed`` is false when it was so already."""

    pinned: bool
    changed: bool


class SweepBody(Body):
    """What kind of sweep: a dry run changes nothing and only says what would go."""

    dry_run: bool = False


class SweptAnswer(Body):
    """What a sweep let go of, or in a dry run would; ``held_bytes`` is what kernels hold after it."""

    artifact_ids: list[str]
    kernel_bytes: int
    held_bytes: int
    reports: int
    uploads: int


class KernelStatisticsAnswer(Body):
    """What field reports say of a kernel; ``null`` while none came."""

    statistics: StatisticsBody | None


class HealthAnswer(Body):
    """Whether the library can do its work."""

    status: str


class Problem(BaseModel):
    """An error, as RFC 9457 has it, with the stable reason of Esper's error tree."""

    type: str
    title: str
    status: int
    detail: str
    reason: str
    parameter: str | None = None
    incident_id: str | None = None


def _attribute(value: AttributeBody) -> AttributeValue:
    return Expression(value.expression) if isinstance(value, ExpressionBody) else value


def _attribute_body(value: AttributeValue) -> AttributeBody:
    return ExpressionBody(expression=value.text) if isinstance(value, Expression) else value

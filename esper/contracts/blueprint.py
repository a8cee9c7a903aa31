"""Blueprints, the sites they fit, and what is said of them: plain frozen values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import IntEnum

from esper.contracts.errors import InvalidInputError


class SiteKind(IntEnum):
    """Kind of layer at which a seed may stand."""

    LINEAR = 1
    CONV1D = 2
    CONV2D = 3
    ATTENTION = 4
    LAYER_NORM = 5
    BATCH_NORM1D = 6
    BATCH_NORM2D = 7


class BlueprintState(IntEnum):
    """Place of a blueprint in the library's life cycle."""

    DRAFT = 1
    VALIDATED = 2
    ACTIVE = 3
    DEPRECATED = 4
    RETIRED = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """A layer at which a seed may stand, with its dimensions."""

    kind: SiteKind
    """Kind of the layer."""
    input_shape: tuple[int, ...]
    """Shape of the layer's input without the batch dimension."""
    output_shape: tuple[int, ...]
    """Shape of the layer's output without the batch dimension."""

    def __post_init__(self) -> None:
        for name, shape in (("input_shape", self.input_shape), ("output_shape", self.output_shape)):
            if not 1 <= len(shape) <= 4 or any(size < 1 for size in shape):
                raise InvalidInputError.of(f"site.{name}", "be 1 to 4 sizes, each > 0", shape)


@dataclass(frozen=True, slots=True)
class Expression:
    """A whole number written in the site's dims, e.g. ``Expression("max(4, C // 4)")``."""

    text: str


AttributeValue = int | float | bool | str | Expression
"""Value of a node's attribute; a ``str`` is a word of the operator's closed set."""


@dataclass(frozen=True, kw_only=True, slots=True)
class IRNode:
    """One node of a blueprint's graph."""

    name: str
    """Unique in the graph; ``x`` and ``h`` are taken by the inputs."""
    op: str
    """Operator of the closed set."""
    inputs: tuple[str, ...] = ()
    """Nodes (or ``x``, ``h``) whose outputs this node reads, in order."""
    attributes: Mapping[str, AttributeValue] = field(default_factory=dict)
    """Attributes by name; those left out take the operator's default."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BlueprintIR:
    """A typed graph from the layer's input ``x`` and output ``h`` to the seed's delta."""

    nodes: tuple[IRNode, ...]
    """Nodes in topological order."""
    output: str
    """Node whose output is the delta."""
    format_version: int = 1
    """Version of the operator set."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lineage:
    """Where a blueprint comes from."""

    parent_ids: tuple[str, ...] = ()
    """Content ids of the blueprints it was made from."""
    operator: str = "manual"
    """``template``, ``mutation``, ``crossover``, ``simplification`` or ``manual``."""
    author: str = ""
    """Who made it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BlueprintMetadata:
    """What people and policies say about a blueprint."""

    tags: list[str] = field(default_factory=list)
    """Tags in the author's order."""
    description: str = ""
    """What it is and when it helps."""
    citation: str = ""
    """Paper or source of the method."""
    site_kinds: tuple[SiteKind, ...] = ()
    """Kinds of site it is meant for; empty means every kind where it is legal."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BlueprintStatistics:
    """What field reports say of a blueprint, over all runs."""

    trials: int = 0
    """Adaptations reported."""
    kept: int = 0
    """Adaptations that ended FOSSILIZED."""
    mean_contribution: float | None = None
    """Mean measured contribution, in units of loss; ``None`` while nothing was measured."""
    mean_latency_ms: float | None = None
    """Mean latency of the kernels that stood in them, one example, in milliseconds; ``None`` while none is known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelStatistics:
    """What field reports say of a kernel, over all runs."""

    trials: int = 0
    """Adaptations reported."""
    kept: int = 0
    """Adaptations that ended FOSSILIZED."""
    mean_contribution: float | None = None
    """Mean measured contribution, in units of loss; ``None`` while nothing was measured."""
    mean_latency_ms: float | None = None
    """Latency of one example as its validation measured it, in milliseconds; ``None`` where it is not known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BlueprintBounds:
    """Bounds on a blueprint's figures; ``None`` does not bind. A figure that nobody knows is within no bound."""

    min_parameters: int | None = None
    """Least trainable parameters at a reference site, >= 0."""
    max_parameters: int | None = None
    """Most trainable parameters at a reference site, >= 0."""
    min_flops: int | None = None
    """Least FLOPs of one forward pass of one example at the same reference site, >= 0."""
    max_flops: int | None = None
    """Most FLOPs of one forward pass of one example at the same reference site, >= 0."""
    min_latency_ms: float | None = None
    """Least mean latency in the statistics, in milliseconds, >= 0."""
    max_latency_ms: float | None = None
    """Most mean latency in the statistics, in milliseconds, >= 0."""
    min_success_rate: float | None = None
    """Least share of the trials that were kept, 0 to 1."""
    max_success_rate: float | None = None
    """Most share of the trials that were kept, 0 to 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Blueprint:
    """One immutable version of a blueprint."""

    id: str
    """Content id: SHA-256 of the IR's canonical bytes, 64 hex digits."""
    name: str
    """Name in the library."""
    version: int = 0
    """Version under that name, from 1; 0 until the library has assigned one."""
    ir: BlueprintIR
    """The graph."""
    metadata: BlueprintMetadata = field(default_factory=BlueprintMetadata)
    """Description, citation, tags, kinds."""
    lineage: Lineage = field(default_factory=Lineage)
    """Where it comes from."""
    state: BlueprintState = BlueprintState.DRAFT
    """Place in the library's life cycle."""
    created_at: datetime | None = None
    """When the library stored it; ``None`` before that."""
    statistics: BlueprintStatistics | None = None
    """What runs reported of it; ``None`` while no report came."""

    @property
    def architecture_ir(self) -> BlueprintIR:
        """The graph, under the name that operators know it by."""
        return self.ir


@dataclass(frozen=True, kw_only=True, slots=True)
class BlueprintStateChange:
    """One step of a blueprint's life cycle."""

    from_state: BlueprintState | None = None
    """State before; ``None`` for the creation."""
    to_state: BlueprintState
    """State after."""
    actor: str
    """Identity of the caller."""
    reason: str
    """Reason given."""
    changed_at: datetime
    """When."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BlueprintCost:
    """Exact cost of a blueprint at a site, for one example."""

    parameters: int
    """Trainable parameters."""
    flops: int
    """Floating-point operations of one forward pass; a multiply-add counts 2."""
    activation_bytes: int
    """Bytes of intermediate activations kept for backward, float32."""

"""A blueprint laid out at a site: every attribute a value, every edge a type; building and costing start here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from esper.blueprints.dims import evaluate, site_dims
from esper.blueprints.ir import check_structure, refuse
from esper.blueprints.operator_base import Resolved
from esper.blueprints.operators import OPERATORS, Call, Operator, Work
from esper.blueprints.types import Mixing, TensorType, resized_site, site_types
from esper.contracts.blueprint import BlueprintIR, Expression, IRNode, Site
from esper.contracts.errors import InvalidBlueprintError

MAX_PARAMETERS: Final = 50_000_000
"""Most parameters of a blueprint at a site."""
MAX_ELEMENTS: Final = 2**26
"""Most elements of one value of one example."""
MAX_FLOPS: Final = 2**40
"""Most floating-point operations of one example."""


@dataclass(frozen=True, slots=True)
class Step:
    """One node at the site."""

    node: IRNode
    """The node."""
    operator: Operator
    """Its operator."""
    call: Call
    """Its resolved attributes and input types."""
    output: TensorType
    """Type of its output."""
    work: Work
    """What it costs."""


@dataclass(frozen=True)
class Plan:
    """A blueprint that is legal at a site."""

    ir: BlueprintIR
    """The graph."""
    site: Site
    """The site."""
    x: TensorType
    """Type of the layer's input."""
    h: TensorType
    """Type of the layer's output, and of the delta."""
    steps: tuple[Step, ...]
    """The nodes in order."""

    @property
    def mixing(self) -> Mixing:
        """How far information travels between the layer's positions, at most; NONE where it has none."""
        if not self.h.positions:
            return Mixing.NONE
        return max(step.operator.mixing(step.call) for step in self.steps)

    @property
    def keeps_leading(self) -> bool:
        """Whether the graph runs on vectors with further leading dimensions as it stands."""
        return all(step.operator.keeps_leading(step.call) for step in self.steps)

    @cached_property
    def is_size_free(self) -> bool:
        """Whether one module serves every height and width, or every sequence length."""
        return not self.h.positions or self.resized(4) is not None

    def resized(self, extra: int) -> Plan | None:
        """Give the plan for ``extra`` more output positions per axis, where this plan's module serves it too."""
        site = resized_site(self.site, extra)
        if site is None:
            return None
        try:
            other = plan(self.ir, site)
        except InvalidBlueprintError:
            return None
        same = all(
            mine.operator.constants(mine.call, mine.output) == theirs.operator.constants(theirs.call, theirs.output)
            for mine, theirs in zip(self.steps, other.steps, strict=True)
        )
        return other if same else None


def plan(ir: BlueprintIR, site: Site) -> Plan:
    """Lay a blueprint out at a site.

    Raises:
        InvalidBlueprintError: The graph is not legal, or not at this site; the message names the node at fault.
    """
    check_structure(ir)
    x, h = site_types(site)
    dims = site_dims(site)
    types = {"x": x, "h": h}
    steps: list[Step] = []
    for node in ir.nodes:
        operator = OPERATORS[node.op]
        call = Call(node.name, tuple(types[source] for source in node.inputs), _resolve(node, operator, dims))
        output = operator.infer(call)
        if output.num_elements > MAX_ELEMENTS:
            raise refuse(node.name, "output", f"have at most {MAX_ELEMENTS} elements", str(output))
        types[node.name] = output
        steps.append(Step(node, operator, call, output, operator.work(call, output)))
    if types[ir.output] != h:
        raise refuse(ir.output, "output", f"have the type of the layer's output, {h}", str(types[ir.output]))
    _check_totals(steps)
    return Plan(ir, site, x, h, tuple(steps))


def validate(ir: BlueprintIR, site: Site | None = None) -> None:
    """Check a graph, and its fit to a site where one is given.

    Raises:
        InvalidBlueprintError: It is not legal; the message names the node at fault.
    """
    if site is None:
        check_structure(ir)
    else:
        plan(ir, site)


def is_legal(ir: BlueprintIR, site: Site) -> bool:
    """Say whether a graph is legal at a site."""
    try:
        plan(ir, site)
    except InvalidBlueprintError:
        return False
    return True


def _resolve(node: IRNode, operator: Operator, dims: Mapping[str, int]) -> Mapping[str, Resolved]:
    resolved: dict[str, Resolved] = {}
    for attribute in operator.attributes:
        value = node.attributes.get(attribute.name, attribute.default)
        part = f"attribute '{attribute.name}'"
        if isinstance(value, Expression):
            number = evaluate(value, dims, f"node '{node.name}' {part}")
            if not attribute.accepts(number):
                raise refuse(node.name, part, f"{attribute.rule} at this site", f"{value.text} = {number}")
            resolved[attribute.name] = number
        else:
            resolved[attribute.name] = value
    return resolved


def _check_totals(steps: list[Step]) -> None:
    parameters = flops = 0
    for step in steps:
        parameters += step.work.parameters
        flops += step.work.flops
        if parameters > MAX_PARAMETERS:
            raise refuse(step.node.name, "parameters", f"keep the sum within {MAX_PARAMETERS}", parameters)
        if flops > MAX_FLOPS:
            raise refuse(step.node.name, "work", f"keep the sum within {MAX_FLOPS} operations", flops)

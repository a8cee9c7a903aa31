"""Variation of blueprints: typed changes of a graph, each legal at the site or not made at all.

    change         what it does
    attribute      another width, rank, kernel, dilation, stride, group count, function, bias or affinity
    operator       another operator of the same role in a node's place
    insertion      a node that keeps its input's shape behind some value
    gate           a learned gate on some value
    removal        a node less
    crossover      the sum of two designs, or one's part in the place of another's

The node that gives the delta keeps the initialisation that makes it zero at birth. What a change does to learning,
gradients and finiteness is for the blueprint contract test to say; see ``proposer``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from typing import Final, TypeVar

import numpy as np

from esper.blueprints import cost, structure_id, validate
from esper.blueprints.operators import OPERATORS
from esper.blueprints.rewrite import (
    fresh_name,
    insert_node,
    remove_node,
    replace_operator,
    set_attribute,
    splice,
    sum_of,
)
from esper.contracts.blueprint import AttributeValue, BlueprintIR, Expression, IRNode, Site
from esper.contracts.errors import InvalidBlueprintError

T = TypeVar("T")

MUTATION: Final = "mutation"
"""Lineage of a change of one design that does not take anything away."""
CROSSOVER: Final = "crossover"
"""Lineage of a design made of two."""
SIMPLIFICATION: Final = "simplification"
"""Lineage of a design with a node less."""

_WIDTHS: Final[tuple[AttributeValue, ...]] = (
    Expression("max(2, C // 8)"),
    Expression("max(4, C // 4)"),
    Expression("max(4, C // 2)"),
    Expression("C"),
    Expression("C * 2"),
    Expression("C * 4"),
    2,
    4,
    8,
    16,
    32,
    64,
)
_VALUES: Final[Mapping[str, tuple[AttributeValue, ...]]] = {
    "features": _WIDTHS,
    "rank": (1, 2, 4, 8, 16, 32),
    "kernel": (1, 3, 5, 7),
    "dilation": (1, 2, 3, 4),
    "stride": (1, 2, Expression("S")),
    "groups": (1, 2, 4, 8),
    "fn": ("relu", "gelu", "silu", "tanh", "sigmoid", "softplus"),
    "bias": (True, False),
    "affine": (True, False),
    "heads": (1, 2, 4, 8),
    "channels": (1, 2, 4, 8),
}
_SIZES: Final = frozenset({"features", "rank", "kernel", "stride", "groups"})
_ROLES: Final = (
    ("linear", "conv", "low_rank"),
    ("conv", "depthwise_conv"),
    ("layer_norm", "rms_norm", "group_norm"),
    ("scale", "shift"),
    ("add", "mul"),
)
_INSERTED: Final[tuple[tuple[str, Mapping[str, AttributeValue]], ...]] = (
    ("activation", {"fn": "gelu"}),
    ("activation", {"fn": "relu"}),
    ("activation", {"fn": "silu"}),
    ("layer_norm", {}),
    ("rms_norm", {}),
    ("group_norm", {}),
    ("scale", {}),
    ("depthwise_conv", {"kernel": 3}),
    ("conv", {"kernel": 3}),
    ("linear", {}),
)
_TRIES: Final = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class Variation:
    """A new graph, and how it came about."""

    ir: BlueprintIR
    """The graph, legal at the site."""
    operator: str
    """``mutation``, ``crossover`` or ``simplification``."""
    change: str
    """What was done, in words."""
    parents: tuple[int, ...]
    """Which of the graphs given it was made from."""
    structure: str = ""
    """Its structure id, once it was found to be new."""


class Grammar:
    """Makes variations at one site, with some operators or all. Holds no state of its own."""

    def __init__(self, site: Site, allowed_ops: frozenset[str] = frozenset()) -> None:
        """Make a grammar; an empty set allows every operator."""
        self._site = site
        self._allowed = allowed_ops or frozenset(OPERATORS)

    def permits(self, ir: BlueprintIR) -> bool:
        """Say whether a graph uses allowed operators only."""
        return all(node.op in self._allowed for node in ir.nodes)

    def vary(
        self, designs: Sequence[BlueprintIR], random: np.random.Generator, known: AbstractSet[str] = frozenset()
    ) -> Variation | None:
        """Give a variation of the first design, perhaps crossed with the second; ``None`` when no try was legal.

        The result uses allowed operators only, and its structure id is not among ``known``.
        """
        for _ in range(_TRIES):
            made = self._try(designs, random)
            if made is not None and self.permits(made.ir):
                structure = structure_id(made.ir)
                if structure not in known:
                    return replace(made, structure=structure)
        return None

    def shrink(self, ir: BlueprintIR, random: np.random.Generator) -> Variation | None:
        """Give the graph with one size made smaller, so that it has fewer parameters or does less work; or ``None``."""
        before = cost(ir, self._site)
        for _ in range(_TRIES):
            try:
                made, change = self._attribute(ir, random, _SIZES)
            except InvalidBlueprintError:
                continue
            after = cost(made, self._site)
            if (after.parameters, after.flops) < (before.parameters, before.flops):
                return Variation(ir=made, operator=MUTATION, change=change, parents=(0,), structure=structure_id(made))
        return None

    def _try(self, designs: Sequence[BlueprintIR], random: np.random.Generator) -> Variation | None:
        changes: list[Callable[[BlueprintIR, np.random.Generator], tuple[BlueprintIR, str]]] = [
            self._attribute,
            self._attribute,
            self._attribute,
            self._operator,
            self._insertion,
            self._gate,
        ]
        pick = int(random.integers(0, len(changes) + 1 + (len(designs) > 1)))
        try:
            if pick < len(changes):
                ir, change = changes[pick](designs[0], random)
                return Variation(ir=ir, operator=MUTATION, change=change, parents=(0,))
            if pick == len(changes):
                ir, change = self._removal(designs[0], random)
                return Variation(ir=ir, operator=SIMPLIFICATION, change=change, parents=(0,))
            ir, change = self._crossing(designs[0], designs[1], random)
            return Variation(ir=ir, operator=CROSSOVER, change=change, parents=(0, 1))
        except InvalidBlueprintError:
            return None

    def _attribute(
        self, ir: BlueprintIR, random: np.random.Generator, names: AbstractSet[str] = _VALUES.keys()
    ) -> tuple[BlueprintIR, str]:
        places = [
            (node, attribute.name)
            for node in ir.nodes
            for attribute in OPERATORS[node.op].attributes
            if attribute.name in names
        ]
        node, name = _pick(places, random)
        value = _pick(_VALUES[name], random)
        shown = value.text if isinstance(value, Expression) else value
        return set_attribute(ir, node.name, name, value, site=self._site), f"{name} of {node.name} set to {shown}"

    def _operator(self, ir: BlueprintIR, random: np.random.Generator) -> tuple[BlueprintIR, str]:
        places = [
            (node, other)
            for node in ir.nodes
            for role in _ROLES
            if node.op in role
            for other in role
            if other != node.op
        ]
        node, op = _pick(places, random)
        taken = {attribute.name for attribute in OPERATORS[op].attributes}
        attributes = {name: value for name, value in node.attributes.items() if name in taken}
        changed = replace_operator(ir, node.name, op, attributes, site=self._site)
        return changed, f"{node.op} {node.name} became {op}"

    def _insertion(self, ir: BlueprintIR, random: np.random.Generator) -> tuple[BlueprintIR, str]:
        source = _pick(_inner_values(ir), random)
        op, attributes = _pick(_INSERTED, random)
        return insert_node(ir, source, op, attributes, site=self._site), f"{op} behind {source}"

    def _gate(self, ir: BlueprintIR, random: np.random.Generator) -> tuple[BlueprintIR, str]:
        """Multiply some inner value v by sigmoid(linear(v)), of the same width."""
        places = [node for node in ir.nodes if node.name != ir.output and node.op in ("linear", "activation", "conv")]
        source = _pick(places, random)
        widths = [node.attributes["features"] for node in _upstream(ir, source) if "features" in node.attributes]
        gate, opened = fresh_name(ir, "gate"), fresh_name(ir, "open")
        place = ir.nodes.index(source) + 1
        attributes: dict[str, AttributeValue] = {"features": widths[0]} if widths else {}
        added = (
            IRNode(name=gate, op="linear", inputs=(source.name,), attributes=attributes),
            IRNode(name=opened, op="activation", inputs=(gate,), attributes={"fn": "sigmoid"}),
        )
        bare = replace(ir, nodes=(*ir.nodes[:place], *added, *ir.nodes[place:]))
        return _gated(bare, source.name, opened, self._site), f"a gate on {source.name}"

    def _removal(self, ir: BlueprintIR, random: np.random.Generator) -> tuple[BlueprintIR, str]:
        node = _pick(ir.nodes, random)
        return remove_node(ir, node.name, site=self._site), f"without {node.op} {node.name}"

    def _crossing(
        self, first: BlueprintIR, second: BlueprintIR, random: np.random.Generator
    ) -> tuple[BlueprintIR, str]:
        if random.random() < 0.5:
            return sum_of(first, second, site=self._site), "the sum of both"
        node = _pick([one for one in first.nodes if one.name != first.output] or list(first.nodes), random)
        donor = _pick([one for one in second.nodes if one.name != second.output] or list(second.nodes), random)
        made = splice(first, node.name, second, donor.name, site=self._site)
        return made, f"{node.name} of one replaced by {donor.name} of the other"


def _inner_values(ir: BlueprintIR) -> list[str]:
    """Give the inputs and the nodes behind which something may be put: all but the one that gives the delta."""
    read = {source for node in ir.nodes for source in node.inputs}
    return sorted(name for name in read if name != ir.output)


def _upstream(ir: BlueprintIR, node: IRNode) -> list[IRNode]:
    """Give a node and what it reads first, the node before its sources, down to an input."""
    by_name = {one.name: one for one in ir.nodes}
    found = [node]
    while found[-1].inputs and found[-1].inputs[0] in by_name:
        found.append(by_name[found[-1].inputs[0]])
    return found


def _gated(ir: BlueprintIR, source: str, opened: str, site: Site) -> BlueprintIR:
    """Give the graph in which everything after ``opened`` that read ``source`` reads their product."""
    end = next(index for index, node in enumerate(ir.nodes) if node.name == opened) + 1
    product = IRNode(name=fresh_name(ir, "gated"), op="mul", inputs=(source, opened))
    readers = tuple(
        replace(node, inputs=tuple(product.name if one == source else one for one in node.inputs))
        for node in ir.nodes[end:]
    )
    whole = replace(ir, nodes=(*ir.nodes[:end], product, *readers))
    validate(whole, site)
    return whole


def _pick(options: Sequence[T], random: np.random.Generator) -> T:
    """Give one of the options.

    Raises:
        InvalidBlueprintError: There is none, so this change can't be made.
    """
    if not options:
        raise InvalidBlueprintError("the design offers no place for this change")
    return options[int(random.integers(0, len(options)))]

"""Blueprints as graphs: what is legal without a site, the canonical bytes, and the content id."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from typing import Final

from esper.blueprints.dims import check_expression
from esper.blueprints.operator_base import Attribute
from esper.blueprints.operators import OPERATORS, Operator
from esper.contracts import wire
from esper.contracts.blueprint import BlueprintIR, Expression, IRNode
from esper.contracts.errors import CorruptDataError, InvalidBlueprintError

FORMAT_VERSION: Final = 1
"""Version of the operator set that this build knows."""
MAX_NODES: Final = 64
"""Most nodes of a graph."""
MAX_DEPTH: Final = 48
"""Most nodes on one path from an input to the output."""
MAX_IR_BYTES: Final = 65_536
"""Longest canonical form, in bytes."""
INPUTS: Final = ("x", "h")
"""Names of the graph's inputs: the layer's input and the layer's output."""

_NAME: Final = re.compile(r"[a-z][a-z0-9_]{0,31}", re.ASCII)


def refuse(node: str, part: str, rule: str, received: object) -> InvalidBlueprintError:
    """Build the error that names the node at fault."""
    error = InvalidBlueprintError.of(f"node '{node}' {part}".rstrip(), rule, received)
    assert isinstance(error, InvalidBlueprintError)
    return error


def check_structure(ir: BlueprintIR) -> None:
    """Check everything about a graph that does not depend on a site.

    Raises:
        InvalidBlueprintError: A bound, a name, an operator, an edge or an attribute is not legal; the message names
            the node at fault.
    """
    if ir.format_version != FORMAT_VERSION:
        raise InvalidBlueprintError.of("format_version", f"be {FORMAT_VERSION}", ir.format_version)
    if not 1 <= len(ir.nodes) <= MAX_NODES:
        raise InvalidBlueprintError.of("nodes", f"be 1 to {MAX_NODES}", len(ir.nodes))
    names = {node.name for node in ir.nodes}
    depths: dict[str, int] = dict.fromkeys(INPUTS, 0)
    for node in ir.nodes:
        _check_name(node, depths)
        operator = _operator_of(node)
        _check_edges(node, operator, depths, names)
        _check_attributes(node, operator)
        depths[node.name] = 1 + max(depths[source] for source in node.inputs)
        if depths[node.name] > MAX_DEPTH:
            raise refuse(node.name, "depth", f"be at most {MAX_DEPTH} nodes from an input", depths[node.name])
    if ir.output not in names:
        raise InvalidBlueprintError.of("output", "name a node of the graph", ir.output)
    _check_all_used(ir)


def live_nodes(ir: BlueprintIR) -> frozenset[str]:
    """Give the names of the nodes whose values reach the output; being read for its shape is not enough."""
    by_name = {node.name: node for node in ir.nodes}
    found: set[str] = set()
    waiting = [ir.output]
    while waiting:
        node = by_name.get(waiting.pop())
        if node is not None and node.name not in found:
            found.add(node.name)
            waiting.extend(_value_sources(node))
    return frozenset(found)


def reads_input(ir: BlueprintIR) -> bool:
    """Say whether the values of the layer's input reach the output."""
    live = live_nodes(ir)
    return any("x" in _value_sources(node) for node in ir.nodes if node.name in live)


def _value_sources(node: IRNode) -> list[str]:
    """Give what a node reads for its values, not for its shape."""
    operator = OPERATORS.get(node.op)
    shapes = operator.shape_inputs if operator else ()
    return [source for index, source in enumerate(node.inputs) if index not in shapes]


def canonical_bytes(ir: BlueprintIR) -> bytes:
    """Give the bytes that stand for a legal graph, the same in every process: its message with attributes sorted.

    Raises:
        InvalidBlueprintError: The graph is not legal, or longer than 65,536 bytes.
    """
    check_structure(ir)
    data = wire.serialize(ir)
    if len(data) > MAX_IR_BYTES:
        raise InvalidBlueprintError.of("ir", f"be at most {MAX_IR_BYTES} bytes", len(data))
    return data


def ir_from_bytes(data: bytes) -> BlueprintIR:
    """Give the graph of canonical bytes.

    Raises:
        CorruptDataError: The bytes are no message, or not in canonical form.
        InvalidBlueprintError: They are too long, or the graph is not legal.
    """
    if len(data) > MAX_IR_BYTES:
        raise InvalidBlueprintError.of("ir", f"be at most {MAX_IR_BYTES} bytes", len(data))
    ir = wire.parse(data, BlueprintIR)
    if canonical_bytes(ir) != data:
        raise CorruptDataError("the IR's bytes are not in canonical form", parameter="ir")
    return ir


def content_id(ir: BlueprintIR) -> str:
    """Give the identity of a legal graph: SHA-256 of its canonical bytes, 64 hex digits."""
    return hashlib.sha256(canonical_bytes(ir)).hexdigest()


def structure_id(ir: BlueprintIR) -> str:
    """Give an identity that ignores how a legal graph is written down, 64 hex digits: see `canonical_form`.

    Two graphs with the same structure id compute the same thing; use it to find repeats. Kernels are keyed by
    `content_id` all the same: names of nodes are names of weights, and their order is the order in which weights are
    drawn, so that graphs of one structure still give different bytes.
    """
    return content_id(canonical_form(ir))


def canonical_form(ir: BlueprintIR) -> BlueprintIR:
    """Give the one graph that stands for all of a structure.

    Nodes come in the order in which a walk from the output through the inputs leaves them, and are named by it;
    attributes spelled out at their default are left out, and whole numbers where a real one is meant are real.

    Raises:
        InvalidBlueprintError: The graph is not legal.
    """
    check_structure(ir)
    by_name = {node.name: node for node in ir.nodes}
    names = {name: name for name in INPUTS}
    nodes: list[IRNode] = []

    def leave(name: str) -> None:
        """Add a node behind all it reads; at most ``MAX_DEPTH`` deep."""
        if name in names:
            return
        node = by_name[name]
        for source in node.inputs:
            leave(source)
        names[name] = f"n{len(nodes)}"
        inputs = tuple(names[source] for source in node.inputs)
        nodes.append(IRNode(name=names[name], op=node.op, inputs=inputs, attributes=_plain_attributes(node)))

    leave(ir.output)
    return BlueprintIR(nodes=tuple(nodes), output=names[ir.output], format_version=ir.format_version)


def _plain_attributes(node: IRNode) -> Mapping[str, int | float | bool | str | Expression]:
    known = {attribute.name: attribute for attribute in OPERATORS[node.op].attributes}
    return {
        name: float(value) if known[name].kind is float and isinstance(value, int) else value
        for name, value in node.attributes.items()
        if value != known[name].default
    }


def _check_name(node: IRNode, defined: Mapping[str, int]) -> None:
    if not _NAME.fullmatch(node.name):
        raise refuse(node.name, "name", "match [a-z][a-z0-9_]{0,31}", node.name)
    if node.name in INPUTS:
        raise refuse(node.name, "name", "differ from the inputs x and h", node.name)
    if node.name in defined:
        raise refuse(node.name, "name", "be unique in the graph", node.name)


def _operator_of(node: IRNode) -> Operator:
    operator = OPERATORS.get(node.op)
    if operator is None:
        raise refuse(node.name, "operator", f"be one of {', '.join(sorted(OPERATORS))}", node.op)
    return operator


def _check_edges(node: IRNode, operator: Operator, defined: Mapping[str, int], names: set[str]) -> None:
    if len(node.inputs) != operator.arity:
        raise refuse(node.name, "inputs", f"be {operator.arity} for '{operator.name}'", list(node.inputs))
    for source in node.inputs:
        if source in defined:
            continue
        if source in names:
            raise refuse(node.name, "inputs", "come earlier in the graph (no cycle, no forward reference)", source)
        raise refuse(node.name, "inputs", "be x, h or nodes of the graph", source)


def _check_attributes(node: IRNode, operator: Operator) -> None:
    known = {attribute.name: attribute for attribute in operator.attributes}
    for name, value in node.attributes.items():
        attribute = known.get(name)
        if attribute is None:
            allowed = ", ".join(known) or "none"
            raise refuse(node.name, "attributes", f"be among those of '{operator.name}' ({allowed})", name)
        if isinstance(value, Expression):
            _check_expression_attribute(node, attribute, value)
        elif not attribute.accepts(value):
            raise refuse(node.name, f"attribute '{name}'", attribute.rule, value)
        elif isinstance(value, float) and math.copysign(1.0, value) < 0.0 == value:
            raise refuse(node.name, f"attribute '{name}'", "not be negative zero", value)


def _check_expression_attribute(node: IRNode, attribute: Attribute, value: Expression) -> None:
    if attribute.kind is not int:
        raise refuse(node.name, f"attribute '{attribute.name}'", f"{attribute.rule}, not an expression", value.text)
    check_expression(value, f"node '{node.name}' attribute '{attribute.name}'")


def _check_all_used(ir: BlueprintIR) -> None:
    live = live_nodes(ir)
    for node in ir.nodes:
        if node.name not in live:
            raise refuse(node.name, "", "reach the output by its value", ir.output)

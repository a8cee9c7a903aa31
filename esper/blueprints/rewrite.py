"""Changes to blueprints that keep them legal: every function gives a new graph, checked, or refuses.

Give ``site`` to have the result checked there too (shapes, ranges); without it only its structure is. Inputs of a graph
are never changed in place. Nodes that nothing reads any more are dropped from every result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from esper.blueprints.ir import INPUTS, check_structure, live_nodes, refuse
from esper.blueprints.plan import validate
from esper.contracts.blueprint import AttributeValue, BlueprintIR, IRNode, Site
from esper.contracts.errors import InvalidBlueprintError


def set_attribute(
    ir: BlueprintIR, node: str, name: str, value: AttributeValue | None, *, site: Site | None = None
) -> BlueprintIR:
    """Give the graph with one attribute changed; ``None`` brings the operator's default back.

    Raises:
        InvalidBlueprintError: There is no such node, or the result is not legal.
    """
    target = find_node(ir, node)
    attributes = {key: old for key, old in target.attributes.items() if key != name}
    if value is not None:
        attributes[name] = value
    return _finish(_with_node(ir, replace(target, attributes=attributes)), site)


def replace_operator(
    ir: BlueprintIR, node: str, op: str, attributes: Mapping[str, AttributeValue], *, site: Site | None = None
) -> BlueprintIR:
    """Give the graph with another operator, of the same arity, in a node's place.

    Raises:
        InvalidBlueprintError: There is no such node, or the result is not legal.
    """
    target = find_node(ir, node)
    return _finish(_with_node(ir, replace(target, op=op, attributes=dict(attributes))), site)


def replace_input(ir: BlueprintIR, node: str, index: int, source: str, *, site: Site | None = None) -> BlueprintIR:
    """Give the graph with one input of a node read from elsewhere: x, h or an earlier node.

    Raises:
        InvalidBlueprintError: There is no such node or input, or the result is not legal.
    """
    target = find_node(ir, node)
    if not 0 <= index < len(target.inputs):
        raise refuse(node, "input index", f"be in [0, {len(target.inputs)})", index)
    inputs = (*target.inputs[:index], source, *target.inputs[index + 1 :])
    return _finish(_with_node(ir, replace(target, inputs=inputs)), site)


def insert_node(
    ir: BlueprintIR,
    source: str,
    op: str,
    attributes: Mapping[str, AttributeValue],
    *,
    others: Sequence[str] = (),
    site: Site | None = None,
) -> BlueprintIR:
    """Give the graph with a new node behind ``source``, which everything that read ``source`` reads instead.

    ``others`` are the further inputs of an operator of more than one; they must come before ``source``'s readers.
    A new node behind ``x`` or ``h`` comes first in the graph.

    Raises:
        InvalidBlueprintError: There is no such node, or the result is not legal.
    """
    if source not in INPUTS:
        find_node(ir, source)
    added = IRNode(name=fresh_name(ir, op), op=op, inputs=(source, *others), attributes=dict(attributes))
    last = max((index for index, node in enumerate(ir.nodes) if node.name in added.inputs), default=-1)
    readers = tuple(_rename_inputs(node, {source: added.name}) for node in ir.nodes[last + 1 :])
    output = added.name if ir.output == source else ir.output
    return _finish(replace(ir, nodes=(*ir.nodes[: last + 1], added, *readers), output=output), site)


def remove_node(ir: BlueprintIR, node: str, *, site: Site | None = None) -> BlueprintIR:
    """Give the graph without a node; its readers read the first of its inputs that makes a legal graph.

    Raises:
        InvalidBlueprintError: There is no such node, or no input can stand in for it.
    """
    target = find_node(ir, node)
    rest = tuple(other for other in ir.nodes if other.name != node)
    refusals: list[str] = []
    for source in dict.fromkeys(target.inputs):
        nodes = tuple(_rename_inputs(other, {node: source}) for other in rest)
        try:
            return _finish(replace(ir, nodes=nodes, output=source if ir.output == node else ir.output), site)
        except InvalidBlueprintError as error:
            refusals.append(error.message)
    raise InvalidBlueprintError(f"node '{node}' can't be removed: {'; '.join(refusals)}", parameter=f"node '{node}'")


def splice(ir: BlueprintIR, node: str, donor: BlueprintIR, donor_node: str, *, site: Site | None = None) -> BlueprintIR:
    """Give the graph with a node replaced by the part of another graph that leads to ``donor_node``.

    Raises:
        InvalidBlueprintError: There is no such node in either graph, or the result is not legal.
    """
    find_node(ir, node)
    grafted, source = _renamed_part(donor, donor_node, {other.name for other in ir.nodes})
    kept = tuple(_rename_inputs(other, {node: source}) for other in ir.nodes if other.name != node)
    return _finish(replace(ir, nodes=(*grafted, *kept), output=source if ir.output == node else ir.output), site)


def sum_of(first: BlueprintIR, second: BlueprintIR, *, site: Site | None = None) -> BlueprintIR:
    """Give the graph whose delta is the sum of two graphs' deltas.

    Raises:
        InvalidBlueprintError: The result is not legal.
    """
    others, source = _renamed_part(second, second.output, {node.name for node in first.nodes})
    both = (*first.nodes, *others)
    end = _free("sum", {node.name for node in both})
    last = IRNode(name=end, op="add", inputs=(first.output, source))
    return _finish(replace(first, nodes=(*both, last), output=end), site)


def prune(ir: BlueprintIR) -> BlueprintIR:
    """Give the graph without the nodes that the output does not depend on; not checked otherwise."""
    live = live_nodes(ir)
    return replace(ir, nodes=tuple(node for node in ir.nodes if node.name in live))


def find_node(ir: BlueprintIR, name: str) -> IRNode:
    """Give the node of a name.

    Raises:
        InvalidBlueprintError: There is none; the message lists those that there are.
    """
    for node in ir.nodes:
        if node.name == name:
            return node
    names = ", ".join(node.name for node in ir.nodes)
    raise InvalidBlueprintError.of("node", f"be one of {names}", name)


def fresh_name(ir: BlueprintIR, stem: str) -> str:
    """Give a node name that the graph does not use: the stem, or the stem with a number."""
    return _free(stem, {node.name for node in ir.nodes})


def _free(stem: str, taken: set[str]) -> str:
    stem = stem[:27]
    if stem not in taken and stem not in INPUTS:
        return stem
    return next(name for name in (f"{stem}{number}" for number in range(2, 10_000)) if name not in taken)


def _renamed_part(donor: BlueprintIR, end: str, taken: set[str]) -> tuple[tuple[IRNode, ...], str]:
    """Give the donor's nodes that lead to ``end``, under names that are not taken, and the new name of ``end``."""
    check_structure(donor)
    find_node(donor, end)
    part = prune(replace(donor, output=end)).nodes
    names: dict[str, str] = {}
    for node in part:
        names[node.name] = _free(node.name, taken | set(names.values()))
    return tuple(replace(_rename_inputs(node, names), name=names[node.name]) for node in part), names[end]


def _rename_inputs(node: IRNode, names: Mapping[str, str]) -> IRNode:
    return replace(node, inputs=tuple(names.get(source, source) for source in node.inputs))


def _with_node(ir: BlueprintIR, changed: IRNode) -> BlueprintIR:
    return replace(ir, nodes=tuple(changed if node.name == changed.name else node for node in ir.nodes))


def _finish(ir: BlueprintIR, site: Site | None) -> BlueprintIR:
    pruned = prune(ir)
    validate(pruned, site)
    return pruned

"""The readable form of a blueprint, for people and version control.

    blueprint 1
    down = linear(x, features={max(4, C // 4)})
    act = activation(down, fn=gelu)
    up = linear(act, init=zero)
    return up

One node a line; inputs first, then attributes by name. Values are whole numbers, reals (with a point or an exponent),
``true`` and ``false``, words, and expressions in braces. ``#`` begins a comment. For every legal graph
``parse_text(to_text(ir)) == ir``.
"""

from __future__ import annotations

import re
from typing import Final

from esper.blueprints.ir import MAX_IR_BYTES, check_structure
from esper.contracts.blueprint import AttributeValue, BlueprintIR, Expression, IRNode
from esper.contracts.errors import InvalidBlueprintError

_HEADER: Final = re.compile(r"blueprint (\d{1,9})", re.ASCII)
_NODE: Final = re.compile(r"(\w+) *= *(\w+) *\((.*)\)", re.ASCII)
_RETURN: Final = re.compile(r"return +(\w+)", re.ASCII)
_ARGUMENT: Final = re.compile(r" *(?:(\w+) *= *)?(\{[^{}]*\}|[\w.+-]+) *(?:,|$)", re.ASCII)
_INTEGER: Final = re.compile(r"-?\d{1,18}", re.ASCII)
_REAL: Final = re.compile(r"-?\d+(\.\d+)?(e[+-]?\d+)?", re.ASCII)


def to_text(ir: BlueprintIR) -> str:
    """Give the readable form of a legal graph.

    Raises:
        InvalidBlueprintError: The graph is not legal.
    """
    check_structure(ir)
    lines = [f"blueprint {ir.format_version}"]
    for node in ir.nodes:
        attributes = [f"{name}={_show(value)}" for name, value in sorted(node.attributes.items())]
        lines.append(f"{node.name} = {node.op}({', '.join([*node.inputs, *attributes])})")
    lines.append(f"return {ir.output}")
    return "\n".join(lines) + "\n"


def parse_text(text: str) -> BlueprintIR:
    """Give the graph of its readable form.

    Raises:
        InvalidBlueprintError: A line does not read, with its number; or the graph is not legal, with the node.
    """
    if len(text) > MAX_IR_BYTES:
        raise InvalidBlueprintError.of("text", f"be at most {MAX_IR_BYTES} characters", len(text))
    lines = [(number, line.split("#")[0].strip()) for number, line in enumerate(text.splitlines(), start=1)]
    lines = [(number, line) for number, line in lines if line]
    if len(lines) < 2:
        raise InvalidBlueprintError.of("text", "have a 'blueprint' line, nodes and a 'return' line", text)
    header, ending = _HEADER.fullmatch(lines[0][1]), _RETURN.fullmatch(lines[-1][1])
    if header is None:
        raise _unreadable(lines[0], "be 'blueprint <version>'")
    if ending is None:
        raise _unreadable(lines[-1], "be 'return <node>'")
    nodes = tuple(_parse_node(line) for line in lines[1:-1])
    ir = BlueprintIR(nodes=nodes, output=ending[1], format_version=int(header[1]))
    check_structure(ir)
    return ir


def _parse_node(line: tuple[int, str]) -> IRNode:
    matched = _NODE.fullmatch(line[1])
    if matched is None:
        raise _unreadable(line, "be 'name = operator(inputs, attribute=value)'")
    inputs: list[str] = []
    attributes: dict[str, AttributeValue] = {}
    name, op, rest = matched.groups()
    rest = rest.strip()
    at = 0
    while at < len(rest):
        argument = _ARGUMENT.match(rest, at)
        if argument is None:
            raise _unreadable(line, "have arguments 'input' or 'attribute=value', with commas between")
        key, value = argument.groups()
        if key in attributes or (key is None and attributes):
            raise _unreadable(line, "have every attribute once, after the inputs")
        if key is None:
            inputs.append(value)
        else:
            attributes[key] = _parse_value(value)
        at = argument.end()
    return IRNode(name=name, op=op, inputs=tuple(inputs), attributes=attributes)


def _parse_value(text: str) -> AttributeValue:
    if text.startswith("{"):
        return Expression(text[1:-1])
    if text in ("true", "false"):
        return text == "true"
    if _INTEGER.fullmatch(text):
        return int(text)
    return float(text) if _REAL.fullmatch(text) else text


def _show(value: AttributeValue) -> str:
    match value:
        case Expression(text=text):
            return f"{{{text}}}"
        case bool():
            return "true" if value else "false"
        case float():
            return repr(value)
        case _:
            return str(value)


def _unreadable(line: tuple[int, str], rule: str) -> InvalidBlueprintError:
    error = InvalidBlueprintError.of(f"line {line[0]}", rule, line[1])
    assert isinstance(error, InvalidBlueprintError)
    return error

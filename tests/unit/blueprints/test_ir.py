from __future__ import annotations

import os
import subprocess
import sys

import pytest

from esper.blueprints import (
    BlueprintRegistry,
    canonical_bytes,
    content_id,
    ir_from_bytes,
    parse_text,
    structure_id,
    validate,
)
from esper.blueprints.ir import MAX_IR_BYTES
from esper.contracts import wire
from esper.contracts.blueprint import AttributeValue, BlueprintIR, Expression, IRNode, Site
from esper.contracts.errors import CorruptDataError, InvalidBlueprintError

ADAPTER = """
blueprint 1
down = linear(h, features={max(4, C // 4)}, init=kaiming, bias=false)
act = activation(down, fn=gelu)
up = linear(act, init=zero)
return up
"""
ADAPTER_ID = "2e935aedd612ee45f0ee0fe9d73b2acc74b344268f0858a1dad0a2b9bf5ecaca"


def node(name: str, op: str, *inputs: str, **attributes: AttributeValue) -> IRNode:
    return IRNode(name=name, op=op, inputs=inputs, attributes=attributes)


def ir(*nodes: IRNode, output: str = "a") -> BlueprintIR:
    return BlueprintIR(nodes=nodes, output=output)


GOOD = node("a", "linear", "x")


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (ir(), "nodes must be 1 to 64, got 0"),
        (ir(*(node(f"n{i}", "scale", "h") for i in range(65))), "nodes must be 1 to 64, got 65"),
        (BlueprintIR(nodes=(GOOD,), output="a", format_version=2), "format_version must be 1, got 2"),
        (ir(node("A", "linear", "x"), output="A"), r"node 'A' name must match \[a-z\]"),
        (ir(node("a" * 33, "linear", "x"), output="a" * 33), "name must match"),
        (ir(node("x", "linear", "h"), output="x"), "node 'x' name must differ from the inputs"),
        (ir(GOOD, GOOD), "node 'a' name must be unique"),
        (ir(node("a", "conv9", "x")), "node 'a' operator must be one of .*attention.* got 'conv9'"),
        (ir(node("a", "linear", "x", "h")), "node 'a' inputs must be 1 for 'linear'"),
        (ir(node("a", "linear", "a")), "node 'a' inputs must come earlier .* got 'a'"),
        (ir(node("a", "linear", "b"), node("b", "linear", "x")), "node 'a' inputs must come earlier"),
        (ir(node("a", "linear", "y")), "node 'a' inputs must be x, h or nodes of the graph, got 'y'"),
        (ir(GOOD, output="h"), "output must name a node of the graph, got 'h'"),
        (ir(node("b", "scale", "h"), GOOD), "node 'b' must reach the output by its value"),
        (ir(node("b", "linear", "x"), node("a", "align", "h", "b")), "node 'b' must reach the output by its value"),
        (ir(node("a", "linear", "x", width=3)), r"'linear' \(features, bias, init\), got 'width'"),
        (ir(node("a", "scale", "x", value=float("nan"))), "attribute 'value' must be a finite real number"),
        (ir(node("a", "scale", "x", value=-0.0)), "attribute 'value' must not be negative zero"),
        (ir(node("a", "scale", "x", value=Expression("C"))), "finite real number .* not an expression"),
        (ir(node("a", "linear", "x", bias=1)), "attribute 'bias' must be true or false, got 1"),
        (ir(node("a", "linear", "x", features=True)), "attribute 'features' must be a whole number"),
        (ir(node("a", "linear", "x", features=2.0)), "attribute 'features' must be a whole number"),
        (ir(node("a", "linear", "x", init="ones")), "must be one of default, kaiming, orthogonal, zero, got 'ones'"),
        (ir(node("a", "conv", "x", kernel=4)), r"attribute 'kernel' must be an odd whole number in \[1, 31\], got 4"),
        (ir(node("a", "linear", "x", features=Expression("C ** 2"))), "attribute 'features' must be whole numbers"),
    ],
)
def test_structure_faults_name_the_node(broken: BlueprintIR, message: str) -> None:
    with pytest.raises(InvalidBlueprintError, match=message):
        validate(broken)


def test_depth_is_bounded() -> None:
    chain = [node("n0", "scale", "h"), *(node(f"n{i}", "scale", f"n{i - 1}") for i in range(1, 49))]
    with pytest.raises(InvalidBlueprintError, match="node 'n48' depth must be at most 48 nodes from an input, got 49"):
        validate(ir(*chain, output="n48"))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            "a = linear(h, features=5)\nreturn a",
            r"node 'a' output must have the type .* vector\(12,\), got 'vector\(5,\)'",
        ),
        ("a = linear(h, features={L})\nreturn a", r"must use dimensions that the site has \(I, C, S\), got 'L'"),
        ("a = linear(h, features={C // 0})\nreturn a", "must not divide by zero at this site"),
        ("a = linear(h, features={C - 12})\nreturn a", r"must be a whole number .* at this site, got 'C - 12 = 0'"),
        ("a = add(h, x)\nreturn a", "node 'a' second input must be"),
        ("a = attention(h, h, h)\nreturn a", "node 'a' input must be a tokens here"),
        ("a = group_norm(h, groups=5)\nreturn a", "node 'a' groups must divide the 12 features, got 5"),
        ("a = group_norm(h, groups=12)\nreturn a", "node 'a' groups must leave at least 2 elements"),
        ("a = signal_view(h, channels=5)\nreturn a", "node 'a' channels must divide the 12 features"),
        ("a = image_view(h)\nreturn a", "node 'a' height must be given where 12 pixels are no square"),
        (
            "a = linear(x, features=60000)\nb = linear(a, features=60000)\nc = linear(b)\nreturn c",
            "node 'b' parameters must keep the sum",
        ),
    ],
)
def test_faults_at_a_site_name_the_node(lines: str, message: str, linear: Site) -> None:
    with pytest.raises(InvalidBlueprintError, match=message):
        validate(parse_text(f"blueprint 1\n{lines}"), linear)


def test_attention_heads_must_divide(tokens: Site) -> None:
    graph = parse_text("blueprint 1\na = attention(h, h, h, heads=5)\nreturn a")
    with pytest.raises(InvalidBlueprintError, match="node 'a' heads must divide the 12 features, got 5"):
        validate(graph, tokens)


def test_a_value_of_too_many_elements_is_refused(conv2d: Site) -> None:
    huge = Site(kind=conv2d.kind, input_shape=(3, 4096, 4096), output_shape=(8, 4096, 4096))
    with pytest.raises(InvalidBlueprintError, match="node 'a' output must have at most 67108864 elements"):
        validate(parse_text("blueprint 1\na = conv(x)\nreturn a"), huge)


def test_canonical_bytes_come_back(registry: BlueprintRegistry) -> None:
    for name in registry.names():
        graph = registry.create_blueprint(name).ir
        assert ir_from_bytes(canonical_bytes(graph)) == graph


def test_content_id_is_pinned() -> None:
    assert content_id(parse_text(ADAPTER)) == ADAPTER_ID


def test_content_id_does_not_depend_on_the_order_of_attributes() -> None:
    one = node("a", "linear", "x", features=3, init="zero")
    other = node("a", "linear", "x", init="zero", features=3)
    assert content_id(ir(one)) == content_id(ir(other))


@pytest.mark.parametrize("runtime", ["upb", "python"])
def test_content_id_is_the_same_in_another_process(runtime: str) -> None:
    code = (
        "import sys\n"
        "from esper.blueprints.ir import content_id\n"
        "from esper.blueprints.text import parse_text\n"
        "print(content_id(parse_text(sys.argv[1])))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": runtime}
    command = [sys.executable, "-c", code, ADAPTER]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ADAPTER_ID


def test_structure_id_ignores_names_and_spelled_out_defaults() -> None:
    one = parse_text("blueprint 1\na = linear(x, bias=true)\nb = scale(a)\nreturn b")
    other = parse_text("blueprint 1\nfirst = linear(x)\nlast = scale(first, value=1.0)\nreturn last")
    third = parse_text("blueprint 1\na = linear(x, bias=false)\nb = scale(a)\nreturn b")
    assert structure_id(one) == structure_id(other) != structure_id(third)
    assert content_id(one) != content_id(other)


def test_bytes_that_are_not_canonical_are_refused() -> None:
    with pytest.raises(CorruptDataError, match="not in canonical form"):
        ir_from_bytes(canonical_bytes(parse_text(ADAPTER)) + b"\xa0\x06\x01")


def test_bytes_that_are_no_message_are_refused() -> None:
    with pytest.raises(CorruptDataError, match="does not parse"):
        ir_from_bytes(b"\xff\xff\xff")


def test_bytes_of_an_illegal_graph_are_refused() -> None:
    with pytest.raises(InvalidBlueprintError, match="node 'a' operator"):
        ir_from_bytes(wire.serialize(ir(node("a", "eval", "x"))))


def test_too_many_bytes_are_refused_before_they_are_parsed() -> None:
    with pytest.raises(InvalidBlueprintError, match="at most 65536 bytes, got 65537"):
        ir_from_bytes(b"\x00" * (MAX_IR_BYTES + 1))

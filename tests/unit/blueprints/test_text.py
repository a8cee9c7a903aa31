from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.blueprints import BlueprintRegistry, parse_text, to_text
from esper.blueprints.ir import MAX_IR_BYTES
from esper.contracts.blueprint import AttributeValue, BlueprintIR, Expression, IRNode
from esper.contracts.errors import InvalidBlueprintError


def test_text_of_a_graph() -> None:
    nodes = (
        IRNode(name="a", op="linear", inputs=("x",), attributes={"init": "zero", "features": Expression("C // 2")}),
        IRNode(name="b", op="scale", inputs=("a",), attributes={"value": 0.5}),
        IRNode(name="c", op="linear", inputs=("b",), attributes={"bias": False, "features": 12}),
    )
    assert to_text(BlueprintIR(nodes=nodes, output="c")) == (
        "blueprint 1\n"
        "a = linear(x, features={C // 2}, init=zero)\n"
        "b = scale(a, value=0.5)\n"
        "c = linear(b, bias=false, features=12)\n"
        "return c\n"
    )


def test_templates_come_back_from_their_text(registry: BlueprintRegistry) -> None:
    for name in registry.names():
        ir = registry.create_blueprint(name).ir
        assert parse_text(to_text(ir)) == ir


@given(
    features=st.integers(1, 65_536),
    value=st.floats(-1e3, 1e3, allow_nan=False).map(lambda number: number or 0.0),
    flag=st.booleans(),
    word=st.sampled_from(["default", "kaiming", "orthogonal", "zero"]),
)
def test_every_kind_of_value_comes_back(features: int, value: float, flag: bool, word: str) -> None:
    attributes: dict[str, AttributeValue] = {"features": features, "bias": flag, "init": word}
    nodes = (
        IRNode(name="a", op="linear", inputs=("x",), attributes=attributes),
        IRNode(name="b", op="scale", inputs=("a",), attributes={"value": value}),
    )
    ir = BlueprintIR(nodes=nodes, output="b")
    back = parse_text(to_text(ir))
    assert back == ir
    assert [type(item) for item in back.nodes[0].attributes.values()] == [bool, int, str]


def test_comments_blank_lines_and_spaces_are_free() -> None:
    text = "  # a seed\nblueprint 1\n\n  a=linear( x ,features = 3 , init=zero )  # last\nreturn  a\n"
    assert parse_text(text).nodes[0].attributes == {"features": 3, "init": "zero"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "text must have a 'blueprint' line"),
        ("linear\nreturn a", "line 1 must be 'blueprint <version>', got 'linear'"),
        ("blueprint 1\na = linear(x)", r"line 2 must be 'return <node>', got 'a = linear\(x\)'"),
        ("blueprint 1\na linear x\nreturn a", r"line 2 must be 'name = operator\(inputs, attribute=value\)'"),
        ("blueprint 1\na = linear(x y)\nreturn a", "line 2 must have arguments"),
        ("blueprint 1\n\na = linear(features=3, x)\nreturn a", "line 3 must have every attribute once, after"),
        ("blueprint 1\na = linear(x, bias=true, bias=true)\nreturn a", "line 2 must have every attribute once"),
        ("blueprint 1\na = linear(x, features={C}})\nreturn a", "line 2 must have arguments"),
        ("blueprint 2\na = linear(x)\nreturn a", "format_version must be 1, got 2"),
        ("blueprint 1\na = exec(x)\nreturn a", "node 'a' operator must be one of"),
        ("blueprint 1\na = linear(x, features=__import__)\nreturn a", "node 'a' attribute 'features' must be a whole"),
    ],
)
def test_unreadable_text_is_refused_with_the_line(text: str, message: str) -> None:
    with pytest.raises(InvalidBlueprintError, match=message):
        parse_text(text)


def test_too_long_text_is_refused() -> None:
    with pytest.raises(InvalidBlueprintError, match="text must be at most 65536 characters"):
        parse_text("#" * (MAX_IR_BYTES + 1))


@given(st.text(max_size=200))
def test_no_text_does_anything_but_parse_or_be_refused(text: str) -> None:
    with pytest.raises(InvalidBlueprintError):
        parse_text(f"blueprint 1\na = linear(x, {text})\n{text}")

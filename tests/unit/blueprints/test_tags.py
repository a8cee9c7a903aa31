"""What a run reads off a blueprint, and that nobody's words open a door."""

from __future__ import annotations

import pytest

from esper.blueprints import default_registry, parse_text
from esper.blueprints.operators import OPERATORS
from esper.blueprints.tags import KINDS, is_allowed, tags_of, unknown_tags
from esper.contracts.blueprint import BlueprintMetadata
from esper.contracts.tag_expression import parse_tags

DENSE = {"bottleneck_adapter", "deepen", "gated_mlp", "glu", "lora", "norm_shift", "squeeze_excite"} | {
    "token_channel_mixer",
    "widen",
}


def allowed(text: str) -> set[str]:
    registry = default_registry()
    rule = parse_tags(text)
    return {name for name in registry.names() if is_allowed(registry.create_blueprint(name), rule)}


@pytest.mark.parametrize("text", ["dense", "!conv & !attention", "!convolution & !attention", "!(conv | attention)"])
def test_dense_is_what_neither_convolves_nor_attends(text: str) -> None:
    assert allowed(text) == DENSE


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", set(default_registry().names())),
        ("attention", {"low_rank_attention", "causal_attention"}),
        ("depthwise_conv", {"depthwise_separable_conv", "causal_token_conv"}),
        ("dense & !linear", {"norm_shift"}),
        ("widening & !conv", {"widen"}),
        ("conv & attention", set()),
    ],
)
def test_an_expression_leaves_the_templates_that_keep_it(text: str, names: set[str]) -> None:
    assert allowed(text) == names


def test_every_operator_is_a_tag_of_what_uses_it_and_every_kind_is_of_operators() -> None:
    for name in default_registry().names():
        ir = default_registry().create_blueprint(name).ir
        assert {node.op for node in ir.nodes} <= tags_of(ir)
    assert frozenset().union(*KINDS.values()) <= set(OPERATORS)


def test_what_an_author_says_does_not_change_what_is_read_off_the_graph() -> None:
    ir = parse_text("blueprint 1\nu = conv(h, kernel=3, init=zero)\nreturn u")
    assert tags_of(ir) == {"conv", "convolution"}
    assert tags_of(ir, ["dense", "linear", "attention", "mine"]) == {"conv", "convolution", "mine"}
    said = default_registry().create_blueprint("conv3x3", BlueprintMetadata(tags=["dense"]))
    assert not is_allowed(said, parse_tags("dense"))


def test_tags_that_nothing_shipped_has_are_told() -> None:
    assert unknown_tags(parse_tags("!convolutoin & (mine | conv) & karn & validated & widening")) == [
        "convolutoin",
        "mine",
    ]
    assert unknown_tags(None) == []

"""Graphs off the wire that nobody of ours wrote, with their attributes: refused by type, or built and run."""

from __future__ import annotations

from typing import Final

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from esper.blueprints import canonical_bytes, content_id, default_registry, is_legal, plan, structure_id, to_module
from esper.blueprints.cost import plan_cost
from esper.blueprints.ir import ir_from_bytes
from esper.blueprints.operators import OPERATORS
from esper.contracts.blueprint import BlueprintIR, Site
from esper.contracts.errors import CorruptDataError, InvalidBlueprintError, InvalidInputError
from esper.contracts.wire import parse, serialize
from esper.v1 import blueprint_pb2
from tests.unit.blueprints.conftest import SITES

REGISTRY: Final = default_registry()
GRAPHS: Final = [REGISTRY.create_blueprint(name).ir for name in REGISTRY.names()]
MAX_RUN: Final = 2_000_000
"""Most parameters and operations of a graph that is run here; larger ones are priced alone."""
REFUSALS: Final = (InvalidBlueprintError, CorruptDataError, InvalidInputError)
MANY: Final = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])

words = st.sampled_from(
    [
        "",
        "x",
        "h",
        "a",
        "out",
        "gelu",
        "zero",
        "max",
        "C",
        "../a",
        "a\0b",
        "é",
        "x" * 40,
        "__import__('os')",
        *OPERATORS,
    ]
)
expressions = st.sampled_from(
    ["", "C", "L", "B", "C // 0", "C ** 9", "max(4, C // 4)", "9" * 64, "-C", "C" * 65, "((((C))))", "min()", "C.real"]
) | st.text("CHWLIB0123456789+-*/()minax, ", max_size=20)
sites = st.sampled_from(list(SITES.values()))


def set_value(value: blueprint_pb2.AttributeValue, data: st.DataObject) -> None:
    """Set an attribute to a value of any kind, or to none."""
    match data.draw(st.integers(0, 5)):
        case 0:
            value.integer = data.draw(st.sampled_from([0, 1, -1, 2, 3, 64, 2**31, 2**63 - 1, -(2**63)]))
        case 1:
            value.real = data.draw(st.floats())
        case 2:
            value.flag = data.draw(st.booleans())
        case 3:
            value.expression = data.draw(expressions)
        case 4:
            value.word = data.draw(words)
        case _:
            value.Clear()


def change(message: blueprint_pb2.BlueprintIR, data: st.DataObject) -> None:
    """Change one thing about a graph."""
    at = data.draw(st.integers(0, max(0, len(message.nodes) - 1)))
    node = message.nodes[at] if message.nodes else message.nodes.add()
    match data.draw(st.integers(0, 8)):
        case 0:
            node.op = data.draw(words)
        case 1:
            node.name = data.draw(words)
        case 2:
            node.inputs[:] = data.draw(
                st.lists(words | st.sampled_from([one.name for one in message.nodes]), max_size=4)
            )
        case 3:
            message.nodes.insert(data.draw(st.integers(0, len(message.nodes))), node)
        case 4:
            message.output = data.draw(words)
        case 5:
            message.format_version = data.draw(st.integers(0, 3))
        case _:
            known = OPERATORS.get(node.op)
            names = [one.name for one in known.attributes] if known else []
            set_value(node.attributes[data.draw(words | st.sampled_from(names or ["a"]))], data)


def go_through(ir: BlueprintIR, site: Site) -> bool:
    """Take a graph as the services do: identity, price, module, one run; say whether it was legal."""
    try:
        assert ir_from_bytes(canonical_bytes(ir)) == ir
        assert len(content_id(ir)) == len(structure_id(ir)) == 64
        price = plan_cost(plan(ir, site))
    except InvalidBlueprintError:
        return False
    if max(price.parameters, price.flops, price.activation_bytes) <= MAX_RUN:
        module = to_module(ir, site, seed=0)
        assert sum(one.numel() for one in module.parameters()) == price.parameters
        delta = module(*(torch.zeros(2, *shape) for shape in (site.input_shape, site.output_shape)))
        assert delta.shape == (2, *site.output_shape)
    return True


@MANY
@given(graph=st.sampled_from(GRAPHS), site=sites, data=st.data())
def test_a_changed_message_is_refused_or_a_graph_that_runs(graph: BlueprintIR, site: Site, data: st.DataObject) -> None:
    message = blueprint_pb2.BlueprintIR.FromString(serialize(graph))
    for _ in range(data.draw(st.integers(1, 3))):
        change(message, data)
    try:
        ir = parse(message.SerializeToString(), BlueprintIR)
    except REFUSALS:
        return
    go_through(ir, site)


@MANY
@given(graph=st.sampled_from(GRAPHS), site=sites, data=st.data())
def test_damaged_bytes_are_refused_or_a_graph_that_runs(graph: BlueprintIR, site: Site, data: st.DataObject) -> None:
    payload = bytearray(canonical_bytes(graph))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(payload) - 1))
        match data.draw(st.integers(0, 2)):
            case 0:
                payload[at] ^= 1 << data.draw(st.integers(0, 7))
            case 1:
                payload[at:at] = data.draw(st.binary(min_size=1, max_size=8))
            case _:
                payload[at : at + data.draw(st.integers(1, 8))] = data.draw(st.binary(max_size=8))
        payload = payload or bytearray(1)
    for read in (ir_from_bytes, lambda data: parse(data, BlueprintIR)):
        try:
            ir = read(bytes(payload))
        except REFUSALS:
            continue
        go_through(ir, site)


def test_some_changed_graphs_are_legal_and_some_are_not() -> None:
    """So that what the tests above go through are not refusals alone."""
    legal = [go_through(graph, site) for graph in GRAPHS for site in SITES.values()]
    assert 50 < sum(legal) < len(legal)
    message = blueprint_pb2.BlueprintIR.FromString(serialize(REGISTRY.create_blueprint("lora").ir))
    rank = message.nodes[1].attributes["rank"]
    for text, is_so in (("C", True), ("max(1, C // 2)", True), ("C - C", False), ("C // 0", False)):
        rank.expression = text
        assert is_legal(parse(message.SerializeToString(), BlueprintIR), SITES["linear"]) is is_so

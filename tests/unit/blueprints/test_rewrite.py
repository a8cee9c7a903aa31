from __future__ import annotations

import pytest

from esper.blueprints import BlueprintRegistry, cost, parse_text, to_text, validate
from esper.blueprints.rewrite import (
    find_node,
    insert_node,
    prune,
    remove_node,
    replace_input,
    replace_operator,
    set_attribute,
    splice,
    sum_of,
)
from esper.contracts.blueprint import BlueprintIR, Expression, IRNode, Site
from esper.contracts.errors import InvalidBlueprintError


def graph(*lines: str) -> BlueprintIR:
    return parse_text("\n".join(["blueprint 1", *lines]))


@pytest.fixture
def adapter() -> BlueprintIR:
    return graph("down = linear(h, features=4)", "act = activation(down)", "up = linear(act, init=zero)", "return up")


def test_set_attribute_changes_one_value_and_leaves_the_original(adapter: BlueprintIR, linear: Site) -> None:
    before = to_text(adapter)
    wider = set_attribute(adapter, "down", "features", Expression("C // 2"), site=linear)
    assert "features={C // 2}" in to_text(wider)
    assert cost(wider, linear).parameters > cost(adapter, linear).parameters
    assert to_text(adapter) == before


def test_set_attribute_to_none_brings_the_default_back(adapter: BlueprintIR) -> None:
    assert find_node(set_attribute(adapter, "up", "init", None), "up").attributes == {}


def test_set_attribute_refuses_what_is_out_of_range(adapter: BlueprintIR) -> None:
    with pytest.raises(InvalidBlueprintError, match="node 'down' attribute 'features' must be a whole number"):
        set_attribute(adapter, "down", "features", 0)


def test_set_attribute_refuses_what_does_not_fit_the_site(adapter: BlueprintIR, linear: Site) -> None:
    with pytest.raises(InvalidBlueprintError, match="node 'up' output must have the type of the layer's output"):
        set_attribute(adapter, "up", "features", 5, site=linear)


def test_unknown_node_is_refused_with_the_names(adapter: BlueprintIR) -> None:
    with pytest.raises(InvalidBlueprintError, match="node must be one of down, act, up, got 'side'"):
        set_attribute(adapter, "side", "features", 5)


def test_replace_operator_keeps_the_edges(adapter: BlueprintIR, linear: Site) -> None:
    changed = replace_operator(adapter, "up", "low_rank", {"rank": 2, "init": "zero"}, site=linear)
    assert find_node(changed, "up").inputs == ("act",)


def test_replace_input_drops_what_nothing_reads(adapter: BlueprintIR, linear: Site) -> None:
    shallow = replace_input(adapter, "up", 0, "h", site=linear)
    assert [node.name for node in shallow.nodes] == ["up"]


def test_replace_input_refuses_a_cycle(adapter: BlueprintIR) -> None:
    with pytest.raises(InvalidBlueprintError, match=r"node 'down' inputs must come earlier .* got 'act'"):
        replace_input(adapter, "down", 0, "act")


def test_replace_input_refuses_a_wrong_index(adapter: BlueprintIR) -> None:
    with pytest.raises(InvalidBlueprintError, match=r"node 'down' input index must be in \[0, 1\), got 1"):
        replace_input(adapter, "down", 1, "h")


def test_insert_node_stands_between_source_and_all_its_readers(adapter: BlueprintIR, linear: Site) -> None:
    deeper = insert_node(adapter, "act", "layer_norm", {}, site=linear)
    assert find_node(deeper, "up").inputs == ("layer_norm",)
    assert find_node(deeper, "layer_norm").inputs == ("act",)


def test_insert_behind_an_input_and_behind_the_output(adapter: BlueprintIR, linear: Site) -> None:
    front = insert_node(adapter, "h", "rms_norm", {}, site=linear)
    assert front.nodes[0].op == "rms_norm"
    assert find_node(front, "down").inputs == ("rms_norm",)
    back = insert_node(adapter, "up", "scale", {}, site=linear)
    assert back.output == "scale"


def test_insert_of_a_second_input_keeps_the_order(adapter: BlueprintIR, linear: Site) -> None:
    joined = insert_node(adapter, "act", "concat", {}, others=("down",), site=linear)
    assert [node.name for node in joined.nodes] == ["down", "act", "concat", "up"]
    assert find_node(joined, "concat").inputs == ("act", "down")


def test_inserted_names_never_clash(adapter: BlueprintIR, linear: Site) -> None:
    twice = insert_node(insert_node(adapter, "act", "scale", {}), "act", "scale", {}, site=linear)
    assert sorted(node.name for node in twice.nodes) == ["act", "down", "scale", "scale2", "up"]


def test_remove_node_joins_its_neighbours(adapter: BlueprintIR, linear: Site) -> None:
    plain = remove_node(adapter, "act", site=linear)
    assert find_node(plain, "up").inputs == ("down",)


def test_remove_takes_the_first_input_whose_type_fits(linear: Site) -> None:
    gated = graph(
        "n = linear(x, features=4)", "j = concat(n, h)", "s = scale(j)", "d = linear(s, init=zero)", "return d"
    )
    assert find_node(remove_node(gated, "j", site=linear), "s").inputs == ("n",)
    tail = graph("n = linear(x, features=1)", "g = mul(h, n)", "return g")
    with pytest.raises(InvalidBlueprintError, match="node 'g' can't be removed"):
        remove_node(tail, "g", site=linear)


def test_splice_brings_a_part_of_the_donor_under_new_names(
    adapter: BlueprintIR, linear: Site, registry: BlueprintRegistry
) -> None:
    donor = registry.create_blueprint("gated_mlp").ir
    child = splice(adapter, "act", donor, "gated", site=linear)
    ops = [node.op for node in child.nodes]
    assert ops == ["align", "linear", "linear", "activation", "mul", "linear"]
    assert find_node(child, "up").inputs == ("gated",)


def test_splice_with_itself_renames(adapter: BlueprintIR, linear: Site) -> None:
    child = splice(adapter, "down", adapter, "up", site=linear)
    assert [node.name for node in child.nodes] == ["down2", "act2", "up2", "act", "up"]


def test_sum_of_two_graphs_costs_as_much_as_both(registry: BlueprintRegistry, site: Site) -> None:
    first, second = (registry.create_blueprint(name).ir for name in ("norm_shift", "bottleneck_adapter"))
    both = sum_of(first, second, site=site)
    assert cost(both, site).parameters == cost(first, site).parameters + cost(second, site).parameters


def test_prune_drops_unread_nodes(adapter: BlueprintIR) -> None:
    extra = BlueprintIR(nodes=(*adapter.nodes, IRNode(name="idle", op="scale", inputs=("h",))), output="up")
    with pytest.raises(InvalidBlueprintError, match="node 'idle' must reach the output"):
        validate(extra)
    assert prune(extra) == adapter

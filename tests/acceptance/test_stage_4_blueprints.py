"""Stage 4: the registry yields blueprints; Karn generates new ones; Urza finds them by their tags."""

from __future__ import annotations

import uuid

from esper.blueprints import check_blueprint, to_text
from esper.blueprints.registry import BlueprintRegistry, default_registry
from esper.client import EsperClient
from esper.contracts.blueprint import BlueprintMetadata, BlueprintState, Lineage, Site, SiteKind

CONV = Site(kind=SiteKind.CONV2D, input_shape=(3, 8, 8), output_shape=(4, 8, 8))
LINEAR = Site(kind=SiteKind.LINEAR, input_shape=(64,), output_shape=(16,))


def registry_with_test_template() -> BlueprintRegistry:
    registry = default_registry()
    ir = registry.create_blueprint("conv3x3").ir
    registry.register_template("test_template", lambda: ir, tags=["conv"], description="for this test", citation="")
    return registry


def test_the_registry_creates_a_blueprint_from_a_template() -> None:
    registry = registry_with_test_template()
    metadata = BlueprintMetadata(tags=["conv2d", "optimized"])
    blueprint = registry.create_blueprint("test_template", metadata)
    assert blueprint.architecture_ir
    assert blueprint.metadata.tags == ["conv2d", "optimized"]
    assert blueprint.lineage.operator == "template"
    assert "conv" in to_text(blueprint.architecture_ir)


def test_urza_finds_those_with_all_tags_and_only_those(client: EsperClient) -> None:
    urza_client = client.urza
    mine = f"acceptance-{uuid.uuid4().hex[:8]}"
    registry = default_registry()
    tagged = {"both": ["validated", "conv2d", mine], "one": ["validated", mine], "other": ["conv2d", mine]}
    sources = ("dilated_conv", "squeeze_excite", "conv1x1")
    for (name, tags), template in zip(tagged.items(), sources, strict=True):
        ir = changed(registry, template, mine)
        urza_client.create_blueprint(f"{mine}-{name}", ir, metadata=BlueprintMetadata(tags=tags))
    found = urza_client.search_blueprints(tags=["validated", "conv2d"])
    assert f"{mine}-both" in {blueprint.name for blueprint in found}
    assert all({"validated", "conv2d"} <= set(blueprint.metadata.tags) for blueprint in found)


def changed(registry: BlueprintRegistry, template: str, mark: str):  # type: ignore[no-untyped-def]
    """Give a template's graph with its own node names, so that no other test has stored the same one."""
    import dataclasses

    ir = registry.create_blueprint(template).ir
    names = {node.name: f"n{mark[-8:]}{index}" for index, node in enumerate(ir.nodes)}
    nodes = tuple(
        dataclasses.replace(node, name=names[node.name], inputs=tuple(names.get(name, name) for name in node.inputs))
        for node in ir.nodes
    )
    return dataclasses.replace(ir, nodes=nodes, output=names[ir.output])


def test_life_cycle_and_genealogy_are_kept(client: EsperClient) -> None:
    urza_client = client.urza
    mine = f"acceptance-{uuid.uuid4().hex[:8]}"
    parent = urza_client.get_blueprint("lora")
    child = urza_client.create_blueprint(
        mine,
        changed(default_registry(), "lora", mine),
        lineage=Lineage(parent_ids=(parent.id,), operator="manual", author="acceptance"),
    )
    assert [(depth, one.id) for depth, one in urza_client.get_lineage(child.id)] == [(1, parent.id)]
    validated = urza_client.set_blueprint_state(
        child.id, BlueprintState.VALIDATED, actor="acceptance", reason="passed its test"
    )
    assert validated.state is BlueprintState.VALIDATED


def test_karn_proposes_new_blueprints_within_constraints(client: EsperClient) -> None:
    proposals = client.karn.propose_blueprints(LINEAR, count=3, max_parameters=3000, random_seed=5)
    assert len(proposals) == 3
    for proposal in proposals:
        assert proposal.cost.parameters <= 3000
        assert 0 <= proposal.novelty <= 1
        check_blueprint(proposal.blueprint.ir, LINEAR).require()

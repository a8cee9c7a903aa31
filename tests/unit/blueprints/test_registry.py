from __future__ import annotations

import pytest

from esper.blueprints import BlueprintRegistry, Mixing, content_id, cost, default_registry, is_legal, parse_text, plan
from esper.blueprints.templates import TEMPLATES
from esper.contracts.blueprint import BlueprintIR, BlueprintMetadata, BlueprintState, Site, SiteKind
from esper.contracts.errors import AlreadyExistsError, InvalidBlueprintError, InvalidInputError, NotFoundError


def shift() -> BlueprintIR:
    return parse_text("blueprint 1\na = scale(h, value=0.0)\nreturn a")


def test_registered_template_gives_a_blueprint_with_the_metadata_given() -> None:
    registry = BlueprintRegistry()
    registry.register_template("test_template", shift, tags=("cheap",))
    blueprint = registry.create_blueprint("test_template", BlueprintMetadata(tags=["conv2d", "optimized"]))
    assert blueprint.architecture_ir == shift()
    assert blueprint.metadata.tags == ["conv2d", "optimized"]
    assert blueprint.id == content_id(shift())
    assert (blueprint.lineage.operator, blueprint.lineage.author) == ("template", "registry")
    assert (blueprint.state, blueprint.version) == (BlueprintState.DRAFT, 0)


def test_template_metadata_stands_in_where_none_is_given() -> None:
    registry = BlueprintRegistry()
    registry.register_template("a", shift, tags=("x",), description="d", citation="c", site_kinds=(SiteKind.LINEAR,))
    assert registry.create_blueprint("a").metadata == BlueprintMetadata(
        tags=["x"], description="d", citation="c", site_kinds=(SiteKind.LINEAR,)
    )


def test_blueprints_do_not_share_their_tags(registry: BlueprintRegistry) -> None:
    registry.create_blueprint("lora").metadata.tags.append("mine")
    assert "mine" not in registry.create_blueprint("lora").metadata.tags


def test_unknown_template_is_refused_with_the_names() -> None:
    registry = BlueprintRegistry()
    with pytest.raises(NotFoundError, match="template must be one of none, got 'b'"):
        registry.create_blueprint("b")
    registry.register_template("a", shift)
    with pytest.raises(NotFoundError, match="template must be one of a, got 'b'"):
        registry.create_blueprint("b")


def test_name_is_taken_once() -> None:
    registry = BlueprintRegistry()
    registry.register_template("a", shift)
    with pytest.raises(AlreadyExistsError, match="template 'a' is already registered"):
        registry.register_template("a", shift)


def test_bad_name_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="name must match"):
        BlueprintRegistry().register_template("No Spaces", shift)


def test_illegal_graph_is_refused_when_it_is_registered() -> None:
    registry = BlueprintRegistry()
    with pytest.raises(InvalidBlueprintError, match="nodes must be 1 to 64"):
        registry.register_template("a", lambda: BlueprintIR(nodes=(), output="a"))
    assert registry.names() == ()


def test_offers_are_legal_and_cheapest_first(registry: BlueprintRegistry, site: Site) -> None:
    offered = registry.for_site(site)
    prices = [cost(blueprint.ir, site).parameters for blueprint in offered]
    assert prices == sorted(prices)
    assert all(is_legal(blueprint.ir, site) for blueprint in offered)


def test_offers_span_kinds_and_not_only_sizes(registry: BlueprintRegistry, linear: Site, conv2d: Site) -> None:
    assert {"signal_conv", "image_conv", "lora", "gated_mlp"} <= {b.name for b in registry.for_site(linear)}
    assert {"conv3x3", "widen_conv", "squeeze_excite", "low_rank_attention"} <= {
        b.name for b in registry.for_site(conv2d)
    }


def test_image_view_is_offered_for_squares_only(registry: BlueprintRegistry) -> None:
    names = {
        size: {
            blueprint.name
            for blueprint in registry.for_site(Site(kind=SiteKind.LINEAR, input_shape=(size,), output_shape=(8,)))
        }
        for size in (64, 40)
    }
    assert "image_conv" in names[64]
    assert "image_conv" not in names[40]
    assert "signal_conv" in names[40]


def test_causal_sites_get_no_seed_that_looks_ahead(registry: BlueprintRegistry, tokens: Site) -> None:
    causal = registry.for_site(tokens, mixing=Mixing.CAUSAL)
    assert {"causal_attention", "causal_token_conv", "lora"} <= {blueprint.name for blueprint in causal}
    assert all(plan(blueprint.ir, tokens).mixing <= Mixing.CAUSAL for blueprint in causal)
    assert not {"low_rank_attention", "token_channel_mixer"} & {blueprint.name for blueprint in causal}


def test_every_template_is_described_cited_and_offered_somewhere(registry: BlueprintRegistry, site: Site) -> None:
    assert registry.names() == tuple(template.name for template in TEMPLATES)
    for template in TEMPLATES:
        assert template.description
        assert template.citation
        assert template.tags
    assert {blueprint.name for blueprint in registry.for_site(site)} <= set(registry.names())


def test_default_registries_are_independent() -> None:
    one, other = default_registry(), default_registry()
    one.register_template("mine", shift)
    assert "mine" not in other.names()

"""A run says which kinds of blueprint may stand in it: nothing else is a candidate, whoever made it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from esper.contracts.blueprint import Site, SiteKind
from esper.contracts.errors import InvalidInputError
from esper.contracts.run import SkipSite
from esper.services.tamiyo.candidates import CandidateSource
from esper.services.tamiyo.service import check_packet
from tests.unit.tamiyo.test_candidates import TEMPLATES, Designer, Library, names

DENSE_ON_VECTORS = {"bottleneck_adapter", "deepen", "gated_mlp", "glu", "lora", "norm_shift", "widen"}


async def test_only_what_the_run_allows_is_a_candidate_at_a_layer_and_as_a_skip_seed(make_packet, make_layer):
    skip = SkipSite(source="hidden", site=Site(kind=SiteKind.LINEAR, input_shape=(64,), output_shape=(10,)))
    layers = (make_layer("hidden"), replace(make_layer("head"), skip_sites=(skip,)))
    source = CandidateSource(Library(TEMPLATES))
    packet = make_packet(1, 1.0, layers=layers, allowed_blueprints="dense")
    found = await source.candidates(packet)
    assert names([one for one in found if one.layer == "hidden"]) == DENSE_ON_VECTORS
    assert {one.source for one in found} == {"", "hidden"}
    assert names([one for one in found if one.source]) < DENSE_ON_VECTORS
    assert source.held(packet) == found
    everything = await source.candidates(replace(packet, allowed_blueprints=""))
    assert names(everything) - names(found) == {"signal_conv", "image_conv"}, "another run is not bound by it"


async def test_a_design_of_another_kind_is_not_offered_whatever_it_is_called(make_packet):
    signal = next(one for one in TEMPLATES if one.name == "signal_conv")
    untagged = replace(signal, metadata=replace(signal.metadata, tags=["dense", "karn"]))
    source = CandidateSource(None, Designer(untagged))
    packet = make_packet(1, 1.0, allowed_blueprints="!conv")
    assert await source.candidates(packet, {"hidden"}) == []
    assert source.held(packet) == []
    assert len(await source.candidates(replace(packet, allowed_blueprints="conv"), {"hidden"})) == 1


async def test_karn_is_told_in_one_writing_and_asked_anew_for_another_meaning(make_packet):
    designer = Designer(next(one for one in TEMPLATES if one.name == "glu"))
    source = CandidateSource(None, designer)
    packet = make_packet(1, 1.0)
    for text in ("", "dense & !widening", " !widening&dense ", "dense"):
        await source.candidates(replace(packet, allowed_blueprints=text), {"hidden"})
    told = [request.constraints.allowed_blueprints for request in designer.requests]
    assert told == ["", "!widening & dense", "dense"]


@pytest.mark.parametrize("text", ["dense &", "a b"])
async def test_a_packet_whose_expression_is_none_is_refused(make_packet, text):
    packet = make_packet(1, 1.0, allowed_blueprints=text)
    with pytest.raises(InvalidInputError, match=r"state\.allowed_blueprints must have"):
        check_packet(packet)
    with pytest.raises(InvalidInputError, match=r"state\.allowed_blueprints must have"):
        await CandidateSource(Library(TEMPLATES)).candidates(packet)

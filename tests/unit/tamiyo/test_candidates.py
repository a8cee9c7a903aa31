"""Where candidates come from, what is left out, and what happens while a service is away."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from esper.blueprints import Mixing, allowed_mixing, default_registry
from esper.blueprints.cost import cost
from esper.contracts.blueprint import BlueprintState, Site, SiteKind
from esper.contracts.errors import InvalidInputError, InvalidStateError, UnavailableError
from esper.contracts.lifecycle import SeedLifecycleState
from esper.contracts.run import BudgetStatus, SeedStatus, SkipSite
from esper.contracts.wire import to_wire
from esper.services.tamiyo.candidates import CandidateConfig, CandidateSource
from esper.v1 import karn_service_pb2, urza_service_pb2

TEMPLATES = [
    replace(default_registry().create_blueprint(name), state=BlueprintState.ACTIVE)
    for name in default_registry().names()
]


class Library:
    """Answers SearchBlueprints from a row of blueprints, two a page; can be away."""

    def __init__(self, blueprints):
        self.blueprints = blueprints
        self.calls = 0
        self.away = False

    async def SearchBlueprints(self, request, **_):
        self.calls += 1
        if self.away:
            raise UnavailableError("the library is away")
        start = int(request.page_token or 0)
        answer = urza_service_pb2.SearchBlueprintsResponse()
        for one in self.blueprints[start : start + 2]:
            answer.blueprints.add().CopyFrom(to_wire(one))
        if start + 2 < len(self.blueprints):
            answer.next_page_token = str(start + 2)
        return answer


class Designer:
    """Answers ProposeBlueprints with one design; writes down what it is told and asked, in order."""

    def __init__(self, blueprint):
        self.blueprint = blueprint
        self.away = False
        self.barren = False
        self.refuses_reports = False
        self.requests = []
        self.heard = []

    async def SubmitFieldReport(self, request, **_):
        if self.away:
            raise UnavailableError("the designer is away")
        self.heard.append(request.report.report_id)
        if self.refuses_reports:
            raise InvalidInputError("report.price must be >= 0")
        return karn_service_pb2.KarnServiceSubmitFieldReportResponse()

    async def ProposeBlueprints(self, request, **_):
        self.requests.append(request)
        self.heard.append("asked")
        if self.away:
            raise UnavailableError("the designer is away")
        if self.barren:
            raise InvalidStateError("no design keeps the constraints")
        answer = karn_service_pb2.ProposeBlueprintsResponse()
        answer.proposals.add().blueprint.CopyFrom(to_wire(self.blueprint))
        return answer


class SlowDesigner(Designer):
    """A designer that answers nobody until it may go on."""

    def __init__(self, blueprint):
        super().__init__(blueprint)
        self.began = asyncio.Event()
        self.go_on = asyncio.Event()

    async def ProposeBlueprints(self, request, **_):
        self.began.set()
        await self.go_on.wait()
        return await super().ProposeBlueprints(request)


class Clock:
    now_s = 0.0

    def __call__(self):
        return self.now_s


def names(candidates):
    return {one.blueprint.name for one in candidates}


async def test_every_legal_blueprint_of_every_page_is_a_candidate(make_packet):
    found = await CandidateSource(Library(TEMPLATES)).candidates(make_packet(1, 1.0))
    expected = {one.name for one in default_registry().for_site(found[0].site)}
    assert names([one for one in found if one.layer == "hidden"]) == expected
    assert {one.layer for one in found} == {"hidden", "head"}
    assert all(one.cost.parameters > 0 for one in found)


async def test_places_of_skip_seeds_take_the_librarys_blueprints_and_no_designs(make_packet, make_layer):
    skip = SkipSite(source="hidden", site=Site(kind=SiteKind.LINEAR, input_shape=(64,), output_shape=(10,)))
    layers = (make_layer("hidden"), replace(make_layer("head"), skip_sites=(skip,)))
    lora = next(one for one in TEMPLATES if one.name == "lora")
    designer = Designer(next(one for one in TEMPLATES if one.name == "glu"))
    source = CandidateSource(Library([lora]), designer)
    found = await source.candidates(make_packet(1, 1.0, layers=layers))
    assert [(one.layer, one.source) for one in found if one.blueprint.name == "lora"] == [
        ("hidden", ""),
        ("head", ""),
        ("head", "hidden"),
    ]
    (at_skip,) = [one for one in found if one.source]
    assert at_skip.site == skip.site
    assert at_skip.cost == cost(lora.ir, skip.site)
    assert len(designer.requests) == 2, "once for each layer's own site"


async def test_what_reads_the_layers_output_alone_is_no_skip_seed(make_packet, make_layer):
    skip = SkipSite(source="hidden", site=Site(kind=SiteKind.LINEAR, input_shape=(64,), output_shape=(10,)))
    layers = (replace(make_layer("head"), skip_sites=(skip,)),)
    designs = [one for one in TEMPLATES if one.name in ("norm_shift", "deepen", "lora")]
    found = await CandidateSource(Library(designs)).candidates(make_packet(1, 1.0, layers=layers))
    assert sorted((one.blueprint.name, one.source) for one in found) == [
        ("deepen", ""),
        ("lora", ""),
        ("lora", "hidden"),
        ("norm_shift", ""),
    ]


async def test_the_library_is_asked_again_only_when_its_answer_is_old(make_packet):
    library, clock = Library(TEMPLATES[:2]), Clock()
    source = CandidateSource(library, config=CandidateConfig(refresh_s=10.0), clock=clock)
    await source.candidates(make_packet(1, 1.0))
    await source.candidates(make_packet(2, 1.0))
    assert library.calls == 1
    clock.now_s = 10.0
    await source.candidates(make_packet(3, 1.0))
    assert library.calls == 2


async def test_with_the_library_away_the_last_answer_stands(make_packet):
    library, clock = Library(TEMPLATES), Clock()
    source = CandidateSource(library, config=CandidateConfig(refresh_s=1.0), clock=clock)
    before = await source.candidates(make_packet(1, 1.0))
    library.away, clock.now_s = True, 5.0
    assert await source.candidates(make_packet(2, 1.0)) == before
    assert source.failures["urza"] == 1


async def test_designs_join_the_librarys_blueprints_once(make_packet):
    lora = next(one for one in TEMPLATES if one.name == "lora")
    both = await CandidateSource(Library([lora]), Designer(lora)).candidates(make_packet(1, 1.0))
    assert [one.layer for one in both] == ["hidden", "head"]
    designer = Designer(lora)
    designer.away = True
    source = CandidateSource(None, designer)
    assert await source.candidates(make_packet(1, 1.0)) == []
    assert source.failures["karn"] > 0


async def test_a_service_that_is_away_is_not_asked_again_at_once(make_packet):
    designer, clock = Designer(TEMPLATES[0]), Clock()
    designer.away = True
    source = CandidateSource(None, designer, CandidateConfig(refresh_s=10.0), clock=clock)
    await source.candidates(make_packet(1, 1.0))
    assert len(designer.requests) == 1, "two layers, and one failure is enough"
    designer.away, clock.now_s = False, 10.0
    assert len(await source.candidates(make_packet(2, 1.0))) == 2


async def test_designs_are_asked_for_within_the_budget_left(make_packet):
    designer = Designer(TEMPLATES[0])
    source = CandidateSource(None, designer)
    budget = BudgetStatus(max_added_parameters=2_500, added_parameters=400)
    await source.candidates(make_packet(1, 1.0, budget=budget), {"hidden"})
    (request,) = designer.requests
    assert request.constraints.max_parameters == 2_048, "2100 with three binary digits"
    assert not request.constraints.HasField("max_flops")
    await source.candidates(make_packet(2, 1.0, budget=replace(budget, added_parameters=420)), {"hidden"})
    assert len(designer.requests) == 1
    await source.candidates(make_packet(3, 1.0, budget=replace(budget, added_parameters=2_000)), {"hidden"})
    assert designer.requests[1].constraints.max_parameters == 448


async def test_a_report_has_designs_asked_for_anew(make_packet, make_report):
    designer = Designer(TEMPLATES[0])
    source = CandidateSource(None, designer)
    packet = make_packet(1, 1.0)
    await source.candidates(packet, {"hidden"})
    elsewhere = Site(kind=SiteKind.CONV2D, input_shape=(1, 4, 4), output_shape=(1, 4, 4))
    source.note_report(make_report(site=elsewhere))
    await source.candidates(packet, {"hidden"})
    assert len(designer.requests) == 1
    source.note_report(make_report("r2"))
    await source.candidates(packet, {"hidden"})
    assert len(designer.requests) == 2


async def test_karn_knows_every_report_that_was_learned_from_before_it_is_asked(make_packet, make_report):
    designer, packet = Designer(TEMPLATES[0]), make_packet(1, 1.0)
    source = CandidateSource(None, designer)
    for name in ("r1", "r2"):
        source.note_report(make_report(name))
    await source.candidates(packet, {"hidden"})
    assert designer.heard == ["r1", "r2", "asked"]
    await source.candidates(replace(packet, run_id="run-2"), {"hidden"})
    assert designer.heard == ["r1", "r2", "asked", "asked"], "each run asks for itself; a report is told once"


async def test_designs_asked_for_ahead_are_those_a_decision_finds(make_packet, make_report):
    designer, packet = Designer(TEMPLATES[0]), make_packet(1, 1.0)
    asked_late = await CandidateSource(None, Designer(TEMPLATES[0])).candidates(packet)
    source = CandidateSource(None, designer)
    assert source.held(packet) == []
    assert [await source.ask_ahead(packet) for _ in range(3)] == [True, True, False], "one layer after the other"
    asked = list(designer.requests)
    assert source.held(packet) == asked_late
    assert await source.candidates(packet) == asked_late
    assert designer.requests == asked, "the decision asks nobody"
    source.note_report(make_report())
    assert await source.ask_ahead(packet)
    assert designer.heard == ["asked", "asked", "r1", "asked"], "after every report that a decision would learn from"


async def test_only_what_may_be_grown_is_asked_for_ahead(make_packet, make_layer):
    busy = (SeedStatus(seed_index=0, state=SeedLifecycleState.ACTIVE),)
    layers = (make_layer("hidden", seeds=busy), replace(make_layer("head"), site=None))
    designer = Designer(TEMPLATES[0])
    assert not await CandidateSource(None, designer).ask_ahead(make_packet(1, 1.0, layers=layers))
    assert not await CandidateSource(None, designer, CandidateConfig(proposals=0)).ask_ahead(make_packet(1, 1.0))
    assert not await CandidateSource(None, None).ask_ahead(make_packet(1, 1.0))
    assert designer.requests == []


async def test_a_failure_ahead_leaves_the_decision_to_ask_for_itself(make_packet):
    designer, packet = Designer(TEMPLATES[0]), make_packet(1, 1.0)
    source = CandidateSource(None, designer)
    designer.away = True
    with pytest.raises(UnavailableError, match="the designer is away"):
        await source.ask_ahead(packet)
    designer.away = False
    assert len(await source.candidates(packet)) == 2
    assert source.failures["karn"] == 0


async def test_a_designer_found_away_by_a_decision_is_not_asked_ahead(make_packet):
    designer, packet = Designer(TEMPLATES[0]), make_packet(1, 1.0)
    source = CandidateSource(None, designer, clock=Clock())
    designer.away = True
    await source.candidates(packet)
    assert not await source.ask_ahead(packet)
    assert len(designer.requests) == 1


async def test_a_decision_waits_for_what_is_being_asked_ahead_and_never_behind_a_queue_of_it(make_packet):
    designer = SlowDesigner(TEMPLATES[0])
    source = CandidateSource(None, designer)
    ahead = [asyncio.create_task(source.ask_ahead(make_packet(1, 1.0, run_id=f"run-{name}"))) for name in range(5)]
    await designer.began.wait()
    decision = asyncio.create_task(source.candidates(make_packet(1, 1.0, run_id="run-0"), {"hidden"}))
    await asyncio.sleep(0)
    designer.go_on.set()
    assert len(await decision) == 1
    assert len(designer.requests) <= 2, "of the five, one was at Karn and one more may have come before"
    await asyncio.gather(*ahead)
    assert len(designer.requests) == 5, "the decision found what was asked ahead for its run"


async def test_a_current_answer_is_held_alone_and_older_ones_until_it_is_there(make_packet, make_report):
    packet = make_packet(1, 1.0, layers=make_packet(1, 1.0).layers[:1])
    designer = Designer(TEMPLATES[0])
    source = CandidateSource(None, designer)
    await source.candidates(packet)
    designer.blueprint = TEMPLATES[1]
    source.note_report(make_report())
    assert names(source.held(packet)) == {TEMPLATES[0].name}
    await source.ask_ahead(packet)
    assert names(source.held(packet)) == {TEMPLATES[1].name}


async def test_reports_wait_for_a_designer_that_is_away_and_one_it_refuses_keeps_none_from_it(make_packet, make_report):
    designer, clock = Designer(TEMPLATES[0]), Clock()
    source = CandidateSource(None, designer, CandidateConfig(refresh_s=10.0), clock=clock)
    before = await source.candidates(make_packet(1, 1.0), {"hidden"})
    source.note_report(make_report("r1"))
    source.note_report(make_report("r2"))
    designer.away = True
    assert await source.candidates(make_packet(2, 1.0), {"hidden"}) == before, "the last answer stands"
    designer.away, designer.refuses_reports, clock.now_s = False, True, 10.0
    assert await source.candidates(make_packet(3, 1.0), {"hidden"}) == before
    assert designer.heard == ["asked", "r1", "r2", "asked"]


async def test_the_age_of_designs_is_no_reason_to_ask_again(make_packet):
    designer, clock = Designer(TEMPLATES[0]), Clock()
    source = CandidateSource(None, designer, CandidateConfig(refresh_s=1.0), clock=clock)
    await source.candidates(make_packet(1, 1.0), {"hidden"})
    clock.now_s = 1e6
    await source.candidates(make_packet(2, 1.0), {"hidden"})
    assert len(designer.requests) == 1


async def test_that_no_design_keeps_the_bounds_is_no_failure(make_packet):
    designer = Designer(TEMPLATES[0])
    designer.barren = True
    source = CandidateSource(Library(TEMPLATES), designer)
    assert await source.candidates(make_packet(1, 1.0))
    assert source.failures["karn"] == 0


async def test_only_the_layers_of_interest_are_looked_at(make_packet):
    found = await CandidateSource(Library(TEMPLATES)).candidates(make_packet(1, 1.0), {"head"})
    assert {one.layer for one in found} == {"head"}


async def test_a_blueprint_that_is_not_what_its_id_says_is_left_out(make_packet):
    forged = replace(TEMPLATES[0], id="0" * 64)
    assert await CandidateSource(Library([forged])).candidates(make_packet(1, 1.0)) == []


async def test_layers_that_have_shown_no_shape_are_left_out(make_packet):
    packet = make_packet(1, 1.0)
    blind = replace(packet, layers=tuple(replace(layer, site=None) for layer in packet.layers))
    assert await CandidateSource(Library(TEMPLATES)).candidates(blind) == []


async def test_no_seed_of_a_sequence_layer_may_look_ahead():
    tokens = Site(kind=SiteKind.LINEAR, input_shape=(16, 32), output_shape=(16, 32))
    assert allowed_mixing(tokens) is Mixing.CAUSAL
    assert allowed_mixing(Site(kind=SiteKind.LINEAR, input_shape=(32,), output_shape=(32,))) is Mixing.FULL
    offered = {one.name for one in await CandidateSource(Library(TEMPLATES)).blueprints(tokens)}
    causal = {one.name for one in default_registry().for_site(tokens, mixing=Mixing.CAUSAL)}
    assert offered == causal
    assert offered < {one.name for one in default_registry().for_site(tokens)}


async def test_names_of_what_was_offered_are_remembered(make_packet):
    source = CandidateSource(Library(TEMPLATES))
    await source.candidates(make_packet(1, 1.0))
    lora = next(one for one in TEMPLATES if one.name == "lora")
    assert source.name_of(lora.id) == "lora"
    assert source.name_of("0" * 64) == ""


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("refresh_s", -1.0, "refresh_s must be >= 0 seconds, got -1"),
        ("proposals", 33, r"proposals must be within \[0, 32\], got 33"),
        ("call_timeout_s", 0.0, "call_timeout_s must be > 0 seconds, got 0"),
    ],
)
def test_settings_that_break_their_rule_are_refused(setting, value, message):
    with pytest.raises(InvalidInputError, match=message):
        CandidateConfig(**{setting: value})

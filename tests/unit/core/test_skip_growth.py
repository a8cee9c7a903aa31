"""Skip seeds grown by decisions: offered by packets, gated, grafted, reported, and built again from a checkpoint."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import esper
from esper.blueprints import is_legal
from esper.contracts.decision import PlanStatus
from esper.contracts.run import SkipSite
from esper.contracts.wire import from_wire, to_wire
from esper.core.capture import capture_model, restore_model
from esper.execution.layers.germination import MAX_SOURCES
from esper.telemetry.subjects import Kind

GROWTH = esper.GrowthConfig(incubation_epochs=2, graft_epochs=1, incubation_learning_rate=1e-2)


def train(session: Any, task: Any, epochs: int) -> None:
    model, criterion = session._context.model, session._context.loss_fn
    for _ in range(epochs):
        for x, y in task.train:
            loss = criterion(model(x), y)
            loss.backward()
            session.step(loss)
        session.end_epoch()


def skip_decision(decide: Any, model: Any, *, template: str = "widen", **changes: Any) -> Any:
    site = model.kasmina_layers["2"].skip_site("0")
    return decide(model, "2", template, **({"site": site, "source": "0"} | changes))


def test_packets_offer_the_places_of_skip_seeds(task: Any, line: Any, open_session: Any) -> None:
    model = esper.wrap(task.host())
    session = open_session(model)
    train(session, task, 1)
    first, last = line.values(Kind.STATE)[-1].layers
    assert first.skip_sites == ()
    assert last.skip_sites == (SkipSite(source="0", site=model.kasmina_layers["2"].skip_site("0")),)
    assert last.skip_sites[0].site.input_shape == (6,)
    assert from_wire(to_wire(last), type(last)) == last


def test_of_many_sources_the_first_and_the_nearest_are_offered() -> None:
    model = esper.wrap(nn.Sequential(*(nn.Linear(4, 4) for _ in range(9))))
    model(torch.randn(2, 4))
    offered = [place.source for place in model.kasmina_layers["8"].skip_sites()]
    assert offered == ["0", "5", "6", "7"]
    assert len(offered) == MAX_SOURCES


def test_layers_of_other_ranks_are_not_offered() -> None:
    model = esper.wrap(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 4), nn.Linear(4, 3)))
    model(torch.randn(2, 1, 4, 4))
    assert [place.source for place in model.kasmina_layers["3"].skip_sites()] == ["2"]
    assert model.kasmina_layers["2"].skip_sites() == ()


def test_a_skip_seed_goes_through_its_whole_life(
    large_task: Any, line: Any, open_session: Any, decide: Any, kernel_for: Any
) -> None:
    """The host's own hidden layer is too narrow; a skip seed around it is what widening it would be."""
    model = esper.wrap(large_task.host())
    session = open_session(model, control=large_task.control, growth=GROWTH)
    decision = skip_decision(decide, model, template="gated_mlp")
    line.incoming += [decision, kernel_for(decision)]
    train(session, large_task, 9)
    (adaptation,) = session.report().adaptations
    assert adaptation.outcome == "kept", adaptation
    assert (adaptation.layer, adaptation.source) == ("2", "0")
    assert "| 2 from 0 | gated_mlp |" in session.report().to_markdown()
    (report,) = line.values(Kind.FIELD_REPORT)
    assert (report.layer, report.source) == ("2", "0")
    assert report.site == decision.site
    (grown,) = model.grown_structure()
    assert grown.source == "0"
    head = line.values(Kind.STATE)[-1].layers[1]
    assert [seed.source for seed in head.seeds] == ["0", "", "", ""]
    assert from_wire(to_wire(head), type(head)) == head
    fresh = esper.wrap(large_task.host())
    restore_model(fresh, capture_model(model))
    x = next(iter(large_task.control))[0]
    assert torch.equal(fresh.eval()(x), model.eval()(x))
    assert [place.source for place in fresh.kasmina_layers["2"].skip_sites()] == ["0"], "its order was seen anew"


@pytest.mark.parametrize("way", ["trial", "local"])
def test_while_it_learns_alone_the_host_is_untouched_to_the_bit(
    task: Any, line: Any, open_session: Any, decide: Any, kernel_for: Any, way: Any
) -> None:
    growth = esper.GrowthConfig(incubation_epochs=20, incubation_way=way, incubation_cost=10.0)
    model, plain = esper.wrap(task.host()), task.host()
    session = open_session(model, growth=growth)
    decision = skip_decision(decide, model)
    line.incoming += [decision, kernel_for(decision)]
    train(session, task, 3)
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    for _ in range(3):
        for x, y in task.train:
            nn.CrossEntropyLoss()(plain(x), y).backward()
            reference.step()
            reference.zero_grad()
    host = [value for name, value in model.named_parameters() if ".seeds." not in name]
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), host, strict=True))
    seed = model.kasmina_layers["2"].require_seed(0)
    assert any(bool(value.abs().sum() > 0) for name, value in seed.named_parameters() if "out" in name)


@pytest.mark.parametrize(
    ("changes", "detail"),
    [
        ({"source": "nowhere"}, "source must be a layer of the model that can hold seeds, got 'nowhere'"),
        ({"source": "2"}, "source must run before the layer '2', got '2'"),
        ({"source": ""}, "layer has"),
    ],
)
def test_a_source_that_does_not_fit_is_refused_in_words(
    task: Any, line: Any, open_session: Any, decide: Any, changes: Any, detail: str
) -> None:
    model = esper.wrap(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)))
    session = open_session(model)
    train(session, task, 1)
    line.incoming.append(replace(skip_decision(decide, model), **changes))
    train(session, task, 1)
    (plan,) = line.values(Kind.PLAN)
    assert plan.status is PlanStatus.REJECTED
    assert detail in plan.reason
    assert not session.report().adaptations


def test_an_offered_place_takes_what_is_legal_there(task: Any, line: Any, open_session: Any, decide: Any) -> None:
    model = esper.wrap(task.host())
    open_session(model)
    place = model.kasmina_layers["2"].skip_sites()[0]
    decision = skip_decision(decide, model, template="glu")
    assert is_legal(decision.blueprint.ir, place.site)

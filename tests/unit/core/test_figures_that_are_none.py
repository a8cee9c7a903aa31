"""Effects and control losses that are no number: who has such an effect loses, and what is told of it is legal."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import nn

import esper
from esper.contracts.lifecycle import SeedLifecycleState as State
from esper.contracts.run import AdaptationOutcome, Contribution
from esper.core import race
from esper.core.adaptation import Adaptation
from esper.services.karn.service import check_report as check_by_karn
from esper.services.tamiyo.run_memory import RunMemory
from esper.services.tamiyo.service import check_report as check_by_tamiyo
from esper.telemetry.subjects import Kind
from tests.unit.core.test_race import GROWTH
from tests.unit.core.test_session import state_of, train

RACE = "a" + "f" * 32
BRINGS = {"a1": 0.02, "a2": math.nan, "a3": 0.05}


@pytest.mark.parametrize("order", list(itertools.permutations(BRINGS)))
def test_whose_effect_is_no_number_comes_last_in_whatever_order(task: Any, decide: Any, order: tuple[str, ...]) -> None:
    model = esper.wrap(task.host())
    rivals = [Adaptation(decision=decide(model, adaptation_id=name)) for name in order]
    noise = 0.001 * torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    effects = torch.stack([noise + BRINGS[name] for name in order])
    found = race.standings(rivals, effects, [0.0] * 3, level=0.95, rounds=2)
    assert [one.adaptation.id for one in found] == ["a3", "a1", "a2"]
    assert [one.is_measured for one in found] == [True, True, False]
    for one, effect in zip(rivals, effects, strict=True):
        one.contribution = Contribution(estimate=float(effect.mean()), low=0.0, high=0.0, num_examples=40)
    ranked = race.company(rivals, [], lambda some: len(some) == 1)
    assert [one.id for one in ranked] == ["a3"]


@pytest.fixture
def racing(large_task: Any, line: Any, open_session: Any, decide: Any, kernel_for: Any) -> Any:
    """A race of three that has learnt for one epoch; gives the session and them, in the order sent."""
    model = esper.wrap(nn.Sequential(large_task.host()[0], nn.Linear(6, 2)))
    session = open_session(model, control=large_task.control, growth=GROWTH)
    templates = ("gated_mlp", "gated_mlp", "norm_shift")
    sent = [
        decide(model, "0", template, seed_index=seed, race_id=RACE, race_size=3)
        for seed, template in enumerate(templates)
    ]
    line.incoming += [*sent, *map(kernel_for, sent)]
    train(session, large_task, 1)
    return session, [session.orchestrator.adaptations[one.adaptation_id] for one in sent]


def spoil(session: Any, task: Any, adaptation: Adaptation) -> None:
    """Let a rival's kernel answer one control example with what is a number, and overflows in the layer behind it."""
    example = task.control.dataset.tensors[0][17]

    def overflow(_module: nn.Module, args: tuple[Any, ...], delta: torch.Tensor) -> torch.Tensor:
        is_one = (args[0] == example).all(1, keepdim=True)
        return torch.where(is_one, torch.full_like(delta, 3e38), delta)

    layer = session._context.model.kasmina_layers[adaptation.layer]
    layer.require_seed(adaptation.seed_index).kernel.register_forward_hook(overflow)


def test_a_rival_that_is_no_number_goes_in_the_first_round_and_the_best_of_the_others_is_grafted(
    large_task: Any, line: Any, racing: Any
) -> None:
    session, (bad, good, _) = racing
    spoil(session, large_task, bad)
    train(session, large_task, 1)
    assert bad.outcome is AdaptationOutcome.CULLED
    assert bad.reason == "with it on, the loss of a control example is no number"
    (report,) = [one for one in line.values(Kind.FIELD_REPORT) if one.adaptation_id == bad.id]
    check_by_tamiyo(report)
    check_by_karn(report)
    assert report.contribution is None
    assert "its effect is no number" in report.reason
    memory = RunMemory()
    memory.note_report(report)
    assert memory.embargoed("0", bad.decision.blueprint_id, 5)
    train(session, large_task, 2)
    assert good.state is State.EVALUATING


def test_a_seed_is_priced_once_the_control_loss_is_a_number(
    task: Any, line: Any, open_session: Any, decide: Any, kernel_for: Any
) -> None:
    session = open_session(growth=GROWTH)
    loss, session._context.control_loss = session._context.control_loss, math.nan
    decision = decide(session._context.model)
    line.incoming += [decision, kernel_for(decision)]
    session._take_in()
    adaptation = session.orchestrator.adaptations[decision.adaptation_id]
    assert adaptation.price is None
    session.orchestrator._fail(adaptation, "a test")
    (report,) = line.values(Kind.FIELD_REPORT)
    check_by_tamiyo(report)
    check_by_karn(report)
    second = decide(session._context.model, "2")
    line.incoming += [second, kernel_for(second)]
    session._take_in()
    priced = session.orchestrator.adaptations[second.adaptation_id]
    assert priced.price is None
    session._context.control_loss = loss
    train(session, task, 1)
    parameters = priced.cost.parameters / session._context.host_parameters
    flops = priced.cost.flops / session._context.host_flops
    assert priced.price == pytest.approx((0.02 * parameters + 0.001 * flops) * loss)


def test_a_seed_without_a_price_is_never_kept(
    large_task: Any, line: Any, open_session: Any, decide: Any, kernel_for: Any
) -> None:
    model = esper.wrap(nn.Sequential(large_task.host()[0], nn.Linear(6, 2)))
    session = open_session(model, control=large_task.control, growth=GROWTH)
    decision = decide(model, template="gated_mlp")
    line.incoming += [decision, kernel_for(decision)]
    train(session, large_task, 5)
    adaptation = session.orchestrator.adaptations[decision.adaptation_id]
    assert state_of(session) is State.EVALUATING
    assert adaptation.looks == 1
    adaptation.price = None
    adaptation.contribution = Contribution(estimate=0.2, low=0.1, high=0.3, num_examples=400)
    session.finish()
    assert adaptation.outcome is AdaptationOutcome.CULLED

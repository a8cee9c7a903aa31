"""What growth costs a run: booked once, by phase, and told by report and packet without changing a bit of the run."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import esper
from esper.blueprints import default_registry
from esper.contracts.run import GrowthCost, GrowthPhase
from esper.core.costs import CostMeter
from esper.core.incubator import Incubator, LearningWay
from esper.core.report import EpochRecord, PhaseCost, RunReport
from esper.telemetry.subjects import Kind

BIRTH, ISOLATION, RACE = GrowthPhase.BIRTH, GrowthPhase.ISOLATION, GrowthPhase.RACE
A, B = torch.randn(4, 8), torch.randn(8, 2)
FLOPS = 2 * 4 * 8 * 2


def by_phase(costs: tuple[GrowthCost, ...]) -> dict[GrowthPhase, GrowthCost]:
    return {cost.phase: cost for cost in costs}


def test_what_lies_within_a_phase_is_no_part_of_it() -> None:
    meter, began_s = CostMeter(counts_flops=True), time.perf_counter()
    with meter.phase(ISOLATION):
        _ = A @ B
        with meter.phase(BIRTH):
            _ = (A @ B, A @ B)
            with meter.phase(RACE):
                _ = A @ B
        _ = A @ B
    with meter.phase(BIRTH):
        _ = A @ B
    whole_s, found = time.perf_counter() - began_s, by_phase(meter.costs())
    assert {phase: found[phase].flops for phase in (BIRTH, ISOLATION, RACE)} == {
        BIRTH: 3 * FLOPS,
        ISOLATION: 2 * FLOPS,
        RACE: FLOPS,
    }
    assert all(found[phase].seconds > 0 for phase in (BIRTH, ISOLATION, RACE))
    assert sum(cost.seconds for cost in found.values()) <= whole_s
    assert [cost.phase for cost in meter.costs()] == list(GrowthPhase)


def test_a_phase_that_fails_is_booked_and_the_one_around_goes_on() -> None:
    meter = CostMeter(counts_flops=True)

    @meter.phase(BIRTH)
    def fail() -> None:
        _ = A @ B
        raise ValueError("lost")

    with meter.phase(ISOLATION):
        with pytest.raises(ValueError, match="lost"):
            fail()
        _ = A @ B
    found = by_phase(meter.costs())
    assert (found[BIRTH].flops, found[ISOLATION].flops) == (FLOPS, FLOPS)


def test_where_flops_are_not_counted_there_are_none() -> None:
    meter = CostMeter()
    with meter.phase(RACE):
        _ = A @ B
    assert {cost.flops for cost in meter.costs()} == {None}
    assert by_phase(meter.costs())[RACE].seconds > 0


def train(task: Any, session: esper.Session, epochs: int) -> None:
    criterion = nn.CrossEntropyLoss()
    model: Any = session._context.model
    for _ in range(epochs):
        for x, y in task.train:
            loss = criterion(model(x), y)
            loss.backward()
            session.step(loss, batch=(x, y))
        session.end_epoch()


@pytest.mark.parametrize("counts_flops", [False, True])
def test_a_run_in_which_nothing_grows_pays_for_its_looks_alone(
    task: Any, open_session: Callable[..., Any], counts_flops: bool
) -> None:
    session = open_session(counts_flops=counts_flops)
    train(task, session, 2)
    found = by_phase(session.growth_costs)
    assert found[GrowthPhase.CONTROL].seconds > 0
    assert all(found[phase].seconds == 0 for phase in (BIRTH, ISOLATION, RACE))
    looks = 2 * len(task.control.dataset) * 2 * (6 * 6 + 6 * 2) if counts_flops else None
    assert found[GrowthPhase.CONTROL].flops == looks


def test_each_phase_of_a_race_is_booked_and_told(
    task: Any, line: Any, open_session: Callable[..., Any], decide: Any, kernel_for: Any
) -> None:
    runs = {}
    for counts_flops in (True, False):
        torch.manual_seed(0)
        line.sent.clear()
        session = open_session(
            counts_flops=counts_flops, growth=esper.GrowthConfig(incubation_epochs=2, race_rounds=1, graft_epochs=1)
        )
        model: Any = session._context.model
        train(task, session, 1)
        assert by_phase(session.growth_costs)[ISOLATION].seconds == 0
        for number, layer in enumerate(("0", "2")):
            decision = decide(
                model,
                layer,
                "gated_mlp",
                adaptation_id=f"a{number:032x}",
                race_id="a" + "f" * 32,
                race_size=2,
            )
            line.incoming += [decision, kernel_for(decision)]
        train(task, session, 6)
        report = session.report()
        told = line.values(Kind.STATE)[-1].growth_costs
        runs[counts_flops] = model.state_dict(), by_phase(session.growth_costs), report
        assert [cost.phase for cost in told] == list(GrowthPhase)
        assert by_phase(told)[ISOLATION] == by_phase(session.growth_costs)[ISOLATION]
        assert [PhaseCost.of(cost) for cost in session.growth_costs] == list(report.costs)
    (counted, costs, _), (timed, times, report) = runs[True], runs[False]
    assert all(torch.equal(one, timed[name]) for name, one in counted.items() if isinstance(one, torch.Tensor))
    assert all(costs[phase].flops for phase in GrowthPhase)
    assert all(times[phase].seconds > 0 for phase in GrowthPhase)
    assert any(item.graft_steps for item in report.adaptations)


@pytest.mark.parametrize("kind", ["damped", "local"])
def test_a_seed_is_born_once_and_its_fit_is_no_part_of_its_learning(task: Any, kind: Any) -> None:
    meter, model = CostMeter(counts_flops=True), esper.wrap(task.host())
    model.eval()(task.train.dataset.tensors[0][:2])
    model.kasmina_layer("0").germinate(0, default_registry().create_blueprint("gated_mlp").ir)
    incubator = Incubator(
        model,
        nn.CrossEntropyLoss(),
        layer="0",
        seed_index=0,
        learning_rate=1e-2,
        way=LearningWay(kind=kind),
        fitting_seed=3,
        costs=meter,
    )
    batch = next(iter(task.train))
    told = []
    for _ in range(4):
        nn.functional.cross_entropy(model.train()(batch[0]), batch[1]).backward()
        incubator.step(batch)
        told.append(by_phase(meter.costs()))
    incubator.close()
    births, learning = ([one[phase].flops for one in told] for phase in (BIRTH, ISOLATION))
    assert births == births[:1] * 4
    assert births[0] > 0
    each = learning[1] - learning[0]
    assert learning[3] - learning[2] == learning[2] - learning[1] == each
    assert each <= learning[0] < 2 * each, "what the fit took is in no step; the first asks if its loss takes damping"


def test_a_report_tells_costs_with_their_share_of_the_run() -> None:
    costs = (PhaseCost(phase="birth", seconds=0.5, flops=None), PhaseCost(phase="race", seconds=1.0, flops=1_200))
    record = EpochRecord(
        epoch=1, step=3, train_loss=None, control_loss=0.5, control_accuracy=None, parameters=1, seconds=4.0
    )
    whole = RunReport(run_id="r", phase="finished", host_params=1, final_params=1, history=(record,), costs=costs)
    text = whole.to_markdown()
    assert "| birth | 0.500 | 12.5% | not counted |" in text
    assert "| race | 1.000 | 25.0% | 1,200 |" in text
    assert json.loads(whole.to_json())["costs"][1] == {"phase": "race", "seconds": 1.0, "flops": 1200}
    bare = RunReport(run_id="r", phase="finished", host_params=1, final_params=1)
    assert "## What growth cost\n\nNot measured." in bare.to_markdown()

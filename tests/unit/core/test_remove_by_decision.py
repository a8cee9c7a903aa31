"""``remove_seed`` as the policy asks for it: a fossil goes, its place in the budget comes back, and it is told."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import esper
from esper.contracts.decision import AdaptationType, PlanStatus
from esper.contracts.lifecycle import SeedLifecycleState as State
from esper.contracts.run import AdaptationOutcome, Contribution, GateCheck
from esper.recovery import CheckpointConfig, CheckpointManager
from esper.telemetry.subjects import Kind

PASSED = GateCheck(name="test", passed=True, detail="by test")


def step(session: esper.Session, task: Any) -> None:
    x, y = next(iter(task.train))
    context = session._context
    loss = context.loss_fn(context.model(x), y)
    loss.backward()
    session.step(loss)


def fossil(session: esper.Session, task: Any, line: Any, decide: Any, kernel_for: Any) -> Any:
    """Have a seed stand as a fossil at the first layer, however little it brought."""
    decision = decide(session._context.model)
    line.incoming += [decision, kernel_for(decision)]
    step(session, task)
    orchestrator = session.orchestrator
    (adaptation,) = orchestrator.ongoing()
    orchestrator._graft(adaptation, PASSED)
    adaptation.contribution = Contribution(estimate=0.1, low=0.05, high=0.15, num_examples=100)
    orchestrator._fossilize(adaptation, PASSED)
    step(session, task)
    return adaptation


def removal(decide: Any, model: Any, **changes: Any) -> Any:
    nothing = {"blueprint": None, "blueprint_id": "", "site": None}
    fields = {"adaptation_type": AdaptationType.REMOVE_SEED, "explanation": "it fails", **nothing} | changes
    return decide(model, **fields)


def test_a_fossil_goes_for_good(task: Any, line: Any, open_session: Any, decide: Any, kernel_for: Any) -> None:
    host = task.host()
    names = list(host.state_dict())
    model = esper.wrap(host)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    session = open_session(model, optimizer, budget=esper.Budget(added_params=200))
    kept = fossil(session, task, line, decide, kernel_for)
    assert session._context.ledger.status().added_parameters == kept.cost.parameters > 0
    assert len(optimizer.state) > len(names)
    decision = removal(decide, model)
    line.incoming.append(decision)
    session._take_in()
    assert model.kasmina_layers["0"].find_seed(0) is not None, "its share is ramped out"
    assert session._context.ledger.status().added_parameters == kept.cost.parameters
    for _ in range(session._context.clock.steps_per_epoch):
        step(session, task)
    assert model.kasmina_layers["0"].find_seed(0) is None
    assert list(model.state_dict()) == names
    assert len(optimizer.state) == sum(len(group["params"]) for group in optimizer.param_groups) == len(names)
    assert session._context.ledger.status().added_parameters == 0
    report = session.report()
    assert report.kept == (), "a removal grew nothing"
    outcomes = {item.id: item.outcome for item in report.adaptations}
    assert outcomes == {kept.id: "culled", decision.adaptation_id: "kept"}
    told = [(one.adaptation_id, one.outcome, one.grew) for one in line.values(Kind.FIELD_REPORT)]
    assert told == [
        (kept.id, AdaptationOutcome.KEPT, True),
        (decision.adaptation_id, AdaptationOutcome.KEPT, False),
    ]
    reasons = [event.reason for event in line.values(Kind.SEED) if event.to_state is State.CULLED]
    assert reasons == ["it fails"]
    plans = [plan.status for plan in line.values(Kind.PLAN) if plan.adaptation_id == decision.adaptation_id]
    assert plans == [PlanStatus.ACCEPTED, PlanStatus.COMPLETED]
    step(session, task)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, "live: seed 0 is DORMANT"),
        ({"seed_index": 9}, "layer: seed must be 0 to 3, got 9"),
        ({"layer": "7"}, "layer: there is no layer '7' with seeds"),
    ],
)
def test_what_is_not_there_is_not_removed(
    task: Any, line: Any, open_session: Any, decide: Any, changes: dict[str, Any], reason: str
) -> None:
    session = open_session()
    step(session, task)
    base = removal(decide, session._context.model)
    line.incoming.append(type(base)(**{name: getattr(base, name) for name in base.__slots__} | changes))
    session._take_in()
    (plan,) = line.values(Kind.PLAN)
    assert (plan.status, plan.reason) == (PlanStatus.REJECTED, reason)
    assert session.orchestrator.adaptations == {}


@pytest.mark.parametrize("way", ["load", "roll_back"])
def test_a_seed_kept_after_the_state_that_a_run_returns_to_is_kept_no_longer(
    task: Any, line: Any, open_session: Any, decide: Any, kernel_for: Any, tmp_path: Any, way: str
) -> None:
    store = CheckpointManager(CheckpointConfig(directory=tmp_path))
    session = open_session(esper.wrap(task.host()), checkpoints=store)
    saved = session.save_checkpoint()
    kept = fossil(session, task, line, decide, kernel_for)
    if way == "load":
        session.load_checkpoint(saved)
    else:
        session._memory.roll_back("a test")
    report = session.report()
    assert report.kept == ()
    assert report.final_params == report.host_params
    assert (kept.outcome, kept.state) == (AdaptationOutcome.ROLLED_BACK, State.DORMANT)
    assert kept.reason == ("a test" if way == "roll_back" else f"the run returned to {saved}")


@pytest.mark.parametrize("is_kept", [True, False])
def test_one_that_has_failed_is_cleared_away_with_its_books_when_somebody_removes_it(
    task: Any, line: Any, open_session: Any, decide: Any, kernel_for: Any, is_kept: bool
) -> None:
    session = open_session(esper.wrap(task.host()))
    if is_kept:
        one = fossil(session, task, line, decide, kernel_for)
    else:
        decision = decide(session._context.model)
        line.incoming += [decision, kernel_for(decision)]
        step(session, task)
        one = session.orchestrator.adaptations[decision.adaptation_id]
    layer = session._context.model.kasmina_layers["0"]
    layer.cut_off(layer.find_seed(0))
    assert one.state is State.ERROR
    session.orchestrator.remove_seed("0", 0, "an operator")
    assert (one.state, one.outcome) == (State.EMBARGOED, AdaptationOutcome.FAILED)
    assert session._context.ledger.status().added_parameters == 0
    session.finish()

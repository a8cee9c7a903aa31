"""Kept seeds are measured again in their time, and told at the price of that time; nothing else changes by it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import esper
import esper.core.rechecks as recheck_module
from esper.contracts.decision import PlanStatus
from esper.contracts.errors import InvalidInputError
from esper.contracts.lifecycle import SeedLifecycleState as State
from esper.contracts.run import RECHECK, AdaptationOutcome, FieldReport
from esper.core.adaptation import Adaptation
from esper.core.pricing import price_of
from esper.core.randomness import capture_random_state
from esper.execution.overrides import SeedRef
from esper.recovery import CheckpointConfig, CheckpointManager
from esper.telemetry.subjects import Kind
from tests.nested_states import differences
from tests.unit.core.test_remove_by_decision import PASSED, fossil, step
from tests.unit.core.test_session import train

GROWTH = esper.GrowthConfig(recheck_epochs=3)


def spoil(model: Any, factor: float = 30.0) -> None:
    """Have the first layer's seed do harm."""
    stream = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in model.kasmina_layers["0"].seed_parameters(0):
            value.copy_(factor * torch.randn(value.shape, generator=stream))


def rechecks(line: Any) -> list[FieldReport]:
    return [one for one in line.values(Kind.FIELD_REPORT) if one.adaptation_type == RECHECK]


@pytest.fixture
def kept(task: Any, line: Any, open_session: Any, decide: Any, kernel_for: Any) -> Any:
    """Open a session in which a seed stands as a fossil."""

    def make(growth: esper.GrowthConfig = GROWTH, **settings: Any) -> tuple[esper.Session, Any, Adaptation]:
        model = esper.wrap(task.host())
        session = open_session(model, growth=growth, **settings)
        return session, model, fossil(session, task, line, decide, kernel_for)

    return make


def test_a_fossil_that_does_harm_is_told_in_its_time_and_not_before(kept: Any, task: Any, line: Any) -> None:
    session, model, one = kept()
    train(session, task, 2)
    spoil(model)
    assert rechecks(line) == []
    session.end_epoch()
    (told,) = rechecks(line)
    assert told.contribution is not None
    assert told.contribution.high < 0
    assert told.contribution == one.contribution
    assert told.contribution.num_examples == 128
    assert (told.adaptation_id, told.layer, told.seed_index) == (one.id, "0", 0)
    assert (told.outcome, told.grew) == (AdaptationOutcome.KEPT, False)
    assert (told.blueprint_id, told.artifact_id) == ("", "")
    assert told.reason.startswith("measured again after 3 epochs: -")
    assert model.kasmina_layers["0"].get_layer_stats()["performance_improvement"] == told.contribution.estimate
    train(session, task, 2)
    assert len(rechecks(line)) == 1
    train(session, task, 1)
    assert len({one.report_id for one in rechecks(line)}) == 2, "every measurement has a report of its own"
    statuses = [plan.status for plan in line.values(Kind.PLAN)]
    assert statuses == [PlanStatus.ACCEPTED, PlanStatus.COMPLETED], "no plan is told anew"


def test_it_is_told_at_the_price_of_its_time(kept: Any, task: Any, line: Any) -> None:
    session, _, one = kept(esper.GrowthConfig(recheck_epochs=2, price_per_host_share=0.3))
    began_at = one.price
    train(session, task, 1)
    at_last = session._context.control_loss
    session._context.control_loss = at_last / 2
    expected = price_of(one.cost, session._context)
    session.end_epoch()
    (told,) = rechecks(line)
    assert told.price == expected == one.price
    assert told.price != began_at


def test_nothing_is_measured_where_nobody_asks(kept: Any, task: Any, line: Any) -> None:
    session, _, _ = kept(esper.GrowthConfig(recheck_epochs=0))
    train(session, task, 9)
    assert rechecks(line) == []
    with pytest.raises(InvalidInputError, match=r"growth\.recheck_epochs must be >= 0 epochs, got -1"):
        esper.GrowthConfig(recheck_epochs=-1)


def test_it_is_measured_at_the_mean_of_the_epochs_weights(kept: Any, task: Any, monkeypatch: Any) -> None:
    session, model, _ = kept()
    seen: list[list[torch.Tensor]] = []
    means: list[list[torch.Tensor]] = []
    measure = session.orchestrator._rechecks._measure

    def noting(due: Any) -> Any:
        mean = session.orchestrator._mean
        (cohort,) = mean._cohorts
        assert len(cohort.live) == len(cohort.means) == len(list(model.parameters()))
        means.append([value.clone() for value in cohort.means])
        with mean.applied():
            seen.append([value.detach().clone() for value in model.parameters()])
        return measure(due)

    monkeypatch.setattr(session.orchestrator._rechecks, "_measure", noting)
    train(session, task, 3)
    assert all(torch.equal(one, other) for one, other in zip(seen[0], means[0], strict=True))
    assert any(not torch.equal(one, other) for one, other in zip(seen[0], model.parameters(), strict=True))


def test_measuring_leaves_weights_optimizer_and_streams_to_the_bit(
    task: Any, line: Any, open_session: Any, decide: Any, kernel_for: Any
) -> None:
    found = []
    for spacing in (0, 1):
        torch.manual_seed(5)
        model = esper.wrap(torch.nn.Sequential(*task.host()[:2], torch.nn.Dropout(0.2), task.host()[2]))
        session = open_session(model, growth=esper.GrowthConfig(recheck_epochs=spacing))
        fossil(session, task, line, lambda m: decide(m, adaptation_id="a" + "b" * 32), kernel_for)
        train(session, task, 3)
        state = {name: value.clone() for name, value in model.state_dict().items()}
        found.append({"model": state, "random": capture_random_state()})
    assert len(rechecks(line)) == 3
    assert differences(*found) == []


def test_several_are_measured_in_one_pass_each_beside_the_others(
    kept: Any, task: Any, line: Any, decide: Any, kernel_for: Any, monkeypatch: Any
) -> None:
    session, model, one = kept()
    x, y = next(iter(task.train))
    session._context.loss_fn(model(x), y).backward()
    decision = decide(model, "2")
    line.incoming += [decision, kernel_for(decision)]
    session.step(torch.tensor(0.5))
    other = session.orchestrator.adaptations[decision.adaptation_id]
    session.orchestrator._graft(other, PASSED)
    other.contribution = one.contribution
    session.orchestrator._fossilize(other, PASSED)
    asked: list[Any] = []
    losses: list[torch.Tensor] = []
    inner = recheck_module.evaluate_configurations

    def noting(model: Any, batches: Any, loss: Any, configurations: Any) -> Any:
        asked.append(configurations)
        losses.append(inner(model, batches, loss, configurations))
        return losses[-1]

    monkeypatch.setattr(recheck_module, "evaluate_configurations", noting)
    train(session, task, 3)
    a, b = SeedRef("0", 0), SeedRef("2", 0)
    assert asked == [[{a: 1.0, b: 1.0}, {a: 0.0, b: 1.0}, {a: 1.0, b: 0.0}, {a: 0.0, b: 0.0}]]
    told = rechecks(line)
    assert {report.adaptation_id for report in told} == {one.id, other.id}
    both, off = losses[0][0], losses[0][3]
    parts = sum(report.contribution.estimate for report in told if report.contribution is not None)
    expected = f"; 2 kept seeds bring {float((off - both).mean()):+.4f} together, one by one {parts:+.4f}"
    assert all(report.reason.endswith(expected) for report in told)


def test_an_effect_that_is_no_number_is_told_as_none(kept: Any, line: Any, monkeypatch: Any) -> None:
    session, _, one = kept(esper.GrowthConfig(recheck_epochs=1))
    before = one.contribution
    session._context.control_loss = math.nan
    session.end_epoch()
    (told,) = rechecks(line)
    assert (told.contribution, told.price) == (None, None)
    assert told.reason == "measured again after 1 epochs: the loss is no number"
    assert one.contribution == before


def test_a_run_taken_up_in_between_measures_the_same(
    task: Any, line: Any, open_session: Any, decide: Any, kernel_for: Any, tmp_path: Any
) -> None:
    checkpoints = CheckpointManager(CheckpointConfig(directory=tmp_path))
    session = open_session(esper.wrap(task.host()), growth=GROWTH, checkpoints=checkpoints)
    fossil(session, task, line, decide, kernel_for)
    train(session, task, 2)
    step(session, task)  # in the middle of the epoch whose mean is asked for
    saved = session.save_checkpoint()
    train(session, task, 1)
    (whole,) = rechecks(line)
    line.sent.clear()
    again = open_session(esper.wrap(task.host()), growth=GROWTH, checkpoints=checkpoints)
    again.load_checkpoint(saved)
    train(again, task, 1)
    (resumed,) = rechecks(line)
    assert resumed.contribution == whole.contribution
    assert resumed.price == whole.price


def test_after_a_roll_back_it_is_measured_anew_under_another_name(kept: Any, task: Any, line: Any) -> None:
    session, model, _ = kept(esper.GrowthConfig(recheck_epochs=2))
    train(session, task, 1)
    snapshot = session._memory._snapshot
    train(session, task, 1)
    session._memory._snapshot = snapshot  # what a run holds whose last epoch was not healthy
    session._memory.roll_back("a test")
    assert session.epoch_count == 1
    spoil(model)
    train(session, task, 1)
    first, second = rechecks(line)
    assert first.report_id != second.report_id
    assert first.contribution != second.contribution


def test_what_stands_is_booked(kept: Any, task: Any) -> None:
    session, _, one = kept(esper.GrowthConfig(recheck_epochs=1))
    assert one.state is State.FOSSILIZED
    session._context.ledger.release(one.id)
    with pytest.raises(AssertionError):
        session.end_epoch()

"""Rivals are born one a step, begin together, and learn in one pass where the host allows it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import esper
from esper.contracts.lifecycle import SeedLifecycleState as State
from esper.contracts.run import AdaptationOutcome, GrowthPhase
from esper.core.capture import cloned
from esper.execution.fused import FusedPasses
from tests.unit.core.test_session import grow, train

RACE = "a" + "f" * 32
FIELD = (("gated_mlp", "0", 0), ("norm_shift", "0", 1), ("lora", "0", 2), ("gated_mlp", "2", 0))
LONG = esper.GrowthConfig(incubation_epochs=20, race_rounds=1, recheck_epochs=0, cull_epochs=0)


class Counted(nn.Sequential):
    """Counts its passes."""

    num_passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.num_passes += 1
        return super().forward(x)


def host(*, dropout: float = 0.0) -> Counted:
    torch.manual_seed(3)
    return Counted(nn.Linear(6, 6), nn.Sequential(nn.ReLU(), nn.Dropout(dropout)), nn.Linear(6, 2))


class Running:
    """A session in its second epoch, of 50 steps, and a race that has just been decided on."""

    def __init__(self, model: Any, session: Any, task: Any, decisions: list[Any]) -> None:
        self.model, self.session = model, session
        self.rivals = [decision.adaptation_id for decision in decisions]
        self._batches = iter(list(task.train) * 2)

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            inputs, targets = next(self._batches)
            loss = self.session._context.loss_fn(self.model(inputs), targets)
            loss.backward()
            self.session.step(loss)

    def passes_of(self, steps: int) -> float:
        before = self.model.num_passes
        self.step(steps)
        return (self.model.num_passes - before) / steps

    def adaptations(self) -> list[Any]:
        return [self.session.orchestrator.adaptations[one] for one in self.rivals]

    def states(self) -> list[State]:
        return [item.state for item in self.adaptations()]

    def learnt(self) -> list[int]:
        return [item.isolated_steps for item in self.adaptations()]

    def weights(self) -> list[Tensor]:
        born = [item for item in self.adaptations() if item.state is State.ACTIVE]
        found = [self.model.kasmina_layer(item.layer).seed_parameters(item.seed_index) for item in born]
        return [value.detach().clone() for values in found for value in values]


@pytest.fixture
def race(large_task: Any, line: Any, open_session: Any, decide: Any, kernel_for: Any) -> Callable[..., Running]:
    def begin(model: nn.Module | None = None, *, missing: int = 0, epochs: int = 1) -> Running:
        model = esper.wrap(model or host())
        session = open_session(model, control=large_task.control, growth=LONG)
        train(session, large_task, epochs)
        settings = {"race_id": RACE, "race_size": len(FIELD)}
        decisions = [decide(model, layer, kind, seed_index=seed, **settings) for kind, layer, seed in FIELD]
        line.incoming += decisions
        # Kernels come as they are made, which no two runs do alike.
        line.incoming += [kernel_for(decision) for decision in reversed(decisions[missing:])]
        line.late = [kernel_for(decision) for decision in decisions[:missing]]
        return Running(model, session, large_task, decisions)

    return begin


def test_rivals_are_born_one_a_step_in_the_order_of_their_decisions(race: Any) -> None:
    running = race()
    seen = []
    for _ in FIELD:
        running.step()
        seen.append([state is State.ACTIVE for state in running.states()])
        assert not running.session.orchestrator.awaits_kernel, "all are at hand"
    assert seen == [[place <= step for place in range(4)] for step in range(4)]


def test_they_begin_to_learn_when_the_last_is_born_and_are_fitted_before(race: Any) -> None:
    running = race()
    running.step()
    drawn = running.weights()
    running.step(3)
    assert running.learnt() == [0, 0, 0, 0]
    fitted = running.weights()[: len(drawn)]
    assert not all(torch.equal(a, b) for a, b in zip(drawn, fitted, strict=True))
    running.step(5)
    assert running.learnt() == [5, 5, 5, 5]


def test_in_an_epoch_of_few_steps_they_are_born_at_once(race: Any) -> None:
    running = race(epochs=0)  # no epoch is over, and none is known to be long
    running.step()
    assert running.states() == [State.ACTIVE] * 4


def test_who_is_not_yet_born_when_the_epoch_ends_is_born_there(race: Any) -> None:
    running = race()
    running.step(2)
    running.session.end_epoch()
    assert running.states() == [State.ACTIVE] * 4


def test_a_kernel_that_is_late_holds_nobody_up(race: Any, line: Any) -> None:
    running = race(missing=1)
    running.step(5)
    assert running.states() == [State.LOADING] + [State.ACTIVE] * 3
    assert running.learnt() == [0, 2, 2, 2]
    assert running.session.orchestrator.awaits_kernel
    line.incoming += line.late
    running.step(3)
    assert running.states() == [State.ACTIVE] * 4
    assert running.learnt() == [2, 5, 5, 5]


def test_whoever_is_removed_before_its_turn_is_never_born(race: Any) -> None:
    running = race()
    running.step()
    last = running.adaptations()[-1]
    running.session.orchestrator._fail(last, "a test")
    running.step(6)
    assert last.outcome is AdaptationOutcome.FAILED
    assert running.states()[:3] == [State.ACTIVE] * 3
    assert running.model.kasmina_layer("2").find_seed(0) is None
    assert running.session.orchestrator._shelf.waiting == frozenset()


def test_rivals_share_one_pass_a_step(race: Any) -> None:
    running = race()
    running.step(7)
    assert running.passes_of(10) == 2.0, "the host's own, and one for four rivals"


def test_beside_a_host_that_draws_each_learns_by_itself(race: Any) -> None:
    running = race(host(dropout=0.2))
    running.step(7)
    assert running.passes_of(10) == 9.0, "the host's own, and two for each of four"
    assert running.learnt() == [13] * 4


def test_they_learn_what_each_would_alone(race: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    together = race()
    together.step(12)
    monkeypatch.setattr(FusedPasses, "outputs", lambda *_: None)
    alone = race()
    alone.step(12)
    assert alone.learnt() == together.learnt() == [8] * 4
    torch.testing.assert_close(together.weights(), alone.weights(), rtol=1e-3, atol=1e-4)


def test_a_shared_pass_is_booked_as_isolation(race: Any) -> None:
    running = race()
    running.step(7)
    before = {cost.phase: cost.seconds for cost in running.session.growth_costs}
    running.step(5)
    after = {cost.phase: cost.seconds for cost in running.session.growth_costs}
    assert after[GrowthPhase.ISOLATION] > before[GrowthPhase.ISOLATION]
    assert after[GrowthPhase.BIRTH] - before[GrowthPhase.BIRTH] < after[GrowthPhase.ISOLATION]


def test_equal_runs_with_kernels_in_another_order_learn_the_same(race: Any, line: Any) -> None:
    one = race()
    one.step(10)
    other = race()
    kernels = [line.incoming.pop() for _ in FIELD]
    line.incoming += kernels
    other.step(10)
    assert all(torch.equal(a, b) for a, b in zip(one.weights(), other.weights(), strict=True))


def test_every_rival_is_measured_at_its_mean_whenever_in_the_epoch_it_was_born(race: Any) -> None:
    running = race()
    running.step(20)
    mean = running.session.orchestrator._mean
    last = running.weights()
    with mean.applied():
        averaged = running.weights()
    assert not any(torch.equal(a, b) for a, b in zip(last, averaged, strict=True) if a.abs().max() > 0)


class Clamped(Counted):
    """Writes to a parameter of its own in every pass."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
        self.temperature = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.temperature.clamp_(0.01, 100.0)
        return super().forward(x) * self.temperature


def test_beside_a_host_whose_passes_cannot_be_shared_each_learns_by_itself(
    race: Any, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(3)
    running = race(Clamped())
    with caplog.at_level("INFO", logger="esper.core.nursery"):
        running.step(10)
    assert running.learnt() == [6] * 4
    said = [record for record in caplog.records if record.msg == "shared_pass_impossible"]
    assert [record.seeds for record in said] == [3, 4], "once a company: the last born takes its first step by itself"


def test_a_loss_that_writes_to_the_output_is_taken_seed_by_seed(
    large_task: Any, line: Any, open_session: Any, decide: Any, kernel_for: Any
) -> None:
    def loss_fn(output: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output.mul_(2.0), targets)

    growth = replace(LONG, incubation_way="trial")
    session = open_session(esper.wrap(host()), control=large_task.control, growth=growth, loss_fn=loss_fn)
    train(session, large_task, 1)
    settings = {"race_id": RACE, "race_size": 2}
    rivals = [decide(session._context.model, "0", "gated_mlp", seed_index=place, **settings) for place in range(2)]
    line.incoming += [*rivals, *map(kernel_for, rivals)]
    inputs, targets = next(iter(large_task.train))
    for _ in range(8):
        loss = loss_fn(session._context.model(inputs), targets)
        loss.backward()
        session.step(loss, batch=(inputs, targets))
    assert [session.orchestrator.adaptations[one.adaptation_id].isolated_steps for one in rivals] == [6, 6]


def test_a_state_saved_amid_births_holds_every_rival(race: Any) -> None:
    running = race()
    running.step(2)
    state = cloned(running.session._memory.capture())
    running.step(5)
    running.session._memory.restore(state)
    assert running.states() == [State.ACTIVE] * 4
    assert not running.session.orchestrator.awaits_kernel
    learnt = running.learnt()
    running.step(3)
    assert [now - before for now, before in zip(running.learnt(), learnt, strict=True)] == [3] * 4


def test_a_restored_run_averages_what_the_run_would_have(race: Any) -> None:
    running = race()
    running.step(4)  # the last was born after the step: it is averaged from the next one on
    mean = running.session.orchestrator._mean
    state = cloned(running.session._memory.capture())
    sizes = []
    for _ in range(2):
        running.step(3)
        sizes.append(sum(len(cohort.live) for cohort in mean._cohorts))
        running.session._memory.restore(state)
    assert sizes[0] == sizes[1] == sum(value.requires_grad for value in running.model.parameters())


def test_a_run_that_ends_amid_births_fails_none(race: Any) -> None:
    running = race()
    running.step(2)
    running.session.finish()
    ends = {(item.outcome, item.reason) for item in running.adaptations()}
    assert ends == {(AdaptationOutcome.CULLED, "the run ended before it was grafted")}


class CheckpointedInTheOldWay(nn.Module):
    """Has a part that autograd cannot differentiate with respect to chosen parameters."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.middle, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        value = checkpoint(lambda x: torch.relu(self.middle(x)), torch.relu(self.first(x)), use_reentrant=True)
        found: Tensor = self.head(value)
        return found


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize("layer", ["first", "middle", "head"])
def test_beside_a_host_that_cannot_be_tried_a_seed_learns_from_its_site(
    task: Any, line: Any, open_session: Any, decide: Any, kernel_for: Any, layer: str, caplog: pytest.LogCaptureFixture
) -> None:
    session = open_session(esper.wrap(CheckpointedInTheOldWay()), control=task.control, growth=LONG)
    train(session, task, 1)
    decision = grow(session, line, decide, kernel_for, layer=layer)
    train(session, task, 2)
    seed = session.orchestrator.adaptations[decision.adaptation_id]
    assert seed.state is State.ACTIVE
    assert seed.isolated_steps >= 10
    said = [record.layer for record in caplog.records if record.msg == "trial_impossible"]
    assert said == (["first"] if layer == "first" else []), "once, and where the part lies behind the seed"


def test_nothing_holds_on_to_a_rival_that_is_gone(race: Any) -> None:
    running = race()
    running.step(8)
    seeds = [weakref.ref(running.model.kasmina_layer(layer).require_seed(place)) for _, layer, place in FIELD]
    for adaptation in running.adaptations():
        running.session.orchestrator._fail(adaptation, "a test")
    gc.collect()
    assert [seed() for seed in seeds] == [None] * 4

"""A seed with a share is ramped out when it is to go: smoothly, once, and everything else waits for it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import esper
from esper.contracts.errors import InvalidInputError
from esper.contracts.lifecycle import SeedLifecycleState as State
from esper.contracts.run import AdaptationOutcome
from esper.recovery import CheckpointConfig, CheckpointManager
from esper.telemetry.subjects import Kind
from tests.nested_states import differences
from tests.unit.core.test_remove_by_decision import PASSED, fossil, step
from tests.unit.core.test_session import grow, train

STEPS = 6
"""Steps of an epoch."""


class Rig:
    """A session in which a seed stands as a fossil, an epoch after its start."""

    def __init__(self, task: Any, line: Any, open_session: Any, decide: Any, kernel_for: Any, **settings: Any) -> None:
        self.task, self.line = task, line
        self.model: Any = esper.wrap(task.host())
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.session: esper.Session = open_session(self.model, self.optimizer, **settings)
        train(self.session, task, 1)
        self.kept = fossil(self.session, task, line, decide, kernel_for)
        self.layer = self.model.kasmina_layers["0"]

    @property
    def state(self) -> State:
        return self.layer.state_layout.state(0)

    @property
    def alpha(self) -> float:
        return float(self.layer.state_layout.alpha_blend[0])

    @property
    def booked(self) -> int:
        return int(self.session._context.ledger.status().added_parameters)

    def remove(self) -> None:
        self.session.orchestrator.remove_seed("0", 0, "a test")

    def steps(self, number: int) -> list[float]:
        return [step(self.session, self.task) or self.alpha for _ in range(number)]


@pytest.fixture
def rig(task: Any, line: Any, open_session: Any, decide: Any, kernel_for: Any) -> Any:
    def make(growth: esper.GrowthConfig | None = None, **settings: Any) -> Rig:
        return Rig(task, line, open_session, decide, kernel_for, growth=growth or esper.GrowthConfig(), **settings)

    return make


def test_the_share_falls_to_nothing_over_an_epoch_and_then_all_is_given_back(rig: Any) -> None:
    one = rig(budget=esper.Budget(added_params=200))
    names = len(list(one.task.host().state_dict()))
    one.remove()
    assert (one.state, one.alpha) == (State.CULLED, 1.0)
    assert one.kept.outcome is AdaptationOutcome.CULLED
    alphas = [1.0, *one.steps(STEPS - 1)]
    assert alphas == sorted(alphas, reverse=True)
    assert len(set(alphas)) == STEPS
    assert 0.0 < alphas[-1] < 0.1
    assert one.booked == one.kept.cost.parameters > 0, "it stands, and is booked"
    assert one.steps(1) == [0.0]
    assert one.booked == 0
    assert one.state is State.EMBARGOED
    assert one.layer.find_seed(0) is None
    assert len(one.optimizer.state) == sum(len(group["params"]) for group in one.optimizer.param_groups) == names
    told = [(event.to_state, event.alpha) for event in one.line.values(Kind.SEED)][-2:]
    assert told == [(State.CULLED, 1.0), (State.EMBARGOED, 0.0)]
    one.session.end_epoch()
    assert one.state is State.EMBARGOED, "it rests from when it was gone"


def test_with_no_epochs_it_goes_between_two_steps(rig: Any) -> None:
    one = rig(esper.GrowthConfig(cull_epochs=0))
    one.remove()
    assert (one.state, one.booked, one.layer.find_seed(0)) == (State.EMBARGOED, 0, None)
    with pytest.raises(InvalidInputError, match=r"growth\.cull_epochs must be >= 0 epochs, got -1"):
        esper.GrowthConfig(cull_epochs=-1)


def test_a_veto_takes_it_out_in_one_step(rig: Any) -> None:
    one = rig()
    one.remove()
    one.steps(2)
    one.session.step(torch.tensor(math.nan))
    assert (one.state, one.booked) == (State.EMBARGOED, 0)
    assert one.session._memory.rollbacks == 0


def test_who_is_asked_to_remove_it_again_or_to_end_does_it_at_once(rig: Any) -> None:
    one, other = rig(), rig()
    for rigged in (one, other):
        rigged.remove()
        rigged.steps(1)
        assert rigged.state is State.CULLED
    one.remove()
    other.session.finish()
    assert [(rigged.state, rigged.booked) for rigged in (one, other)] == [(State.EMBARGOED, 0)] * 2


def test_after_a_roll_back_it_goes_on_from_the_snapshot_or_stays_gone(rig: Any) -> None:
    one = rig()
    one.remove()
    one.steps(2)
    at_snapshot = one.alpha
    one.session._memory.take_snapshot()
    one.steps(2)
    one.session._memory.roll_back("a test")
    assert (one.state, one.alpha) == (State.CULLED, at_snapshot)
    one.steps(3)
    assert one.state is State.CULLED
    one.steps(1)
    assert (one.state, one.booked) == (State.EMBARGOED, 0)
    one.session._memory.roll_back("a test")
    assert (one.state, one.booked, one.layer.find_seed(0)) == (State.EMBARGOED, 0, None)


def test_a_fossil_that_was_removed_does_not_come_back_with_a_roll_back(rig: Any) -> None:
    one = rig()
    one.session._memory.take_snapshot()
    one.remove()
    one.steps(2)
    one.session._memory.roll_back("a test")
    assert (one.state, one.booked) == (State.EMBARGOED, 0)
    assert one.session.orchestrator.adaptations[one.kept.id].outcome is AdaptationOutcome.CULLED


def test_a_run_taken_up_on_the_way_goes_on_to_the_bit(rig: Any, open_session: Any, task: Any, tmp_path: Any) -> None:
    checkpoints = CheckpointManager(CheckpointConfig(directory=tmp_path))
    one = rig(checkpoints=checkpoints)
    one.session.end_epoch()
    one.session._context.clock.last_epoch_steps = STEPS
    one.remove()
    one.steps(2)
    saved = one.session.save_checkpoint()
    model: Any = esper.wrap(task.host())
    again = open_session(model, growth=esper.GrowthConfig(), checkpoints=checkpoints)
    again.load_checkpoint(saved)
    found = []
    for session in (one.session, again):
        alphas = []
        for _ in range(STEPS):
            step(session, task)
            alphas.append(float(session._context.model.kasmina_layers["0"].state_layout.alpha_blend[0]))
        state = {name: value.clone() for name, value in session._context.model.state_dict().items()}
        found.append({"alphas": alphas, "model": state, "booked": session._context.ledger.status().added_parameters})
    assert found[0]["alphas"][2] > 0.0 == found[0]["alphas"][3]
    assert differences(*found) == []


def test_one_whose_kernel_fails_on_its_way_out_is_gone_with_its_parameters(rig: Any) -> None:
    one = rig()
    one.remove()
    one.steps(1)
    one.layer.find_seed(0).kernel.register_forward_hook(lambda *_: 1 / 0)
    one.steps(4)
    assert (one.state, one.booked, one.layer.find_seed(0)) == (State.EMBARGOED, 0, None)
    known = {id(value) for value in one.model.parameters()}
    assert all(id(value) in known for group in one.optimizer.param_groups for value in group["params"])


def test_one_whose_kernel_fails_while_the_host_is_evaluated_does_not_stop_the_run(rig: Any) -> None:
    """The epoch's snapshot is taken before the next step would have noticed that its layer has freed it."""
    one = rig()
    one.remove()
    one.steps(1)
    one.layer.find_seed(0).kernel.register_forward_hook(lambda *_: 1 / 0)
    one.steps(1)
    assert one.layer.find_seed(0) is not None, "one failure is none; two batches of the control split are two more"
    one.session.end_epoch()
    assert (one.state, one.booked, one.layer.find_seed(0)) == (State.EMBARGOED, 0, None)
    one.steps(1)
    one.session._memory.roll_back("a test")
    assert (one.state, one.booked) == (State.EMBARGOED, 0)


def test_what_is_on_its_way_out_is_booked_with_its_race_in_a_run_that_is_taken_up(
    task: Any, line: Any, open_session: Any, decide: Any, kernel_for: Any, tmp_path: Any
) -> None:
    settings = {
        "checkpoints": CheckpointManager(CheckpointConfig(directory=tmp_path)),
        "budget": esper.Budget(added_params=80),
    }
    session = open_session(esper.wrap(task.host()), **settings)
    train(session, task, 1)
    first = decide(session._context.model, "0", race_size=2, race_id="race")
    second = decide(session._context.model, "2", race_size=2, race_id="race")
    line.incoming += [first, second, kernel_for(first), kernel_for(second)]
    step(session, task)
    orchestrator = session.orchestrator
    grafted, other = (orchestrator.adaptations[one.adaptation_id] for one in (first, second))
    orchestrator._graft(grafted, PASSED)
    step(session, task)
    orchestrator._cull(grafted, "a test", ())
    assert orchestrator.fading == {grafted.id}
    books = session._context.ledger.status()
    assert books.added_parameters == grafted.cost.parameters < 80 < grafted.cost.parameters + other.cost.parameters
    again = open_session(esper.wrap(task.host()), **settings)
    again.load_checkpoint(session.save_checkpoint())
    assert again._context.ledger.status() == books


def test_a_culled_graft_is_ramped_out_and_the_next_waits_for_it(
    large_task: Any, line: Any, open_session: Any, decide: Any, kernel_for: Any
) -> None:
    growth = esper.GrowthConfig(
        incubation_epochs=1, incubation_learning_rate=1e-2, graft_epochs=1, max_looks=1, price_per_host_share=1e6
    )
    model = esper.wrap(large_task.host())
    session = open_session(model, control=large_task.control, growth=growth)
    first = grow(session, line, decide, kernel_for)
    train(session, large_task, 1)
    second = grow(session, line, decide, kernel_for, layer="2", template="norm_shift")
    known = session.orchestrator.adaptations
    train(session, large_task, 1)
    assert known[first.adaptation_id].outcome is AdaptationOutcome.CULLED
    assert known[first.adaptation_id].state is State.CULLED
    assert known[second.adaptation_id].state is State.ACTIVE, "one seed is blended at a time"
    train(session, large_task, 1)
    assert known[first.adaptation_id].state is State.EMBARGOED
    assert known[second.adaptation_id].state is not State.ACTIVE, "its turn has come"


def test_one_that_learns_alone_goes_at_once(
    task: Any, line: Any, open_session: Any, decide: Any, kernel_for: Any
) -> None:
    session = open_session(growth=esper.GrowthConfig(incubation_epochs=9))
    decision = grow(session, line, decide, kernel_for)
    train(session, task, 1)
    session.orchestrator.remove_seed("0", 0, "a test")
    assert session.orchestrator.adaptations[decision.adaptation_id].state is State.EMBARGOED

"""Changes of one group's settings or state: made where meant, undone to the bit, with the weights or not."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import esper
from esper.contracts.decision import AdaptationType, CurveState, ParameterChange, PlanStatus
from esper.contracts.errors import InvalidInputError
from esper.contracts.lifecycle import SeedLifecycleState as State
from esper.contracts.run import AdaptationOutcome
from esper.core.capture import cloned
from esper.core.tuning import ParameterTrial
from esper.recovery import CheckpointManager
from esper.telemetry.subjects import Kind
from tests.nested_states import differences
from tests.unit.core.test_remove_by_decision import PASSED

RESET = ParameterChange(resets_state=True, group=0)
HARM = ParameterChange(learning_rate_factor=5000.0)


class Rig:
    """A run with a norm, two groups and a schedule."""

    def __init__(self, task: Any, open_session: Any, decide: Any, line: Any, store: Any, **growth: Any) -> None:
        self.task, self.line, self._decide = task, line, decide
        torch.manual_seed(1)
        host = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.1), nn.ReLU(), nn.Linear(6, 2))
        self.model = esper.wrap(host)
        groups = [
            {"params": [*self.model[0].parameters(), *self.model[1].parameters()]},
            {"params": self.model[4].parameters(), "lr": 5e-3},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-2)
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.5)
        settings = esper.GrowthConfig(**({"settle_epochs": 1} | growth))
        self.session = open_session(self.model, self.optimizer, growth=settings, checkpoints=store)
        self.session.track("scheduler", self.scheduler)

    def ask(self, change: ParameterChange, state: CurveState = CurveState.OVERFITTING) -> None:
        named = {"layer": "", "site": None, "seed_index": None, "blueprint": None, "blueprint_id": ""}
        kind = AdaptationType.OPTIMIZE_PARAMETERS
        self.line.incoming.append(
            self._decide(self.model, adaptation_type=kind, curve_state=state, parameter_change=change, **named)
        )

    def train(self, *, schedule: bool = False) -> None:
        for x, y in self.task.train:
            loss = nn.functional.cross_entropy(self.model(x), y)
            loss.backward()
            self.session.step(loss)
        if schedule:
            self.scheduler.step()

    def epochs(self, count: int) -> None:
        for _ in range(count):
            self.train()
            self.session.end_epoch()

    def harm(self) -> None:
        """Take a step whose loss is not finite."""
        x, _ = next(iter(self.task.train))
        loss = self.model(x).sum() * float("nan")
        loss.backward()
        self.session.step(loss)

    def states(self, group: int) -> list[Any]:
        values = self.optimizer.param_groups[group]["params"]
        return [cloned(dict(self.optimizer.state.get(value, {}))) for value in values]

    def settings(self) -> list[tuple[float, float]]:
        return [(group["lr"], group["weight_decay"]) for group in self.optimizer.param_groups]

    def weights(self) -> dict[str, Any]:
        return cloned(dict(self.model.state_dict()))

    def everything(self) -> list[Any]:
        state = cloned(self.session._memory.capture())
        return [state["kasmina"]["model"], state["tolaria"]["optimizer"], state["orchestrator"]["trials"]]

    @property
    def shown(self) -> Any:
        return self.session.report().adaptations[0]


@pytest.fixture
def rig(task: Any, open_session: Any, decide: Any, line: Any, tmp_path: Path) -> Callable[..., Rig]:
    store = CheckpointManager(tmp_path / "checkpoints")
    return lambda **growth: Rig(task, open_session, decide, line, store, **growth)


def test_the_settings_of_one_group_change_and_those_of_the_other_stay(rig: Any) -> None:
    one = rig()
    one.ask(ParameterChange(learning_rate_factor=0.5, weight_decay_factor=4.0, group=1))
    one.epochs(1)
    assert one.settings() == [(1e-2, 1e-2), (2.5e-3, 4e-2)]
    one.session.finish()
    assert one.settings() == [(1e-2, 1e-2), (5e-3, 1e-2)]


def test_the_state_of_one_group_begins_anew_and_that_of_the_other_stays(rig: Any) -> None:
    one = rig()
    one.ask(RESET)
    one.train()
    before = one.states(1)
    one.session.end_epoch()
    assert one.states(0) == [{}, {}, {}, {}]
    assert differences(before, one.states(1)) == []


def test_a_reset_that_is_undone_puts_the_state_back_to_the_bit_under_a_schedule(rig: Any) -> None:
    one = rig()
    one.ask(ParameterChange(learning_rate_factor=5000.0, resets_state=True, group=0))
    one.train(schedule=True)
    states, weights = [one.states(0), one.states(1)], one.weights()
    one.session.end_epoch()
    one.train(schedule=True)
    others, moved = one.states(1), one.weights()
    one.session.end_epoch()
    assert one.shown.outcome == "culled", one.shown.reason
    assert differences(states[0], one.states(0)) == []
    assert differences(others, one.states(1)) == [], "the other group's state is that of its last step"
    assert differences(states[1], others) != []
    assert differences(moved, one.weights()) == [], "the weights keep what they learned"
    assert differences(weights, moved) != []
    assert [rate for rate, _ in one.settings()] == pytest.approx([2.5e-3, 1.25e-3])


@pytest.mark.parametrize("undone", ["change", "snapshot"])
@pytest.mark.parametrize("change", [HARM, ParameterChange(learning_rate_factor=5000.0, resets_state=True, group=1)])
def test_a_snapshot_takes_weights_buffers_and_state_back(rig: Any, undone: str, change: ParameterChange) -> None:
    one = rig(undone=undone)
    one.ask(change)
    one.train()
    weights, settings, states = one.weights(), one.settings(), [one.states(0), one.states(1)]
    one.session.end_epoch()
    one.epochs(1)
    assert one.shown.outcome == "culled", one.shown.reason
    assert one.settings() == settings
    back = undone == "snapshot"
    assert (differences(weights, one.weights()) == []) is back
    assert (differences(states, [one.states(0), one.states(1)]) == []) is back
    assert ("weights and optimizer state of 6 steps ago are back" in one.shown.reason) is back
    assert one.session.step_count == 12, "the steps stay counted"


def test_a_change_that_helps_keeps_what_was_learned_since(rig: Any, large_task: Any) -> None:
    one = rig(undone="snapshot")
    for group in one.optimizer.param_groups:
        group["lr"] *= 1e-3  # hardly learns
    one.ask(ParameterChange(learning_rate_factor=3000.0))
    one.epochs(1)
    one.train()
    weights = one.weights()
    one.session.end_epoch()
    assert one.shown.outcome == "kept", one.shown.reason
    assert differences(weights, one.weights()) == []


def test_a_snapshot_of_another_network_is_not_put_back(rig: Any, line: Any, decide: Any, kernel_for: Any) -> None:
    one = rig(undone="snapshot", settle_epochs=9, incubation_epochs=1, graft_epochs=9)
    rate = one.settings()
    one.ask(ParameterChange(learning_rate_factor=0.5, resets_state=True, group=1))
    one.train()
    reset = one.states(1)
    one.session.end_epoch()
    decision = decide(one.model)
    line.incoming += [decision, kernel_for(decision)]
    one.epochs(3)
    assert one.model.kasmina_layers["0"].state_layout.state(0) is State.EVALUATING
    before = {name: value for name, value in one.weights().items() if "seeds" not in name}
    moments = cloned(one.optimizer.state[one.model[0].weight])
    one.session.finish()
    after = one.weights()
    assert differences(before, {name: after[name] for name in before}) == []
    assert differences(moments, dict(one.optimizer.state[one.model[0].weight])) == []
    assert differences(reset, one.states(1)) == [], "what was begun anew is put back"
    assert one.settings() == rate
    assert "the weights stay, for no copy fits the network" in one.shown.reason


def test_what_is_measured_after_weights_are_back_is_measured_at_them(rig: Any) -> None:
    one = rig(undone="snapshot", settle_epochs=9)
    one.ask(ParameterChange(learning_rate_factor=0.5))
    one.epochs(1)
    one.train()
    orchestrator = one.session.orchestrator
    (adaptation,) = orchestrator.ongoing()
    with orchestrator._mean.applied():
        lost = one.weights()
    adaptation.outcome, adaptation.reason = AdaptationOutcome.CULLED, orchestrator._trials.undo(adaptation)
    own = one.weights()
    with orchestrator._mean.applied():
        assert differences(own, one.weights()) == []
    assert differences(lost, own) != []


def test_the_alpha_of_a_graft_goes_on_beside_a_snapshot(rig: Any, line: Any, decide: Any, kernel_for: Any) -> None:
    one = rig(undone="snapshot", settle_epochs=9, incubation_epochs=1, graft_epochs=9)
    decision = decide(one.model)
    line.incoming += [decision, kernel_for(decision)]
    one.epochs(3)
    one.ask(ParameterChange(learning_rate_factor=0.5))
    one.train()
    weights = one.weights()
    one.session.end_epoch()
    seed = one.model.kasmina_layers["0"].find_seed(0)
    begun = float(seed.alpha)
    one.train()
    alpha, orchestrator = float(seed.alpha), one.session.orchestrator
    (adaptation,) = [item for item in orchestrator.ongoing() if item.id != decision.adaptation_id]
    adaptation.outcome, adaptation.reason = AdaptationOutcome.CULLED, orchestrator._trials.undo(adaptation)
    after, values = one.weights(), [name for name in weights if not name.endswith("_extra_state")]  # that holds alpha
    assert any(".seeds." in name for name in values)
    assert differences([weights[name] for name in values], [after[name] for name in values]) == []
    assert float(seed.alpha) == alpha > begun > 0.0


def test_a_seed_that_learns_alone_goes_on_beside_a_snapshot(rig: Any, line: Any, decide: Any, kernel_for: Any) -> None:
    one = rig(undone="snapshot", incubation_epochs=9)
    decision = decide(one.model)
    line.incoming += [decision, kernel_for(decision)]
    one.ask(ParameterChange(learning_rate_factor=300.0))
    one.train()
    weights = one.weights()
    one.session.end_epoch()
    one.train()
    learned = one.weights()
    one.session.end_epoch()
    after = one.weights()
    seeds = [name for name in after if ".seeds." in name and not name.endswith("_extra_state")]
    assert seeds
    assert one.session.orchestrator.ongoing(), "the seed is gone"
    assert differences([learned[name] for name in seeds], [after[name] for name in seeds]) == []
    assert differences([weights[name] for name in seeds], [after[name] for name in seeds]) != []
    hosts = [name for name in after if ".seeds." not in name and not name.endswith("_extra_state")]
    assert differences([weights[name] for name in hosts], [after[name] for name in hosts]) == []


@pytest.mark.parametrize("undone", ["change", "snapshot"])
def test_a_run_taken_up_amid_a_trial_goes_on_to_the_bit(rig: Any, undone: str) -> None:
    first = rig(undone=undone, settle_epochs=2)
    first.ask(ParameterChange(learning_rate_factor=5000.0, resets_state=True, group=0))
    first.train()
    states = first.states(0)
    first.session.end_epoch()
    first.epochs(1)
    checkpoint_id = first.session.save_checkpoint()
    first.epochs(1)
    second = rig(undone=undone, settle_epochs=2)
    second.session.load_checkpoint(checkpoint_id)
    second.epochs(1)
    assert first.shown.outcome == "culled", first.shown.reason
    assert second.shown.reason == first.shown.reason
    assert differences(states, second.states(0)) == []
    assert differences(first.everything(), second.everything()) == []


def test_a_run_taken_up_while_a_copy_does_not_fit_puts_it_back_once_it_does(
    rig: Any, line: Any, decide: Any, kernel_for: Any
) -> None:
    settings = {"undone": "snapshot", "settle_epochs": 2, "incubation_epochs": 9, "cull_epochs": 0}
    first, second = rig(**settings), rig(**settings)
    first.ask(HARM)
    first.epochs(1)
    decision = decide(first.model)
    line.incoming += [decision, kernel_for(decision)]
    first.epochs(1)
    orchestrator = first.session.orchestrator
    orchestrator._graft(orchestrator.adaptations[decision.adaptation_id], PASSED)
    second.session.load_checkpoint(first.session.save_checkpoint())
    for one in (first, second):
        one.session.orchestrator.remove_seed("0", 0, "a test")
        one.epochs(1)
        assert "weights and optimizer state of 12 steps ago are back" in one.shown.reason
    assert differences(first.everything(), second.everything()) == []


@pytest.mark.parametrize("resumes", [False, True])
def test_a_group_that_is_added_amid_a_trial_stays_as_it_is(rig: Any, resumes: bool) -> None:
    """As who thaws a network layer by layer adds them."""

    def thaw(one: Any) -> None:
        one.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": 0.25})
        one.model.register_parameter("late", one.optimizer.param_groups[2]["params"][0])

    one, rest = rig(), rig()
    settings = one.settings()
    one.ask(HARM)
    one.epochs(1)
    thaw(one)
    if resumes:
        saved = one.session.save_checkpoint()
        thaw(rest)
        rest.session.load_checkpoint(saved)
        one = rest
    one.epochs(1)
    assert one.shown.outcome == "culled", one.shown.reason
    assert one.settings() == [*settings, (0.25, 1e-2)]


@pytest.mark.parametrize("undone", ["change", "snapshot"])
def test_the_governor_takes_a_run_back_amid_a_trial_and_the_trial_goes_on(rig: Any, undone: str) -> None:
    one = rig(undone=undone)
    one.ask(ParameterChange(learning_rate_factor=5000.0, resets_state=True, group=0))
    one.train()
    states = one.states(0)
    one.session.end_epoch()
    at_snapshot = one.everything()
    one.train()
    for _ in range(2):  # one bad batch is left out, two take the state back
        one.harm()
    assert one.session._memory.rollbacks == 1
    assert differences(at_snapshot, one.everything()) == []
    one.epochs(1)
    assert one.shown.outcome == "culled", one.shown.reason
    assert differences(states, one.states(0)) == []


def test_a_trial_begun_at_once_is_taken_back_with_the_state_it_was_begun_in(rig: Any, line: Any) -> None:
    one = rig()
    one.epochs(1)
    before = one.everything()
    one.ask(ParameterChange(learning_rate_factor=0.5, resets_state=True), CurveState.UNSTABLE)
    one.session._look_into_mailbox()
    assert one.states(0) == [{}, {}, {}, {}]
    for _ in range(2):
        one.harm()
    assert differences(before, one.everything()) == []
    assert line.values(Kind.FIELD_REPORT)[0].outcome is AdaptationOutcome.ROLLED_BACK


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (ParameterChange(resets_state=True, group=2), "parameter_change.group must be 0 to 1, got 2"),
        (ParameterChange(resets_state=True, group=-1), "parameter_change.group must be 0 to 1, got -1"),
        (ParameterChange(learning_rate_factor=0.0), "learning_rate_factor must be finite and > 0, got 0.0"),
        (ParameterChange(learning_rate_factor=math.nan), "learning_rate_factor must be finite and > 0, got nan"),
        (ParameterChange(weight_decay_factor=math.inf), "weight_decay_factor must be finite and > 0, got inf"),
        (ParameterChange(weight_decay_factor=-1.0), "weight_decay_factor must be finite and > 0, got -1.0"),
        (ParameterChange(group=0), "change: no change is named"),
    ],
)
def test_a_change_that_cannot_be_made_is_refused_and_training_goes_on(
    rig: Any, line: Any, change: ParameterChange, reason: str
) -> None:
    one = rig()
    settings = one.settings()
    one.ask(change)
    one.epochs(1)
    (plan,) = line.values(Kind.PLAN)
    assert plan.status is PlanStatus.REJECTED
    assert reason in plan.reason
    assert one.settings() == settings
    assert one.session.report().adaptations == ()


def test_a_loss_that_is_not_finite_is_no_gain_and_one_that_is_so_again_is(rig: Any) -> None:
    context = rig().session._context
    bad, good = torch.tensor([1.0, math.nan]), torch.tensor([1.0, 2.0])
    judged = []
    for before, after in ((good, bad), (bad, good), (bad, bad)):
        trial = ParameterTrial(context, ParameterChange(learning_rate_factor=0.5))
        trial.begin(before, context.clock)
        judged.append(trial.losses_fell(after, 0.95)[:2])
    assert judged == [(False, None), (True, None), (False, None)]


def test_what_is_taken_back_is_one_of_two_words() -> None:
    with pytest.raises(InvalidInputError, match=r"growth\.undone must be one of change, snapshot, got 'weights'"):
        esper.GrowthConfig(undone="weights")  # type: ignore[arg-type]

"""A run that is saved and taken up again goes on to the bit; what is taken back leaves nothing behind."""

from __future__ import annotations

import copy
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import esper
from esper.contracts.decision import AdaptationType, ParameterChange
from esper.contracts.errors import CorruptDataError, InvalidInputError, InvalidStateError
from esper.contracts.lifecycle import SeedLifecycleState as State
from esper.contracts.run import AdaptationOutcome, RunPhase
from esper.core.capture import cloned
from esper.recovery import CheckpointConfig, CheckpointManager
from esper.telemetry.subjects import Kind
from tests.nested_states import differences

SLOW = esper.GrowthConfig(incubation_epochs=3, graft_epochs=3, max_looks=2, incubation_learning_rate=1e-2)
CHANGE = {
    "adaptation_type": AdaptationType.OPTIMIZE_PARAMETERS,
    "layer": "",
    "site": None,
    "seed_index": None,
    "blueprint": None,
    "blueprint_id": "",
}


class Rig:
    """One process's worth of a run: host, optimizer, scheduler and session, as a fresh start would make them."""

    def __init__(
        self, task: Any, open_session: Any, store: CheckpointManager | None, *, loss_fn: Any = None, **settings: Any
    ) -> None:
        torch.manual_seed(3)
        host = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.2), nn.ReLU(), nn.Linear(6, 2))
        self.model = esper.wrap(host)
        groups = [{"params": self.model[3].parameters(), "lr": 5e-3}, {"params": self.model[0].parameters()}]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-2)
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.9)
        self.loss_fn = loss_fn or nn.CrossEntropyLoss()
        self.task = task
        self.session = open_session(
            self.model, self.optimizer, loss_fn=self.loss_fn, checkpoints=store, **({"growth": SLOW} | settings)
        )
        self.session.track("scheduler", self.scheduler)

    def epochs(self, count: int) -> None:
        for _ in range(count):
            for x, y in self.task.train:
                loss = self.loss_fn(self.model(x), y)
                loss.backward()
                self.session.step(loss)
            self.scheduler.step()
            self.session.end_epoch()

    def state_of(self, seed: int = 0) -> State:
        return self.model.kasmina_layers["0"].state_layout.state(seed)

    def everything(self) -> dict[str, Any]:
        state = cloned(self.session._memory.capture())
        for key in ("life", "packets", "control_loss"):
            state["tolaria"].pop(key)
        for item in state["orchestrator"]["adaptations"].values():
            item.pop("trace_id")
        return state


@pytest.fixture
def store(tmp_path: Path) -> CheckpointManager:
    return CheckpointManager(tmp_path / "checkpoints")


@pytest.fixture
def rig(task: Any, open_session: Any, store: CheckpointManager) -> Callable[..., Rig]:
    return lambda **settings: Rig(task, open_session, store, **settings)


@pytest.mark.parametrize("loss_fn", [nn.CrossEntropyLoss(), F.cross_entropy], ids=["module", "function"])
@pytest.mark.parametrize(("epochs", "state"), [(2, State.ACTIVE), (4, State.EVALUATING)])
def test_a_run_taken_up_in_mid_growth_goes_on_to_the_bit(
    rig: Any, line: Any, decide: Any, kernel_for: Any, epochs: int, state: State, loss_fn: Any
) -> None:
    first = rig(loss_fn=loss_fn)
    decision = decide(first.model)
    line.incoming += [decision, kernel_for(decision)]
    first.epochs(epochs)
    assert first.state_of() is state
    checkpoint_id = first.session.save_checkpoint()
    first.epochs(3)
    second = rig(loss_fn=loss_fn)
    second.session.load_checkpoint(checkpoint_id)
    assert second.state_of() is state
    second.epochs(3)
    assert differences(first.everything(), second.everything()) == []


def test_a_seed_that_waits_for_its_kernel_goes_on_waiting(rig: Any, line: Any, decide: Any, kernel_for: Any) -> None:
    first = rig()
    decision = decide(first.model)
    line.incoming.append(decision)
    first.epochs(1)
    checkpoint_id = first.session.save_checkpoint()
    line.incoming.append(kernel_for(decision))
    first.epochs(2)
    second = rig()
    second.session.load_checkpoint(checkpoint_id)
    assert second.state_of() is State.LOADING
    line.incoming.append(kernel_for(decision))
    second.epochs(2)
    assert second.state_of() is State.ACTIVE
    states = [one.everything() for one in (first, second)]
    for state in states:
        state["kasmina"].pop("seed_states")  # holds the latency of the kernel's first run
    assert differences(*states) == []


def test_a_kept_seed_comes_back_with_what_it_brought(
    rig: Any, line: Any, decide: Any, kernel_for: Any, large_task: Any
) -> None:
    growth = esper.GrowthConfig(incubation_epochs=3, incubation_learning_rate=1e-2)
    first = rig(growth=growth, control=large_task.control)
    first.task = large_task
    decision = decide(first.model, template="gated_mlp")
    line.incoming += [decision, kernel_for(decision)]
    first.epochs(8)
    assert first.state_of() is State.FOSSILIZED
    checkpoint_id = first.session.save_checkpoint()
    second = rig(growth=growth, control=large_task.control)
    second.session.load_checkpoint(checkpoint_id)
    layers = [one.model.kasmina_layers["0"].get_layer_stats() for one in (first, second)]
    for name in ("performance_improvement", "successful_adaptations", "seeds_by_state"):
        assert layers[0][name] == layers[1][name]
    assert layers[0]["performance_improvement"] > 0
    assert second.session.report().adaptations[0].outcome == "kept"


def test_a_change_on_trial_is_undone_to_the_bit_after_a_restart(rig: Any, line: Any, decide: Any) -> None:
    first = rig()
    rates = [group["lr"] for group in first.optimizer.param_groups]
    line.incoming.append(decide(first.model, **CHANGE, parameter_change=ParameterChange(learning_rate_factor=5000.0)))
    first.scheduler.gamma = 1.0
    first.epochs(1)
    assert [group["lr"] for group in first.optimizer.param_groups] != rates
    second = rig()
    second.session.load_checkpoint(first.session.save_checkpoint())
    second.epochs(2)
    (adaptation,) = second.session.report().adaptations
    assert adaptation.outcome == "culled", adaptation.reason
    assert [group["lr"] for group in second.optimizer.param_groups] == rates


def test_a_change_on_trial_survives_a_roll_back(rig: Any, line: Any, decide: Any) -> None:
    one = rig()
    line.incoming.append(decide(one.model, **CHANGE, parameter_change=ParameterChange(learning_rate_factor=0.5)))
    one.epochs(1)
    one.session._memory.roll_back("test")
    one.epochs(2)
    (adaptation,) = one.session.report().adaptations
    assert adaptation.outcome in ("kept", "culled")


def test_what_a_scheduler_moved_meanwhile_stays(rig: Any, line: Any, decide: Any) -> None:
    one = rig()
    before = one.optimizer.param_groups[0]["lr"]
    line.incoming.append(decide(one.model, **CHANGE, parameter_change=ParameterChange(learning_rate_factor=5000.0)))
    one.epochs(3)
    assert one.session.report().adaptations[0].outcome == "culled"
    assert one.optimizer.param_groups[0]["lr"] == pytest.approx(before * 0.9**3)


def test_a_seed_begun_since_the_snapshot_leaves_no_trace(rig: Any, line: Any, decide: Any, kernel_for: Any) -> None:
    one = rig()
    one.epochs(1)
    before = one.everything()
    decision = decide(one.model)
    line.incoming += [decision, kernel_for(decision)]
    one.session._look_into_mailbox()
    assert one.state_of() is State.ACTIVE
    one.session._memory.roll_back("test")
    (report,) = line.values(Kind.FIELD_REPORT)
    assert report.outcome is AdaptationOutcome.ROLLED_BACK
    assert one.state_of() is State.DORMANT
    assert differences(before["kasmina"], one.everything()["kasmina"]) == []
    assert one.session._context.ledger.status().added_parameters == 0
    assert one.session._context.ledger.status().adaptations == 1, "an adaptation once begun stays counted"
    (shown,) = one.session.report().adaptations
    assert (shown.state, shown.outcome) == ("dormant", "rolled_back")


def test_a_kernel_that_comes_after_its_seed_was_taken_back_is_not_used(
    rig: Any, line: Any, decide: Any, kernel_for: Any
) -> None:
    one = rig()
    decision = decide(one.model)
    line.incoming.append(decision)
    one.session._look_into_mailbox()
    one.session._memory.roll_back("test")
    line.incoming.append(kernel_for(decision))
    one.epochs(1)
    assert one.state_of() is State.DORMANT


def test_a_graft_that_did_harm_does_not_come_back_with_the_snapshot(
    rig: Any, line: Any, decide: Any, kernel_for: Any
) -> None:
    one = rig(growth=esper.GrowthConfig(incubation_epochs=1, graft_epochs=20, embargo_epochs=5))
    decision = decide(one.model)
    line.incoming += [decision, kernel_for(decision)]
    one.epochs(3)
    assert one.state_of() is State.EVALUATING
    for _ in range(2):  # the first takes the graft out, the second takes the whole state back
        loss = one.model(torch.randn(4, 6)).sum() * float("nan")
        loss.backward()
        one.session.step(loss)
    assert one.session._memory.rollbacks == 1
    assert one.state_of() is State.EMBARGOED
    assert one.model.kasmina_layers["0"].find_seed(0) is None
    assert len(line.values(Kind.FIELD_REPORT)) == 1
    one.epochs(1)


def test_a_tracked_object_is_taken_back_in_the_first_epoch_too(rig: Any) -> None:
    one = rig()
    rate = one.scheduler.get_last_lr()
    x, y = next(iter(one.task.train))
    loss = one.loss_fn(one.model(x), y)
    loss.backward()
    one.session.step(loss)
    one.scheduler.step()
    one.session._memory.roll_back("test")
    assert one.scheduler.last_epoch == 0
    assert one.scheduler.get_last_lr() == rate


def test_a_state_that_is_not_finite_is_not_the_last_good_one(rig: Any) -> None:
    one = rig()
    one.epochs(1)
    good = copy.deepcopy(one.model.state_dict())
    with torch.no_grad():
        one.model[0].weight.fill_(float("nan"))
    one.session.end_epoch()
    one.session._memory.roll_back("test")
    assert differences(dict(good), dict(one.model.state_dict())) == []


def test_order_of_groups_and_parameters_is_kept(rig: Any, line: Any, decide: Any, kernel_for: Any) -> None:
    first = rig()
    decision = decide(first.model)
    line.incoming += [decision, kernel_for(decision)]
    first.epochs(4)
    second = rig()
    second.session.load_checkpoint(first.session.save_checkpoint())
    orders = [
        [[names[id(value)] for value in group["params"]] for group in one.optimizer.param_groups]
        for one in (first, second)
        for names in [{id(value): name for name, value in one.model.named_parameters()}]
    ]
    assert orders[0] == orders[1]
    assert any("seeds.0" in name for name in orders[1][1]), "the seed is in the group of its layer"


@contextmanager
def full_disk() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_training_going(task: Any, open_session: Any, tmp_path: Path, caplog: Any) -> None:
    store = CheckpointManager(CheckpointConfig(directory=tmp_path, interval=timedelta(microseconds=1)))
    one = Rig(task, open_session, store)
    with full_disk():
        one.epochs(2)
    assert one.session.epoch_count == 2
    assert store.list_checkpoints() == ()
    assert "checkpoint_failed" in caplog.text
    one.epochs(1)
    assert len(store.list_checkpoints()) == 1


def test_a_checkpoint_of_another_host_changes_nothing(rig: Any, task: Any, open_session: Any, line: Any) -> None:
    other = open_session(checkpoints=CheckpointManager(rig().session._memory._store.config))
    checkpoint_id = other.save_checkpoint()
    one = rig()
    one.epochs(1)
    before = one.everything()
    with pytest.raises(InvalidStateError, match=r"tracked objects must be \[\] as saved, got \['scheduler'\]"):
        one.session.load_checkpoint(checkpoint_id)
    assert differences(before, one.everything()) == []
    other.track("scheduler", torch.optim.lr_scheduler.ExponentialLR(other._context.optimizer, 0.9))
    with pytest.raises(CorruptDataError, match="state must fit this run's model"):
        one.session.load_checkpoint(other.save_checkpoint())
    assert differences(before, one.everything()) == []


def test_a_name_is_tracked_once(rig: Any) -> None:
    one = rig()
    with pytest.raises(InvalidInputError, match="name must be new, got 'scheduler'"):
        one.session.track("scheduler", one.scheduler)


def test_packets_of_a_run_taken_up_again_are_newer_than_all_before(rig: Any, line: Any) -> None:
    first = rig()
    first.epochs(1)
    checkpoint_id = first.session.save_checkpoint()
    first.epochs(3)
    second = rig()
    second.session.load_checkpoint(checkpoint_id)
    packets = line.values(Kind.STATE)
    assert packets[-1].phase is RunPhase.STARTED
    assert packets[-1].sequence > max(packet.sequence for packet in packets[:-1])


def test_growth_leaves_the_random_streams_alone(rig: Any, line: Any, decide: Any, kernel_for: Any) -> None:
    streams = []
    for grows in (False, True):
        one = rig(growth=esper.GrowthConfig(incubation_epochs=9))
        if grows:
            decision = decide(one.model)
            line.incoming += [decision, kernel_for(decision)]
        one.epochs(2)
        streams.append(torch.get_rng_state())
    assert torch.equal(*streams)

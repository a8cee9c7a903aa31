"""Operators' commands are carried out once each, and a refusal is an answer in words, never an error in the loop."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch

import esper
from esper.blueprints.registry import default_registry
from esper.contracts.decision import ControlAction, ControlCommand, ControlResult, PlanStatus
from esper.contracts.errors import EsperError
from esper.contracts.lifecycle import SeedLifecycleState as State
from esper.contracts.run import AdaptationOutcome, GateCheck, RunPhase
from esper.recovery import CheckpointManager
from esper.telemetry.subjects import Kind

REMOVED = esper.GrowthConfig(incubation_epochs=9, embargo_epochs=0, cull_epochs=0)


def command(action: ControlAction, request_id: str = "q1", **fields: Any) -> ControlCommand:
    return ControlCommand(
        **({"request_id": request_id, "run_id": "r", "action": action, "created_at": datetime.now(UTC)} | fields)
    )


def germinate(request_id: str = "q1", **fields: Any) -> ControlCommand:
    blueprint = default_registry().create_blueprint("bottleneck_adapter")
    place = {"layer": "0", "seed_index": 1, "blueprint": blueprint, "actor": "ada"}
    return command(ControlAction.GERMINATE, request_id, **(place | fields))


@pytest.fixture
def store(tmp_path: Path) -> CheckpointManager:
    return CheckpointManager(tmp_path)


class Desk:
    """A session whose mailbox is looked into after each command."""

    def __init__(self, session: esper.Session, line: Any) -> None:
        self.session, self.line = session, line
        self.model = session._context.model

    def ask(self, asked: ControlCommand) -> ControlResult:
        self.line.incoming.append(asked)
        self.session._look_into_mailbox()
        answer = self.line.values(Kind.CONTROL)[-1]
        assert isinstance(answer, ControlResult)
        assert (answer.request_id, answer.run_id) == (asked.request_id, "r")
        return answer

    def state_of(self, seed: int, layer: str = "0") -> State:
        return self.model.kasmina_layers[layer].state_layout.state(seed)


@pytest.fixture
def desk(open_session: Any, line: Any) -> Callable[..., Desk]:
    return lambda **settings: Desk(open_session(**settings), line)


def test_checkpoint_writes_one_and_names_it(desk: Any, store: CheckpointManager) -> None:
    answer = desk(checkpoints=store).ask(command(ControlAction.CHECKPOINT))
    assert answer.accepted
    assert (answer.checkpoint_id,) == store.list_checkpoints()


@pytest.mark.parametrize(
    ("asked", "detail", "reason"),
    [
        (command(ControlAction.CHECKPOINT), "checkpoints must have a place", "INVALID_STATE"),
        (
            command(ControlAction.ROLLBACK, checkpoint_id="c20260101120000000-0123abcd"),
            "checkpoints must have a pl",
            "",
        ),
        (command(ControlAction.GERMINATE, layer="0", seed_index=0), "command.blueprint must be given", "INVALID_INPUT"),
        (germinate(layer="nowhere"), "layer: there is no layer 'nowhere' with seeds", "INVALID_STATE"),
        (germinate(seed_index=4), "layer: seed must be 0 to 3, got 4", "INVALID_STATE"),
        (germinate(seed_index=None), "layer: seed must be 0 to 3, got None", "INVALID_STATE"),
        (
            command(ControlAction.CULL, layer="nowhere", seed_index=0),
            "command.layer must name a layer",
            "INVALID_INPUT",
        ),
        (command(ControlAction.CULL, layer="0"), "command.seed_index must be given to cull", "INVALID_INPUT"),
        (command(ControlAction.CULL, layer="0", seed_index=9), "seed_idx must be 0 to 3", "INVALID_INPUT"),
        (command(ControlAction.CULL, layer="0", seed_index=0), "must hold a kernel, got none in state DORMANT", ""),
    ],
)
def test_what_cannot_be_done_is_refused_in_words(desk: Any, asked: ControlCommand, detail: str, reason: str) -> None:
    answer = desk().ask(asked)
    assert not answer.accepted
    assert detail in answer.detail
    assert answer.error_reason == (reason or "INVALID_STATE")


@pytest.mark.parametrize(
    ("checkpoint_id", "reason"), [("../x", "INVALID_INPUT"), ("c20260101120000000-0123abcd", "NOT_FOUND")]
)
def test_rollback_to_what_is_not_there_is_refused(
    desk: Any, store: CheckpointManager, checkpoint_id: str, reason: str
) -> None:
    answer = desk(checkpoints=store).ask(command(ControlAction.ROLLBACK, checkpoint_id=checkpoint_id))
    assert (answer.accepted, answer.error_reason) == (False, reason)


def test_a_disk_that_fails_is_an_answer(desk: Any, store: CheckpointManager, monkeypatch: Any) -> None:
    def fail(_state: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(store, "save_state", fail)
    answer = desk(checkpoints=store).ask(command(ControlAction.CHECKPOINT))
    assert (answer.accepted, answer.error_reason) == (False, "UNAVAILABLE")
    assert "Permission denied" in answer.detail


def test_rollback_returns_to_the_checkpoint_named(desk: Any, store: CheckpointManager) -> None:
    one = desk(checkpoints=store)
    weight = one.model[0].weight.detach().clone()
    written = one.ask(command(ControlAction.CHECKPOINT)).checkpoint_id
    with torch.no_grad():
        one.model[0].weight.zero_()
    answer = one.ask(command(ControlAction.ROLLBACK, "q2", checkpoint_id=written))
    assert answer.accepted
    assert torch.equal(one.model[0].weight, weight)


def test_rollback_returns_to_the_last_good_snapshot_as_often_as_asked(desk: Any) -> None:
    one = desk(governor=esper.GovernorConfig(max_rollbacks=1))
    weight = one.model[0].weight.detach().clone()
    for number in range(3):
        with torch.no_grad():
            one.model[0].weight.zero_()
        assert one.ask(command(ControlAction.ROLLBACK, f"q{number}")).accepted
        assert torch.equal(one.model[0].weight, weight)
    for _ in range(2):  # the governor's own allowance is not used up by operators
        loss = one.model(torch.randn(4, 6)).sum() * float("nan")
        loss.backward()
        one.session.step(loss)
    assert one.session.report().rollbacks == 4


def test_germinate_by_hand_needs_no_compiler(desk: Any, line: Any) -> None:
    one = desk(growth=REMOVED)
    answer = one.ask(germinate())
    assert answer.accepted
    assert "germinated bottleneck_adapter as a" in answer.detail
    assert one.state_of(1) is State.ACTIVE
    assert line.values(Kind.PLAN)[0].status is PlanStatus.ACCEPTED
    (adaptation,) = one.session.orchestrator.adaptations.values()
    assert adaptation.decision.explanation == "asked by ada"


def test_a_repeated_request_is_carried_out_once(desk: Any) -> None:
    one = desk(growth=REMOVED)
    first, second = one.ask(germinate()), one.ask(germinate(seed_index=2))
    assert first == second
    assert one.state_of(2) is State.DORMANT


def test_a_request_of_an_earlier_life_is_not_carried_out_again(desk: Any) -> None:
    one = desk(growth=REMOVED)
    one.ask(germinate())
    one.session._desk._answers.clear()  # as after a restart from a checkpoint
    answer = one.ask(germinate())
    assert not answer.accepted
    assert "request_id must be new" in answer.detail


def test_germinate_what_does_not_fit_the_layer_is_refused_and_leaves_no_trace(desk: Any) -> None:
    one = desk()
    before = list(one.model.state_dict())
    blueprint = default_registry().create_blueprint("conv3x3")
    answer = one.ask(germinate(blueprint=blueprint))
    assert not answer.accepted
    assert one.state_of(1) is State.DORMANT
    assert list(one.model.state_dict()) == before


def test_cull_ends_a_seed_that_learns(desk: Any, line: Any) -> None:
    one = desk(growth=REMOVED)
    one.ask(germinate())
    answer = one.ask(command(ControlAction.CULL, "q2", layer="0", seed_index=1, actor="ada"))
    assert answer.accepted
    assert one.state_of(1) is State.EMBARGOED
    (report,) = line.values(Kind.FIELD_REPORT)
    assert (report.outcome, report.reason) == (AdaptationOutcome.CULLED, "culled by ada")


def test_cull_removes_a_fossil_and_the_report_says_so(desk: Any) -> None:
    one = desk(growth=REMOVED)
    one.ask(germinate())
    (adaptation,) = one.session.orchestrator.ongoing()
    one.session.orchestrator._graft(adaptation, GateCheck(name="test", passed=True, detail=""))
    adaptation.contribution = one.session.orchestrator._looks.effect(adaptation, [], level=0.95)
    one.session.orchestrator._fossilize(adaptation, GateCheck(name="test", passed=True, detail="by test"))
    assert one.state_of(1) is State.FOSSILIZED
    assert one.session._context.ledger.status().added_parameters > 0
    assert one.ask(command(ControlAction.CULL, "q2", layer="0", seed_index=1)).accepted
    assert one.model.kasmina_layers["0"].find_seed(1) is None
    assert one.session._context.ledger.status().added_parameters == 0
    assert one.session.report().kept == ()


def test_pause_holds_the_loop_until_resume(desk: Any, line: Any, decide: Any) -> None:
    one = desk()
    held, went_on = threading.Event(), threading.Event()

    class Watched(type(line)):  # type: ignore[misc]
        def send(self, kind: Kind, value: Any, **rest: Any) -> None:
            super().send(kind, value, **rest)
            if kind is Kind.STATE and value.phase is RunPhase.PAUSED:
                held.set()

    line.__class__ = Watched
    line.incoming.append(command(ControlAction.PAUSE))

    def loop() -> None:
        one.session._look_into_mailbox()
        went_on.set()

    thread = threading.Thread(target=loop)
    thread.start()
    assert held.wait(10)
    decision = decide(one.model)
    line.incoming.append(decision)
    assert not went_on.wait(0.2)
    assert decision.adaptation_id in one.session.orchestrator.adaptations, "what comes meanwhile is not lost"
    line.incoming.append(command(ControlAction.RESUME, "q2"))
    assert went_on.wait(10)
    thread.join(10)
    assert [answer.accepted for answer in line.values(Kind.CONTROL)] == [True, True]


def test_stop_ends_a_held_run_too(desk: Any, line: Any) -> None:
    one = desk()
    line.incoming += [command(ControlAction.PAUSE), command(ControlAction.STOP, "q2")]
    one.session._look_into_mailbox()
    assert one.session.should_stop
    one.session.close()
    assert line.values(Kind.STATE)[-1].phase is RunPhase.STOPPED


def test_every_action_has_its_way(desk: Any) -> None:
    assert set(desk().session._desk._actions) == set(ControlAction)


def test_a_start_that_fails_leaves_nothing_behind(task: Any, line: Any, open_session: Any) -> None:
    model = esper.wrap(task.host())
    stray = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([*model.parameters(), stray], lr=0.1)
    with pytest.raises(EsperError, match="hold the model's parameters"):
        open_session(model, optimizer)
    assert line.closed
    assert not model._forward_pre_hooks
    assert not model.seed_states._listeners


def test_an_end_that_fails_lets_go_of_everything(desk: Any, line: Any, monkeypatch: Any) -> None:
    one = desk()

    def fail() -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(one.session.orchestrator, "finish", fail)
    with pytest.raises(MemoryError):
        one.session.close()
    assert line.closed
    assert not one.model._forward_pre_hooks
    assert line.values(Kind.STATE)[-1].phase is RunPhase.FAILED


def test_a_second_run_of_a_model_begins_without_the_unproven_seeds_of_the_first(
    desk: Any, task: Any, line: Any
) -> None:
    one = desk(growth=REMOVED)
    one.ask(germinate())
    one.session.close(RunPhase.STOPPED, "interrupted")
    assert one.state_of(1) is State.ACTIVE
    fresh = torch.optim.SGD(one.model.parameters(), lr=0.1)
    second = esper.Session(
        one.model,
        fresh,
        loss_fn=torch.nn.CrossEntropyLoss(),
        control_loader=task.control,
        mesh=type("Mesh", (), {"open_link": lambda *_: line})(),
    )
    assert one.state_of(1) is State.DORMANT
    assert len(fresh.param_groups[0]["params"]) == len(list(one.model.parameters())) == 4
    assert second.report().host_params == sum(value.numel() for value in one.model.parameters())
    second.close()


def test_what_an_operator_takes_back_stays_so_though_its_losses_are_higher(desk: Any, store: CheckpointManager) -> None:
    one = desk(checkpoints=store)
    written = one.ask(command(ControlAction.CHECKPOINT)).checkpoint_id
    for _ in range(64):
        one.session.step(torch.tensor(1e-3))
    assert one.ask(command(ControlAction.ROLLBACK, "q2", checkpoint_id=written)).accepted
    before = one.session.step_count
    for _ in range(8):
        one.session.step(torch.tensor(0.7))
    assert one.session.step_count == before + 8
    assert one.session.report().rollbacks == 0


def test_what_an_operator_could_not_take_back_is_watched_as_before(desk: Any, store: CheckpointManager) -> None:
    one = desk(checkpoints=store)
    for _ in range(64):
        one.session.step(torch.tensor(1e-3))
    assert not one.ask(command(ControlAction.ROLLBACK, checkpoint_id="../x")).accepted
    for _ in range(8):
        one.session.step(torch.tensor(0.7))
    assert one.session.report().rollbacks == 1

"""A run lets only the kinds of blueprint stand that its settings allow, whoever asks, and says so in its packets."""

from __future__ import annotations

import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

import esper
from esper.blueprints import default_registry
from esper.contracts.decision import ControlAction, ControlCommand, ControlResult, PlanStatus
from esper.contracts.errors import InvalidInputError
from esper.contracts.lifecycle import SeedLifecycleState as State
from esper.core.growth import UnknownTagWarning
from esper.recovery import CheckpointManager
from esper.telemetry.subjects import Kind

REFUSAL = "allowed_blueprints: signal_conv must keep 'dense', has the tags activation, conv, convolution,"


def take_in(session: Any, line: Any, *arrivals: Any) -> None:
    line.incoming += arrivals
    session._look_into_mailbox()


def seed_states(session: Any, layer: str = "0") -> set[State]:
    layout = session._context.model.kasmina_layers[layer].state_layout
    return {layout.state(index) for index in range(4)}


def test_packets_say_what_may_stand(line: Any, open_session: Any) -> None:
    open_session(growth=esper.GrowthConfig(allowed_blueprints="dense & !widening"))
    assert {packet.allowed_blueprints for packet in line.values(Kind.STATE)} == {"dense & !widening"}


def test_a_decision_for_another_kind_is_rejected_with_the_rule(line: Any, open_session: Any, decide: Any) -> None:
    session = open_session(growth=esper.GrowthConfig(allowed_blueprints="dense"))
    take_in(session, line, decide(session._context.model, template="signal_conv"))
    (plan,) = line.values(Kind.PLAN)
    assert plan.status is PlanStatus.REJECTED
    assert REFUSAL in plan.reason
    assert [check.name for check in plan.checks if not check.passed] == ["allowed_blueprints"]
    assert seed_states(session) == {State.DORMANT}


@pytest.mark.parametrize(
    ("allowed", "template", "detail"),
    [
        ("dense", "gated_mlp", "gated_mlp keeps 'dense'"),
        ("conv & !image", "signal_conv", "signal_conv keeps '!image & conv'"),
        ("", "signal_conv", "every blueprint may stand in this run"),
    ],
)
def test_a_decision_for_an_allowed_kind_is_carried_out(
    line: Any, open_session: Any, decide: Any, allowed: str, template: str, detail: str
) -> None:
    session = open_session(growth=esper.GrowthConfig(allowed_blueprints=allowed))
    take_in(session, line, decide(session._context.model, template=template))
    (plan,) = line.values(Kind.PLAN)
    assert plan.status is PlanStatus.ACCEPTED
    assert [check.detail for check in plan.checks if check.name == "allowed_blueprints"] == [detail]
    assert State.LOADING in seed_states(session)


def test_a_command_by_hand_is_bound_as_well(line: Any, open_session: Any) -> None:
    session = open_session(growth=esper.GrowthConfig(allowed_blueprints="dense"))
    place = {"layer": "0", "seed_index": 1, "run_id": "r", "actor": "ada", "created_at": datetime.now(UTC)}
    for request_id, name in (("q1", "signal_conv"), ("q2", "glu")):
        blueprint = default_registry().create_blueprint(name)
        asked = ControlCommand(request_id=request_id, action=ControlAction.GERMINATE, blueprint=blueprint, **place)
        take_in(session, line, asked)
    refused, done = line.values(Kind.CONTROL)
    assert isinstance(refused, ControlResult)
    assert (refused.accepted, refused.error_reason) == (False, "INVALID_STATE")
    assert REFUSAL in refused.detail
    assert done.accepted, done.detail


def test_what_stands_already_is_left_alone(
    line: Any, open_session: Any, decide: Any, kernel_for: Any, tmp_path: Path
) -> None:
    """A run that is taken up under a narrower rule goes on with what it had: the rule binds what is to germinate."""
    store = CheckpointManager(tmp_path)
    first = open_session(growth=esper.GrowthConfig(incubation_epochs=9), checkpoints=store)
    decision = decide(first._context.model, template="signal_conv")
    take_in(first, line, decision, kernel_for(decision))
    assert State.ACTIVE in seed_states(first)
    written = first.save_checkpoint()
    narrower = esper.GrowthConfig(incubation_epochs=9, allowed_blueprints="dense")
    second = open_session(growth=narrower, checkpoints=store)
    second.load_checkpoint(written)
    assert seed_states(second) == {State.ACTIVE, State.DORMANT}
    take_in(second, line, decide(second._context.model, "2", template="signal_conv"))
    assert "signal_conv must keep 'dense'" in line.values(Kind.PLAN)[-1].reason


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dense &", r"growth\.allowed_blueprints must have a tag, '!' or '\(' at character 8, got its end"),
        ("Dense", r"growth\.allowed_blueprints must have a tag, '!' or '\(' at character 1, got 'D'"),
        ("a" * 1_025, r"growth\.allowed_blueprints must be at most 1024 characters, got 1025"),
    ],
)
def test_what_is_no_expression_is_refused_with_its_place(text: str, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message) as caught:
        esper.GrowthConfig(allowed_blueprints=text)
    assert caught.value.parameter == "growth.allowed_blueprints"


def test_a_tag_that_nothing_has_is_warned_of_where_it_was_written() -> None:
    with pytest.warns(UnknownTagWarning, match="allowed_blueprints names convolutoin: no operator or template") as seen:
        esper.GrowthConfig(allowed_blueprints="!convolutoin & !attention")
    assert seen[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        esper.GrowthConfig(allowed_blueprints="!convolution & !global_pool & !causal & !generated")

"""Tolaria behind its gRPC face and on its bus: runs are listed and watched, commands get their run's answer."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any

import pytest

from esper.contracts.decision import ControlResult
from esper.contracts.errors import (
    ConfigError,
    DeadlineExceededError,
    InvalidInputError,
    InvalidStateError,
    NotFoundError,
    UnavailableError,
)
from esper.contracts.run import AdaptationOutcome, FieldReport, RunPhase
from esper.contracts.wire import to_message
from esper.mesh.auth import Caller, Role, _caller
from esper.services.tolaria import bus_loop
from esper.services.tolaria.server import TolariaNodeConfig
from esper.telemetry.subjects import Kind, build_subject
from esper.v1 import decision_pb2, telemetry_pb2
from esper.v1 import tolaria_service_pb2 as pb

PAUSE = decision_pb2.CONTROL_ACTION_PAUSE


def request_of(request_id: str = "q1", **fields: Any) -> pb.ControlRunRequest:
    values: dict[str, Any] = {"request_id": request_id, "run_id": "run-1", "action": PAUSE}
    return pb.ControlRunRequest(command=decision_pb2.ControlCommand(**(values | fields)))


class Trainer:
    """The run's end of the bus: notes commands, and answers each with what a test says."""

    def __init__(self, control: Any) -> None:
        self._control = control
        self.commands: list[Any] = []
        self.answers = True

    async def run(self) -> None:
        subscription = await self._control.bus.subscribe(build_subject("run-1", Kind.CONTROL))
        async for raw in subscription:
            message = decision_pb2.ControlMessage.FromString(raw.payload)
            if message.WhichOneof("body") != "command":
                continue
            self.commands.append(message.command)
            if self.answers:
                await self.answer(message.command.request_id)

    async def answer(self, request_id: str) -> None:
        result = ControlResult(request_id=request_id, run_id="run-1", accepted=True, detail="held", step=7)
        message = decision_pb2.ControlMessage(result=to_message(result, decision_pb2.ControlResult))
        await self._control.publish(Kind.CONTROL, message)


@pytest.fixture
async def trainer(control: Any) -> Any:
    one = Trainer(control)
    task = asyncio.create_task(one.run())
    yield one
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_runs_are_listed_page_by_page(control: Any, packet: Any) -> None:
    for number in range(5):
        await control.say_state(packet(1, f"run-{number}"))
    found, token = [], ""
    for _ in range(3):
        page = await control.stub.ListRuns(pb.ListRunsRequest(page_size=2, page_token=token))
        found += [run.run_id for run in page.runs]
        token = page.next_page_token
    assert (sorted(found), token) == ([f"run-{number}" for number in range(5)], "")
    assert len(set(found)) == 5


async def test_a_page_token_belongs_to_its_listing(control: Any, packet: Any) -> None:
    for number in range(2):
        await control.say_state(packet(1, f"run-{number}"))
    page = await control.stub.ListRuns(pb.ListRunsRequest(page_size=1))
    phases = [telemetry_pb2.RUN_PHASE_TRAINING]
    with pytest.raises(InvalidInputError, match="page_token"):
        await control.stub.ListRuns(pb.ListRunsRequest(phases=phases, page_token=page.next_page_token))
    with pytest.raises(InvalidInputError, match="page_token"):
        await control.stub.ListRuns(pb.ListRunsRequest(page_token="made up"))


@pytest.mark.parametrize(
    ("request_fields", "message"),
    [({"phases": [0]}, "phases"), ({"phases": [99]}, "phases")],
)
async def test_a_bad_listing_is_refused(control: Any, request_fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        await control.stub.ListRuns(pb.ListRunsRequest(**request_fields))


async def test_a_run_is_shown_with_its_adaptations(control: Any, packet: Any, event: Any) -> None:
    await control.say_state(packet(1))
    one, other = event(), event("a" + "2" * 32)
    report = FieldReport(
        report_id="r1",
        adaptation_id=one.adaptation_id,
        run_id="run-1",
        layer="body",
        seed_index=0,
        outcome=AdaptationOutcome.CULLED,
        created_at=datetime.now(UTC),
        adaptation_type="add_seed",
    )
    for kind, value in ((Kind.SEED, one), (Kind.SEED, other), (Kind.FIELD_REPORT, report)):
        await control.publish(kind, value)
    await control.say_state(packet(2))
    shown = await control.stub.GetRun(pb.GetRunRequest(run_id="run-1"))
    assert shown.run.state.sequence == 2
    assert [record.adaptation_id for record in shown.adaptations] == [one.adaptation_id, other.adaptation_id]
    assert shown.adaptations[0].report.report_id == "r1"
    assert not shown.adaptations[1].HasField("report")


async def test_what_cannot_be_read_is_not_kept_and_does_not_stop_the_rest(
    control: Any, packet: Any, event: Any
) -> None:
    await control.publish(Kind.SEED, telemetry_pb2.SeedEvent(adaptation_id="a" + "3" * 32, alpha=7.0))
    await control.publish(Kind.SEED, event("a" * 200))
    await control.publish(Kind.SEED, event(), payload=b"\xff\xff")
    await control.publish(Kind.STATE, telemetry_pb2.SystemStatePacket())
    await control.say_state(packet(1))
    assert list((await control.stub.GetRun(pb.GetRunRequest(run_id="run-1"))).adaptations) == []
    await control.node._loop.ready()


async def test_a_defect_with_one_event_does_not_end_the_intake(control: Any, packet: Any, monkeypatch: Any) -> None:
    keep, failed = control.node.store.keep_packet, []

    async def fail_once(value: Any) -> bool:
        if not failed:
            failed.append(value)
            raise ZeroDivisionError
        return bool(await keep(value))

    monkeypatch.setattr(control.node.store, "keep_packet", fail_once)
    await control.say_state(packet(1))
    assert failed


async def test_seeds_are_listed_by_layer(control: Any, packet: Any) -> None:
    await control.say_state(packet(1))
    everything = await control.stub.ListSeeds(pb.ListSeedsRequest(run_id="run-1"))
    assert [layer.layer for layer in everything.layers] == ["body", "head"]
    head = await control.stub.ListSeeds(pb.ListSeedsRequest(run_id="run-1", layer="head"))
    assert [layer.layer for layer in head.layers] == ["head"]
    with pytest.raises(NotFoundError, match="run run-1 must have layer 'tail'"):
        await control.stub.ListSeeds(pb.ListSeedsRequest(run_id="run-1", layer="tail"))


@pytest.mark.parametrize("method", ["GetRun", "ListSeeds"])
async def test_an_unknown_run_is_not_found(control: Any, method: str) -> None:
    with pytest.raises(NotFoundError, match="run must be known, got 'nobody'"):
        await getattr(control.stub, method)(getattr(pb, f"{method}Request")(run_id="nobody"))
    with pytest.raises(InvalidInputError, match="run_id must match"):
        await getattr(control.stub, method)(getattr(pb, f"{method}Request")(run_id="../x"))


async def test_a_watcher_sees_the_run_until_it_ends(control: Any, packet: Any, event: Any) -> None:
    await control.say_state(packet(1))
    seen = []
    async with asyncio.timeout(10):
        async for response in control.stub.WatchRun(pb.WatchRunRequest(run_id="run-1")):
            seen.append(response.WhichOneof("event"))
            if len(seen) == 1:
                await control.publish(Kind.SEED, event())
                await control.say_state(packet(2, phase=RunPhase.FINISHED))
    assert seen == ["state", "seed", "state"]
    assert control.node._loop._watchers == {}


async def test_a_run_that_ended_is_shown_once(control: Any, packet: Any) -> None:
    await control.say_state(packet(1, phase=RunPhase.STOPPED))
    seen = [response async for response in control.stub.WatchRun(pb.WatchRunRequest(run_id="run-1"))]
    assert len(seen) == 1


async def test_watching_an_unknown_run_is_not_found_and_leaves_no_watcher(control: Any) -> None:
    with pytest.raises(NotFoundError, match="run must be known"):
        async for _ in control.stub.WatchRun(pb.WatchRunRequest(run_id="nobody")):
            pass
    assert control.node._loop._watchers == {}


async def test_a_command_gets_its_runs_answer(control: Any, trainer: Trainer, packet: Any) -> None:
    await control.say_state(packet(1))
    result = (await control.stub.ControlRun(request_of(actor="ada"), timeout=5)).result
    assert (result.accepted, result.detail, result.step) == (True, "held", 7)
    assert trainer.commands[0].actor == "ada"
    again = (await control.stub.ControlRun(request_of(actor="ada"), timeout=5)).result
    assert again == result
    assert len(trainer.commands) == 1, "a repeated request is sent once"


async def test_two_who_ask_the_same_both_get_the_answer(control: Any, trainer: Trainer, packet: Any) -> None:
    await control.say_state(packet(1))
    trainer.answers = False
    impatient = asyncio.create_task(control.stub.ControlRun(request_of(), timeout=0.5)._response())
    patient = asyncio.create_task(control.node._loop.command(_command(request_of()), 5))
    with pytest.raises(DeadlineExceededError, match=r"run run-1 must answer within .* got no answer to PAUSE"):
        await impatient
    await trainer.answer("q1")
    assert (await patient).accepted
    assert control.node._loop._waiting == {}


def _command(request: Any) -> Any:
    from esper.services.tolaria.servicer import _command as checked

    return checked(request.command)


async def test_a_run_that_says_nothing_is_a_deadline(control: Any, packet: Any) -> None:
    await control.say_state(packet(1))
    with pytest.raises(DeadlineExceededError, match="got no answer to PAUSE"):
        await control.stub.ControlRun(request_of(), timeout=0.4)
    assert control.node._loop._waiting == {}


async def test_a_run_that_ended_takes_no_command(control: Any, packet: Any) -> None:
    await control.say_state(packet(1, phase=RunPhase.FINISHED))
    with pytest.raises(InvalidStateError, match="run run-1 must be under way, got FINISHED"):
        await control.stub.ControlRun(request_of(), timeout=5)


async def test_an_unknown_run_takes_no_command(control: Any) -> None:
    with pytest.raises(NotFoundError, match="run must be known"):
        await control.stub.ControlRun(request_of(), timeout=5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"action": decision_pb2.CONTROL_ACTION_UNSPECIFIED}, "command.action must be one of CONTROL_ACTION_PAUSE"),
        ({"action": 99}, "command.action must be one of"),
        ({"actor": "x" * 129}, "command.actor must be at most 128 characters"),
        ({"request_id": ""}, "command.request_id must be 1 to 128 characters"),
        ({"request_id": "../x"}, "command.request_id must match"),
        ({"run_id": "No Run"}, "run_id must match"),
    ],
)
async def test_a_bad_command_is_refused(control: Any, packet: Any, fields: dict[str, Any], message: str) -> None:
    await control.say_state(packet(1))
    with pytest.raises(InvalidInputError, match=message):
        await control.stub.ControlRun(request_of(**fields), timeout=5)


def test_who_has_proven_a_name_cannot_act_in_another() -> None:
    token = _caller.set(Caller("grace", Role.OPERATOR))
    try:
        assert _command(request_of(actor="ada")).actor == "grace"
    finally:
        _caller.reset(token)
    assert _command(request_of()).actor == "operator"


async def test_a_loop_that_cannot_open_both_intakes_opens_none(control: Any, monkeypatch: Any) -> None:
    await control.node._loop.close()
    consume, opened = control.bus.consume, []

    async def refuse_the_second(*args: Any, **named: Any) -> Any:
        if opened:
            raise UnavailableError("the bus is away")
        opened.append(await consume(*args, **named))
        return opened[0]

    monkeypatch.setattr(control.bus, "consume", refuse_the_second)
    with pytest.raises(UnavailableError, match="the bus is away"):
        await control.node._loop.start()
    async with asyncio.timeout(5):
        assert [delivery async for delivery in opened[0]] == [], "it is closed"
    with pytest.raises(UnavailableError, match="bus loop must run"):
        await control.node._loop.ready()


async def test_an_answer_that_comes_again_pushes_no_other_out(control: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(bus_loop, "_ANSWERS_KEPT", 2)
    loop = control.node._loop
    for request_id in ("q1", "q2", "q2", "q2"):
        loop._answer(ControlResult(request_id=request_id, run_id="run-1", accepted=True, detail="held", step=7))
    assert set(loop._answers) == {"q1", "q2"}
    loop._answer(ControlResult(request_id="q3", run_id="run-1", accepted=True, detail="held", step=7))
    assert set(loop._answers) == {"q2", "q3"}


@pytest.mark.parametrize("place", [0, 1])
async def test_readiness_needs_both_intakes(control: Any, place: int) -> None:
    await control.node._loop.ready()
    ended = control.node._loop._intakes[place]
    ended.cancel()
    await asyncio.gather(ended, return_exceptions=True)
    with pytest.raises(UnavailableError, match="bus loop must run"):
        await control.node._loop.ready()


async def test_readiness_follows_the_loop(control: Any) -> None:
    await control.node._loop.ready()
    await control.node.close()
    with pytest.raises(UnavailableError, match="bus loop must run"):
        await control.node._loop.ready()


def test_a_store_must_be_named() -> None:
    with pytest.raises(ConfigError, match="database_url must name a store, got nothing"):
        TolariaNodeConfig(database_url="")

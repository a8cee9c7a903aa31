"""The command line's face: its commands and options are frozen, JSON is JSON, errors are one line with an exit code."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from esper.cli import connection, runs
from esper.cli import mesh as mesh_commands
from esper.cli.main import app
from esper.client.transport import AsyncStubTransport, Transport
from esper.contracts.errors import NotFoundError, UnavailableError
from esper.mesh import InProcessChannel
from esper.mesh.settings import MeshSettings
from esper.v1 import lifecycle_pb2, telemetry_pb2
from esper.v1 import tolaria_service_pb2 as pb
from esper.v1.tolaria_service_pb2_grpc import (
    TolariaServiceServicer,
    TolariaServiceStub,
    add_TolariaServiceServicer_to_server,
)

SURFACE = {
    "audit verify": "RUN_ID --head --json --timeout",
    "bench": "NAME --json --quick",
    "blueprints cost": "FILE --json --site",
    "blueprints create": "FILE --citation --description --json --kinds --name --tags|-t --timeout",
    "blueprints lineage": "REFERENCE --depth --descendants --json --timeout",
    "blueprints search": "--json --kind --state --tags --tag|-t --text --where --without",
    "blueprints show": "REFERENCE --json --timeout",
    "blueprints state": "REFERENCE STATE --json --reason --timeout",
    "blueprints validate": "FILE --json --site",
    "config show": "--config --json",
    "dead-letters list": "--json --limit|-n",
    "dead-letters requeue": "JOB_IDS --all --json --timeout",
    "dead-letters show": "JOB_ID --json --timeout",
    "demo": "--connect --epochs --first-seed --out --seeds --state-dir",
    "down": "--config --state-dir",
    "jobs cancel": "JOB_IDS --json --timeout",
    "jobs list": "--json --limit|-n --phase",
    "jobs show": "JOB_ID --json --timeout",
    "jobs watch": "JOB_ID --json",
    "kernels compile": "BLUEPRINT --device --json --priority --seed --site --target --timeout --wait",
    "kernels download": "ARTIFACT_ID FILE --force",
    "kernels list": "--blueprint --json --timeout",
    "kernels pin": "ARTIFACT_ID --json --reason --timeout",
    "kernels show": "ARTIFACT_ID --json --timeout",
    "kernels sweep": "--dry-run --json --timeout",
    "kernels unpin": "ARTIFACT_ID --json --reason --timeout",
    "kernels verify": "KERNEL --json --key",
    "logs": "SERVICE --config --lines|-n --state-dir",
    "memory export": "FILE --force --json --run",
    "memory import": "FILE --json",
    "report": "RUN_ID --json --timeout",
    "runs checkpoint": "RUN_ID --timeout",
    "runs list": "--json",
    "runs pause": "RUN_ID --timeout",
    "runs resume": "RUN_ID --timeout",
    "runs decisions": "RUN_ID --acted-on --json",
    "runs explain": "ADAPTATION_ID --json --timeout",
    "runs replay": "RUN_ID --json --present-settings",
    "runs rollback": "RUN_ID --timeout --to",
    "runs show": "RUN_ID --timeout",
    "runs stop": "RUN_ID --timeout",
    "runs watch": "RUN_ID --json",
    "seeds cull": "RUN_ID LAYER SEED_INDEX --timeout",
    "seeds germinate": "RUN_ID LAYER SEED_INDEX BLUEPRINT --timeout",
    "seeds list": "RUN_ID --json --timeout",
    "serve": "SERVICE --config",
    "status": "--config --json --state-dir",
    "up": "--config --state-dir",
}
"""Every command with its arguments and options; a change here is a change of the stable face."""


def surface(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    """Give every command below one, with its arguments and options."""
    if hasattr(command, "commands"):
        for name, inner in command.commands.items():
            yield from surface(inner, (*path, name))
        return
    arguments = [parameter.name.upper() for parameter in command.params if parameter.param_type_name == "argument"]
    options = ["|".join(each.opts) for each in command.params if each.param_type_name == "option"]
    yield " ".join(path), " ".join([*arguments, *sorted(options)])


class Runs(TolariaServiceServicer):
    """One run; commands are refused when a test says so."""

    def __init__(self) -> None:
        self.accepts = True
        self.commands: list[Any] = []

    async def ListRuns(self, request: Any, context: Any) -> Any:
        number = int(request.page_token or 0)
        state = telemetry_pb2.SystemStatePacket(phase=telemetry_pb2.RUN_PHASE_TRAINING, epoch=number)
        run = pb.Run(run_id=f"run-{number}", state=state)
        return pb.ListRunsResponse(runs=[run], next_page_token="" if number else "1")

    async def GetRun(self, request: Any, context: Any) -> Any:
        if request.run_id != "run-1":
            raise NotFoundError(f"run must be known, got {request.run_id!r}", parameter="run_id")
        return pb.GetRunResponse(run=pb.Run(run_id="run-1"))

    async def ListSeeds(self, request: Any, context: Any) -> Any:
        layer = telemetry_pb2.LayerStatus(layer="head")
        for index, source in enumerate(("", "body")):
            layer.seeds.add(seed_index=index, state=lifecycle_pb2.SEED_LIFECYCLE_STATE_ACTIVE, source=source)
        return pb.ListSeedsResponse(layers=[layer])

    async def ControlRun(self, request: Any, context: Any) -> Any:
        self.commands.append(request.command)
        result = {"accepted": self.accepts, "detail": "held" if self.accepts else "there is no seed", "step": 7}
        return pb.ControlRunResponse(result=result)


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Runs:
    """Have commands call a servicer in this process instead of a socket."""
    servicer, channel = Runs(), InProcessChannel()
    channel.add_servicer(add_TolariaServiceServicer_to_server, servicer)

    class Calls(AsyncStubTransport):
        def stub(self, service: str) -> Any:
            assert service == "tolaria"
            return TolariaServiceStub(channel)  # type: ignore[no-untyped-call]

    monkeypatch.setattr(connection, "ChannelTransport", lambda _settings: Transport(Calls()))
    return servicer


def test_the_first_process_of_a_container_ends_when_told_to_while_it_still_starts():
    script = """
import os, signal
own, os.getpid = os.getpid(), lambda: 1
import esper.cli.main
os.kill(own, signal.SIGTERM)
"""
    ended = subprocess.run([sys.executable, "-c", script], check=False, timeout=60)
    assert ended.returncode == 128 + signal.SIGTERM


def test_the_surface_is_frozen() -> None:
    assert dict(surface(typer.main.get_command(app))) == SURFACE


def test_every_command_explains_itself() -> None:
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        assert command.help, name


def test_a_table_is_json_on_request(esper: Any, service: Runs) -> None:
    code, out, _ = esper("runs", "list", "--json")
    assert code == 0
    assert [row["run"] for row in json.loads(out)] == ["run-0", "run-1"]
    assert json.loads(out)[0]["phase"] == "training"
    assert json.loads(out)[0]["control_loss"] is None, "what was not measured is absent, not zero"


def test_a_table_is_for_people_otherwise(esper: Any, service: Runs) -> None:
    code, out, _ = esper("runs", "list")
    assert code == 0
    assert "run-0" in out
    assert "control_loss" in out


def test_a_run_is_shown_as_json(esper: Any, service: Runs) -> None:
    assert json.loads(esper("runs", "show", "run-1")[1])["run"]["run_id"] == "run-1"


def test_seeds_are_listed_with_the_layer_whose_input_they_read(esper: Any, service: Runs) -> None:
    rows = json.loads(esper("seeds", "list", "run-1", "--json")[1])
    assert [(row["layer"], row["seed"], row["source"]) for row in rows] == [("head", 0, ""), ("head", 1, "body")]


def test_an_error_of_the_service_is_one_line_and_exit_code_1(esper: Any, service: Runs) -> None:
    code, out, err = esper("runs", "show", "nobody")
    assert (code, out) == (1, "")
    assert err == "esper: NOT_FOUND: run must be known, got 'nobody'\n"


@pytest.mark.parametrize("action", ["pause", "resume", "stop", "checkpoint", "rollback"])
def test_levers_reach_the_run(esper: Any, service: Runs, action: str) -> None:
    code, out, _ = esper("runs", action, "run-1")
    assert (code, out) == (0, "step 7: held\n")
    (command,) = service.commands
    assert command.action == runs.decision_pb2.ControlAction.Value(f"CONTROL_ACTION_{action.upper()}")
    assert command.request_id
    assert command.actor


def test_a_refusal_is_exit_code_1(esper: Any, service: Runs) -> None:
    service.accepts = False
    code, _, err = esper("seeds", "cull", "run-1", "head", "0")
    assert (code, err) == (1, "esper: INVALID_STATE: run run-1 did not cull: there is no seed\n")


@pytest.mark.parametrize(
    "words",
    [
        ("nonsense",),
        ("runs", "show"),
        ("runs", "list", "--nonsense"),
        ("serve", "nonsense"),
        ("seeds", "cull", "r", "head", "-1"),
        ("logs", "../../etc/passwd"),
        ("runs", "show", "r", "--timeout", "0"),
    ],
)
def test_bad_use_is_exit_code_2(esper: Any, words: tuple[str, ...]) -> None:
    code, out, err = esper(*words)
    assert code == 2
    assert err
    assert "Traceback" not in out + err


def test_a_bad_setting_is_exit_code_2_and_named(esper: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPER_NATS_URI", "x")
    code, _, err = esper("config", "show")
    assert (code, err) == (2, "esper: CONFIG: environment must name known settings, got ESPER_NATS_URI\n")


def test_a_mesh_that_is_away_is_one_line_and_exit_code_1(esper: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from esper.mesh.ports import free_port

    monkeypatch.setenv("ESPER_TOLARIA_ADDRESS", f"127.0.0.1:{free_port()}")
    code, _, err = esper("runs", "list")
    assert code == 1
    assert err.startswith("esper: UNAVAILABLE: ")
    assert err.count("\n") == 1


def test_ctrl_c_is_exit_code_130(esper: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "call", lambda *_: signal.raise_signal(signal.SIGINT))
    code, out, err = esper("runs", "show", "run-1")
    assert code == 130
    assert "Traceback" not in out + err


def test_the_configuration_is_shown_with_its_sources(esper: Any, monkeypatch: Any, tmp_path: Path) -> None:
    path = tmp_path / "esper.toml"
    path.write_text("tezzeret_workers = 2\n")
    monkeypatch.setenv("ESPER_NATS_URL", "nats://bus:4222")
    code, out, _ = esper("config", "show", "--json", "--config", str(path))
    assert code == 0
    rows = {row["setting"]: (row["value"], row["source"]) for row in json.loads(out)}
    assert set(rows) == set(MeshSettings.model_fields)
    assert rows["tezzeret_workers"] == (2, f"file {path}")
    assert rows["nats_url"] == ("nats://bus:4222", "environment")
    assert rows["urza_rest_port"] == (8081, "default")


def test_passwords_are_not_shown(esper: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPER_DATABASE_URL", "postgresql://me:secret@db/esper")
    out = esper("config", "show", "--json")[1]
    assert "postgresql://me:***@db/esper" in out
    assert "secret" not in out


def test_without_a_mesh_status_and_down_say_so(esper: Any, tmp_path: Path) -> None:
    assert "no mesh is running in" in esper("status")[1]
    assert json.loads(esper("status", "--json")[1]) == []
    assert esper("down")[:2] == (0, "nothing was running\n")
    code, _, err = esper("logs", "urza")
    assert (code, err) == (1, "esper: NOT_FOUND: service must be one the mesh has run, got 'urza'\n")


def test_logs_stay_when_the_mesh_has_gone(esper: Any, tmp_path: Path) -> None:
    path = tmp_path / "esper" / "logs" / "urza.log"
    path.parent.mkdir(parents=True)
    path.write_text("".join(f"line {number}\n" for number in range(9)))
    assert esper("logs", "urza", "-n", "2")[1] == "line 7\nline 8\n"


def test_a_mesh_that_does_not_come_up_is_an_error_and_leaves_no_process(esper: Any, monkeypatch: Any) -> None:
    started: list[Any] = []
    popen = mesh_commands.subprocess.Popen

    def failing(argv: list[str], **rest: Any) -> Any:
        started.append(popen([*argv[:1], "-c", "raise SystemExit('no room for a mesh')"], **rest))
        return started[0]

    monkeypatch.setattr(mesh_commands.subprocess, "Popen", failing)
    code, _, err = esper("up")
    assert code == 1
    assert err.startswith(f"esper: {UnavailableError.reason}: the mesh must come up, got:")
    assert "no room for a mesh" in err
    assert started[0].poll() is not None

"""``esper runs``, ``esper seeds``, ``esper report``: training runs and the operator's levers on them."""

from __future__ import annotations

import getpass
import sys
import uuid
from typing import Annotated, Any

import typer

from esper.cli.connection import call, pages, watch
from esper.cli.output import Json, Timeout, console, plain, print_json, print_rows
from esper.contracts.decision import ControlAction
from esper.contracts.errors import InvalidStateError
from esper.v1 import (
    decision_pb2,
    lifecycle_pb2,
    nissa_service_pb2,
    tamiyo_service_pb2,
    telemetry_pb2,
    tolaria_service_pb2,
    urza_service_pb2,
)

app = typer.Typer(help="Training runs: look, hold, stop, take back.", no_args_is_help=True)
seeds_app = typer.Typer(help="Seeds of a run: look, germinate, cull.", no_args_is_help=True)

RunId = Annotated[str, typer.Argument(help="Run.")]


@app.command("list")
def list_runs(as_json: Json = False) -> None:
    """List runs, newest first."""
    request = tolaria_service_pb2.ListRunsRequest()
    found = [run for page in pages("tolaria", "ListRuns", request) for run in page.runs]
    rows = [
        (
            run.run_id,
            _word(telemetry_pb2.RunPhase.Name(run.state.phase), "RUN_PHASE_"),
            run.state.epoch,
            f"{run.state.control_loss:.4f}" if run.state.HasField("control_loss") else None,
            run.state.current_parameters,
            run.started_at.ToJsonString(),
        )
        for run in found
    ]
    columns = ("run", "phase", "epoch", "control_loss", "parameters", "started")
    print_rows("runs", columns, rows, as_json=as_json)


@app.command("show")
def show(run_id: RunId, timeout: Timeout = 10.0) -> None:
    """Print one run with its adaptations, as JSON."""
    print_json(plain(call("tolaria", "GetRun", tolaria_service_pb2.GetRunRequest(run_id=run_id), timeout)))


@app.command("watch")
def watch_run(run_id: RunId, as_json: Json = False) -> None:
    """Follow a run until it ends."""

    def print_event(response: Any) -> None:
        if as_json:
            print_json(plain(response))
        else:
            console.print(_event_line(response), highlight=False, markup=False)

    watch("tolaria", "WatchRun", tolaria_service_pb2.WatchRunRequest(run_id=run_id), print_event)


@app.command("pause")
def pause(run_id: RunId, timeout: Timeout = 10.0) -> None:
    """Hold a run before its next step."""
    _command(ControlAction.PAUSE, run_id, timeout)


@app.command("resume")
def resume(run_id: RunId, timeout: Timeout = 10.0) -> None:
    """Let a held run go on."""
    _command(ControlAction.RESUME, run_id, timeout)


@app.command("stop")
def stop(run_id: RunId, timeout: Timeout = 10.0) -> None:
    """End a run after its present step, with report."""
    _command(ControlAction.STOP, run_id, timeout)


@app.command("checkpoint")
def checkpoint(run_id: RunId, timeout: Timeout = 30.0) -> None:
    """Have a run write a checkpoint now."""
    _command(ControlAction.CHECKPOINT, run_id, timeout)


@app.command("rollback")
def rollback(
    run_id: RunId,
    checkpoint_id: Annotated[str, typer.Option("--to", help="Checkpoint; default: the last good snapshot.")] = "",
    timeout: Timeout = 30.0,
) -> None:
    """Take a run back to its last good snapshot, or to a checkpoint."""
    _command(ControlAction.ROLLBACK, run_id, timeout, checkpoint_id=checkpoint_id)


@app.command("decisions")
def list_decisions(
    run_id: RunId,
    acted_on: Annotated[bool, typer.Option("--acted-on", help="Only those that were to be acted on.")] = False,
    as_json: Json = False,
) -> None:
    """List what was decided for a run and why, newest first; ``runs explain`` tells all of one decision."""
    request = tamiyo_service_pb2.ListDecisionsRequest(run_id=run_id)
    found = [one for page in pages("tamiyo", "ListDecisions", request) for one in page.decisions]
    rows = [
        (
            one.adaptation_id,
            one.epoch,
            _word(decision_pb2.AdaptationType.Name(one.adaptation_type), "ADAPTATION_TYPE_"),
            one.layer,
            round(one.confidence, 3),
            round(one.urgency, 3),
            one.actionable,
            one.explanation,
        )
        for one in found
        if one.actionable or not acted_on
    ]
    columns = ("adaptation", "epoch", "type", "layer", "confidence", "urgency", "acted_on", "why")
    print_rows("decisions", columns, rows, as_json=as_json)


@app.command("explain")
def explain(
    adaptation_id: Annotated[str, typer.Argument(help="Adaptation, as decisions and reports name it.")],
    as_json: Json = False,
    timeout: Timeout = 10.0,
) -> None:
    """Explain one decision: what was seen, who raced, what came of it."""
    response = call("tamiyo", "Explain", tamiyo_service_pb2.ExplainRequest(adaptation_id=adaptation_id), timeout)
    if as_json:
        print_json(plain(response))
    else:
        for line in response.lines:
            console.print(line, highlight=False, markup=False)


@seeds_app.command("list")
def list_seeds(run_id: RunId, as_json: Json = False, timeout: Timeout = 10.0) -> None:
    """List the seeds of a run as of its last state packet."""
    response = call("tolaria", "ListSeeds", tolaria_service_pb2.ListSeedsRequest(run_id=run_id), timeout)
    rows = [
        (
            layer.layer,
            seed.seed_index,
            _word(lifecycle_pb2.SeedLifecycleState.Name(seed.state), "SEED_LIFECYCLE_STATE_"),
            round(seed.alpha, 4),
            seed.parameters,
            seed.blueprint_id[:12],
            seed.source,
        )
        for layer in response.layers
        for seed in layer.seeds
    ]
    columns = ("layer", "seed", "state", "alpha", "parameters", "blueprint", "source")
    print_rows("seeds", columns, rows, as_json=as_json)


@seeds_app.command("germinate")
def germinate(
    run_id: RunId,
    layer: Annotated[str, typer.Argument(help="Dotted module name.")],
    seed_index: Annotated[int, typer.Argument(help="Seed within the layer.", min=0)],
    blueprint: Annotated[str, typer.Argument(help="Blueprint: id, name or name@version.")],
    timeout: Timeout = 10.0,
) -> None:
    """Germinate a seed by hand, of a kind that the run allows."""
    request = urza_service_pb2.GetBlueprintRequest(reference=blueprint)
    found = call("urza", "GetBlueprint", request, timeout).blueprint
    _command(ControlAction.GERMINATE, run_id, timeout, layer=layer, seed_index=seed_index, blueprint=found)


@seeds_app.command("cull")
def cull(
    run_id: RunId,
    layer: Annotated[str, typer.Argument(help="Dotted module name.")],
    seed_index: Annotated[int, typer.Argument(help="Seed within the layer.", min=0)],
    timeout: Timeout = 10.0,
) -> None:
    """Remove a seed by hand."""
    _command(ControlAction.CULL, run_id, timeout, layer=layer, seed_index=seed_index)


def report(
    run_id: RunId,
    as_json: Json = False,
    timeout: Timeout = 10.0,
) -> None:
    """Print the report of a run, as Nissa has it."""
    form = nissa_service_pb2.REPORT_FORMAT_JSON if as_json else nissa_service_pb2.REPORT_FORMAT_MARKDOWN
    request = nissa_service_pb2.GetRunReportRequest(run_id=run_id, format=form)
    sys.stdout.write(call("nissa", "GetRunReport", request, timeout).document + "\n")


def _command(action: ControlAction, run_id: str, timeout_s: float, **fields: Any) -> None:
    command = decision_pb2.ControlCommand(
        request_id=uuid.uuid4().hex,
        run_id=run_id,
        action=decision_pb2.ControlAction.Value(f"CONTROL_ACTION_{action.name}"),
        actor=getpass.getuser(),
        **fields,
    )
    request = tolaria_service_pb2.ControlRunRequest(command=command)
    result = call("tolaria", "ControlRun", request, timeout_s).result
    if not result.accepted:
        raise InvalidStateError(f"run {run_id} did not {action.name.lower()}: {result.detail}")
    console.print(f"step {result.step}: {result.detail}", highlight=False, markup=False)


def _event_line(response: Any) -> str:
    match response.WhichOneof("event"):
        case "state":
            state = response.state
            phase = _word(telemetry_pb2.RunPhase.Name(state.phase), "RUN_PHASE_")
            loss = f", control loss {state.control_loss:.4f}" if state.HasField("control_loss") else ""
            return f"epoch {state.epoch} step {state.step}: {phase}{loss}, {state.current_parameters} parameters"
        case "decision":
            decision = response.decision
            return f"decision {decision.adaptation_id}: {decision.explanation}"
        case "seed":
            seed = response.seed
            states = lifecycle_pb2.SeedLifecycleState
            to_state = _word(states.Name(seed.to_state), "SEED_LIFECYCLE_STATE_")
            return f"step {seed.step}: seed {seed.seed_index} of {seed.layer} is {to_state}: {seed.reason}"
        case _:
            return f"report {response.report.adaptation_id}: {response.report.reason}"


def _word(name: str, prefix: str) -> str:
    return name.removeprefix(prefix).lower()

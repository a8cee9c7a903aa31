"""``esper demo`` and ``esper bench``."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.live import Live
from rich.table import Table

from esper.cli.output import console
from esper.contracts.errors import NotFoundError

if TYPE_CHECKING:
    from esper.cli.demo_run import DemoResult, DemoSettings, SeedResult
    from esper.core.report import EpochRecord
    from esper.core.session import Session


def demo(
    epochs: Annotated[int, typer.Option(help="Epochs of every arm.", min=1, max=1000)] = 30,
    seeds: Annotated[int, typer.Option(help="Runs with different weights and batches.", min=1, max=50)] = 5,
    out: Annotated[Path, typer.Option(help="Directory of the report.")] = Path("demo-report"),
    state_dir: Annotated[Path, typer.Option(help="Where the mesh keeps its state.")] = Path(".state/demo"),
    first_seed: Annotated[int, typer.Option(help="Seed of the first run; the others count up from it.", min=0)] = 0,
    connect: Annotated[bool, typer.Option("--connect", help="Use the mesh of the settings; start none.")] = False,
) -> None:
    """Grow a small network on handwritten digits, through all services, and show what it brought.

    Starts NATS and the six services on this machine, trains on three splits (train, control, sealed test), and compares
    with the host alone and with a static network of the grown size. Takes a few minutes on two cores; no network.
    """
    # torch is behind these: only who needs it waits for it
    import torch

    import esper
    from esper.cli import digits
    from esper.cli.demo_report import write_report
    from esper.cli.demo_run import DemoResult, DemoSettings, run_seed

    # Networks this small only lose by splitting their work over threads.
    torch.set_num_threads(1)
    settings = DemoSettings(epochs=epochs, seeds=seeds)
    splits = digits.load_digits()
    runs: list[SeedResult] = []
    with console.status("reaching the mesh ..." if connect else "starting NATS and six services ..."):
        mesh = esper.Mesh.connect() if connect else esper.Mesh.local(state_dir)
    with mesh:
        for seed in range(first_seed, first_seed + seeds):
            with _live(seed, settings) as show:
                runs.append(run_seed(mesh, splits, settings, seed, show))
            _say_seed(runs[-1])
    result = DemoResult(settings=settings, runs=tuple(runs))
    path = write_report(result, out)
    _say_result(result, path, None if connect else state_dir)


def bench(
    name: Annotated[str, typer.Argument(help="Measure, or all.")],
    quick: Annotated[bool, typer.Option("--quick", help="Fewer repeats.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON alone.")] = False,
) -> None:
    """Run a measure of bench/ (from a checkout): each prints its figures as ratios and writes JSON."""
    directory = Path.cwd() / "bench"
    if not (directory / "__main__.py").is_file():
        raise NotFoundError(f"bench must be run in a checkout of Esper, got {Path.cwd()}")
    sys.argv = ["bench", name, *(["--quick"] if quick else []), *(["--json"] if as_json else [])]
    sys.path.insert(0, os.fspath(Path.cwd()))
    runpy.run_module("bench", run_name="__main__")


@contextmanager
def _live(seed: int, settings: DemoSettings) -> Iterator[Any]:
    """Show a run as it goes: a live table on a terminal, a line every few epochs elsewhere."""
    with Live(console=console, refresh_per_second=8, transient=True) as live:

        def show(record: EpochRecord, session: Session) -> None:
            if console.is_terminal:
                live.update(_run_table(seed, settings, record, session))
            elif record.epoch % 10 == 0 or record.epoch == settings.epochs:
                console.print(_line(seed, record, session), soft_wrap=True)

        yield show


def _run_table(seed: int, settings: DemoSettings, record: EpochRecord, session: Session) -> Table:
    done = round(30 * record.epoch / settings.epochs)
    title = f"seed {seed}  [{'#' * done}{'.' * (30 - done)}] epoch {record.epoch}/{settings.epochs}"
    accuracy = "" if record.control_accuracy is None else f", control accuracy {record.control_accuracy:.2%}"
    table = Table(title=f"{title}  control loss {record.control_loss:.4f}{accuracy}", title_justify="left")
    for column in ("layer", "blueprint", "state", "contribution", "parameters"):
        table.add_column(column)
    alive = (item for item in session.orchestrator.adaptations.values() if item.open or item.graft_steps)
    for item in alive:
        shown = item.summary(record.step)
        effect = "" if shown.contribution is None else f"{shown.contribution:+.4f}"
        table.add_row(shown.place, shown.blueprint or shown.adaptation_type, shown.state, effect, str(shown.parameters))
    return table


def _line(seed: int, record: EpochRecord, session: Session) -> str:
    adaptations = session.orchestrator.adaptations.values()
    outcomes = [item.outcome.name.lower() if item.outcome else "open" for item in adaptations]
    counts = ", ".join(f"{outcomes.count(name)} {name}" for name in dict.fromkeys(outcomes)) or "none tried yet"
    loss = f"control loss {record.control_loss:.4f}, {record.parameters} parameters"
    return f"seed {seed} epoch {record.epoch:3d}: {loss}; {counts}"


def _say_seed(run: SeedResult) -> None:
    report = run.report
    console.print(
        f"seed {run.seed}: {report.host_params:,} -> {report.final_params:,} parameters, {len(report.kept)} of "
        f"{len(report.adaptations)} adaptations kept; sealed test: grown {run.grown_accuracy:.2%}, host alone "
        f"{run.host_accuracy:.2%}, static of the grown size {run.static_accuracy:.2%}",
        highlight=False,
        soft_wrap=True,
    )
    blended = [item for item in report.adaptations if item.graft_steps or item.outcome == "kept"]
    for item in blended:
        effect = "not measured"
        if item.contribution is not None and item.interval is not None:
            effect = f"{item.contribution:+.4f} ({item.interval[0]:+.4f} to {item.interval[1]:+.4f})"
        name = item.blueprint or item.adaptation_type
        console.print(
            f"    layer {item.place or '(all)'}: {name}, {item.outcome}, contribution {effect}",
            highlight=False,
            soft_wrap=True,
        )
    if others := len(report.adaptations) - len(blended):
        console.print(f"    {others} more learnt alone and were not blended in", highlight=False)


def _say_result(result: DemoResult, path: Path, state_dir: Path | None) -> None:
    from esper.cli.demo_report import describe_margin

    for name, control in (("the host alone", "host"), ("a static net of the grown size", "static")):
        margin = result.margin(control)
        if margin is not None:
            console.print(f"grown minus {name}: {describe_margin(margin)}", highlight=False, soft_wrap=True)
    console.print(f"report: {path}")
    if state_dir is None:
        return
    run_id = result.runs[-1].report.run_id
    console.print("look around (the services keep what they saw):")
    console.print(f"    .venv/bin/esper up --state-dir {state_dir}", highlight=False, soft_wrap=True)
    request = f'\'{{"run_id": "{run_id}"}}\''
    line = f"    grpcurl -plaintext -d {request} 127.0.0.1:50051 esper.v1.TolariaService/GetRun"
    console.print(line, highlight=False, soft_wrap=True)

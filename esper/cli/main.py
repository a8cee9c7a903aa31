"""Entry point of the ``esper`` command: commands in groups, errors as one clear line, exit codes 0, 1 and 2."""

from __future__ import annotations

import os
import signal
import sys

# A forked DataLoader worker beside a busy gRPC client can crash the trainer; must be set before grpc is imported.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

# A container's first process is not ended by a signal that it has no handler for; a service has one once it serves.
if os.getpid() == 1:
    signal.signal(signal.SIGTERM, lambda number, _: os._exit(128 + number))

import typer

from esper.cli import (
    audit,
    authoring,
    catalogue,
    demo,
    jobs,
    kernels,
    library_care,
    memory,
    mesh,
    replay,
    runs,
    settings,
)
from esper.cli.output import fail
from esper.contracts.errors import EsperError, InvalidInputError

app = typer.Typer(
    name="esper",
    help="PyTorch networks that grow while they train.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("up")(mesh.up)
app.command("down")(mesh.down)
app.command("status")(mesh.status)
app.command("logs")(mesh.logs)
app.command("serve")(mesh.serve)
app.command("demo")(demo.demo)
app.command("bench")(demo.bench)
app.command("report")(runs.report)
app.add_typer(runs.app, name="runs")
runs.app.command("replay")(replay.replay)
app.add_typer(runs.seeds_app, name="seeds")
app.add_typer(catalogue.blueprints_app, name="blueprints")
catalogue.blueprints_app.command("create")(authoring.create)
catalogue.blueprints_app.command("validate")(authoring.validate)
catalogue.blueprints_app.command("cost")(authoring.cost)
catalogue.blueprints_app.command("state")(library_care.set_state)
kernels.app.command("pin")(library_care.pin)
kernels.app.command("unpin")(library_care.unpin)
kernels.app.command("sweep")(library_care.sweep)
app.add_typer(kernels.app, name="kernels")
app.add_typer(jobs.app, name="jobs")
app.add_typer(jobs.dead_letters_app, name="dead-letters")
app.add_typer(memory.app, name="memory")
app.add_typer(audit.app, name="audit")
app.add_typer(settings.app, name="config")


def main() -> None:
    """Run the command line; the process ends with 0 (done), 1 (failed) or 2 (bad use)."""
    try:
        app()
    except InvalidInputError as error:
        fail(error, exit_code=2)
    except EsperError as error:
        fail(error, exit_code=1)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)


if __name__ == "__main__":
    main()

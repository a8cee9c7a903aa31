"""``esper memory``: what Tamiyo has learned, taken from one mesh to another."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from esper.cli.connection import client
from esper.cli.files import Force, write_file
from esper.cli.memory_file import decode_memory, encode_memory
from esper.cli.output import Json, console, print_json
from esper.contracts.errors import InvalidInputError
from esper.contracts.lesson import Memory

app = typer.Typer(help="What Tamiyo has learned: take it from one mesh to another.", no_args_is_help=True)


@app.command("export")
def export_memory(
    file: Annotated[Path, typer.Argument(help="File to write.")],
    run_id: Annotated[str, typer.Option("--run", help="Only what this run taught.")] = "",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write what Tamiyo has learned to a file: every outcome as it was reported, with the decision behind it."""
    with client() as mesh:
        memory = mesh.tamiyo.export_memory(run_id)
    data = encode_memory(memory)
    write_file(file, data, force=force)
    if memory.num_unreadable:
        sys.stderr.write(f"esper: {memory.num_unreadable} lessons no longer read in Tamiyo's store and are left out\n")
    if as_json:
        print_json({"file": str(file), "bytes": len(data), **_figures(memory), "unreadable": memory.num_unreadable})
        return
    console.print(f"{file}  {len(memory.lessons)} lessons, {len(data)} bytes", highlight=False, soft_wrap=True)


@app.command("import")
def import_memory(
    file: Annotated[Path, typer.Argument(help="File that `esper memory export` wrote.")], as_json: Json = False
) -> None:
    """Teach Tamiyo, and Karn, what a file holds; what they know already is not learned again.

    A file that is damaged teaches nothing. Where the mesh goes away in the middle, the command can simply be repeated.
    """
    try:
        with file.open("rb") as opened:
            memory = decode_memory(opened)
    except OSError as error:
        raise InvalidInputError.of("file", "be one that can be read", f"{file}: {error.strerror}") from error
    with client() as mesh:
        found = mesh.tamiyo.import_memory(memory.lessons)
    if as_json:
        figures = {"learned": found.learned, "known": found.known, "differing": found.differing}
        print_json({"file": str(file), **_figures(memory), **figures})
        return
    console.print(f"{found.learned} lessons learned, {found.known} were known", highlight=False)
    if found.differing:
        console.print(f"{found.differing} left out: their reports are known with another content", highlight=False)


def _figures(memory: Memory) -> dict[str, int]:
    return {
        "lessons": len(memory.lessons),
        "model_version": memory.model_version,
        "calibration_version": memory.calibration_version,
    }

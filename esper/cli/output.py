"""How the command line speaks: tables for people, JSON for programs, errors as one line."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NoReturn

import typer
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from esper.contracts.errors import EsperError

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Timeout = Annotated[float, typer.Option("--timeout", help="Seconds a call may take.", min=0.1, max=600)]

console = Console()


def fail(error: EsperError, *, exit_code: int) -> NoReturn:
    """Print an error as one line on standard error and end the process."""
    sys.stderr.write(f"esper: {error.reason}: {error}\n")
    sys.exit(exit_code)


def print_rows(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, as_json: bool) -> None:
    """Print rows as a table, or as a JSON array of objects."""
    if as_json:
        print_json([dict(zip(columns, row, strict=True)) for row in rows])
        return
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*("" if cell is None else escape(str(cell)) for cell in row))  # text, never markup
    console.print(table)


def print_json(value: object) -> None:
    """Print JSON, plain, so that it can be piped."""
    sys.stdout.write(json.dumps(value, indent=2, default=str) + "\n")


def plain(message: Message) -> Mapping[str, Any]:
    """Give a message as plain data with its field names as the schema has them."""
    found: Mapping[str, Any] = MessageToDict(message, preserving_proto_field_name=True)
    return found

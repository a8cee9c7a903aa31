"""``esper audit``: whether what a run recorded still stands as it was recorded."""

from __future__ import annotations

import json
import re
from typing import Annotated

import typer

from esper.cli.connection import call
from esper.cli.output import Json, Timeout, console, print_json
from esper.contracts.errors import CorruptDataError, InvalidInputError
from esper.v1 import nissa_service_pb2

app = typer.Typer(help="Audit logs of runs.", no_args_is_help=True)


@app.command("verify")
def verify(
    run_id: Annotated[str, typer.Argument(help="Run.")],
    head: Annotated[
        str,
        typer.Option(
            "--head",
            help="Hash of the last event, 64 hex digits, as noted earlier from here or from a report: events that "
            "were cut off at the end, or added since, show in it alone.",
        ),
    ] = "",
    as_json: Json = False,
    timeout: Timeout = 10.0,
) -> None:
    """Have Nissa verify the hash chain over a run's events; exit code 1 where one was changed, dropped or added."""
    if head and not re.fullmatch(r"[0-9a-f]{64}", head):
        raise InvalidInputError.of("--head", "be 64 lower-case hex digits", head)
    request = nissa_service_pb2.GetRunReportRequest(run_id=run_id, format=nissa_service_pb2.REPORT_FORMAT_JSON)
    found = json.loads(call("nissa", "GetRunReport", request, timeout).document)["audit"]
    verified = f"{found['events_verified']} of {found['events']} events verified"
    if as_json:
        print_json(found)
    if not found["intact"]:
        raise CorruptDataError(f"audit log of run {run_id} must be intact, got {found['reason']}; {verified}")
    if head and found["head"] != head:
        raise CorruptDataError(f"audit log of run {run_id} must end with {head}, got {found['head']}; {verified}")
    if not as_json:
        console.print(f"run {run_id}: intact, {verified}\nhead {found['head']}", highlight=False, markup=False)

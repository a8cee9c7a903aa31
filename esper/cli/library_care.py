"""``esper kernels pin``, ``unpin`` and ``sweep``, and ``esper blueprints state``: what the library keeps."""

from __future__ import annotations

import getpass
from typing import Annotated, Final

import typer

from esper.cli.catalogue import Reference, StateName
from esper.cli.connection import call
from esper.cli.kernels import ArtifactId
from esper.cli.output import Json, Timeout, console, plain, print_json
from esper.contracts.blueprint import BlueprintState
from esper.v1 import blueprint_pb2, urza_service_pb2

Reason = Annotated[str, typer.Option("--reason", help="Why, for the record; at most 500 characters.")]

_STATES: Final = ", ".join(state.name.lower() for state in BlueprintState)


def pin(artifact_id: ArtifactId, reason: Reason, as_json: Json = False, timeout: Timeout = 10.0) -> None:
    """Keep a kernel from every sweep; it stays pinned if it is built again."""
    _pin(artifact_id, reason, unpin=False, as_json=as_json, timeout_s=timeout)


def unpin(artifact_id: ArtifactId, reason: Reason = "", as_json: Json = False, timeout: Timeout = 10.0) -> None:
    """Let sweeps judge a kernel again."""
    _pin(artifact_id, reason, unpin=True, as_json=as_json, timeout_s=timeout)


def sweep(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Change nothing; only say what would go.")] = False,
    as_json: Json = False,
    timeout: Timeout = 60.0,
) -> None:
    """Let go of kernels that nobody refers to, of details of old reports and of uploads that never went on.

    The library does so by itself every hour; its settings say what may go.
    """
    request = urza_service_pb2.SweepLibraryRequest(dry_run=dry_run)
    swept = call("urza", "SweepLibrary", request, timeout)
    if as_json:
        print_json(plain(swept))
        return
    for artifact_id in swept.artifact_ids:
        console.print(artifact_id, highlight=False)
    verb = "would go" if dry_run else "went"
    console.print(
        f"{len(swept.artifact_ids)} kernels of {swept.kernel_bytes} bytes {verb}, {swept.held_bytes} bytes are held; "
        f"{swept.reports} reports and {swept.uploads} uploads {'are not judged' if dry_run else 'went'}",
        highlight=False,
        soft_wrap=True,
    )


def set_state(
    reference: Reference,
    state: Annotated[
        StateName, typer.Argument(help=f"State to reach, the one after its own: {_STATES}; or active again.")
    ],
    reason: Reason,
    as_json: Json = False,
    timeout: Timeout = 10.0,
) -> None:
    """Take the next step of a blueprint's life cycle: draft, validated, active, deprecated, retired.

    One that is deprecated can be made active again; one that is retired stays so. Asking for the state it is in changes
    nothing. Exit code 1 when the life cycle does not lead there from its own.
    """
    asked = urza_service_pb2.GetBlueprintRequest(reference=reference)
    found = call("urza", "GetBlueprint", asked, timeout).blueprint
    request = urza_service_pb2.SetBlueprintStateRequest(
        blueprint_id=found.id,
        state=blueprint_pb2.BlueprintState.ValueType(BlueprintState[state.name]),
        actor=getpass.getuser(),
        reason=reason,
    )
    moved = call("urza", "SetBlueprintState", request, timeout).blueprint
    if as_json:
        print_json(plain(moved))
        return
    name = blueprint_pb2.BlueprintState.Name(moved.state).removeprefix("BLUEPRINT_STATE_").lower()
    console.print(f"{moved.name}@{moved.version}  {name}", highlight=False, soft_wrap=True)


def _pin(artifact_id: str, reason: str, *, unpin: bool, as_json: bool, timeout_s: float) -> None:
    request = urza_service_pb2.PinKernelRequest(
        artifact_id=artifact_id, unpin=unpin, actor=getpass.getuser(), reason=reason
    )
    response = call("urza", "PinKernel", request, timeout_s)
    if as_json:
        print_json({"artifact_id": artifact_id, "pinned": not unpin, "changed": response.changed})
        return
    verb = "unpinned" if unpin else "pinned"
    console.print(f"{artifact_id} {verb if response.changed else f'was {verb} already'}", highlight=False)

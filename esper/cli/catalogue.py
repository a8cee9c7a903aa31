"""``esper blueprints`` and ``esper kernels``: the library and the compiler."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from esper.cli.connection import call, pages
from esper.cli.output import Json, Timeout, console, plain, print_json, print_rows
from esper.contracts.blueprint import Blueprint
from esper.contracts.wire import from_wire
from esper.v1 import blueprint_pb2, kernel_pb2, urza_service_pb2

blueprints_app = typer.Typer(help="Blueprints in the library.", no_args_is_help=True)
kernels_app = typer.Typer(help="Kernels in the library.", no_args_is_help=True)

Reference = Annotated[str, typer.Argument(help="Blueprint: id, name or name@version.")]


@blueprints_app.command("search")
def search(
    tag: Annotated[list[str] | None, typer.Option("--tag", "-t", help="Tag it must have; may repeat.")] = None,
    without: Annotated[list[str] | None, typer.Option("--without", help="Tag it must not have; may repeat.")] = None,
    text: Annotated[str, typer.Option("--text", help="Text in name or description.")] = "",
    as_json: Json = False,
) -> None:
    """List blueprints that match, by name."""
    request = urza_service_pb2.SearchBlueprintsRequest(all_tags=tag or [], no_tags=without or [], text=text)
    found = [one for page in pages("urza", "SearchBlueprints", request) for one in page.blueprints]
    rows = [
        (
            f"{one.name}@{one.version}",
            one.id[:12],
            blueprint_pb2.BlueprintState.Name(one.state).removeprefix("BLUEPRINT_STATE_").lower(),
            " ".join(one.metadata.tags),
            one.statistics.trials if one.HasField("statistics") else None,
            one.statistics.kept if one.HasField("statistics") else None,
        )
        for one in found
    ]
    print_rows("blueprints", ("name", "id", "state", "tags", "trials", "kept"), rows, as_json=as_json)


@blueprints_app.command("show")
def show(reference: Reference, as_json: Json = False, timeout: Timeout = 10.0) -> None:
    """Print one blueprint: its graph in text form, its tags and history."""
    response = _blueprint(reference, timeout)
    if as_json:
        print_json(plain(response))
        return
    from esper.blueprints import to_text  # torch is behind it: only who needs it waits for it

    blueprint = from_wire(response.blueprint, Blueprint)
    console.print(f"{blueprint.name}@{blueprint.version}  {blueprint.id}", highlight=False)
    console.print(f"{blueprint.state.name.lower()}  tags: {' '.join(blueprint.metadata.tags)}", highlight=False)
    if blueprint.metadata.citation:
        console.print(blueprint.metadata.citation, highlight=False)
    console.print(to_text(blueprint.ir), highlight=False, markup=False)


@blueprints_app.command("lineage")
def lineage(
    reference: Reference,
    descendants: Annotated[bool, typer.Option("--descendants", help="Children instead of parents.")] = False,
    as_json: Json = False,
    timeout: Timeout = 10.0,
) -> None:
    """List the ancestors (or descendants) of a blueprint."""
    direction = (
        urza_service_pb2.LINEAGE_DIRECTION_DESCENDANTS if descendants else urza_service_pb2.LINEAGE_DIRECTION_ANCESTORS
    )
    request = urza_service_pb2.GetLineageRequest(
        blueprint_id=_blueprint(reference, timeout).blueprint.id, direction=direction
    )
    entries = call("urza", "GetLineage", request, timeout).entries
    rows = [
        (entry.depth, f"{entry.blueprint.name}@{entry.blueprint.version}", entry.blueprint.id[:12]) for entry in entries
    ]
    print_rows("lineage", ("depth", "name", "id"), rows, as_json=as_json)


@kernels_app.command("list")
def list_kernels(
    blueprint: Annotated[str, typer.Option("--blueprint", help="Only kernels of this blueprint.")] = "",
    as_json: Json = False,
    timeout: Timeout = 10.0,
) -> None:
    """List kernels, newest first."""
    blueprint_id = _blueprint(blueprint, timeout).blueprint.id if blueprint else ""

    request = urza_service_pb2.ListKernelsRequest(blueprint_id=blueprint_id)
    found = [one for page in pages("urza", "ListKernels", request) for one in page.kernels]
    rows = [
        (
            one.artifact_id,
            one.blueprint_id[:12],
            kernel_pb2.CompileTarget.Name(one.target).removeprefix("COMPILE_TARGET_").lower(),
            one.cost.parameters,
            f"{one.compilation_time.ToTimedelta().total_seconds():.3f}",
            one.created_at.ToJsonString(),
        )
        for one in found
    ]
    columns = ("kernel", "blueprint", "target", "parameters", "compile_s", "created")
    print_rows("kernels", columns, rows, as_json=as_json)


@kernels_app.command("show")
def show_kernel(artifact_id: Annotated[str, typer.Argument(help="Kernel.")], timeout: Timeout = 10.0) -> None:
    """Print a kernel's manifest with its validation rows, as JSON."""
    request = urza_service_pb2.GetKernelRequest(artifact_id=artifact_id)
    print_json(plain(call("urza", "GetKernel", request, timeout)))


def _blueprint(reference: str, timeout_s: float) -> Any:
    return call("urza", "GetBlueprint", urza_service_pb2.GetBlueprintRequest(reference=reference), timeout_s)

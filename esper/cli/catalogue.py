"""``esper blueprints``: what the library holds."""

from __future__ import annotations

import sys
from enum import StrEnum
from typing import Annotated, Any

import typer

from esper.cli.bounds import bounds_of
from esper.cli.connection import call, pages
from esper.cli.output import Json, Timeout, plain, print_json, print_rows
from esper.contracts.blueprint import Blueprint, BlueprintState, SiteKind
from esper.contracts.wire import from_wire
from esper.v1 import blueprint_pb2, urza_service_pb2

blueprints_app = typer.Typer(help="Blueprints in the library.", no_args_is_help=True)

StateName = StrEnum("StateName", {state.name: state.name.lower() for state in BlueprintState})  # type: ignore[misc]
"""Names of the states of a blueprint, as they are typed."""
KindName = StrEnum("KindName", {kind.name: kind.name.lower() for kind in SiteKind})  # type: ignore[misc]
"""Names of the kinds of site, as they are typed."""

_LINEAGE_PAGE = 500  # the most there may be: each page walks the genealogy anew

Reference = Annotated[str, typer.Argument(help="Blueprint: id, name or name@version.")]


@blueprints_app.command("search")
def search(
    tag: Annotated[list[str] | None, typer.Option("--tag", "-t", help="Tag it must have; may repeat.")] = None,
    without: Annotated[list[str] | None, typer.Option("--without", help="Tag it must not have; may repeat.")] = None,
    tags: Annotated[
        str, typer.Option("--tags", help="Expression over tags: 'validated & (conv2d | linear) & !deprecated'.")
    ] = "",
    text: Annotated[str, typer.Option("--text", help="Text in name or description.")] = "",
    state: Annotated[list[StateName] | None, typer.Option("--state", help="State it is in; may repeat.")] = None,
    kind: Annotated[KindName | None, typer.Option("--kind", help="Kind of site it is meant for.")] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(
            "--where",
            help="Bound on parameters, flops (both at a reference site), latency_ms or success_rate, "
            "e.g. 'parameters<=5000'; may repeat.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """List blueprints that match, by name."""
    request = urza_service_pb2.SearchBlueprintsRequest(
        all_tags=tag or [],
        no_tags=without or [],
        tag_expression=tags,
        text=text,
        states=[blueprint_pb2.BlueprintState.ValueType(BlueprintState[one.name]) for one in state or []],
        site_kind=blueprint_pb2.SiteKind.ValueType(0 if kind is None else SiteKind[kind.name]),
        bounds=bounds_of(where or []),
    )
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
    """Print one blueprint: its graph in text form, its tags and history.

    `esper blueprints create` reads what this prints, in both forms; all but the graph is comments in the text form.
    """
    response = _blueprint(reference, timeout)
    if as_json:
        print_json(plain(response))
        return
    from esper.blueprints import to_text  # torch is behind it: only who needs it waits for it

    blueprint = from_wire(response.blueprint, Blueprint)
    said = [
        f"{blueprint.name}@{blueprint.version}  {blueprint.id}",
        f"{blueprint.state.name.lower()}  tags: {' '.join(blueprint.metadata.tags)}",
        *blueprint.metadata.citation.splitlines(),
        *blueprint.metadata.description.splitlines(),
    ]
    said += [*_origin(blueprint), *(_change(one) for one in response.history)]
    comments = "".join(f"# {line}\n" for line in said)
    sys.stdout.write(comments + to_text(blueprint.ir))  # not the console: it breaks lines at the terminal's width


@blueprints_app.command("lineage")
def lineage(
    reference: Reference,
    descendants: Annotated[bool, typer.Option("--descendants", help="Children instead of parents.")] = False,
    depth: Annotated[int, typer.Option("--depth", help="Steps at most; 0 means 100.", min=0, max=100)] = 0,
    as_json: Json = False,
    timeout: Timeout = 10.0,
) -> None:
    """List the ancestors (or descendants) of a blueprint, nearest first."""
    direction = (
        urza_service_pb2.LINEAGE_DIRECTION_DESCENDANTS if descendants else urza_service_pb2.LINEAGE_DIRECTION_ANCESTORS
    )
    request = urza_service_pb2.GetLineageRequest(
        blueprint_id=_blueprint(reference, timeout).blueprint.id,
        direction=direction,
        max_depth=depth,
        page_size=_LINEAGE_PAGE,
    )
    entries = [entry for page in pages("urza", "GetLineage", request) for entry in page.entries]
    rows = [
        (entry.depth, f"{entry.blueprint.name}@{entry.blueprint.version}", entry.blueprint.id[:12]) for entry in entries
    ]
    print_rows("lineage", ("depth", "name", "id"), rows, as_json=as_json)


def _origin(blueprint: Blueprint) -> list[str]:
    """Say where a blueprint comes from, and what came of it where it was tried."""
    lineage, counted = blueprint.lineage, blueprint.statistics
    parents = "".join(f" {one[:12]}" for one in lineage.parent_ids)
    said = [f"by {lineage.operator}{' of' if parents else ''}{parents}"]
    if lineage.author:
        said[0] += f", {_in_one_line(lineage.author)}"
    return [*said, f"tried {counted.trials} times, kept {counted.kept}"] if counted is not None else said


def _change(change: blueprint_pb2.BlueprintStateChange) -> str:
    """Say who changed a blueprint's state, when and why, in one line: it must not leave its comment."""
    state = blueprint_pb2.BlueprintState.Name(change.to_state).removeprefix("BLUEPRINT_STATE_").lower()
    return f"{change.changed_at.ToJsonString()}  {state}  {_in_one_line(change.actor)}: {_in_one_line(change.reason)}"


def _in_one_line(text: str) -> str:
    return " ".join(text.split())


def _blueprint(reference: str, timeout_s: float) -> Any:
    return call("urza", "GetBlueprint", urza_service_pb2.GetBlueprintRequest(reference=reference), timeout_s)

"""``esper blueprints create``, ``validate`` and ``cost``: graphs from files, looked at before they are sent."""

from __future__ import annotations

import getpass
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from esper.cli.blueprint_files import BlueprintFile, read_blueprint
from esper.cli.connection import call
from esper.cli.kernel_tables import CHECK_COLUMNS, check_rows, print_checks
from esper.cli.output import Json, Timeout, console, plain, print_json, print_rows
from esper.cli.sites import site_of, site_text
from esper.contracts.blueprint import BlueprintIR, BlueprintMetadata, Lineage, Site, SiteKind
from esper.contracts.errors import CompilationError, InvalidInputError
from esper.contracts.wire import to_message
from esper.v1 import blueprint_pb2, urza_service_pb2

if TYPE_CHECKING:
    from esper.blueprints import CheckReport

File = Annotated[str, typer.Argument(help="File with the graph as text or JSON; - reads standard input.")]

_SITE_HELP: Final = "as KIND:IN:OUT, e.g. linear:64:32 or conv2d:3x32x32:16x32x32; may repeat."


def create(
    file: File,
    name: Annotated[
        str, typer.Option("--name", help="Name in the library; default: a JSON document's, else the file's own.")
    ] = "",
    tags: Annotated[
        list[str] | None, typer.Option("--tags", "-t", help="Tags, with commas between; may repeat.")
    ] = None,
    description: Annotated[str | None, typer.Option("--description", help="What it is and when it helps.")] = None,
    citation: Annotated[str | None, typer.Option("--citation", help="Paper or source of the method.")] = None,
    kinds: Annotated[
        list[str] | None,
        typer.Option("--kinds", help="Kinds of site it is meant for, with commas between; default: every legal one."),
    ] = None,
    as_json: Json = False,
    timeout: Timeout = 10.0,
) -> None:
    """Store a blueprint in the library, as a draft and a new version of its name; print its version and id.

    The graph is validated here first: one that is not legal is not sent, and the line or node at fault is named.
    The same graph under the same name is stored once. `esper blueprints show` prints the text form.
    """
    chosen = _kinds(kinds)
    found = read_blueprint(file)
    if not (name or found.name):
        raise InvalidInputError.of("--name", "be given for a text from standard input", name)
    metadata = BlueprintMetadata(
        tags=found.metadata.tags if tags is None else _parts(tags),
        description=found.metadata.description if description is None else description,
        citation=found.metadata.citation if citation is None else citation,
        site_kinds=found.metadata.site_kinds if chosen is None else chosen,
    )
    request = urza_service_pb2.CreateBlueprintRequest(
        name=name or found.name,
        ir=to_message(found.ir, blueprint_pb2.BlueprintIR),
        metadata=to_message(metadata, blueprint_pb2.BlueprintMetadata),
        lineage=to_message(Lineage(author=getpass.getuser()), blueprint_pb2.Lineage),
    )
    response = call("urza", "CreateBlueprint", request, timeout)
    if as_json:
        print_json({"created": response.created, **plain(response.blueprint)})
        return
    stored = response.blueprint
    console.print(f"{stored.name}@{stored.version}  {stored.id}", highlight=False, soft_wrap=True)
    if not response.created:
        console.print("it was there already; what is said of it stays as it was", highlight=False)


def validate(
    file: File,
    site: Annotated[
        list[str] | None, typer.Option("--site", help=f"Site to run the blueprint contract test at, {_SITE_HELP}")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say whether a graph is legal, and with --site whether it passes the blueprint contract test there.

    Nothing is sent anywhere. Exit code 2: it is not legal (the line or node at fault is named); 1: a check failed.
    """
    sites = [site_of(one) for one in site or []]
    found = read_blueprint(file)
    from esper.blueprints import check_blueprint, content_id

    reports = [(one, check_blueprint(found.ir, one)) for one in sites]
    if as_json:
        print_json(_verdict(content_id(found.ir), found, reports))
    else:
        console.print(f"legal: {len(found.ir.nodes)} nodes, id {content_id(found.ir)}", highlight=False, soft_wrap=True)
        for one, report in reports:
            print_checks(f"contract test at {site_text(one)}", report.checks)
    for one, report in reports:
        failed = [f"{check.name}: {check.detail}" for check in report.checks if not check.passed]
        if failed:
            raise CompilationError(f"blueprint must pass its contract test at {site_text(one)}, failed {failed[0]}")


def cost(
    file: File,
    site: Annotated[list[str], typer.Option("--site", help=f"Site, {_SITE_HELP}")],
    as_json: Json = False,
) -> None:
    """Print the exact cost of a graph at sites: parameters, FLOPs and bytes of activations, for one example."""
    sites = [site_of(one) for one in site]
    ir = read_blueprint(file).ir
    rows = [(site_text(one), *_cost(ir, one)) for one in sites]
    print_rows("cost", ("site", "parameters", "flops", "activation_bytes"), rows, as_json=as_json)


def _cost(ir: BlueprintIR, site: Site) -> tuple[int, int, int]:
    from esper.blueprints import cost as cost_of

    found = cost_of(ir, site)
    return found.parameters, found.flops, found.activation_bytes


def _verdict(blueprint_id: str, found: BlueprintFile, reports: Sequence[tuple[Site, CheckReport]]) -> dict[str, Any]:
    sites = [
        {
            "site": site_text(site),
            "passed": report.passed,
            "checks": [dict(zip(CHECK_COLUMNS, row, strict=True)) for row in check_rows(report.checks)],
        }
        for site, report in reports
    ]
    return {"id": blueprint_id, "nodes": len(found.ir.nodes), "sites": sites}


def _parts(values: Sequence[str]) -> list[str]:
    return [part.strip() for value in values for part in value.split(",") if part.strip()]


def _kinds(values: Sequence[str] | None) -> tuple[SiteKind, ...] | None:
    if values is None:
        return None
    known = {kind.name.lower(): kind for kind in SiteKind}
    for part in _parts(values):
        if part not in known:
            raise typer.BadParameter(f"must be among {', '.join(known)}, got {part!r}", param_hint="--kinds")
    return tuple(known[part] for part in _parts(values))

"""``esper config``: what is set, and where it came from."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from esper.cli.output import Json, print_rows
from esper.mesh.settings import resolve

app = typer.Typer(help="Configuration: file < environment < flag.", no_args_is_help=True)


@app.callback()
def group() -> None:
    """Configuration: file < environment < flag."""


@app.command("show")
def show(
    as_json: Json = False,
    config: Annotated[Path | None, typer.Option("--config", help="TOML file with settings.")] = None,
) -> None:
    """Print every setting, its value and its source."""
    resolved = resolve(config_file=config)
    values = resolved.settings.model_dump(mode="json")
    rows = [(name, _shown(values[name]), source) for name, source in resolved.sources.items()]
    print_rows("settings", ("setting", "value", "source"), rows, as_json=as_json)


def _shown(value: Any) -> Any:
    """Give a value with the password of a URL left out."""
    return re.sub(r"(://[^:/@]*):[^@/]*@", r"\1:***@", value) if isinstance(value, str) else value

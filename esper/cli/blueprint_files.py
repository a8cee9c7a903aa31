"""Blueprints as files: the readable text form, and the JSON of ``esper blueprints show --json`` and Urza's REST face.

A JSON document is a graph, a blueprint with its graph under ``ir``, or an answer with the blueprint under
``blueprint``. Name, description, citation, tags and kinds of a blueprint are taken along; who stored it, when and in
which state is not.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from google.protobuf.json_format import ParseDict, ParseError

from esper.contracts.blueprint import BlueprintIR, BlueprintMetadata, SiteKind
from esper.contracts.errors import InvalidInputError
from esper.contracts.wire import from_wire
from esper.v1 import blueprint_pb2

STANDARD_INPUT: Final = "-"
"""What stands for standard input in the place of a file."""
MAX_FILE_BYTES: Final = 1024 * 1024
"""Largest file that is read, in bytes."""

_KIND_PREFIX: Final = "SITE_KIND_"


@dataclass(frozen=True, kw_only=True, slots=True)
class BlueprintFile:
    """What a file says of a blueprint."""

    ir: BlueprintIR
    """The graph; legal, as far as that can be said without a site."""
    name: str = ""
    """Its name in the document, else the file's own without its ending; empty for a text from standard input."""
    metadata: BlueprintMetadata = field(default_factory=BlueprintMetadata)
    """Description, citation, tags and kinds of a JSON document; empty for a text."""


def read_blueprint(source: str) -> BlueprintFile:
    """Read a file, or standard input for ``-``.

    Raises:
        InvalidInputError: It cannot be read, is too long, or no UTF-8; or a JSON document is of another form.
        InvalidBlueprintError: The graph is not legal; the message names the line or the node at fault.
    """
    text = _read(source)
    stem = "" if source == STANDARD_INPUT else Path(source).stem
    if text.lstrip().startswith("{"):
        return _from_json(text, stem)
    from esper.blueprints import parse_text  # torch is behind it: only who needs it waits for it

    return BlueprintFile(ir=parse_text(text), name=stem)


def _read(source: str) -> str:
    try:
        if source == STANDARD_INPUT:
            data = sys.stdin.buffer.read(MAX_FILE_BYTES + 1)
        else:
            with Path(source).open("rb") as file:
                data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        rule = "be a file that can be read, or - for standard input"
        raise InvalidInputError(f"file must {rule}, got {source!r}: {error.strerror}", parameter="file") from error
    if len(data) > MAX_FILE_BYTES:
        raise InvalidInputError(f"file must be at most {MAX_FILE_BYTES} bytes, got more", parameter="file")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"file must be UTF-8, got {error.reason} at byte {error.start}") from error


def _from_json(text: str, stem: str) -> BlueprintFile:
    try:
        document = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise InvalidInputError(f"file must be JSON or a blueprint's text, got JSON that ends in: {error}") from error
    inner = document.get("blueprint", document)
    blueprint = inner if isinstance(inner, Mapping) and "ir" in inner else {"ir": inner}
    metadata = _metadata(blueprint.get("metadata", {}))
    name = blueprint.get("name", stem)
    if not isinstance(name, str):
        raise InvalidInputError.of("name", "be a text", name)
    from esper.blueprints import content_id

    ir = from_wire(_message(_graph(blueprint["ir"]), blueprint_pb2.BlueprintIR(), "ir"), BlueprintIR)
    content_id(ir)
    return BlueprintFile(ir=ir, name=name, metadata=metadata)


def _metadata(found: Any) -> BlueprintMetadata:
    """Give the metadata; kinds may be named with or without the prefix that they have on the wire."""
    if isinstance(found, Mapping) and isinstance(found.get("site_kinds"), list):
        kinds = [f"{_KIND_PREFIX}{kind}" if kind in SiteKind.__members__ else kind for kind in found["site_kinds"]]
        found = {**found, "site_kinds": kinds}
    return from_wire(_message(found, blueprint_pb2.BlueprintMetadata(), "metadata"), BlueprintMetadata)


def _graph(found: Any) -> Any:
    """Give a graph with its attributes as on the wire; Urza's REST face has plain values instead."""
    if not isinstance(found, Mapping) or not isinstance(found.get("nodes"), list):
        raise InvalidInputError.of("ir", "be a JSON object with a list of nodes", found)
    return {**found, "nodes": [_node(node) for node in found["nodes"]]}


def _node(node: Any) -> Any:
    if not isinstance(node, Mapping) or not isinstance(node.get("attributes"), Mapping):
        return node
    return {**node, "attributes": {name: _attribute(value) for name, value in node["attributes"].items()}}


def _attribute(value: Any) -> Any:
    match value:
        case bool():
            return {"flag": value}
        case int():
            return {"integer": value}
        case float():
            return {"real": value}
        case str():
            return {"word": value}
        case _:
            return value


def _message(found: Any, message: Any, parameter: str) -> Any:
    try:
        return ParseDict(found, message)
    except (ParseError, TypeError, ValueError, AttributeError) as error:
        raise InvalidInputError(f"{parameter} must have the fields of {message.DESCRIPTOR.name}: {error}") from error

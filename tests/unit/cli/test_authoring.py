"""Blueprints from files: read in every form that the project prints, and refused here when they are not legal."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from google.protobuf.json_format import MessageToDict

from esper.blueprints import content_id, default_registry, parse_text, to_text
from esper.cli.blueprint_files import MAX_FILE_BYTES, read_blueprint
from esper.cli.sites import site_of, site_text
from esper.contracts.blueprint import BlueprintMetadata, Site, SiteKind
from esper.contracts.errors import InvalidBlueprintError, InvalidInputError
from esper.contracts.wire import to_wire
from esper.services.urza.rest_models import GraphBody

TEXT = """# a bottleneck that begins at zero
blueprint 1
down = linear(x, features={max(4, C // 4)})
act = activation(down, fn=gelu)
up = linear(act, init=zero)
return up
"""
WRONG_NODE = "blueprint 1\ndown = linear(x)\nup = linear(nowhere)\nreturn up\n"
NONZERO = "blueprint 1\nout = linear(h)\nreturn out\n"

Esper = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def nothing_to_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every call to the library fail, so that an error of another kind was found before any call."""
    from esper.mesh.ports import free_port

    monkeypatch.setenv("ESPER_URZA_ADDRESS", f"127.0.0.1:{free_port()}")


@pytest.fixture
def file(tmp_path: Path) -> Callable[[str], str]:
    def write(text: str, name: str = "narrow.txt") -> str:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


@pytest.mark.parametrize(
    ("text", "site"),
    [
        ("linear:64:32", Site(kind=SiteKind.LINEAR, input_shape=(64,), output_shape=(32,))),
        ("conv2d:3x32x32:16x32x32", Site(kind=SiteKind.CONV2D, input_shape=(3, 32, 32), output_shape=(16, 32, 32))),
        ("batch_norm1d:8:8", Site(kind=SiteKind.BATCH_NORM1D, input_shape=(8,), output_shape=(8,))),
    ],
)
def test_a_site_reads_as_it_is_shown(text: str, site: Site) -> None:
    assert site_of(text) == site
    assert site_text(site) == text


@pytest.mark.parametrize("text", ["", "linear", "linear:8", "dense:8:8", "linear:8:-8", "linear:8,8:8", "LINEAR:8:8"])
def test_a_site_of_another_form_is_refused_with_form_and_value(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="must be KIND:IN:OUT with sizes joined by x") as refused:
        site_of(text)
    assert f"got {text!r}" in str(refused.value)


def test_a_site_of_a_size_that_is_0_is_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"site.input_shape must be 1 to 4 sizes, each > 0, got \(0,\)"):
        site_of("linear:0:8")


def test_a_text_is_named_after_its_file(file: Any) -> None:
    found = read_blueprint(file(TEXT, "narrow.v2.txt"))
    assert (found.ir, found.name, found.metadata) == (parse_text(TEXT), "narrow.v2", BlueprintMetadata())


@pytest.mark.parametrize("name", default_registry().names())
def test_every_template_reads_back_from_both_json_forms(file: Any, name: str) -> None:
    template = default_registry().create_blueprint(name)
    wire = MessageToDict(to_wire(template), preserving_proto_field_name=True)
    answer = read_blueprint(file(json.dumps({"blueprint": wire, "history": []}), "answer.json"))
    assert (answer.ir, answer.name, answer.metadata) == (template.ir, name, template.metadata)
    graph = GraphBody.of(template.ir).model_dump_json()
    assert read_blueprint(file(graph, "graph.json")).ir == template.ir


def test_the_kinds_of_the_rest_face_are_read(file: Any) -> None:
    body = {
        "name": "mine",
        "ir": json.loads(GraphBody.of(parse_text(TEXT)).model_dump_json()),
        "metadata": {"site_kinds": ["LINEAR"]},
    }
    assert read_blueprint(file(json.dumps(body))).metadata.site_kinds == (SiteKind.LINEAR,)


def test_standard_input_is_read_and_has_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    found = read_blueprint("-")
    assert (found.ir, found.name) == (parse_text(TEXT), "")


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("{", "file must be JSON or a blueprint's text"),
        ("{}", "ir must be a JSON object with a list of nodes"),
        ('{"ir": 3}', "ir must be a JSON object with a list of nodes"),
        ('{"nodes": ["down"], "output": "up"}', "ir must have the fields of BlueprintIR"),
        ('{"nodes": [], "exit": "up"}', "ir must have the fields of BlueprintIR"),
        ('{"ir": {"nodes": []}, "metadata": {"tag": "x"}}', "metadata must have the fields of BlueprintMetadata"),
        ('{"ir": {"nodes": []}, "metadata": 3}', "metadata must have the fields of BlueprintMetadata"),
        ('{"ir": {"nodes": []}, "name": 3}', "name must be a text, got 3"),
        ("[" * 100_000, "text must"),
        ('{"a":' * 100_000, "file must be JSON"),
        ("a" * (MAX_FILE_BYTES + 1), f"file must be at most {MAX_FILE_BYTES} bytes"),
    ],
)
def test_a_document_of_another_form_is_refused_with_the_field(file: Any, text: str, rule: str) -> None:
    with pytest.raises(InvalidInputError, match=rule):
        read_blueprint(file(text))


def test_a_file_that_is_not_there_or_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="file must be a file that can be read, or - for standard input, got"):
        read_blueprint(str(tmp_path / "nothing"))
    (tmp_path / "image").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidInputError, match="file must be UTF-8, got invalid start byte at byte 0"):
        read_blueprint(str(tmp_path / "image"))


def test_a_json_graph_that_is_not_legal_names_the_node(file: Any) -> None:
    body = json.loads(GraphBody.of(parse_text(TEXT)).model_dump_json())
    body["nodes"][1]["op"] = "think"
    with pytest.raises(InvalidBlueprintError, match="node 'act' operator must be one of"):
        read_blueprint(file(json.dumps(body)))


@pytest.mark.parametrize("command", ["create", "validate"])
def test_an_illegal_graph_is_refused_before_any_call_with_its_node(esper: Esper, file: Any, command: str) -> None:
    code, out, err = esper("blueprints", command, file(WRONG_NODE))
    assert (code, out) == (2, "")
    assert err == ("esper: INVALID_BLUEPRINT: node 'up' inputs must be x, h or nodes of the graph, got 'nowhere'\n")


def test_a_line_that_does_not_read_is_named(esper: Esper, file: Any) -> None:
    code, _, err = esper("blueprints", "create", file("blueprint 1\nup : linear\nreturn up\n"))
    assert (code, err.split(", got")[0]) == (
        2,
        "esper: INVALID_BLUEPRINT: line 2 must be 'name = operator(inputs, attribute=value)'",
    )


def test_a_legal_graph_goes_to_the_library(esper: Esper, file: Any) -> None:
    code, _, err = esper("blueprints", "create", file(TEXT))
    assert code == 1
    assert err.startswith("esper: UNAVAILABLE: ")


def test_a_text_from_standard_input_needs_a_name(esper: Esper, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    code, _, err = esper("blueprints", "create", "-")
    assert code == 2
    assert "--name must be given for a text from standard input" in err


def test_an_unknown_kind_is_bad_use(esper: Esper, file: Any) -> None:
    code, _, err = esper("blueprints", "create", file(TEXT), "--kinds", "linear,dense")
    assert code == 2
    assert "must be among linear, conv1d" in err
    assert "'dense'" in err


def test_a_legal_graph_is_said_to_be_so_with_its_id(esper: Esper, file: Any) -> None:
    code, out, _ = esper("blueprints", "validate", file(TEXT))
    assert (code, out) == (0, f"legal: 3 nodes, id {content_id(parse_text(TEXT))}\n")


def test_the_contract_test_is_shown_row_by_row(esper: Esper, file: Any) -> None:
    code, out, _ = esper("blueprints", "validate", file(TEXT), "--site", "linear:8:6", "--json")
    assert code == 0
    (site,) = json.loads(out)["sites"]
    assert (site["site"], site["passed"]) == ("linear:8:6", True)
    assert {"identity", "learning", "determinism"} <= {row["check"] for row in site["checks"]}


def test_a_check_that_fails_is_exit_code_1_and_named(esper: Esper, file: Any) -> None:
    code, out, err = esper("blueprints", "validate", file(NONZERO), "--site", "linear:8:8")
    assert code == 1
    assert "contract test at linear:8:8" in out
    assert err.startswith("esper: COMPILATION: blueprint must pass its contract test at linear:8:8, failed identity: ")


def test_a_graph_that_does_not_fit_a_site_is_refused_with_its_node(esper: Esper, file: Any) -> None:
    text = to_text(default_registry().create_blueprint("squeeze_excite").ir)
    code, _, err = esper("blueprints", "validate", file(text), "--site", "linear:8:8")
    assert code == 2
    assert err.startswith("esper: INVALID_BLUEPRINT: node '")


def test_cost_is_that_of_the_site(esper: Esper, file: Any) -> None:
    code, out, _ = esper(
        "blueprints",
        "cost",
        file("blueprint 1\nup = linear(x, init=zero)\nreturn up\n"),
        "--site",
        "linear:8:6",
        "--json",
    )
    assert code == 0
    (row,) = json.loads(out)
    assert (row["site"], row["parameters"], row["flops"]) == ("linear:8:6", 8 * 6 + 6, 2 * 8 * 6)


@pytest.mark.parametrize(
    "words",
    [
        ("blueprints", "create"),
        ("blueprints", "create", "no/such/file"),
        ("blueprints", "cost", "-"),
        ("kernels", "compile", "lora"),
        ("kernels", "compile", "lora", "--site", "linear"),
        ("kernels", "compile", "lora", "--site", "linear:8:8", "--target", "wasm"),
        ("kernels", "compile", "lora", "--site", "linear:8:8", "--seed", "-1"),
        ("kernels", "compile", "lora", "--site", "linear:8:8", "--priority", "urgent"),
        ("kernels", "verify", "k12"),
        ("jobs", "list", "--phase", "sleeping"),
        ("jobs", "list", "--limit", "0"),
        ("dead-letters", "requeue"),
        ("dead-letters", "requeue", "--all", "j" + "0" * 32),
    ],
)
def test_bad_use_is_exit_code_2_and_explained(esper: Esper, words: tuple[str, ...]) -> None:
    code, out, err = esper(*words)
    assert (code, out) == (2, "")
    assert err
    assert "Traceback" not in err

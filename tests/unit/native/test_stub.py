"""The stub of the native module says exactly what the built module offers."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from esper.execution import _native

STUB = Path(__file__).parents[3] / "esper" / "execution" / "_native.pyi"
SPECIAL = {"__init__", "__len__", "__contains__", "__enter__", "__exit__"}

Function = ast.FunctionDef


def _shown(names: object) -> set[str]:
    return {name for name in vars(names) if not name.startswith("_") or name in SPECIAL}


def _stub_classes() -> dict[str, ast.ClassDef]:
    return {node.name: node for node in ast.parse(STUB.read_text()).body if isinstance(node, ast.ClassDef)}


def _stub_functions(body: list[ast.stmt]) -> dict[str, Function]:
    return {node.name: node for node in body if isinstance(node, Function)}


def _stub_members(cls: ast.ClassDef) -> set[str]:
    fields = {n.target.id for n in cls.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    return fields | set(_stub_functions(cls.body))


def _stub_parameters(function: Function) -> list[str]:
    arguments = function.args.posonlyargs + function.args.args
    return [argument.arg for argument in arguments if argument.arg != "self"]


def _built_parameters(owner: object, name: str) -> list[str]:
    function = getattr(owner, name)
    text = getattr(function, "__text_signature__", None) or function.__doc__.splitlines()[0]
    inside = text[text.index("(") + 1 : text.rindex(")") if "->" not in text else text.index(") ->")]
    inside = re.sub(r"\[[^][]*\]", "", re.sub(r"\[[^][]*\]", "", inside))  # annotations hold commas in brackets
    names = [part.split(":")[0].split("=")[0].strip() for part in inside.split(",")]
    return [n for n in names if n and n not in {"self", "$self", "/", "*"}]


def test_module_and_stub_have_the_same_names() -> None:
    tree = ast.parse(STUB.read_text())
    stub = set(_stub_classes()) | set(_stub_functions(tree.body))
    assert _shown(_native) == stub


@pytest.mark.parametrize("name", sorted(_stub_classes()))
def test_class_and_stub_have_the_same_members(name: str) -> None:
    built = _shown(getattr(_native, name))
    assert built - {"__init__"} == _stub_members(_stub_classes()[name]) - {"__init__"}


def test_parameters_have_the_same_names_and_order() -> None:
    tree = ast.parse(STUB.read_text())
    owners: list[tuple[object, list[ast.stmt]]] = [(_native, tree.body)]
    owners += [(getattr(_native, name), cls.body) for name, cls in _stub_classes().items()]
    compared = 0
    for owner, body in owners:
        for name, function in _stub_functions(body).items():
            is_property = any(isinstance(d, ast.Name) and d.id == "property" for d in function.decorator_list)
            if is_property or (name.startswith("__") and name != "__init__"):
                continue
            assert _built_parameters(owner, name) == _stub_parameters(function), f"{owner}.{name}"
            compared += 1
    assert compared >= 30

"""The stub of the native module says what the built module offers, and its generator guesses nothing.

`make stubs-check` compares the whole stub with what the generator gives. Here it is read against the module itself,
without the generator, so that a fault of the generator's shows.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from esper.execution import _native

ROOT = Path(__file__).parents[3]
STUB = ROOT / "esper" / "execution" / "_native.pyi"
SPECIAL = {"__init__", "__len__", "__contains__", "__enter__", "__exit__"}

Function = ast.FunctionDef


def _generator() -> ModuleType:
    path = ROOT / "csrc" / "bindings" / "generate_stubs.py"
    spec = importlib.util.spec_from_file_location("generate_stubs", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generate_stubs = _generator()


def _shown(names: object) -> set[str]:
    return {name for name in vars(names) if not name.startswith("_") or name in SPECIAL}


def _stub_classes() -> dict[str, ast.ClassDef]:
    return {node.name: node for node in ast.parse(STUB.read_text()).body if isinstance(node, ast.ClassDef)}


def _stub_functions(body: list[ast.stmt]) -> dict[str, Function]:
    return {node.name: node for node in body if isinstance(node, Function)}


def _stub_members(cls: ast.ClassDef) -> set[str]:
    fields = {n.target.id for n in cls.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    return fields | set(_stub_functions(cls.body))


def _is_property(function: Function) -> bool:
    return any(isinstance(d, ast.Name) and d.id == "property" for d in function.decorator_list)


def _owners() -> list[tuple[object, list[ast.stmt]]]:
    module: tuple[object, list[ast.stmt]] = (_native, ast.parse(STUB.read_text()).body)
    return [module, *((getattr(_native, name), cls.body) for name, cls in _stub_classes().items())]


def _callables() -> Iterator[tuple[object, Function]]:
    for owner, body in _owners():
        for function in _stub_functions(body).values():
            if not _is_property(function):
                yield owner, function


def _first_line(owner: object, name: str) -> str:
    """A signature as the module states it: Python's own form for a fast method, pybind11's for all others."""
    function = getattr(owner, name)
    text = getattr(function, "__text_signature__", None)
    return f"{name}{text}" if text else function.__doc__.splitlines()[0]


def _shape(line: str) -> list[tuple[str, str, str]]:
    """Name, kind and default of each parameter but self."""
    line = re.sub(r"^\w+", "f", line.replace("$self", "self"))
    function = ast.parse(f"def {line}: ...").body[0]
    assert isinstance(function, Function)
    return _shape_of(function)


def _shape_of(function: Function) -> list[tuple[str, str, str]]:
    function.returns, function.decorator_list = None, []
    for argument in ast.walk(function.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    signature = _signature(ast.unparse(function.args))
    return [(p.name, p.kind.name, repr(p.default)) for p in signature.parameters.values() if p.name != "self"]


def _signature(parameters: str) -> inspect.Signature:
    return inspect.signature(eval(f"lambda {parameters}: None"))


def test_module_and_stub_have_the_same_names() -> None:
    tree = ast.parse(STUB.read_text())
    stub = set(_stub_classes()) | set(_stub_functions(tree.body))
    assert _shown(_native) == stub


@pytest.mark.parametrize("name", sorted(_stub_classes()))
def test_class_and_stub_have_the_same_members(name: str) -> None:
    built = _shown(getattr(_native, name))
    assert built - {"__init__"} == _stub_members(_stub_classes()[name]) - {"__init__"}


def test_parameters_have_the_same_names_kinds_defaults_and_order() -> None:
    compared = 0
    for owner, function in _callables():
        assert _shape_of(function) == _shape(_first_line(owner, function.name)), f"{owner}.{function.name}"
        compared += 1
    assert compared >= 60


def test_results_that_the_module_states_are_the_stubs() -> None:
    compared = 0
    for owner, body in _owners():
        for name, function in _stub_functions(body).items():
            attribute = vars(owner)[name]
            line = attribute.fget.__doc__ if _is_property(function) else _first_line(owner, name)
            stated = line.strip().partition(" -> ")[2].replace("esper.execution._native.", "")
            stated = re.sub(r"\b(numpy\.typing|typing|collections\.abc)\.", "", stated).replace("numpy.", "np.")
            if stated in {"", *generate_stubs.OPEN}:
                continue
            assert function.returns is not None
            assert ast.unparse(function.returns) == stated, f"{owner}.{name}"
            compared += 1
    assert compared >= 100


RAW = """
import typing
class Box:
    '''A box.'''
    size: typing.ClassVar[int] = 3
    def fill(self, thing, times = 2):
        '''Fill it.'''
    def weigh(self, unit: str, tare: typing.SupportsFloat | typing.SupportsIndex | None = None) -> float:
        ...
def count(number: typing.SupportsInt | typing.SupportsIndex) -> typing.Any:
    ...
"""
FILL = {"thing": "object", "times": "int", "return": "bool"}
COUNT = {"return": "int"}


def test_the_generator_fills_what_is_open_and_keeps_the_rest() -> None:
    stub = generate_stubs.complete(RAW, {"Box.fill": FILL, "count": COUNT})
    lines = [line.strip() for line in stub.removeprefix(generate_stubs.HEADER).splitlines() if line.strip()]
    assert lines == [
        "class Box:",
        "size: ClassVar[int]",
        "def fill(self, thing: object, times: int=2) -> bool:",
        "...",
        "def weigh(self, unit: str, tare: float | None=None) -> float:",
        "...",
        "def count(number: int) -> int:",
        "...",
    ]


@pytest.mark.parametrize(
    ("types", "message"),
    [
        ({"Box.fill": FILL}, r"count -> result must have a type in TYPES: the module says Any"),
        ({"count": COUNT}, r"Box\.fill\(thing\) must have a type in TYPES: the module says nothing"),
        (
            {"Box.fill": FILL, "count": COUNT, "Box.weigh": {"unit": "bytes"}},
            r"Box\.weigh\(unit\) must have no type in TYPES: the module says str",
        ),
        (
            {"Box.fill": FILL | {"what": "int"}, "count": COUNT},
            r"TYPES names parameters that Box\.fill does not have: what",
        ),
        (
            {"Box.fill": FILL, "count": COUNT, "Box.empty": {}},
            r"TYPES names functions that the module does not have: Box\.empty",
        ),
    ],
)
def test_the_generator_refuses_what_does_not_fit(types: dict[str, dict[str, str]], message: str) -> None:
    with pytest.raises(generate_stubs.StubError, match=f"^{message}$"):
        generate_stubs.complete(RAW, types)

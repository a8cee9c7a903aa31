"""Functions of a TorchScript archive that call each other: never in a circle, and not too often in all.

Loading a script puts every call's body in its place, and running it goes through what came of that: ten functions that
each call the next a hundred times are a few lines of source and 10**20 steps. So the steps are counted here as torch
would expand them, with each loop as often as it runs, each branch as if it were taken, and every function as if it were
the one that is called from outside.

Which function a call means is read off the source the way torch's importer reads it: from the class that a member, or
a parameter, is declared to be of. Wherever that leaves any choice, the archive is refused; torch itself prints none.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from esper.execution.archive_errors import refuse, shown
from esper.execution.archive_script import is_operator, steps_of

MAX_EXPANDED_NODES: Final = 250_000
"""Most statements and expressions of a function with all that it calls; the largest legal graph has a third of it."""
MAX_EXPANDED_OPERATIONS: Final = 4_000
"""Most operations of a function with all that it calls, a loop's counted once; the largest legal graph has half of it.

torch puts all of them into one graph, which it walks by recursion: from about 10,000 on it exhausts the stack.
"""
MAX_CALL_DEPTH: Final = 16
"""Most functions within each other; what the compiler makes has four."""
MAX_LIST_ITEMS: Final = 128
"""Most items of a list whose length is the number of a loop's steps."""

_MAX_DIMS: Final = 64
"""Dimensions of a tensor that torch allows."""
_MAX_NAME_STEPS: Final = 8
"""Most names and members from a value to the parameter that it is part of; what the compiler makes has two."""
_MAX_NAME_PARTS: Final = 32
"""Most parts of a dotted name that means a class or a function."""
_MAX_LIST_STEPS: Final = 64
"""Most expressions between a list and what it is made from."""
_NAMESPACES: Final = frozenset({"torch", "ops", "__torch__", "CONSTANTS", "range", "annotate", "unchecked_cast"})

_OPERATIONS: Final = (ast.Call, ast.Subscript, ast.List, ast.Tuple, ast.UnaryOp, ast.If, ast.For)
"""What becomes an operation of torch's graph; names, members, constants and assignments are places in it."""

_Bound = ast.expr | ast.arg | None
"""What a name is bound to; ``None`` where that is not seen from the one statement that binds it."""


def inspect_calls(sources: Mapping[str, ast.Module]) -> Program:
    """Give the functions of some sources, which end after a bounded number of steps.

    Args:
        sources: Syntax tree of every source of the archive by the name of its record, as
            `archive_script.inspect_source` gave it.

    Raises:
        CorruptDataError: Functions call each other in a circle, too deep or too often, or it cannot be told which
            function is called; the message names the record and the call.
    """
    program = Program()
    for record, tree in sources.items():
        program.declare(record, tree)
    program.join()
    for function in program.all:
        program.expand(function, [])
    return program


class _Size(NamedTuple):
    """What a function comes to with all that it calls."""

    steps: int
    operations: int
    height: int
    """How many functions deep it calls."""


@dataclass(eq=False, slots=True)
class Call:
    """One call of a function of the archive."""

    caller: Function
    arguments: Sequence[ast.expr]
    """Values of the parameters, without ``self``."""


@dataclass(eq=False, slots=True)
class Function:
    """A function or a method."""

    record: str
    name: str
    node: ast.FunctionDef
    owner: str
    """Class of which it is a method; empty for a function."""
    bound: dict[str, _Bound]
    """What each name stands for, where one statement alone binds it."""
    callees: list[Function] = field(default_factory=list)
    """One entry per call."""
    calls: list[Call] = field(default_factory=list)
    """Where it is called."""

    @property
    def short_name(self) -> str:
        """Its name without the path of its source, which torch may lengthen; for a method, with its class."""
        return ".".join(self.name.split(".")[-2 if self.owner else -1 :])

    def parameter(self, name: str) -> int:
        """Give the place of a parameter among the arguments of a call."""
        places = [arg.arg for arg in self.node.args.args]
        return places.index(name) - bool(self.owner)


class Program:
    """All functions of an archive."""

    def __init__(self) -> None:
        self.all: list[Function] = []
        self._functions: dict[str, Function] = {}
        self._methods: dict[tuple[str, str], Function] = {}
        self._members: dict[tuple[str, str], str] = {}
        self._expanded: dict[Function, _Size] = {}
        self._lengths: dict[tuple[Function, str], int | None] = {}

    def declare(self, record: str, tree: ast.Module) -> None:
        """Take in what one source declares."""
        qualifier = record.removeprefix("code/").removesuffix(".py").replace("/", ".")
        names: set[str] = set()
        for statement in tree.body:
            if not isinstance(statement, ast.ClassDef | ast.FunctionDef):
                raise refuse("declare modules and functions alone", shown(statement), record=record)
            if statement.name in names:
                raise refuse("declare every name once", statement.name, record=record)
            names.add(statement.name)
            name = f"{qualifier}.{statement.name}"
            if isinstance(statement, ast.ClassDef):
                self._declare_class(record, name, statement)
            else:
                self._functions[name] = self._function(record, name, statement, "")

    def _declare_class(self, record: str, name: str, node: ast.ClassDef) -> None:
        for statement in node.body:
            match statement:
                case ast.FunctionDef():
                    key = (name, statement.name)
                    declared = key in self._methods
                    self._methods[key] = self._function(record, f"{name}.{statement.name}", statement, name)
                case ast.AnnAssign(target=ast.Name(id=member), annotation=annotation):
                    key = (name, member)
                    declared = key in self._members
                    self._members[key] = _dotted(annotation)
                case ast.Assign(targets=[ast.Name(id="__parameters__" | "__buffers__")]) | ast.Pass():
                    continue
                case _:
                    raise refuse("declare members and methods alone in a module", shown(statement), record=record)
            if declared:
                raise refuse("declare every member once", key[1], record=record)

    def _function(self, record: str, name: str, node: ast.FunctionDef, owner: str) -> Function:
        _require_plain(node, record)
        arguments = node.args.args
        if owner and not (arguments and arguments[0].annotation and _dotted(arguments[0].annotation) == owner):
            raise refuse(f"begin the parameters of '{node.name}' with its module, '{owner}'", "other", record=record)
        bindings: defaultdict[str, list[_Bound]] = defaultdict(list)
        for target, value in _bindings(node, record):
            bindings[target].append(value)
        for taken in sorted(_NAMESPACES & bindings.keys()):
            raise refuse("give no other meaning to a name of torch's", taken, record=record)
        bound = {name: values[0] if len(values) == 1 else None for name, values in bindings.items()}
        function = Function(record, name, node, owner, bound)
        self.all.append(function)
        return function

    def join(self) -> None:
        """Find the function that each call means, once all are declared."""
        for function in self.all:
            for part in _parts(function.node.body):
                if isinstance(part, ast.Call) and not is_operator(part.func) and not _is_range(part):
                    callee = self.callee(function, part.func)
                    function.callees.append(callee)
                    callee.calls.append(Call(function, part.args))

    def callee(self, function: Function, called: ast.expr) -> Function:
        """Give the function that a call within a function means."""
        found: Function | None = None
        if isinstance(called, ast.Name):
            bound = function.bound.get(called.id)
            found = self._functions.get(_dotted(bound)) if isinstance(bound, ast.Attribute) else None
        elif isinstance(called, ast.Attribute):
            found = self._functions.get(_dotted(called))
            if found is None:
                found = self._methods.get((self._class_of(function, called.value), called.attr))
        if found is None:
            rule = "call functions of the archive by a name that stands for one alone"
            raise refuse(rule, shown(called), record=function.record)
        return found

    def _class_of(self, function: Function, value: _Bound) -> str:
        """Give the class that a value is declared to be of; empty when nothing declares it a few names away."""
        members: list[str] = []
        for _ in range(_MAX_NAME_STEPS):
            match value:
                case ast.Attribute():
                    members.append(value.attr)
                    value = value.value
                case ast.Name(id=name):
                    value = function.bound.get(name)
                case _:
                    break
        if not isinstance(value, ast.arg):
            return ""
        found = _dotted(value.annotation) if value.annotation else ""
        for member in reversed(members):
            found = self._members.get((found, member), "")
        return found

    def expand(self, function: Function, path: list[Function]) -> _Size:
        """Give what a function comes to with all that it calls."""
        if function in self._expanded:
            return self._expanded[function]
        if function in path:
            circle = " -> ".join(one.short_name for one in [*path[path.index(function) :], function])
            raise refuse("hold no functions that call each other in a circle", circle, record=function.record)
        self._require_depth(function, len(path) + 1)
        below = [self.expand(callee, [*path, function]) for callee in function.callees]
        size = _Size(
            steps=self._own_steps(function) + sum(one.steps for one in below),
            operations=_own_operations(function) + sum(one.operations for one in below),
            height=1 + max((one.height for one in below), default=0),
        )
        self._require_depth(function, size.height)
        for count, limit, what in (
            (size.steps, MAX_EXPANDED_NODES, "steps"),
            (size.operations, MAX_EXPANDED_OPERATIONS, "operations"),
        ):
            if count > limit:
                rule = f"take at most {limit} {what} in '{function.short_name}' with all it calls"
                raise refuse(rule, count, record=function.record)
        self._expanded[function] = size
        return size

    def _require_depth(self, function: Function, depth: int) -> None:
        if depth > MAX_CALL_DEPTH:
            raise refuse(f"nest at most {MAX_CALL_DEPTH} functions by calls", function.name, record=function.record)

    def _own_steps(self, function: Function) -> int:
        steps = 0
        for part in _parts(function.node.body):
            steps += isinstance(part, ast.stmt | ast.expr)
            if isinstance(part, ast.For):
                inside = sum(isinstance(inner, ast.stmt | ast.expr) for inner in _parts(part.body))
                steps += self.times(function, part) * inside
        return steps

    def times(self, function: Function, loop: ast.For) -> int:
        """Give how often a loop of a function runs at most."""
        measured = steps_of(loop, function.record)
        return measured if isinstance(measured, int) else self._length(function, measured, 0)

    def _length(self, function: Function, value: ast.expr, depth: int) -> int:
        """Give how many items a list has at most."""
        length: int | None = None
        if depth <= _MAX_LIST_STEPS:
            match value:
                case ast.List(elts=items):
                    length = len(items)
                case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr=operator), args=arguments):
                    length = self._length_made(function, operator, arguments, depth + 1)
                case ast.Call(func=ast.Name(id="annotate"), args=[_, inner]):
                    length = self._length(function, inner, depth + 1)
                case ast.Name(id=name):
                    length = self._length_bound(function, name, depth + 1)
        if length is None or length > MAX_LIST_ITEMS:
            rule = f"loop over the length of lists that have at most {MAX_LIST_ITEMS} items for certain"
            raise refuse(rule, shown(value), record=function.record)
        return length

    def _length_made(self, function: Function, operator: str, arguments: Sequence[ast.expr], depth: int) -> int | None:
        match operator, arguments:
            case "size", [_]:
                return _MAX_DIMS
            case "add", [left, right]:
                return self._length(function, left, depth) + self._length(function, right, depth)
            case (("slice" | "list"), [inner, *_]):
                return self._length(function, inner, depth)
        return None

    def _length_bound(self, function: Function, name: str, depth: int) -> int | None:
        key = (function, name)
        if key not in self._lengths:
            self._lengths[key] = None  # as long as it is not known, so that a list made from itself is of no length
            bound = function.bound.get(name)
            if isinstance(bound, ast.expr):
                self._lengths[key] = self._length(function, bound, depth)
            elif bound is not None and bound.annotation is not None and shown(bound.annotation) == "List[int]":
                self._lengths[key] = self._length_given(function, name, depth)
        return self._lengths[key]

    def _length_given(self, function: Function, name: str, depth: int) -> int | None:
        """Give how many items a parameter has at most in any call; 0 when nothing in the archive calls the function."""
        place, longest = function.parameter(name), 0
        for call in function.calls:
            if not 0 <= place < len(call.arguments):
                return None
            longest = max(longest, self._length(call.caller, call.arguments[place], depth))
        return longest


def _own_operations(function: Function) -> int:
    return sum(isinstance(part, _OPERATIONS) for part in _parts(function.node.body))


def _parts(statements: Sequence[ast.stmt]) -> Iterator[ast.AST]:
    for statement in statements:
        yield from ast.walk(statement)


def _require_plain(node: ast.FunctionDef, record: str) -> None:
    """Refuse parameters that torch prints of no graph, and defaults that are computed."""
    match node.args:
        case ast.arguments(posonlyargs=[], vararg=None, kwonlyargs=[], kwarg=None, defaults=defaults):
            computed: list[ast.AST] = [
                part for default in defaults for part in ast.walk(default) if isinstance(part, ast.Call)
            ]
        case _:
            computed = [node.args]
    if computed:
        raise refuse(f"give '{node.name}' plain parameters and defaults", shown(computed[0]), record=record)


def _is_range(call: ast.Call) -> bool:
    return isinstance(call.func, ast.Name) and call.func.id == "range"


def _bindings(node: ast.FunctionDef, record: str) -> Iterator[tuple[str, _Bound]]:
    """Give every name that a function binds, as often as it does, with what it is bound to."""
    for argument in node.args.args:
        yield argument.arg, argument
    for part in _parts(node.body):
        match part:
            case ast.FunctionDef() | ast.ClassDef():
                raise refuse("declare nothing within a function", part.name, record=record)
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                yield name, value
            case ast.Assign(targets=targets):
                yield from ((name, None) for target in targets for name in _stored(target))
            case ast.AnnAssign(target=target) | ast.For(target=target):
                yield from ((name, None) for name in _stored(target))


def _stored(target: ast.expr) -> Iterator[str]:
    for part in ast.walk(target):
        if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
            yield part.id


def _dotted(node: ast.expr) -> str:
    """Give a dotted name as text; empty for anything else."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute) and len(parts) < _MAX_NAME_PARTS:
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""

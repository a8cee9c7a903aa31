"""Lists and texts of a TorchScript archive: none grows large, in whatever way its functions put them together.

Tensors are held to their bytes where a form runs (`bounded_form`); lists and texts are seen by no operator there, and a
list added to itself in a loop of 64 steps has no room in any machine. So the source is gone through here as torch would
run it, each loop step by step and both ways of each branch, with nothing for values but how much they hold at most:

    extent      0 for a number, a tensor or a module; for a text its characters, for a list or a tuple its items and
                all that they hold, and one more
    depth       how many lists within each other; an item of one has a depth less
    printable   made of numbers and texts alone: a text made from it is as short as it is itself

What source reads from the archive's pickles are tensors and modules (`archive_script`, `archive_pickle`).
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from esper.execution.archive_calls import Function, Program
from esper.execution.archive_errors import refuse, shown
from esper.execution.archive_script import TEXT_MEMBER, is_operator

MAX_EXTENT: Final = 2048
"""Most that one value may hold; a message of torch's own that names the size of a tensor may have nearly as much."""

_MAX_DIMS: Final = 64
"""Dimensions of a tensor that torch allows."""
_NUMBER_CHARS: Final = 24
"""Characters of the longest number, and what stands between two."""
_TEXT_DEPTH: Final = 64
"""Depth of a text, whose items are texts."""
_NUMBERS: Final = frozenset({"int", "float", "bool"})
_COUNTS: Final = frozenset({"dim", "len"})
_ARITHMETIC: Final = frozenset({"sub", "floordiv", "eq", "lt", "gt", "__is__"})
_WHOLE: Final = frozenset({"list", "slice"})


class _Value(NamedTuple):
    """What is known of a value."""

    extent: int = 0
    depth: int = 0
    printable: bool = False


_OTHER: Final = _Value()
_NUMBER: Final = _Value(printable=True)
_SIZES: Final = _Value(1 + _MAX_DIMS, 1, True)
_Names = dict[str, _Value]


def inspect_values(program: Program) -> None:
    """Do nothing when no list and no text of some functions grows large.

    Raises:
        CorruptDataError: One may; the message names the record and the expression.
    """
    run = _Run(program)
    for function in program.all:
        if not function.calls:  # what others call is gone through with what they give it
            try:
                run.call(function, [_given(argument) for argument in function.node.args.args])
            except RecursionError as error:
                raise refuse("nest expressions less deep", function.short_name, record=function.record) from error


class _Run:
    """Goes through functions as torch runs them."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._known: dict[tuple[Function, tuple[_Value, ...]], _Value] = {}

    def call(self, function: Function, arguments: Sequence[_Value]) -> _Value:
        """Give what a function returns for what it is given, ``self`` and all."""
        key = (function, tuple(arguments))
        if key not in self._known:
            places = function.node.args.args
            defaults = function.node.args.defaults
            given = list(arguments)
            for place in range(len(given), len(places)):
                index = place - (len(places) - len(defaults))
                given.append(_Frame(self, function, {}).value_of(defaults[index]) if index >= 0 else _OTHER)
            names = {place.arg: value for place, value in zip(places, given, strict=False)}
            self._known[key] = _Frame(self, function, names).body(function.node.body)
        return self._known[key]

    def meant(self, function: Function, called: ast.expr) -> Function:
        """Give the function that a call means."""
        return self._program.callee(function, called)

    def times(self, function: Function, loop: ast.For) -> int:
        """Give how often a loop runs at most."""
        return self._program.times(function, loop)


class _Frame:
    """One run of a function."""

    def __init__(self, run: _Run, function: Function, names: _Names) -> None:
        self._run = run
        self._function = function
        self._names = names

    def body(self, statements: Sequence[ast.stmt]) -> _Value:
        """Go through statements; give what the last returns."""
        returned = _OTHER
        for statement in statements:
            match statement:
                case ast.Return(value=ast.expr() as value):
                    returned = self.value_of(value)
                case ast.Assign(targets=targets, value=value):
                    found = self.value_of(value)
                    for target in targets:
                        self._bind(target, found)
                case ast.AnnAssign(target=target, value=ast.expr() as value):
                    self._bind(target, self.value_of(value))
                case ast.Expr(value=value):
                    self.value_of(value)
                case ast.If():
                    returned = self._branch(statement)
                case ast.For():
                    self._loop(statement)
        return returned

    def _branch(self, node: ast.If) -> _Value:
        self.value_of(node.test)
        before = dict(self._names)
        one = self.body(node.body)
        after, self._names = self._names, before
        other = self.body(node.orelse)
        self._names = _either(after, self._names)
        return _larger(one, other)

    def _loop(self, node: ast.For) -> None:
        """Go through a loop until it ends, or changes nothing more."""
        for _ in range(self._run.times(self._function, node)):
            before = dict(self._names)
            self._bind(node.target, _NUMBER)
            self.body(node.body)
            self._names = _either(before, self._names)
            if self._names == before:
                return

    def _bind(self, target: ast.expr, value: _Value) -> None:
        if isinstance(target, ast.Name):
            self._names[target.id] = value
        elif isinstance(target, ast.Tuple | ast.List):
            for part in target.elts:
                self._bind(part, _item_of(value))

    def value_of(self, node: ast.expr) -> _Value:
        """Give what is known of an expression's value."""
        found = self._made(node)
        if found.extent > MAX_EXTENT:
            rule = f"make no list and no text that may hold more than {MAX_EXTENT} items or characters"
            raise refuse(rule, shown(node), record=self._function.record)
        return found

    def _made(self, node: ast.expr) -> _Value:
        match node:
            case ast.Constant(value=str(text)):
                return _Value(1 + len(text), _TEXT_DEPTH, True)
            case ast.Constant():
                return _NUMBER
            case ast.Name(id=name):
                return self._names.get(name, _OTHER)
            case ast.Attribute(attr=member):  # how long the text is stands in a pickle
                return _Value(MAX_EXTENT, _TEXT_DEPTH) if member == TEXT_MEMBER else _OTHER
            case ast.List(elts=items) | ast.Tuple(elts=items):
                return _list_of([self.value_of(item) for item in items])
            case ast.Subscript(value=value, slice=index):
                self.value_of(index)
                return _item_of(self.value_of(value))
            case ast.UnaryOp(operand=operand):
                return self.value_of(operand)
            case ast.Call(func=func, args=arguments):
                return self._called(node, func, arguments)
        raise refuse("use the expressions of a scripted module", shown(node), record=self._function.record)

    def _called(self, node: ast.Call, func: ast.expr, arguments: Sequence[ast.expr]) -> _Value:
        if isinstance(func, ast.Name) and is_operator(func):  # a cast: the type, then the value
            return self.value_of(arguments[-1]) if arguments else _OTHER
        values = [self.value_of(argument) for argument in arguments]
        if not is_operator(func):
            callee = self._run.meant(self._function, func)
            return self._run.call(callee, [_OTHER, *values] if callee.owner else values)
        if isinstance(func, ast.Attribute) and isinstance(func.value, ast.Name) and func.value.id == "torch":
            return self._computed(node, func.attr, values)
        return _OTHER

    def _computed(self, node: ast.Call, operator: str, values: Sequence[_Value]) -> _Value:
        """Give what one of torch's own operators makes."""
        first = values[0] if values else _OTHER
        printable = all(value.printable for value in values)
        if operator == "add":
            depth = max((value.depth for value in values), default=0)
            return _Value(sum(value.extent for value in values), depth, printable)
        if operator in _WHOLE:
            return first
        if operator == "size":
            return _SIZES if len(values) == 1 else _NUMBER
        if operator in _COUNTS:
            return _NUMBER
        if operator == "mul" and any(value.extent for value in values):
            raise refuse("multiply numbers and tensors alone", shown(node), record=self._function.record)
        if operator == "mul" or operator in _ARITHMETIC:
            return _Value(printable=printable)
        if operator == "format":
            if not printable:
                raise refuse("put numbers and texts alone into a text", shown(node), record=self._function.record)
            return _Value(1 + sum(_printed(value) for value in values), _TEXT_DEPTH, True)
        return _OTHER


def _given(argument: ast.arg) -> _Value:
    """Give what the one who runs a kernel may give for a parameter."""
    kind = shown(argument.annotation) if argument.annotation else ""
    if kind == "List[int]":
        return _SIZES
    return _NUMBER if kind in _NUMBERS else _OTHER


def _list_of(items: Sequence[_Value]) -> _Value:
    extent = 1 + sum(1 + item.extent for item in items)
    depth = 1 + max((item.depth for item in items), default=0)
    return _Value(extent, min(depth, _TEXT_DEPTH), all(item.printable for item in items))


def _item_of(value: _Value) -> _Value:
    depth = max(0, value.depth - 1)
    return _Value(value.extent if depth else 0, depth, value.printable)


def _printed(value: _Value) -> int:
    return value.extent if value.depth >= _TEXT_DEPTH else _NUMBER_CHARS * (1 + value.extent)


def _either(one: Mapping[str, _Value], other: Mapping[str, _Value]) -> _Names:
    return {name: _larger(one.get(name), other.get(name)) for name in (*one, *other)}


def _larger(one: _Value | None, other: _Value | None) -> _Value:
    if one is None or other is None:
        return one or other or _OTHER
    return _Value(max(one.extent, other.extent), max(one.depth, other.depth), one.printable and other.printable)

"""Dimensions of a site, and the bounded expressions that blueprints write in them.

Legend (all are whole numbers > 0; a name is known only at sites that have the dimension):

    I       features of the layer's input x        every site
    C       features of the layer's output h       every site
    S       stride: input positions per output position, at least 1; 1 without positions
    L, IL   positions of h and of x (H * W)        token, signal and image sites
    H, W    height and width of h                  image sites
    IH, IW  height and width of x                  image sites

The batch is no dimension of a site: a module takes batches of any size, so nothing that is fixed when it is built can
follow from one. An expression that names it (``B``) is refused and told so.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Final

from esper.blueprints.syntax import parse_syntax
from esper.blueprints.types import Layout, site_types, stride_between
from esper.contracts.blueprint import Expression, Site
from esper.contracts.errors import InvalidBlueprintError

DIM_NAMES: Final = ("I", "C", "S", "L", "IL", "H", "W", "IH", "IW")
"""Every name an expression may use."""

MAX_EXPRESSION_CHARS: Final = 64
"""Longest expression, in characters."""

_BATCH: Final = re.compile(r"\bB\b")
_MAX_VALUE: Final = 2**40
_FUNCTIONS: Final = {"min": min, "max": max}
_GRAMMAR: Final = f"be whole numbers, {', '.join(DIM_NAMES)}, + - * // %, min(...), max(...) and brackets"


def site_dims(site: Site) -> Mapping[str, int]:
    """Give the dimensions of a site by name.

    Raises:
        InvalidBlueprintError: The site's shapes do not fit its kind.
    """
    x, h = site_types(site)
    dims = {"I": x.features, "C": h.features, "S": 1}
    if h.positions:
        dims |= {"L": h.num_positions, "IL": x.num_positions}
    if h.layout is Layout.IMAGE:
        dims |= {"H": h.positions[0], "W": h.positions[1], "IH": x.positions[0], "IW": x.positions[1]}
    if h.positions:
        dims["S"] = stride_between(x.positions[0], h.positions[0])
    return dims


def check_expression(expression: Expression, parameter: str) -> ast.expr:
    """Give the syntax tree of an expression whose every part is allowed.

    Raises:
        InvalidBlueprintError: It is longer than 64 characters or uses anything outside the grammar.
    """
    text = expression.text
    if not 1 <= len(text) <= MAX_EXPRESSION_CHARS:
        raise InvalidBlueprintError.of(parameter, f"be an expression of 1 to {MAX_EXPRESSION_CHARS} characters", text)
    tree = _parse(text)
    if tree is None and _BATCH.search(text):
        raise InvalidBlueprintError.of(parameter, "not depend on the batch B, which may be of any size", text)
    if tree is None:
        raise InvalidBlueprintError.of(parameter, _GRAMMAR, text)
    return tree


@lru_cache(maxsize=1024)
def _parse(text: str) -> ast.expr | None:
    """Give the syntax tree of an expression; ``None`` outside the grammar. Designs share a few dozen expressions."""
    try:
        tree = parse_syntax(text, "eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None
    return tree if _allowed(tree) else None


def evaluate(expression: Expression, dims: Mapping[str, int], parameter: str) -> int:
    """Give the value of an expression at a site.

    Raises:
        InvalidBlueprintError: It is outside the grammar, names a dimension the site lacks, divides by zero, or
            leaves the range of 2**40.
    """
    tree = check_expression(expression, parameter)
    try:
        value = _value(tree, dims)
    except KeyError as error:
        rule = f"use dimensions that the site has ({', '.join(dims)})"
        raise InvalidBlueprintError.of(parameter, rule, expression.text) from error
    except ZeroDivisionError as error:
        raise InvalidBlueprintError.of(parameter, "not divide by zero at this site", expression.text) from error
    if abs(value) > _MAX_VALUE:
        raise InvalidBlueprintError.of(parameter, "stay within 2**40 at this site", expression.text)
    return value


def _allowed(node: ast.expr) -> bool:
    match node:
        case ast.Constant(value=int() as value):
            return not isinstance(value, bool) and abs(value) <= _MAX_VALUE
        case ast.Name(id=name):
            return name in DIM_NAMES
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return _allowed(operand)
        case ast.BinOp(left=left, op=ast.Add() | ast.Sub() | ast.Mult() | ast.FloorDiv() | ast.Mod(), right=right):
            return _allowed(left) and _allowed(right)
        case ast.Call(func=ast.Name(id=name), args=[_, _, *_] as args, keywords=[]):
            return name in _FUNCTIONS and all(_allowed(arg) for arg in args)
        case _:
            return False


def _value(node: ast.expr, dims: Mapping[str, int]) -> int:
    match node:
        case ast.Constant(value=int() as value):
            return value
        case ast.Name(id=name):
            return dims[name]
        case ast.UnaryOp(operand=operand):
            return -_value(operand, dims)
        case ast.BinOp(left=left, op=op, right=right):
            return _binary(op, _value(left, dims), _value(right, dims))
        case ast.Call(func=ast.Name(id=name), args=args):
            return _FUNCTIONS[name](_value(arg, dims) for arg in args)
    raise AssertionError(f"check_expression let {type(node).__name__} pass")


def _binary(op: ast.operator, left: int, right: int) -> int:
    match op:
        case ast.Add():
            return left + right
        case ast.Sub():
            return left - right
        case ast.Mult():
            return left * right
        case ast.FloorDiv():
            return left // right
        case _:
            return left % right

"""Source inside a TorchScript archive: every operator it calls is one that a kernel needs.

The source is what torch prints of a graph: a small part of Python. It is read as Python here and by torch's own parser
later, so whatever the two might read differently (backslashes, comments, other quotes, other characters) is refused.

A loop ends soon: it goes over a range of a written number of steps, `MAX_LOOP_STEPS` at most, or over one list, holds
no other loop, and calls no function of the archive, which might hold one. How long such a list is and how often
functions call each other is seen only in all sources together: `archive_calls`.

Nothing is kept from one run to the next: values have names within their function, and no member of a module is given
another value. The members that source reads are tensors and modules. How much the values hold that are no tensors is
seen only in all sources together too: `archive_values`.

A function returns once, at its end. torch prints no other: what stood after an early return is in the other branch by
then. To load one it moves all that follows into a branch, again for each: 400 of them take it 40 seconds.
"""

from __future__ import annotations

import ast
import re
from typing import Final

from esper.blueprints.syntax import parse_syntax
from esper.execution.archive_errors import refuse, shown

OPERATORS: Final = frozenset(
    {f"torch.{name}" for name in (
        "__is__", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "add", "amax", "avg_pool1d", "avg_pool2d", "cat",
        "contiguous", "conv1d", "conv2d", "dim", "eq", "flatten", "floordiv", "format", "gelu", "group_norm", "gt",
        "layer_norm", "len", "linear", "list", "lt", "matmul", "max_pool1d", "max_pool2d", "mean", "mul", "narrow",
        "pad", "relu", "relu_", "reshape", "reshape_as", "rms_norm", "scaled_dot_product_attention", "sigmoid", "silu",
        "silu_", "size", "slice", "softplus", "sub", "tanh", "to", "transpose", "unflatten", "unsqueeze",
    )}
    | {"ops.prim.RaiseException", "ops.prim.dtype", "ops.quantized.linear_dynamic"}
)  # fmt: skip
"""Operators that compiled forms of the closed operator set use, none of which reaches beyond its tensors."""

TEXT_MEMBER: Final = "_code"
"""The one member that is a text: of a module that torch.fx made, which gives it and reads it nowhere else."""

MAX_LOOP_STEPS: Final = 64
"""Most steps of a loop whose number of steps is written in the source."""

_OWN: Final = re.compile(r"__torch__(\.(?!classes\b)\w+)+", re.ASCII)
_CONSTANT: Final = re.compile(r"CONSTANTS\.c\d+", re.ASCII)
_MEMBER: Final = re.compile(r"(node|down|up|norm)_[a-z][a-z0-9_]*|weight|bias|forward|_conv_forward|_code", re.ASCII)
_MEMBER_KIND: Final = re.compile(r"Tensor|NoneType|Optional\[Tensor\]|__torch__(\.\w+)+", re.ASCII)
_FUNCTION: Final = re.compile(r"(?!__)\w+|__code_getter", re.ASCII)
_CASTS: Final = frozenset({"annotate", "unchecked_cast"})
_CALLED: Final = re.compile(rf"_\d+|{'|'.join(sorted(_CASTS))}", re.ASCII)
_NODES: Final = frozenset(
    {
        ast.Module, ast.ClassDef, ast.FunctionDef, ast.arguments, ast.arg, ast.AnnAssign, ast.Assign, ast.Expr,
        ast.Return, ast.If, ast.For, ast.Pass, ast.Attribute, ast.Name, ast.Call, ast.Constant, ast.List, ast.Tuple,
        ast.Subscript, ast.UnaryOp, ast.USub, ast.Load, ast.Store,
    }
)  # fmt: skip


def inspect_source(data: bytes, name: str) -> ast.Module:
    """Give the syntax tree of a source that calls listed operators and the archive's own functions alone.

    Raises:
        CorruptDataError: It does anything else; the message names the record and what it is.
    """
    if not re.fullmatch(rb"[ -~\n]*", data) or re.search(rb"[\\#']|\"\"\"", data):
        raise refuse('be printable ASCII without backslashes, comments and quotes but "', "other", record=name)
    try:
        tree = parse_syntax(data, "exec")
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise refuse("be source", error, record=name) from error
    waiting: list[ast.AST] = [tree]
    ends: set[ast.stmt] = set()
    while waiting:
        node = waiting.pop()
        if type(node) not in _NODES:
            raise refuse("use the statements of a scripted module", type(node).__name__, record=name)
        if isinstance(node, ast.FunctionDef):
            ends.add(node.body[-1])
        elif isinstance(node, ast.Return) and node not in ends:
            raise refuse("return at the end of a function alone", shown(node), record=name)
        if isinstance(node, ast.Attribute):
            _check_node(node, name)
            waiting.append(_check_dotted(node, name))
        elif isinstance(node, ast.For):
            waiting += [node.target, _check_loop(node, name), *node.body]
        else:
            _check_node(node, name)
            waiting += _children(node)
    return tree


def _children(node: ast.AST) -> list[ast.AST]:
    found: list[ast.AST] = []
    for field in node._fields:
        part = getattr(node, field, None)
        if isinstance(part, list):
            found += [item for item in part if isinstance(item, ast.AST)]
        elif isinstance(part, ast.AST):
            found.append(part)
    return found


def _check_loop(node: ast.For, name: str) -> ast.expr:
    """Check that a loop ends soon; give the number of its steps, which is still to be looked at."""
    steps_of(node, name)
    for statement in node.body:
        for part in ast.walk(statement):
            if isinstance(part, ast.For):
                raise refuse("hold no loop within a loop", shown(part.iter), record=name)
            if isinstance(part, ast.Call) and not is_operator(part.func):
                raise refuse("call operators alone within a loop", shown(part.func), record=name)
    assert isinstance(node.iter, ast.Call)
    return node.iter.args[0]


def steps_of(node: ast.For, name: str) -> int | ast.Name:
    """Give the number of steps of a loop, or the list that has at least as many items.

    Raises:
        CorruptDataError: The loop goes over anything else; the message names the record and what it is.
    """
    match node:
        case ast.For(iter=ast.Call(func=ast.Name(id="range"), args=[steps], keywords=[]), orelse=[]):
            pass
        case _:
            raise refuse("loop over range(STEPS) alone", shown(node.iter), record=name)
    match steps:
        case ast.Constant(value=int(count)) if 0 <= count <= MAX_LOOP_STEPS:
            return count
        case ast.Call(
            func=ast.Attribute(value=ast.Name(id="torch"), attr="sub"), args=[length, ast.Constant(value=int(less))]
        ) if less >= 0:
            pass
        case _:
            length = steps
    match length:
        case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr="len"), args=[ast.Name() as measured]):
            return measured
        case _:
            rule = f"loop over a written number of steps, at most {MAX_LOOP_STEPS}, or over the length of a list"
            raise refuse(rule, shown(steps), record=name)


def is_operator(called: ast.expr) -> bool:
    """Say whether an operator or a cast is called, and no function of the archive; the lists are held to later."""
    while isinstance(called, ast.Attribute):
        called = called.value
        if isinstance(called, ast.Name):
            return called.id in ("torch", "ops")
    return isinstance(called, ast.Name) and called.id in _CASTS


def _check_node(node: ast.AST, name: str) -> None:
    match node:
        case ast.Attribute(ctx=ast.Store()) | ast.Subscript(ctx=ast.Store()):
            raise refuse("give values to names alone", shown(node), record=name)
        case ast.Call(func=ast.Name(id=called)) if not _CALLED.fullmatch(called):
            raise refuse("call what is on the list", called, record=name)
        case ast.Call(func=func) if not isinstance(func, ast.Name | ast.Attribute):
            raise refuse("call operators and functions by name", type(func).__name__, record=name)
        case ast.ClassDef(bases=[ast.Name(id="Module")], keywords=[], decorator_list=[]):
            _check_members(node, name)
        case ast.ClassDef():
            raise refuse("declare modules alone", node.name, record=name)
        case ast.FunctionDef() if node.decorator_list or not _FUNCTION.fullmatch(node.name):
            raise refuse("declare functions that nothing calls by itself", node.name, record=name)
        case ast.Constant(value=value) if not (value is None or isinstance(value, bool | int | float | str)):
            raise refuse("hold plain constants", value, record=name)
        case _:
            pass


def _check_members(node: ast.ClassDef, name: str) -> None:
    """Refuse members of other kinds than tensors and modules under the names that source may read."""
    for statement in node.body:
        match statement:
            case ast.AnnAssign(target=ast.Name(id=member), annotation=kind) if _MEMBER.fullmatch(member):
                if not _MEMBER_KIND.fullmatch(shown(kind)) and (member, shown(kind)) != (TEXT_MEMBER, "str"):
                    raise refuse(f"have a tensor or a module as '{member}'", shown(kind), record=name)


def _check_dotted(node: ast.Attribute, name: str) -> ast.expr:
    """Check a dotted name as a whole; give what stands at its head."""
    parts: list[str] = []
    head: ast.expr = node
    while isinstance(head, ast.Attribute):
        parts.append(head.attr)
        head = head.value
    root = head.id if isinstance(head, ast.Name) else ""
    dotted = ".".join([root, *reversed(parts)])
    if root in ("torch", "ops"):
        allowed = dotted in OPERATORS
    elif root == "__torch__":
        allowed = _OWN.fullmatch(dotted) is not None
    elif root == "CONSTANTS":
        allowed = _CONSTANT.fullmatch(dotted) is not None
    else:  # a member of a module; on a tensor, a name that no operator has
        allowed = all(_MEMBER.fullmatch(part) for part in parts)
    if not allowed:
        raise refuse("use operators on the list", dotted, record=name)
    return head

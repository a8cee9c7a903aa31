"""Python's parser for text that several threads read at once.

CPython before 3.11.9 and 3.12.3 counts the depth of the tree that it builds once for all threads: where the interpreter
goes over to another thread in the midst of it, and that one parses too, either may end in a ``SystemError`` that says
nothing of the text (gh-106905). Our own threads take turns; others, of torch among them, are beyond our reach, and what
they spoil is done again.

A text that Python takes with a ``SyntaxWarning`` (``1if`` without a space) is refused: a later Python refuses it,
nothing of ours needs it, and whoever sends one must not write to the standard error of a service. The filter that says
so names our texts alone, and stays: ``warnings.catch_warnings``, which sets warnings aside for a while, sets them aside
for every other thread too.
"""

from __future__ import annotations

import ast
import re
import threading
import warnings
from typing import Final, Literal, overload

_MAX_ATTEMPTS: Final = 20
_NAME: Final = "<text of esper>"
_FILTER: Final = ("error", None, SyntaxWarning, re.compile(re.escape(_NAME)), 0)
_turn = threading.Lock()


@overload
def parse_syntax(text: str | bytes, mode: Literal["exec"]) -> ast.Module: ...
@overload
def parse_syntax(text: str | bytes, mode: Literal["eval"]) -> ast.Expression: ...
def parse_syntax(text: str | bytes, mode: Literal["exec", "eval"]) -> ast.mod:
    """Give the tree of a text, as ``ast.parse`` does, with nothing said to standard error. Thread-safe.

    Raises:
        SyntaxError: It is no Python, or one that Python warns of.
        ValueError: It holds a null byte, or is not in its encoding.
        RecursionError: It is nested too deeply.
        MemoryError: It is too complex for the parser.
    """
    with _turn:
        if _FILTER not in warnings.filters:  # the first time, or somebody took the filters of before back
            warnings.filterwarnings("error", category=SyntaxWarning, module=_FILTER[3].pattern)
        for _ in range(_MAX_ATTEMPTS - 1):
            try:
                return ast.parse(text, _NAME, mode)
            except SystemError:
                continue
        return ast.parse(text, _NAME, mode)

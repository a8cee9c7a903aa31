"""Python's parser for text that several threads read at once.

CPython before 3.11.9 and 3.12.3 counts the depth of the tree that it builds once for all threads: where the interpreter
goes over to another thread in the midst of it, and that one parses too, either may end in a ``SystemError`` that says
nothing of the text (gh-106905). Our own threads take turns; others, of torch among them, are beyond our reach, and what
they spoil is done again.
"""

from __future__ import annotations

import ast
import threading
from typing import Final, Literal, overload

_MAX_ATTEMPTS: Final = 20
_turn = threading.Lock()


@overload
def parse_syntax(text: str | bytes, mode: Literal["exec"]) -> ast.Module: ...
@overload
def parse_syntax(text: str | bytes, mode: Literal["eval"]) -> ast.Expression: ...
def parse_syntax(text: str | bytes, mode: Literal["exec", "eval"]) -> ast.mod:
    """Give the tree of a text, as ``ast.parse`` does. Thread-safe.

    Raises:
        SyntaxError: It is no Python.
        ValueError: It holds a null byte, or is not in its encoding.
        RecursionError: It is nested too deeply.
        MemoryError: It is too complex for the parser.
    """
    with _turn:
        for _ in range(_MAX_ATTEMPTS - 1):
            try:
                return ast.parse(text, mode=mode)
            except SystemError:
                continue
        return ast.parse(text, mode=mode)

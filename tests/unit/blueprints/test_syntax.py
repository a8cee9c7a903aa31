"""Text is read as it is, whatever other threads read at the same time."""

from __future__ import annotations

import ast
import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest

from esper.blueprints.syntax import parse_syntax

LINES = "def f{0}(a, b):\n    return g(a, h(b, [1, 2, (3, a.b.c)]), k[{0}])\n"
TEXT = "".join(LINES.format(number) for number in range(60))


@pytest.mark.parametrize(
    "other", [ast.parse, lambda text: parse_syntax(text, "exec")], ids=["a thread of torch", "a thread of ours"]
)
def test_a_text_is_read_though_another_thread_reads_one_meanwhile(other: Callable[[str], Any]) -> None:
    """The collector has its turn while the tree is built, and lets the other thread go on in the midst of that."""
    wanted = ast.dump(ast.parse(TEXT))
    others: list[threading.Thread] = []

    def let_the_other_read(phase: str, _: Any) -> None:
        if phase == "start" and not others:
            others.append(threading.Thread(target=other, args=(TEXT,)))
            others[0].start()
            others[0].join(0.2)

    threshold = gc.get_threshold()
    gc.callbacks.append(let_the_other_read)
    gc.set_threshold(200)
    try:
        tree = parse_syntax(TEXT, "exec")
    finally:
        gc.set_threshold(*threshold)
        gc.callbacks.remove(let_the_other_read)
    for thread in others:
        thread.join(10)
        assert not thread.is_alive()
    assert others
    assert ast.dump(tree) == wanted


def test_what_is_no_python_is_refused_as_by_the_parser_itself() -> None:
    with pytest.raises(SyntaxError, match="invalid syntax"):
        parse_syntax("a = = b", "exec")
    with pytest.raises(SyntaxError, match="invalid syntax"):
        parse_syntax("a = b", "eval")
    assert ast.dump(parse_syntax("a + 1", "eval")) == ast.dump(ast.parse("a + 1", mode="eval"))

"""Text is read as it is, whatever other threads read at the same time."""

from __future__ import annotations

import ast
import gc
import subprocess
import sys
import threading
import warnings
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


WARNED = ("1if C else 2", "0x1for x in y", "1_0and C", "0o7or C", "0b1in C", "1jif C else 2")
"""What this Python takes with a warning on standard error, and a later one refuses."""
READ = """
import sys, threading
from esper.blueprints.dims import check_expression
from esper.blueprints.syntax import parse_syntax
from esper.contracts.blueprint import Expression
from esper.contracts.errors import InvalidBlueprintError

def read(text):
    try:
        check_expression(Expression(text), "features")
    except InvalidBlueprintError as error:
        assert repr(text) in str(error)
    try:
        parse_syntax(text.encode(), "exec")
    except SyntaxError as error:
        refused.append(error.msg)

refused = []
threads = [threading.Thread(target=read, args=(text,)) for text in sys.argv[1:]]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(len(refused), *sorted(set(refused)), sep="; ")
"""


def test_hostile_text_writes_nothing_to_the_standard_error_of_who_reads_it() -> None:
    done = subprocess.run([sys.executable, "-c", READ, *WARNED], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    kinds = ("binary", "decimal", "hexadecimal", "imaginary", "octal")
    assert done.stdout.strip() == f"{len(WARNED)}; " + "; ".join(f"invalid {kind} literal" for kind in kinds)


@pytest.mark.parametrize("text", WARNED)
def test_what_python_warns_of_is_refused_though_filters_come_and_go(text: str) -> None:
    """Whoever takes back the filters of before takes ours, too."""
    for _ in range(2):
        with warnings.catch_warnings(record=True) as told:
            warnings.resetwarnings()
            with pytest.raises(SyntaxError, match=r"invalid \w+ literal"):
                parse_syntax(text, "eval")
        assert told == []


def test_warnings_of_others_are_left_alone() -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.resetwarnings()
        warnings.simplefilter("always")
        parse_syntax("1", "eval")
        ast.parse(WARNED[0])
        warnings.warn("own", SyntaxWarning, stacklevel=1)
    assert [str(one.message) for one in told] == ["invalid decimal literal", "own"]

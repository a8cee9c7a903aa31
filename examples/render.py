"""Makes ``docs/tutorial.md`` and its pictures from ``examples/grow_your_own.py`` and one run of it.

The program is in cells: ``# %% [markdown]`` begins text, ``# %%`` code. The page has both in their order, and after
each code what the run printed there. Run it as ``python examples/render.py``.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]
PROGRAM: Final = ROOT / "examples" / "grow_your_own.py"
PAGE: Final = ROOT / "docs" / "tutorial.md"
PICTURES: Final = ROOT / "docs" / "tutorial"

_MARK: Final = "\x1e"
_CELL: Final = re.compile(r"^# %%(?P<kind> \[markdown\])?\n", re.MULTILINE)
_OUTPUT: Final = re.compile(r"\n```text\n.*?```\n", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Cell:
    """A piece of the program."""

    is_text: bool
    """Whether it is Markdown in comments; else it is code."""
    source: str
    """Its lines, without the one that begins it."""


def cells_of(program: str) -> list[Cell]:
    """Give the program's cells; what stands before the first is not one of them."""
    begun = list(_CELL.finditer(program))
    ends = [one.start() for one in begun[1:]] + [len(program)]
    return [
        Cell(one["kind"] is not None, program[one.end() : end].strip("\n"))
        for one, end in zip(begun, ends, strict=True)
    ]


def page_of(program: str, outputs: Sequence[str]) -> str:
    """Give the page; ``outputs`` holds what each cell of code printed, empty where that was nothing."""
    remaining = iter(outputs)
    blocks = [block for cell in cells_of(program) for block in _blocks(cell, remaining)]
    return "\n\n".join(blocks) + "\n"


def _blocks(cell: Cell, outputs: Iterator[str]) -> Iterator[str]:
    if cell.is_text:
        yield re.sub(r"^# ?", "", cell.source, flags=re.MULTILINE)
        return
    yield f"```python\n{cell.source}\n```"
    if printed := next(outputs):
        yield f"```text\n{printed}```"


def without_outputs(page: str) -> str:
    """Give a page as it is where no cell printed anything."""
    return _OUTPUT.sub("", page)


def run(program: str, directory: Path) -> list[str]:
    """Run the program in a directory, where its files stay; give what each cell of code printed.

    Raises:
        subprocess.CalledProcessError: It failed; its errors are on stderr.
    """
    code = [cell.source for cell in cells_of(program) if not cell.is_text]
    script = directory / PROGRAM.name
    script.write_text(f"\nprint({_MARK!r}, end='', flush=True)\n".join(code), encoding="utf-8")
    command = [sys.executable, script.name]
    done = subprocess.run(command, cwd=directory, stdout=subprocess.PIPE, text=True, check=True)  # noqa: S603 - our own
    return done.stdout.split(_MARK)


def main() -> None:
    """Run the program and write the page and its pictures."""
    program = PROGRAM.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as name:
        page = page_of(program, run(program, Path(name)))
        PICTURES.mkdir(exist_ok=True)
        for picture in re.findall(r"\(tutorial/([a-z]+\.png)\)", page):
            shutil.copyfile(Path(name) / "grown" / picture, PICTURES / picture)
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()

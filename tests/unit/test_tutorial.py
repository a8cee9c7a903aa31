"""The tutorial's page is its program: same text, same code, in order, with output after the code that printed it."""

from __future__ import annotations

import re

from examples.render import PAGE, PROGRAM, Cell, cells_of, page_of, without_outputs

PAGE_TEXT = PAGE.read_text(encoding="utf-8")
PROGRAM_TEXT = PROGRAM.read_text(encoding="utf-8")
SMALL = '''"""Not a cell."""

# %% [markdown]
# # Title
#
# - a line

# %%
print("one")


# %%
x = 1

# %%
print("two", x)
'''


def test_the_page_has_the_programs_text_and_code() -> None:
    num_code = sum(not cell.is_text for cell in cells_of(PROGRAM_TEXT))
    assert without_outputs(PAGE_TEXT) == page_of(PROGRAM_TEXT, [""] * num_code), "run: python examples/render.py"


def test_every_picture_of_the_page_is_there_and_no_other() -> None:
    named = re.findall(r"!\[[^]]+\]\(([^)]+)\)", PAGE_TEXT)
    assert named
    assert sorted(named) == sorted(f"tutorial/{path.name}" for path in (PAGE.parent / "tutorial").iterdir())


def test_the_page_names_no_place_on_a_machine() -> None:
    assert re.findall(r"(?:/home|/root|/tmp|/work|/Users)/\S*", PAGE_TEXT) == []


def test_a_program_is_cut_into_its_cells() -> None:
    assert cells_of(SMALL) == [
        Cell(True, "# # Title\n#\n# - a line"),
        Cell(False, 'print("one")'),
        Cell(False, "x = 1"),
        Cell(False, 'print("two", x)'),
    ]


def test_output_stands_after_the_code_that_printed_it() -> None:
    page = page_of(SMALL, ["one\n", "", "two 1\n"])
    assert page == (
        '# Title\n\n- a line\n\n```python\nprint("one")\n```\n\n```text\none\n```\n\n'
        '```python\nx = 1\n```\n\n```python\nprint("two", x)\n```\n\n```text\ntwo 1\n```\n'
    )
    assert without_outputs(page) == page_of(SMALL, ["", "", ""])

"""Makes the synchronous clients from the asynchronous ones: ``python -m esper.client.generate``.

There is one implementation (``_async``). A word-by-word translation gives its twin (``_sync``); a test proves it fresh.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

HERE: Final = Path(__file__).parent
NOTICE: Final = "# Generated from ../_async by esper.client.generate; edit that.\n"
_WORDS: Final = (
    (r"\basync def\b", "def"),
    (r"\basync for\b", "for"),
    (r"\basync with\b", "with"),
    (r"\bawait ", ""),
    (r"\bAsyncIterator\b", "Iterator"),
    (r"\bAsync(?=[A-Z])", ""),
    (r"\b_async\b", "_sync"),
    (r"\b__aenter__\b", "__enter__"),
    (r"\b__aexit__\b", "__exit__"),
    (r"import Iterator, Iterator\b", "import Iterator"),
)


def translate(source: str) -> str:
    """Give the synchronous twin of a module's text."""
    text = source
    for pattern, replacement in _WORDS:
        text = re.sub(pattern, replacement, text)
    return NOTICE + text


def twins() -> dict[Path, str]:
    """Give the text that every generated file should have."""
    found = {}
    for source in sorted((HERE / "_async").glob("*.py")):
        found[HERE / "_sync" / source.name] = translate(source.read_text(encoding="utf-8"))
    return found


def main() -> None:
    """Write the generated files."""
    for path, text in twins().items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

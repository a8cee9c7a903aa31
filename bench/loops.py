"""An event loop for measures: calls are plain ones from outside, and nothing runs between them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Self


class Loop:
    """An event loop that runs only while somebody waits for its work; a context manager."""

    def __init__(self) -> None:
        self._runner = asyncio.Runner()

    def wait(self, work: Awaitable[Any]) -> Any:
        """Run work to its end and give its result."""
        return self._runner.get_loop().run_until_complete(work)

    def calling(self, ask: Callable[[], Awaitable[Any]]) -> Callable[[], Any]:
        """Give a plain call that asks once and waits."""
        run = self._runner.get_loop().run_until_complete
        return lambda: run(ask())

    def __enter__(self) -> Self:
        self._runner.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._runner.close()

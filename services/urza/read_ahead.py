"""One step ahead of whoever works on a stream, and a clean end where the work stops early."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, TypeVar

T = TypeVar("T")


async def one_ahead(stream: AsyncIterator[T]) -> AsyncGenerator[T, None]:
    """Give what a stream brings; while the caller works on one, the next is on its way, and no more than that one.

    gRPC has the rest of a large message sent only once somebody reads it. Close the generator where it is left early.
    """
    coming = asyncio.ensure_future(anext(stream))
    try:
        while True:
            try:
                here = await coming
            except StopAsyncIteration:
                return
            coming = asyncio.ensure_future(anext(stream))
            yield here
    finally:
        await given_up(coming)


async def given_up(task: asyncio.Future[Any]) -> None:
    """End work whose result nobody waits for any more; what it raises was for nobody."""
    if not task.done():
        task.cancel()
    await asyncio.wait([task])
    if not task.cancelled():
        task.exception()

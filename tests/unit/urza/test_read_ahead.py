"""`one_ahead`: the next item is on its way while one is worked on, errors keep their place, nothing is left over."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest

from esper.services.urza.read_ahead import one_ahead


class Source:
    """Gives numbers; knows how many were asked for, and whether it was cancelled."""

    def __init__(self, size: int, *, error: Exception | None = None, stays: bool = False) -> None:
        self._size = size
        self._error = error
        self._stays = stays
        self.asked = 0
        self.asked_for_more = asyncio.Event()
        self.cancelled = False

    def __aiter__(self) -> AsyncIterator[int]:
        return self

    async def __anext__(self) -> int:
        self.asked += 1
        if self.asked > 1:
            self.asked_for_more.set()
        if self.asked <= self._size:
            return self.asked
        if self._error is not None:
            raise self._error
        if self._stays:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.cancelled = True
                raise
        raise StopAsyncIteration


async def test_all_comes_in_order_and_the_end_ends_it() -> None:
    assert [item async for item in one_ahead(Source(5))] == [1, 2, 3, 4, 5]
    assert [item async for item in one_ahead(Source(0))] == []


async def test_the_next_is_asked_for_while_one_is_worked_on_and_no_more() -> None:
    source = Source(5)
    async with aclosing(one_ahead(source)) as items:
        assert await anext(items) == 1
        await asyncio.wait_for(source.asked_for_more.wait(), 5)
        for _ in range(10):
            await asyncio.sleep(0)
        assert source.asked == 2


async def test_an_error_comes_after_what_came_before_it() -> None:
    items = one_ahead(Source(2, error=ConnectionError("broke")))
    assert [await anext(items), await anext(items)] == [1, 2]
    with pytest.raises(ConnectionError, match="broke"):
        await anext(items)


async def test_left_early_it_ends_what_is_on_its_way() -> None:
    source = Source(1, stays=True)
    async with aclosing(one_ahead(source)) as items:
        assert await anext(items) == 1
        await asyncio.wait_for(source.asked_for_more.wait(), 5)
    assert source.cancelled

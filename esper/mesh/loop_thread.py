"""A thread with an event loop, for code that serves while another thread works."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
from collections.abc import Coroutine, Generator
from typing import Any, Final, TypeVar

from esper.contracts.errors import DeadlineExceededError, InvalidStateError

T = TypeVar("T")
_UNWIND_S: Final = 5.0
"""Longest wait for cancelled work to end."""
_TIDY_S: Final = 2.0
"""Longest wait for what cancelled work has others end for it, e.g. close a connection; part of ``_UNWIND_S``."""


class LoopThread:
    """Runs coroutines on an event loop of its own; ``close`` ends loop and thread. Not for use from that thread."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._asked: set[asyncio.Task[Any]] = set()
        self._loop.set_task_factory(self._make_task)
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._thread.start()

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop."""
        return self._loop

    def submit(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Start a coroutine on the loop from any thread.

        Raises:
            InvalidStateError: The loop has been closed.
        """
        if self._loop.is_closed() or not self._thread.is_alive():
            work.close()
            raise InvalidStateError("the loop must be running, got a closed one")
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(self, work: Coroutine[Any, Any, T], timeout_s: float) -> T:
        """Run a coroutine and wait for its result.

        When the time runs out, or Ctrl-C comes, it is cancelled and has ended (or had 5 s to) when this returns.

        Raises:
            DeadlineExceededError: It took longer than ``timeout_s`` seconds.
            InvalidStateError: The loop has been closed, before or meanwhile.
        """
        if self._loop.is_closed() or not self._thread.is_alive():
            work.close()
            raise InvalidStateError("the loop must be running, got a closed one")
        begun: list[asyncio.Task[T]] = []
        ended = threading.Event()

        def begin() -> None:
            begun.append(self._loop.create_task(work))
            begun[0].add_done_callback(lambda _: ended.set())

        in_time = False
        try:  # an interrupt may come as soon as the work has begun
            self._loop.call_soon_threadsafe(begin)
            in_time = ended.wait(timeout_s)
        finally:
            if not in_time:
                self._loop.call_soon_threadsafe(lambda: [task.cancel() for task in begun])
                ended.wait(_UNWIND_S)
        if not in_time:
            raise DeadlineExceededError(f"work must end within {timeout_s:g} s")
        if begun[0].cancelled():
            raise InvalidStateError("the loop must be running, got one that was closed meanwhile")
        return begun[0].result()

    def close(self) -> None:
        """Cancel what is left, end the loop and the thread; idempotent.

        What came from other threads is cancelled first, and ends what it began itself, in its own order: a blow from
        outside would leave, say, a connection half closed. What is left 2 s later is cancelled too.
        """
        if self._loop.is_closed():
            return
        if self._thread.is_alive():
            with contextlib.suppress(concurrent.futures.TimeoutError):
                asyncio.run_coroutine_threadsafe(self._end_others(), self._loop).result(_UNWIND_S)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(_UNWIND_S)
        if not self._loop.is_running():
            self._loop.close()

    def _main(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def _make_task(
        self, loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, T] | Generator[Any, None, T], **settings: Any
    ) -> asyncio.Task[T]:
        """Make a task; one that no task of the loop begins was asked for by another thread."""
        task = asyncio.Task(work, loop=loop, **settings)
        if asyncio.current_task(loop) is None:
            # A loop knows its tasks but weakly: one that nobody else holds would be collected, not ended.
            self._asked.add(task)
            task.add_done_callback(self._asked.discard)
        return task

    async def _end_others(self) -> None:
        for task in _others() & set(self._asked):
            task.cancel()
        tidied_s = self._loop.time() + _TIDY_S
        while (left := _others()) and (left_s := tidied_s - self._loop.time()) > 0:
            await asyncio.wait(left, timeout=left_s)  # and once more for those that they began meanwhile
        for task in (left := _others()):
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        await self._loop.shutdown_asyncgens()


def _others() -> set[asyncio.Task[Any]]:
    return asyncio.all_tasks() - {asyncio.current_task()}

"""A loop in a thread: results and errors come back, what is left when time is up has ended, and close ends it all."""

from __future__ import annotations

import asyncio
import gc
import signal
import threading
from collections.abc import AsyncIterator, Iterator

import pytest

from esper.contracts.errors import DeadlineExceededError, InvalidStateError
from esper.mesh import loop_thread
from esper.mesh.loop_thread import LoopThread


@pytest.fixture
def loop() -> Iterator[LoopThread]:
    one = LoopThread("test-loop")
    yield one
    one.close()


async def give(value: int) -> int:
    await asyncio.sleep(0)
    return value


async def fail(error: BaseException) -> None:
    raise error


class Slow:
    """Work that never ends by itself, and notes that it was cleaned up."""

    def __init__(self) -> None:
        self.began, self.cleaned = threading.Event(), threading.Event()

    async def run(self) -> None:
        try:
            self.began.set()
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.02)
            self.cleaned.set()


def test_results_come_back(loop: LoopThread) -> None:
    assert loop.run(give(3), 5.0) == 3
    assert loop.submit(give(4)).result(5.0) == 4


@pytest.mark.parametrize("error", [ValueError("bad"), TimeoutError("its own")])
def test_errors_come_back_as_they_are(loop: LoopThread, error: Exception) -> None:
    with pytest.raises(type(error), match=str(error)) as caught:
        loop.run(fail(error), 5.0)
    assert caught.value is error


def test_work_that_takes_too_long_has_ended_when_the_error_comes(loop: LoopThread) -> None:
    slow = Slow()
    with pytest.raises(DeadlineExceededError, match=r"work must end within 0\.05 s"):
        loop.run(slow.run(), 0.05)
    assert slow.cleaned.is_set()


def test_work_has_ended_when_an_interrupt_comes_through(loop: LoopThread) -> None:
    slow = Slow()
    main = threading.get_ident()

    def interrupt() -> None:
        slow.began.wait(5)
        signal.pthread_kill(main, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        loop.run(slow.run(), 30.0)
    thread.join(5)
    assert slow.cleaned.is_set()


def test_work_that_nobody_holds_goes_on(loop: LoopThread) -> None:
    slow = Slow()
    loop.submit(slow.run())
    assert slow.began.wait(5)
    loop.run(asyncio.sleep(0), 5.0)  # it waits now
    gc.collect()
    loop.close()
    assert slow.cleaned.is_set()


def test_close_ends_work_generators_and_thread() -> None:
    one = LoopThread("test-closing")
    slow, left = Slow(), threading.Event()

    async def numbers() -> AsyncIterator[int]:
        try:
            while True:
                yield 1
        finally:
            left.set()

    stream = numbers()

    async def first() -> None:
        await anext(stream)

    one.run(first(), 5.0)
    one.submit(slow.run())
    assert slow.began.wait(5)
    one.close()
    one.close()
    assert slow.cleaned.is_set()
    assert left.is_set()
    assert "test-closing" not in {thread.name for thread in threading.enumerate()}


def test_close_lets_what_cancelled_work_cleans_up_with_end() -> None:
    """A task that work began is ended by the work alone, once, and one that is shielded is not ended at all."""
    one, began, done = LoopThread("test-closing"), threading.Event(), []

    async def tidy() -> None:
        began.set()
        await asyncio.sleep(0.05)
        done.append("tidied")

    async def helper() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.05)  # which a second blow would cut short
            done.append("helped")

    async def work() -> None:
        helping = asyncio.create_task(helper())
        try:
            await asyncio.shield(asyncio.create_task(tidy()))
        finally:
            helping.cancel()

    one.submit(work())
    assert began.wait(5)
    one.close()
    assert sorted(done) == ["helped", "tidied"]


def test_close_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_thread, "_TIDY_S", 0.05)
    one, slow = LoopThread("test-closing"), Slow()

    async def leave_behind() -> None:
        kept.append(asyncio.create_task(slow.run()))

    kept: list[asyncio.Task[None]] = []
    one.run(leave_behind(), 5.0)
    assert slow.began.wait(5)
    one.close()
    assert slow.cleaned.is_set()
    assert "test-closing" not in {thread.name for thread in threading.enumerate()}


def test_a_waiting_caller_learns_that_the_loop_was_closed() -> None:
    one = LoopThread("test-closing")
    slow, errors = Slow(), []

    def wait() -> None:
        try:
            one.run(slow.run(), 30.0)
        except InvalidStateError as error:
            errors.append(str(error))

    thread = threading.Thread(target=wait)
    thread.start()
    assert slow.began.wait(5)
    one.close()
    thread.join(5)
    assert errors == ["the loop must be running, got one that was closed meanwhile"]


def test_a_closed_loop_takes_no_work() -> None:
    one = LoopThread("test-closed")
    one.close()
    with pytest.raises(InvalidStateError, match="the loop must be running, got a closed one"):
        one.run(give(1), 1.0)
    with pytest.raises(InvalidStateError, match="the loop must be running, got a closed one"):
        one.submit(give(1))

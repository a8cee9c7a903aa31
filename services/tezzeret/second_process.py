"""A second process beside a compile worker, which does over again what the worker did so that the two can be compared.

It is forked from the worker once, not for every kernel: to copy the page tables of a process that has torch in memory,
and to take them down again, costs as much as the work itself. It inherits the worker's sandbox and ends with it.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import struct
import time
import traceback
from collections.abc import Callable
from typing import BinaryIO, Final, NoReturn

from esper.services.tezzeret.sandbox import follow_worker

DIGEST_BYTES: Final = 32
"""Length of every answer."""

_DEADLINE_S: Final = 20.0
_LENGTH: Final = struct.Struct(">Q")


class SecondProcess:
    """Gives what a function makes of a request in a process of its own; one request at a time. Not thread-safe.

    The process that first asks must have no other threads then: they would be missing in the fork. The fork ends with
    the thread that asked when it was started, not with the process alone: ask from the thread that lives longest.
    """

    def __init__(self, work: Callable[[bytes], bytes], *, deadline_s: float = _DEADLINE_S) -> None:
        """Prepare; the process starts with the first request.

        Args:
            work: Makes an answer of ``DIGEST_BYTES`` bytes. As it stands when the process starts, so it stays.
            deadline_s: Wall time that a request, and then its answer, may take, in seconds.
        """
        self._work = work
        self._deadline_s = deadline_s
        self._pid: int | None = None
        self._requests = self._answers = -1
        self._asked = False

    @property
    def pid(self) -> int | None:
        """Process id; ``None`` while there is no process."""
        return self._pid

    def ask(self, request: bytes) -> None:
        """Hand over a request and return while it is worked on; `answer` gives what came of it.

        A process that died since its last answer is replaced, and one whose last answer nobody fetched.
        """
        if self._asked:
            self.end()
        if self._pid is None or not self._send(request):
            self.end()
            self._start()
            self._send(request)
        self._asked = True

    def answer(self) -> bytes:
        """Wait for the answer; fewer bytes than ``DIGEST_BYTES`` when the process failed, died or took too long."""
        deadline = time.monotonic() + self._deadline_s
        data = b""
        while len(data) < DIGEST_BYTES:
            ready, _, _ = select.select([self._answers], [], [], max(0.0, deadline - time.monotonic()))
            piece = os.read(self._answers, DIGEST_BYTES - len(data)) if ready else b""
            if not piece:
                break
            data += piece
        self._asked = False
        if len(data) < DIGEST_BYTES:
            self.end()
        return data

    def end(self) -> None:
        """Kill the process; the next request starts another. Idempotent."""
        self._asked = False
        if self._pid is None:
            return
        os.close(self._requests)
        os.close(self._answers)
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        self._pid = None

    def _send(self, request: bytes) -> bool:
        """Write a request; false when the process is dead, or does not take it in time."""
        deadline = time.monotonic() + self._deadline_s
        view = memoryview(_LENGTH.pack(len(request)) + request)
        while view:
            _, ready, _ = select.select([], [self._requests], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                return False
            try:
                view = view[os.write(self._requests, view) :]
            except BrokenPipeError:
                return False
        return True

    def _start(self) -> None:
        """Fork the process.

        Raises:
            OSError: The system gives no pipe or no process; nothing is left open.
        """
        with contextlib.ExitStack() as on_failure, contextlib.ExitStack() as its_ends:
            its_requests, requests = _pipe(its_ends, on_failure)
            answers, its_answers = _pipe(on_failure, its_ends)
            os.set_blocking(requests, False)
            worker = os.getpid()
            pid = os.fork()
            if pid == 0:
                os.close(requests)
                os.close(answers)
                self._serve_and_exit(worker, its_requests, its_answers)
            on_failure.pop_all()
            self._pid, self._requests, self._answers = pid, requests, answers

    def _serve_and_exit(self, worker: int, requests: int, answers: int) -> NoReturn:
        """Run in the fork until the worker hangs up; end without the worker's exit handlers, which are not for it."""
        code = 1
        try:
            follow_worker(worker)
            with os.fdopen(requests, "rb") as stream:
                while (request := _read_request(stream)) is not None:
                    os.write(answers, self._work(request))
            code = 0
        except BaseException:  # noqa: BLE001 - said where the worker says its last words; nothing of its stack may run
            traceback.print_exc()
        finally:
            os._exit(code)


def _pipe(reader: contextlib.ExitStack, writer: contextlib.ExitStack) -> tuple[int, int]:
    """Open a pipe whose ends are closed with a stack each."""
    ends = os.pipe()
    for stack, end in zip((reader, writer), ends, strict=True):
        stack.callback(os.close, end)
    return ends


def _read_request(stream: BinaryIO) -> bytes | None:
    """Give the next request, ``None`` when there will be none."""
    header = stream.read(_LENGTH.size)
    if len(header) < _LENGTH.size:
        return None
    [size] = _LENGTH.unpack(header)
    request = stream.read(size)
    return request if len(request) == size else None

"""Calls that stay within the process: the servicer's context and the caller's call, with no socket between them.

Both halves have ``grpc.aio``'s shape and rules: messages are serialised and parsed on the way (nothing mutable is
shared), deadlines cancel the servicer, and the servicer runs in a context of its own, so that no context variable leaks
across.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

import grpc

from esper.mesh.calls import END_OF_STREAM

log = logging.getLogger(__name__)

Codec = Callable[[Any], Any]
Metadata = tuple[tuple[str, str | bytes], ...]
HandlerFinder = Callable[[grpc.HandlerCallDetails], Awaitable[Any]]

_PIPE_BOUND = 16  # messages in flight per direction; a slow reader holds the writer back, as flow control would


class Pipe:
    """One way for messages, one writer and one reader, bounded; what was put before `close` can still be read."""

    def __init__(self, bound: int = _PIPE_BOUND) -> None:
        self._items: deque[Any] = deque()
        self._bound = bound
        self._closed = False
        self._readable = asyncio.Event()
        self._writable = asyncio.Event()
        self._writable.set()

    async def put(self, item: Any) -> bool:
        """Append an item once there is room; false when the pipe is closed and the item was not taken."""
        await self._writable.wait()
        if self._closed:
            return False
        self._items.append(item)
        self._readable.set()
        if len(self._items) >= self._bound:
            self._writable.clear()
        return True

    async def get(self) -> Any:
        """Give the next item, or `END_OF_STREAM` after the last."""
        while not self._items:
            if self._closed:
                return END_OF_STREAM
            self._readable.clear()
            await self._readable.wait()
        item = self._items.popleft()
        if not self._closed:
            self._writable.set()
        return item

    def close(self) -> None:
        """End the stream and let whoever waits go on. Idempotent."""
        self._closed = True
        self._readable.set()
        self._writable.set()

    async def __aiter__(self) -> AsyncIterator[Any]:
        while (item := await self.get()) is not END_OF_STREAM:
            yield item


class LocalContext(grpc.aio.ServicerContext):  # type: ignore[type-arg]
    """What a servicer sees of a call within the process."""

    def __init__(
        self, metadata: Metadata, deadline_s: float | None, requests: Pipe, write: Callable[[Any], Any]
    ) -> None:
        """Make the context; ``deadline_s`` is a moment of ``time.monotonic``."""
        self._metadata = metadata
        self._deadline_s = deadline_s
        self._requests = requests
        self._write = write
        self._code: grpc.StatusCode = grpc.StatusCode.OK
        self._details = ""
        self._initial: Metadata = ()
        self._trailing: Metadata = ()
        self._callbacks: list[Callable[[Any], Any]] = []
        self._done = False
        self._cancelled = False

    async def read(self) -> Any:
        """Give the next request, or `END_OF_STREAM`."""
        return await self._requests.get()

    async def write(self, message: Any) -> None:
        """Send one response; returns once there is room for the next."""
        await self._write(message)

    async def send_initial_metadata(self, initial_metadata: Any) -> None:
        """Set the metadata sent first."""
        self._initial = tuple(initial_metadata)

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Any = ()) -> NoReturn:
        """End the call with a status; never returns."""
        if code is grpc.StatusCode.OK:
            raise ValueError(f"code must not be OK to abort a call, got {code}")
        self._code = code
        self._details = details
        self._trailing = tuple(trailing_metadata) or self._trailing
        raise grpc.aio.AbortError("Locally aborted.")

    async def abort_with_status(self, status: Any) -> NoReturn:
        """End the call with a rich status; never returns."""
        await self.abort(status.code, status.details, status.trailing_metadata)

    def set_trailing_metadata(self, trailing_metadata: Any) -> None:
        """Set the metadata sent last."""
        self._trailing = tuple(trailing_metadata)

    def invocation_metadata(self) -> Any:
        """Give the caller's metadata."""
        return self._metadata

    def set_code(self, code: grpc.StatusCode) -> None:
        """Set the status code of the end."""
        self._code = code

    def set_details(self, details: str) -> None:
        """Set the text of the end."""
        self._details = details

    def set_compression(self, compression: grpc.Compression) -> None:
        """Accept the wish; nothing is compressed within a process."""

    def disable_next_message_compression(self) -> None:
        """Accept the wish; nothing is compressed within a process."""

    def peer(self) -> str:
        """Name the caller."""
        return "inproc:"

    def peer_identities(self) -> None:
        """Give nothing: callers within the process are not authenticated."""

    def peer_identity_key(self) -> None:
        """Give nothing: callers within the process are not authenticated."""

    def auth_context(self) -> dict[str, Any]:
        """Give an empty context: callers within the process are not authenticated."""
        return {}

    def time_remaining(self) -> float | None:  # type: ignore[override]
        """Give the seconds left, never below 0; ``None`` without a deadline."""
        return None if self._deadline_s is None else max(0.0, self._deadline_s - time.monotonic())

    def initial_metadata(self) -> Metadata:
        """Give the metadata sent first."""
        return self._initial

    def trailing_metadata(self) -> Any:
        """Give the metadata sent last."""
        return self._trailing

    def code(self) -> grpc.StatusCode:
        """Give the status code set so far."""
        return self._code

    def details(self) -> str:
        """Give the text set so far."""
        return self._details

    def add_done_callback(self, callback: Callable[[Any], Any]) -> None:
        """Have ``callback`` called with this context once the call is over."""
        self._callbacks.append(callback)

    def cancelled(self) -> bool:
        """Tell whether the caller left or the deadline passed."""
        return self._cancelled

    def done(self) -> bool:
        """Tell whether the call is over."""
        return self._done

    def finish(self, *, cancelled: bool) -> None:
        """Mark the end and tell those who asked."""
        self._done = True
        self._cancelled = cancelled
        for callback in self._callbacks:
            callback(self)


@dataclass(frozen=True, slots=True)
class LocalMethod:
    """One method as a stub sees it, with the way to its handler."""

    path: str
    find: HandlerFinder
    request_serializer: Codec | None
    response_deserializer: Codec | None


class LocalCall:
    """The caller's half of a call within the process; has what ``grpc.aio``'s calls of all four kinds have."""

    def __init__(
        self, method: LocalMethod, request: Any, streams_requests: bool, timeout: float | None, metadata: Any
    ) -> None:
        self._method = method
        self._streams_requests = streams_requests
        self._requests = Pipe()
        self._responses = Pipe()
        self._encode_response: Codec | None = None
        self._timeout_s = timeout
        deadline_s = None if timeout is None else time.monotonic() + timeout
        self._context = LocalContext(tuple(metadata or ()), deadline_s, self._requests, self._send)
        self._over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._left = False
        self._callbacks: list[Callable[[Any], Any]] = []
        self._single = None if streams_requests else self._encode(request)
        # A fresh context, as across a wire: the servicer must not see the caller's context variables.
        self._task = asyncio.create_task(self._serve(), context=contextvars.Context())
        # A task cancelled before its first step runs nothing of its body: the end must not depend on it.
        self._task.add_done_callback(lambda _: self._finish(cancelled=True))
        self._feeder: asyncio.Task[None] | None = None
        if streams_requests and request is not None:
            self._feeder = asyncio.create_task(self._feed(request))

    # ---------------------------------------------------------------- caller's side

    def __await__(self) -> Generator[Any, None, Any]:
        return self._unary().__await__()

    async def __aiter__(self) -> AsyncIterator[Any]:
        while (message := await self.read()) is not END_OF_STREAM:
            yield message

    async def read(self) -> Any:
        """Give the next response, or `END_OF_STREAM`; raises when the call ended with an error."""
        try:
            raw = await self._responses.get()
            if raw is END_OF_STREAM:
                await self._end()
                return END_OF_STREAM
        except asyncio.CancelledError:
            self.cancel()
            raise
        decode = self._method.response_deserializer
        return raw if decode is None else decode(raw)

    async def write(self, request: Any) -> None:
        """Send one request."""
        if not await self._requests.put(self._encode(request)):
            if self.done():
                await self._end()
            raise asyncio.InvalidStateError("no request can follow: the call is over or its writing was ended")

    async def done_writing(self) -> None:
        """Say that no more requests follow."""
        self._requests.close()

    def cancel(self) -> bool:
        """Cancel the call; false when it was over already."""
        if self.done():
            return False
        self._left = True
        self._task.cancel()
        return True

    def cancelled(self) -> bool:
        """Tell whether the call was cancelled."""
        return self._left or self._context.cancelled()

    def done(self) -> bool:
        """Tell whether the call is over."""
        return self._over.done()

    def add_done_callback(self, callback: Callable[[Any], Any]) -> None:
        """Have ``callback`` called with this call once it is over."""
        if self.done():
            callback(self)
        else:
            self._callbacks.append(callback)

    def time_remaining(self) -> float | None:
        """Give the seconds left, ``None`` without a deadline."""
        return self._context.time_remaining()

    async def initial_metadata(self) -> Any:
        """Give the metadata sent first; known at the end."""
        await asyncio.shield(self._over)
        return grpc.aio.Metadata(*self._context.initial_metadata())

    async def trailing_metadata(self) -> Any:
        """Wait for the end and give the metadata sent last."""
        await asyncio.shield(self._over)
        return grpc.aio.Metadata(*self._context.trailing_metadata())

    async def code(self) -> grpc.StatusCode:
        """Wait for the end and give its status code."""
        await asyncio.shield(self._over)
        return self._context.code()

    async def details(self) -> str:
        """Wait for the end and give its text."""
        await asyncio.shield(self._over)
        return self._context.details()

    async def wait_for_connection(self) -> None:
        """Return at once: there is nothing to connect."""

    async def _unary(self) -> Any:
        response = await self.read()
        if response is END_OF_STREAM:
            raise self._error(grpc.StatusCode.INTERNAL, "the servicer gave no response")
        try:
            await self._end()
        except asyncio.CancelledError:
            self.cancel()
            raise
        return response

    async def _end(self) -> None:
        """Wait for the end; raise unless it is OK."""
        await asyncio.shield(self._over)
        if self._left:
            raise asyncio.CancelledError
        if self._context.code() is not grpc.StatusCode.OK:
            raise self._error(self._context.code(), self._context.details())

    def _error(self, code: grpc.StatusCode, details: str) -> grpc.aio.AioRpcError:
        initial = grpc.aio.Metadata(*self._context.initial_metadata())
        trailing = grpc.aio.Metadata(*self._context.trailing_metadata())
        return grpc.aio.AioRpcError(code, initial, trailing, details=details, debug_error_string=None)

    def _encode(self, request: Any) -> Any:
        encode = self._method.request_serializer
        return request if encode is None else encode(request)

    async def _feed(self, requests: AsyncIterable[Any] | Iterable[Any]) -> None:
        try:
            if isinstance(requests, AsyncIterable):
                async for request in requests:
                    if not await self._requests.put(self._encode(request)):
                        return
            else:
                for request in requests:
                    if not await self._requests.put(self._encode(request)):
                        return
            self._requests.close()
        except Exception as error:  # noqa: BLE001 -- the caller's own iterator failed: its call ends, as over a wire
            self._context.set_details(f"the stream of requests failed: {type(error).__name__}")
            self.cancel()

    # --------------------------------------------------------------- servicer's side

    async def _serve(self) -> None:
        cancelled = False
        limit = asyncio.timeout(self._timeout_s)
        try:
            async with limit:
                await self._answer()
        except TimeoutError:
            cancelled = limit.expired()
            self._context.set_code(grpc.StatusCode.DEADLINE_EXCEEDED if cancelled else grpc.StatusCode.UNKNOWN)
            self._context.set_details("Deadline Exceeded" if cancelled else "the servicer failed")
        except asyncio.CancelledError:
            cancelled = True
            self._context.set_code(grpc.StatusCode.CANCELLED)
            self._context.set_details(self._context.details() or "Locally cancelled by application!")
        except grpc.aio.AbortError:
            pass  # the context holds the status
        except Exception:
            # The envelope let nothing of the servicer through: what is left are messages that do not fit their type.
            log.exception("local_call_failed", extra={"path": self._method.path})
            self._context.set_code(grpc.StatusCode.INTERNAL)
            self._context.set_details("a message does not fit its type")
        finally:
            self._finish(cancelled)

    async def _answer(self) -> None:
        details = _CallDetails(self._method.path, self._context.invocation_metadata())
        handler = await self._method.find(details)
        if handler is None:
            await self._context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
        self._encode_response = handler.response_serializer
        decode = handler.request_deserializer or _same
        request = _decoded(self._requests, decode) if self._streams_requests else decode(self._single)
        behaviour = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
        response = await behaviour(request, self._context)
        if not handler.response_streaming and self._context.code() is grpc.StatusCode.OK:
            await self._send(response)

    async def _send(self, message: Any) -> None:
        encode = self._encode_response
        await self._responses.put(message if encode is None else encode(message))

    def _finish(self, cancelled: bool) -> None:
        if self.done():
            return
        if cancelled and self._context.code() is grpc.StatusCode.OK:
            self._context.set_code(grpc.StatusCode.CANCELLED)
        if self._feeder is not None and self._feeder is not asyncio.current_task():
            self._feeder.cancel()
        self._context.finish(cancelled=cancelled)
        self._over.set_result(None)
        self._requests.close()
        self._responses.close()
        for callback in self._callbacks:
            callback(self)


@dataclass(frozen=True, slots=True)
class _CallDetails(grpc.HandlerCallDetails):
    method: str
    invocation_metadata: Any


def _same(message: Any) -> Any:
    return message


async def _decoded(requests: Pipe, decode: Codec) -> AsyncIterator[Any]:
    async for raw in requests:
        yield decode(raw)

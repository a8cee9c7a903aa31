"""How a client's calls reach the services: asynchronous, and the same from a plain thread."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Any, Final, Protocol

from esper.contracts.errors import InvalidStateError
from esper.mesh.channel import open_channel
from esper.mesh.loop_thread import LoopThread
from esper.mesh.settings import MeshSettings, resolve
from esper.mesh.stubs import STUBS

DEFAULT_TIMEOUT_S: Final = 10.0
"""Time a call may take when nobody says otherwise."""
STREAM_TIMEOUT_S: Final = 24 * 3600.0
"""Time a stream may last."""
_MARGIN_S: Final = 5.0


class AsyncTransport(Protocol):
    """Calls on an event loop."""

    async def call(self, service: str, method: str, request: Any, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> Any:
        """Call a unary method."""

    async def send(self, service: str, method: str, requests: Iterable[Any]) -> Any:
        """Call a method that takes a stream and gives one answer."""

    def stream(self, service: str, method: str, request: Any) -> AsyncIterator[Any]:
        """Call a method that gives a stream."""

    def pages(self, service: str, method: str, request: Any) -> AsyncIterator[Any]:
        """Call a listing until its last page."""

    async def close(self) -> None:
        """Let go of connections."""


class AsyncStubTransport:
    """Calls through generated stubs; subclasses say where a stub comes from."""

    def stub(self, service: str) -> Any:
        """Give the stub of a service."""
        raise LookupError(service)

    async def call(self, service: str, method: str, request: Any, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> Any:
        """Call a unary method.

        Raises:
            EsperError: What the service answers; ``UnavailableError`` when it cannot be reached.
        """
        return await getattr(self.stub(service), method)(request, timeout=timeout_s)

    async def send(self, service: str, method: str, requests: Iterable[Any]) -> Any:
        """Call a method that takes a stream and gives one answer."""
        return await getattr(self.stub(service), method)(_slowly(requests), timeout=60.0)

    async def stream(self, service: str, method: str, request: Any) -> AsyncIterator[Any]:
        """Call a method that gives a stream."""
        call = getattr(self.stub(service), method)(request, timeout=STREAM_TIMEOUT_S)
        try:
            async for response in call:
                yield response
        finally:
            call.cancel()

    async def pages(self, service: str, method: str, request: Any) -> AsyncIterator[Any]:
        """Call a listing until its last page."""
        while True:
            response = await self.call(service, method, request)
            yield response
            if not response.next_page_token:
                return
            request.page_token = response.next_page_token

    async def close(self) -> None:
        """Let go of connections."""


class AsyncChannelTransport(AsyncStubTransport):
    """Calls over gRPC channels, opened at the first call to each service."""

    def __init__(self, settings: MeshSettings | None = None) -> None:
        self._settings = settings or resolve().settings
        self._channels: dict[str, Any] = {}

    def stub(self, service: str) -> Any:
        """Give the stub of a service."""
        if service not in self._channels:
            self._channels[service] = open_channel(self._settings.address_of(service), self._settings.channel_config())
        return STUBS[service](self._channels[service])

    async def close(self) -> None:
        """Close the channels; idempotent."""
        for channel in self._channels.values():
            await channel.close()
        self._channels.clear()


class Transport:
    """The calls of an asynchronous transport, made from a plain thread on a loop of its own."""

    def __init__(self, inner: AsyncTransport, loop: LoopThread | None = None) -> None:
        """Make calls of ``inner`` on ``loop``, or on a new one that is closed with the transport."""
        self._inner = inner
        self._owned = LoopThread("esper-client") if loop is None else None
        self._loop = loop or self._owned
        self._closed = False

    def call(self, service: str, method: str, request: Any, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> Any:
        """Call a unary method and wait."""
        return self._run(self._inner.call(service, method, request, timeout_s=timeout_s), timeout_s + _MARGIN_S)

    def send(self, service: str, method: str, requests: Iterable[Any]) -> Any:
        """Call a method that takes a stream and wait for its answer."""
        return self._run(self._inner.send(service, method, requests), 60.0 + _MARGIN_S)

    def stream(self, service: str, method: str, request: Any) -> Iterator[Any]:
        """Give a stream's answers one by one; leaving the iteration cancels the call."""
        return self._iterate(self._inner.stream(service, method, request), STREAM_TIMEOUT_S)

    def pages(self, service: str, method: str, request: Any) -> Iterator[Any]:
        """Give a listing's pages one by one."""
        return self._iterate(self._inner.pages(service, method, request), DEFAULT_TIMEOUT_S + _MARGIN_S)

    def close(self) -> None:
        """Let go of connections; idempotent."""
        if self._closed:
            return
        self._closed = True
        self._run(self._inner.close(), _MARGIN_S)
        if self._owned is not None:
            self._owned.close()

    def _iterate(self, source: AsyncIterator[Any], timeout_s: float) -> Iterator[Any]:
        async def following() -> tuple[bool, Any]:
            try:
                return True, await anext(source)
            except StopAsyncIteration:
                return False, None

        async def leave() -> None:
            closing = getattr(source, "aclose", None)
            if closing is not None:
                await closing()

        try:
            while True:
                there, item = self._run(following(), timeout_s)
                if not there:
                    return
                yield item
        finally:
            with contextlib.suppress(InvalidStateError):  # the loop has been closed, and with it the call
                self._run(leave(), _MARGIN_S)

    def _run(self, work: Any, timeout_s: float) -> Any:
        assert self._loop is not None
        return self._loop.run(work, timeout_s)


class ChannelTransport(Transport):
    """Calls over gRPC channels from a plain thread."""

    def __init__(self, settings: MeshSettings | None = None) -> None:
        super().__init__(AsyncChannelTransport(settings))


async def _slowly(requests: Iterable[Any]) -> AsyncIterator[Any]:
    for request in requests:
        yield request

"""One unary call to one service, for commands."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from esper.mesh import ChannelConfig, open_channel, read_state
from esper.mesh.settings import PREFIX, MeshSettings, resolve
from esper.services.compose import STUBS


def current_settings() -> MeshSettings:
    """Give the settings of the mesh to talk to: of the one that runs in the state directory, else as configured."""
    configured = resolve().settings
    state = read_state(configured.state_dir)
    if not state.running:
        return configured
    recorded = {key.removeprefix(PREFIX).lower(): value for key, value in state.extra.items() if key.startswith(PREFIX)}
    return MeshSettings(**recorded)


def call(service: str, method: str, request: Any, timeout_s: float) -> Any:
    """Call a unary method and wait.

    Raises:
        EsperError: What the service answers.
    """

    async def go() -> Any:
        channel = open_channel(current_settings().address_of(service), ChannelConfig())
        try:
            return await getattr(STUBS[service](channel), method)(request, timeout=timeout_s)
        finally:
            await channel.close()

    return asyncio.run(go())


def watch(service: str, method: str, request: Any, show: Callable[[Any], None]) -> None:
    """Call a streaming method and show every answer, until it ends or Ctrl-C.

    Raises:
        EsperError: What the service answers.
    """

    async def go() -> None:
        channel = open_channel(current_settings().address_of(service), ChannelConfig())
        try:
            stream: AsyncIterator[Any] = getattr(STUBS[service](channel), method)(request, timeout=86_400.0)
            async for item in stream:
                show(item)
        finally:
            await channel.close()

    asyncio.run(go())


def pages(service: str, method: str, make: Callable[[str], Any], timeout_s: float) -> Iterator[Any]:
    """Give every page of a listing; ``make`` builds the request from a page token."""
    token = ""
    while True:
        response = call(service, method, make(token), timeout_s)
        yield response
        token = response.next_page_token
        if not token:
            return

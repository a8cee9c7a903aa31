"""Calls to the mesh at hand, for commands."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from esper.client import EsperClient
from esper.client.transport import ChannelTransport
from esper.mesh.process_state import read_state
from esper.mesh.settings import PREFIX, MeshSettings, resolve


def current_settings() -> MeshSettings:
    """Give the settings of the mesh to talk to: of the one that runs in the state directory, else as configured."""
    return running_settings(resolve().settings)


def running_settings(configured: MeshSettings) -> MeshSettings:
    """Give the settings of the mesh that runs in a state directory; as configured where none does."""
    state = read_state(configured.state_dir)
    if not state.running:
        return configured
    recorded: dict[str, Any] = {
        key.removeprefix(PREFIX).lower(): value for key, value in state.extra.items() if key.startswith(PREFIX)
    }
    return MeshSettings(**recorded)


def client() -> EsperClient:
    """Give a typed client of the mesh; to be closed."""
    return EsperClient(transport=ChannelTransport(current_settings()))


def call(service: str, method: str, request: Any, timeout_s: float) -> Any:
    """Call a unary method and wait.

    Raises:
        EsperError: What the service answers.
    """
    with contextlib.closing(ChannelTransport(current_settings())) as transport:
        return transport.call(service, method, request, timeout_s=timeout_s)


def watch(service: str, method: str, request: Any, show: Callable[[Any], None]) -> None:
    """Call a streaming method and show every answer, until it ends or Ctrl-C.

    Raises:
        EsperError: What the service answers.
    """
    with contextlib.closing(ChannelTransport(current_settings())) as transport:
        for item in transport.stream(service, method, request):
            show(item)


def pages(service: str, method: str, request: Any) -> Iterator[Any]:
    """Give every page of a listing.

    Raises:
        EsperError: What the service answers.
    """
    with contextlib.closing(ChannelTransport(current_settings())) as transport:
        yield from transport.pages(service, method, request)

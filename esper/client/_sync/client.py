# Generated from ../_async by esper.client.generate; edit that.
"""One client with all six services."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from esper.client._sync.karn import KarnClient
from esper.client._sync.nissa import NissaClient
from esper.client._sync.tamiyo import TamiyoClient
from esper.client._sync.tezzeret import TezzeretClient
from esper.client._sync.tolaria import TolariaClient
from esper.client._sync.urza import UrzaClient
from esper.client.transport import ChannelTransport, Transport
from esper.mesh.settings import MeshSettings


class EsperClient:
    """Typed calls to a mesh; a context manager. Every method raises what the service answers as an ``EsperError``."""

    def __init__(self, settings: MeshSettings | None = None, *, transport: Transport | None = None) -> None:
        """Make a client; nothing is connected before the first call.

        Args:
            settings: Where the services are; by default what file and environment say.
            transport: How calls are made, in the place of gRPC channels to ``settings``.
        """
        self._transport = transport or ChannelTransport(settings)
        self.tolaria = TolariaClient(self._transport)
        self.tamiyo = TamiyoClient(self._transport)
        self.karn = KarnClient(self._transport)
        self.urza = UrzaClient(self._transport)
        self.tezzeret = TezzeretClient(self._transport)
        self.nissa = NissaClient(self._transport)

    def close(self) -> None:
        """Close the channels; idempotent."""
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

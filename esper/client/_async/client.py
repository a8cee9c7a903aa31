"""One client with all six services."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from esper.client._async.karn import AsyncKarnClient
from esper.client._async.nissa import AsyncNissaClient
from esper.client._async.tamiyo import AsyncTamiyoClient
from esper.client._async.tezzeret import AsyncTezzeretClient
from esper.client._async.tolaria import AsyncTolariaClient
from esper.client._async.urza import AsyncUrzaClient
from esper.client.transport import AsyncChannelTransport, AsyncTransport
from esper.mesh.settings import MeshSettings


class AsyncEsperClient:
    """Typed calls to a mesh; a context manager. Every method raises what the service answers as an ``EsperError``."""

    def __init__(self, settings: MeshSettings | None = None, *, transport: AsyncTransport | None = None) -> None:
        """Make a client; nothing is connected before the first call.

        Args:
            settings: Where the services are; by default what file and environment say.
            transport: How calls are made, in the place of gRPC channels to ``settings``.
        """
        self._transport = transport or AsyncChannelTransport(settings)
        self.tolaria = AsyncTolariaClient(self._transport)
        self.tamiyo = AsyncTamiyoClient(self._transport)
        self.karn = AsyncKarnClient(self._transport)
        self.urza = AsyncUrzaClient(self._transport)
        self.tezzeret = AsyncTezzeretClient(self._transport)
        self.nissa = AsyncNissaClient(self._transport)

    async def close(self) -> None:
        """Close the channels; idempotent."""
        await self._transport.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

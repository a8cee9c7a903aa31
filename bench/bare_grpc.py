"""The least that gRPC costs: `grpc.aio` with no interceptor and no deadline, answering what it was told to hold.

Unary calls take and give the library's own messages, so that what is serialised and parsed is the same on both sides of
a comparison. A stream gives the chunks that the last upload brought.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from typing import Any, Final

import grpc

from esper.mesh import LOOPBACK
from esper.v1 import urza_service_pb2 as pb

MESSAGES: Final[Mapping[str, tuple[Any, Any]]] = {
    "CreateBlueprint": (pb.CreateBlueprintRequest, pb.CreateBlueprintResponse),
    "GetBlueprint": (pb.GetBlueprintRequest, pb.GetBlueprintResponse),
    "SearchBlueprints": (pb.SearchBlueprintsRequest, pb.SearchBlueprintsResponse),
    "GetLineage": (pb.GetLineageRequest, pb.GetLineageResponse),
}
"""Unary calls by name: request and response."""

_SERVICE: Final = "bench.Bare"
_MAX_BYTES: Final = 16 * 1024 * 1024
_OPTIONS: Final = (("grpc.max_receive_message_length", _MAX_BYTES), ("grpc.max_send_message_length", _MAX_BYTES))


class BareServer:
    """Answers with what it holds. Belongs to one event loop."""

    def __init__(self) -> None:
        self._held: dict[str, Any] = {}
        self._chunks: list[Any] = []
        self._server = grpc.aio.server(options=_OPTIONS)

    async def start(self) -> str:
        """Listen on loopback; give the address."""
        handlers = {name: self._unary(name) for name in MESSAGES}
        handlers["Hold"] = grpc.unary_unary_rpc_method_handler(self._hold)
        handlers["Upload"] = grpc.stream_unary_rpc_method_handler(
            self._upload,
            request_deserializer=pb.UploadKernelRequest.FromString,
            response_serializer=pb.UploadKernelResponse.SerializeToString,
        )
        handlers["Download"] = grpc.unary_stream_rpc_method_handler(
            self._download,
            request_deserializer=pb.DownloadKernelRequest.FromString,
            response_serializer=pb.DownloadKernelResponse.SerializeToString,
        )
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, handlers),))
        port = self._server.add_insecure_port(f"{LOOPBACK}:0")
        await self._server.start()
        return f"{LOOPBACK}:{port}"

    async def stop(self) -> None:
        """Close every connection."""
        await self._server.stop(0)

    def _unary(self, name: str) -> Any:
        request, response = MESSAGES[name]

        async def answer(_request: Any, _context: Any) -> Any:
            return self._held[name]

        return grpc.unary_unary_rpc_method_handler(
            answer, request_deserializer=request.FromString, response_serializer=response.SerializeToString
        )

    async def _hold(self, request: bytes, _context: Any) -> bytes:
        name, _, data = request.partition(b"\0")
        self._held[name.decode()] = MESSAGES[name.decode()][1].FromString(data)
        return b""

    async def _upload(self, requests: AsyncIterator[Any], _context: Any) -> Any:
        self._chunks = [chunk async for chunk in requests]
        return pb.UploadKernelResponse(artifact_id="k", created=True)

    async def _download(self, _request: Any, _context: Any) -> AsyncIterator[Any]:
        for chunk in self._chunks:
            yield pb.DownloadKernelResponse(
                total_bytes=chunk.total_bytes,
                sha256=chunk.sha256,
                offset=chunk.offset,
                data=chunk.data,
                crc32=chunk.crc32,
            )


class BareClient:
    """Calls a `BareServer`. Belongs to one event loop; it is closed by its owner."""

    def __init__(self, address: str) -> None:
        self._channel: Any = grpc.aio.insecure_channel(address, options=_OPTIONS)
        self._calls = {
            name: self._channel.unary_unary(
                f"/{_SERVICE}/{name}",
                request_serializer=request.SerializeToString,
                response_deserializer=response.FromString,
            )
            for name, (request, response) in MESSAGES.items()
        }
        self._upload = self._channel.stream_unary(
            f"/{_SERVICE}/Upload",
            request_serializer=pb.UploadKernelRequest.SerializeToString,
            response_deserializer=pb.UploadKernelResponse.FromString,
        )
        self._download = self._channel.unary_stream(
            f"/{_SERVICE}/Download",
            request_serializer=pb.DownloadKernelRequest.SerializeToString,
            response_deserializer=pb.DownloadKernelResponse.FromString,
        )

    async def hold(self, name: str, response: Any) -> None:
        """Have the server answer calls of one name with a message."""
        call = self._channel.unary_unary(f"/{_SERVICE}/Hold")
        await call(name.encode() + b"\0" + response.SerializeToString())

    async def call(self, name: str, request: Any) -> Any:
        """Call, and give what the server holds for it."""
        return await self._calls[name](request)

    async def upload(self, chunks: Sequence[Any]) -> None:
        """Send chunks, ``UploadKernelRequest`` each; the server keeps them for `download`."""
        await self._upload(_given(chunks))

    async def download(self) -> bytes:
        """Give the bytes of the chunks that were uploaded last."""
        request = pb.DownloadKernelRequest(artifact_id="k")
        return b"".join([chunk.data async for chunk in self._download(request)])

    async def close(self) -> None:
        """Let go of the connection."""
        await self._channel.close()


async def _given(chunks: Iterable[Any]) -> AsyncIterator[Any]:
    for chunk in chunks:
        yield chunk

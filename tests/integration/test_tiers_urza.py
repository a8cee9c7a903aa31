"""The third tier over gRPC: broken transfers go on, damage is found, and a library that is away is UNAVAILABLE."""

from __future__ import annotations

import hashlib
import os
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from esper.contracts.chunks import Assembler, split
from esper.contracts.errors import CapacityExceededError, CorruptDataError, NotFoundError, UnavailableError
from esper.execution.tier_urza import UrzaTier, upload_kernel
from esper.mesh import ChannelConfig, MeshServer, open_channel
from esper.v1 import urza_service_pb2 as pb
from esper.v1.urza_service_pb2_grpc import (
    UrzaServiceServicer,
    UrzaServiceStub,
    add_UrzaServiceServicer_to_server,
)

ID = "k" + "ab" * 16
DATA = os.urandom(700_000)


class Library(UrzaServiceServicer):
    """Kernels in memory behind the real wire; breaks off, damages or refuses as told."""

    def __init__(self) -> None:
        self.kernels = {ID: DATA}
        self.offsets: list[int] = []
        self.break_after_chunks: list[int] = []
        self.damage: dict[str, Any] = {}
        self.refusal: Exception | None = None

    async def DownloadKernel(self, request: pb.DownloadKernelRequest, context: Any) -> AsyncIterator[Any]:
        self.offsets.append(request.offset)
        if self.refusal is not None:
            raise self.refusal
        if request.artifact_id not in self.kernels:
            raise NotFoundError(f"no kernel {request.artifact_id}")
        data = self.kernels[request.artifact_id]
        limit = self.break_after_chunks.pop(0) if self.break_after_chunks else len(data)
        for number, chunk in enumerate(split(data, offset=request.offset)):
            if number >= limit:
                raise UnavailableError("the transfer broke")
            fields = {name: getattr(chunk, name) for name in ("total_bytes", "sha256", "offset", "data", "crc32")}
            yield pb.DownloadKernelResponse(**(fields | self.damage))

    async def UploadKernel(self, request_iterator: Any, context: Any) -> pb.UploadKernelResponse:
        assembler = Assembler(max_bytes=1 << 30)
        async for chunk in request_iterator:
            assembler.add(chunk)
        data = assembler.finish()
        artifact_id = "k" + hashlib.sha256(data).hexdigest()[:32]
        created = artifact_id not in self.kernels
        self.kernels[artifact_id] = data
        return pb.UploadKernelResponse(artifact_id=artifact_id, created=created)


@pytest.fixture
def library() -> Library:
    return Library()  # type: ignore[abstract]  # the calls left out answer UNIMPLEMENTED


@pytest.fixture
async def address(library: Library) -> AsyncIterator[str]:
    server = MeshServer()
    server.add_servicer(add_UrzaServiceServicer_to_server, library)
    await server.start()
    yield server.address
    await server.drain()


@pytest.fixture(params=["mesh", "plain"])
async def stub(request: pytest.FixtureRequest, address: str) -> AsyncIterator[UrzaServiceStub]:
    """Both channels that the constructor may be given."""
    config = ChannelConfig(retry_attempts=1)
    made = open_channel(address, config) if request.param == "mesh" else grpc.aio.insecure_channel(address)
    async with made as channel:
        yield UrzaServiceStub(channel)


async def test_a_kernel_comes_whole(stub: UrzaServiceStub, library: Library) -> None:
    assert await UrzaTier(stub).read(ID) == DATA
    assert library.offsets == [0]


async def test_a_broken_transfer_goes_on_where_it_broke(stub: UrzaServiceStub, library: Library) -> None:
    library.break_after_chunks = [1, 0, 1]
    assert await UrzaTier(stub).read(ID) == DATA
    assert library.offsets == [0, 262_144, 262_144, 524_288]


async def test_a_transfer_that_brings_nothing_is_given_up(stub: UrzaServiceStub, library: Library) -> None:
    library.break_after_chunks = [1, 0, 0, 0, 0, 0]
    with pytest.raises(UnavailableError, match="the transfer broke"):
        await UrzaTier(stub, attempts=3).read(ID)
    assert library.offsets == [0, *[262_144] * 3]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"crc32": 1}, "crc32 must match"),
        ({"sha256": b"\0" * 32}, "sha256 must match"),
        ({"sha256": b"short"}, "arrived damaged: sha256 must be 32 bytes"),
        ({"total_bytes": 1 << 40}, "arrived damaged: total_bytes must be at most"),
        ({"offset": 7}, "offset must be 0"),
        ({"total_bytes": 700_001}, "must hold 700001 bytes"),
    ],
)
async def test_damage_is_found(stub: UrzaServiceStub, library: Library, damage: dict[str, Any], message: str) -> None:
    library.damage = damage
    with pytest.raises(CorruptDataError, match=message):
        await UrzaTier(stub).read(ID)


async def test_what_the_library_says_arrives_as_it_said(stub: UrzaServiceStub, library: Library) -> None:
    with pytest.raises(NotFoundError, match="no kernel k0000"):
        await UrzaTier(stub).read("k" + "0" * 32)
    library.refusal = CapacityExceededError("too much at once")
    with pytest.raises(CapacityExceededError, match="too much at once"):
        await UrzaTier(stub).read(ID)


async def test_an_upload_comes_back_the_same(stub: UrzaServiceStub) -> None:
    data = os.urandom(2_500_000)
    artifact_id, created = await upload_kernel(stub, data)
    assert created
    assert await upload_kernel(stub, data) == (artifact_id, False)
    assert await UrzaTier(stub).read(artifact_id) == data


async def test_a_library_that_is_away_is_unavailable() -> None:
    async with grpc.aio.insecure_channel("127.0.0.1:1") as channel:
        stub = UrzaServiceStub(channel)
        with pytest.raises(UnavailableError, match="DownloadKernel"):
            await UrzaTier(stub, attempts=1).read(ID)
        with pytest.raises(UnavailableError, match="UploadKernel"):
            await upload_kernel(stub, DATA)

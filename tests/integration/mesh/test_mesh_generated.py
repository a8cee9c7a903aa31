"""The generated code of all six services works with both transports."""

from __future__ import annotations

import importlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
from google.protobuf.message_factory import GetMessageClass

from esper.contracts.errors import InvalidStateError
from esper.mesh import InProcessChannel, MeshChannel, MeshServer, open_channel

SERVICES = ("tolaria", "tamiyo", "karn", "urza", "tezzeret", "nissa")


def generated(name: str) -> tuple[Any, Any]:
    pb2 = importlib.import_module(f"esper.v1.{name}_service_pb2")
    return pb2, importlib.import_module(f"esper.v1.{name}_service_pb2_grpc")


def registrar_and_base(name: str) -> tuple[Any, Any]:
    title = f"{name.title()}Service"
    _, pb2_grpc = generated(name)
    return getattr(pb2_grpc, f"add_{title}Servicer_to_server"), getattr(pb2_grpc, f"{title}Servicer")


@pytest.fixture(params=["socket", "in_process"])
async def channel(request: pytest.FixtureRequest) -> AsyncIterator[MeshChannel]:
    """A channel to the bare generated base class of every service, none of which does anything."""
    if request.param == "in_process":
        local = InProcessChannel()
        for name in SERVICES:
            registrar, base = registrar_and_base(name)
            assert local.add_servicer(registrar, base()) == (f"esper.v1.{name.title()}Service",)
        yield local
        return
    server = MeshServer()
    for name in SERVICES:
        registrar, base = registrar_and_base(name)
        server.add_servicer(registrar, base())
    async with server, open_channel(server.address) as opened:
        yield opened


@pytest.mark.parametrize("name", SERVICES)
async def test_every_method_reaches_its_servicer(channel: MeshChannel, name: str) -> None:
    pb2, pb2_grpc = generated(name)
    service = pb2.DESCRIPTOR.services_by_name[f"{name.title()}Service"]
    stub = getattr(pb2_grpc, f"{name.title()}ServiceStub")(channel)
    for method in service.methods:
        request = GetMessageClass(method.input_type)()
        call = getattr(stub, method.name)(iter([request]) if method.client_streaming else request, timeout=5)
        with pytest.raises(InvalidStateError, match=f"{method.name} is not offered by this server"):
            await (call.read() if method.server_streaming else call)

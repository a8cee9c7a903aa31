"""The synchronous clients are what their asynchronous originals say, and cover every method of every service."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest

from esper.client import AsyncEsperClient, EsperClient
from esper.client.generate import translate, twins
from esper.mesh.settings import SERVICES, MeshSettings
from esper.v1 import (
    karn_service_pb2,
    nissa_service_pb2,
    tamiyo_service_pb2,
    tezzeret_service_pb2,
    tolaria_service_pb2,
    urza_service_pb2,
)

MODULES = {
    "tolaria": tolaria_service_pb2,
    "tamiyo": tamiyo_service_pb2,
    "karn": karn_service_pb2,
    "urza": urza_service_pb2,
    "tezzeret": tezzeret_service_pb2,
    "nissa": nissa_service_pb2,
}


@pytest.mark.parametrize("path", sorted(twins()), ids=lambda path: path.name)
def test_generated_client_is_fresh(path: Any) -> None:
    assert path.read_text(encoding="utf-8") == twins()[path], "run python -m esper.client.generate"


def test_translation_leaves_no_trace_of_the_loop() -> None:
    text = translate("async def f(x: AsyncTransport) -> AsyncIterator[int]:\n    async for y in await x.g():\n")
    assert text.endswith("def f(x: Transport) -> Iterator[int]:\n    for y in x.g():\n")


@pytest.mark.parametrize("service", SERVICES)
def test_every_rpc_has_a_method(service: str) -> None:
    descriptor = next(iter(MODULES[service].DESCRIPTOR.services_by_name.values()))
    client = getattr(EsperClient(MeshSettings()), service)
    source = inspect.getsource(type(client))
    called = set(re.findall(rf'"{service}",\s*"(\w+)"', source))
    assert {method.name for method in descriptor.methods} - called == set()


async def test_both_faces_have_the_same_methods() -> None:
    sync, asynchronous = EsperClient(MeshSettings()), AsyncEsperClient(MeshSettings())
    for service in SERVICES:
        names = [
            {name for name in dir(getattr(face, service)) if not name.startswith("_")} for face in (sync, asynchronous)
        ]
        assert names[0] == names[1]
    sync.close()
    await asynchronous.close()

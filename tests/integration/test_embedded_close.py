"""An embedded mesh that is closed while calls are under way says nothing, and tells the callers why."""

from __future__ import annotations

import asyncio
import threading

import pytest

import esper
from esper.contracts.errors import UnavailableError
from esper.v1 import tezzeret_service_pb2, tolaria_service_pb2, urza_service_pb2

_REQUESTS = (
    ("urza", "SearchBlueprints", urza_service_pb2.SearchBlueprintsRequest(page_size=20)),
    ("tezzeret", "ListJobs", tezzeret_service_pb2.ListJobsRequest()),
    ("tolaria", "ListRuns", tolaria_service_pb2.ListRunsRequest()),
)


@pytest.mark.parametrize("num_callers", [3, 24])
def test_a_mesh_closes_quietly_under_load(num_callers: int, caplog: pytest.LogCaptureFixture) -> None:
    mesh = esper.Mesh.embedded()
    under_way, refusals = threading.Event(), []

    async def ask(number: int) -> None:
        service, method, request = _REQUESTS[number % len(_REQUESTS)]
        while True:
            try:
                await getattr(mesh._backend.stub(service), method)(request)
                under_way.set()
            except Exception as error:  # noqa: BLE001 - whatever a caller sees is looked at below
                refusals.append(error)
                await asyncio.sleep(0.01)

    callers = [mesh._loop.submit(ask(number)) for number in range(num_callers)]
    assert under_way.wait(30)
    mesh.close()
    assert all(caller.cancelled() for caller in callers)
    assert [error for error in refusals if not isinstance(error, UnavailableError)] == []
    assert [record.message for record in caplog.records if record.name.startswith(("sqlalchemy", "asyncio"))] == []

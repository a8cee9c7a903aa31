"""Expressions, bounds and statistics by kernel through every face: gRPC, REST and the SDK, over one store."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import httpx
import pytest

from esper.client._async import urza as sdk_urza
from esper.client._async.urza import AsyncUrzaClient
from esper.client.transport import AsyncStubTransport
from esper.contracts.blueprint import (
    BlueprintBounds,
    BlueprintMetadata,
    BlueprintState,
    KernelStatistics,
    Lineage,
    SiteKind,
)
from esper.contracts.errors import CapacityExceededError, InvalidInputError, NotFoundError
from esper.mesh.database import Database
from esper.mesh.in_process import InProcessChannel
from esper.services.urza import blueprint_store
from esper.services.urza.rest import build_app
from esper.services.urza.rules import BlueprintDraft
from esper.services.urza.server import register
from esper.services.urza.service import UrzaServicer
from esper.services.urza.store import UrzaStore
from esper.testing.urza_query_contract import KEY, kernel_with_latency
from esper.testing.urza_samples import field_report, graph
from esper.testing.urza_template import lay_out
from esper.v1 import urza_service_pb2 as pb
from esper.v1.urza_service_pb2_grpc import UrzaServiceStub

UNKNOWN = f"k{'0' * 32}"
BAD = "validated & & old"
WHERE = r"must have a tag, '!' or '\(' at character 13, got '&'"


@pytest.fixture
async def store() -> AsyncIterator[UrzaStore]:
    """Give a store of three blueprints; the last was tried twice with one kernel."""
    async with Database.open("sqlite://") as database:
        store = UrzaStore(database, key_ring=KEY.ring())
        await lay_out(database)
        for number, tags in enumerate((["validated", "conv2d"], ["validated", "old"], ["conv2d"])):
            kinds = (SiteKind.CONV2D,) if number else (SiteKind.LINEAR,)
            metadata = BlueprintMetadata(tags=tags, site_kinds=kinds)
            await store.blueprints.create(BlueprintDraft(name=f"b{number}", ir=graph(number), metadata=metadata))
        yield store


@pytest.fixture
async def kernel(store: UrzaStore) -> str:
    """Give the id of a kernel of the last blueprint that was reported twice."""
    blueprint = await store.blueprints.get("b2")
    record, _ = await store.kernels.put(kernel_with_latency(1, 2.5, blueprint=2))
    for number, estimate in enumerate((0.5, 0.25)):
        report = field_report(f"r{number}", blueprint_id=blueprint.id, estimate=estimate)
        await store.reports.record(replace(report, artifact_id=record.artifact_id))
    return record.artifact_id


@pytest.fixture
async def stub(store: UrzaStore) -> AsyncIterator[Any]:
    channel = InProcessChannel()
    register(channel, UrzaServicer(store))
    yield UrzaServiceStub(channel)  # type: ignore[no-untyped-call]
    await channel.close()


@pytest.fixture
def sdk(stub: Any) -> AsyncUrzaClient:
    class Calls(AsyncStubTransport):
        def stub(self, service: str) -> Any:
            assert service == "urza"
            return stub

    return AsyncUrzaClient(Calls())


@pytest.fixture
async def rest(store: UrzaStore) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(build_app(store), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        yield client


async def found(sdk: AsyncUrzaClient, **conditions: Any) -> list[str]:
    return [blueprint.name for blueprint in await sdk.search_blueprints(**conditions)]


async def shown(rest: httpx.AsyncClient, **conditions: Any) -> list[str]:
    answer = await rest.get("/v1/blueprints", params=conditions)
    assert answer.status_code == 200, answer.text
    return [item["name"] for item in answer.json()["blueprints"]]


@pytest.mark.usefixtures("kernel")
async def test_every_face_finds_the_same(sdk: AsyncUrzaClient, rest: httpx.AsyncClient) -> None:
    expression = "validated & !old | conv2d"
    assert await found(sdk, expression=expression) == await shown(rest, tags=expression) == ["b0", "b2"]
    assert await found(sdk, expression="old") == await shown(rest, tags="old") == ["b1"]
    narrow = BlueprintBounds(max_parameters=16)
    assert await found(sdk, bounds=narrow) == await shown(rest, max_parameters=16) == ["b1", "b2"]
    assert await found(sdk, site_kind=SiteKind.LINEAR) == await shown(rest, site_kind="LINEAR") == ["b0"]
    tried = BlueprintBounds(min_success_rate=1.0, max_latency_ms=2.5)
    assert await found(sdk, bounds=tried) == await shown(rest, min_success_rate=1.0, max_latency_ms=2.5) == ["b2"]
    quick = BlueprintBounds(min_latency_ms=0, max_latency_ms=2.4)
    assert await found(sdk, bounds=quick) == await shown(rest, min_latency_ms=0, max_latency_ms=2.4) == []
    flops = BlueprintBounds(min_flops=1)
    assert await found(sdk, bounds=flops) == await shown(rest, min_flops=1) == []
    assert await found(sdk, states=[BlueprintState.DRAFT], expression="old") == ["b1"]


async def test_pages_of_an_expression_go_on_and_are_bound_to_it(stub: Any, rest: httpx.AsyncClient) -> None:
    request = pb.SearchBlueprintsRequest(tag_expression="conv2d | old", page_size=2)
    first = await stub.SearchBlueprints(request)
    request.page_token = first.next_page_token
    rest_of_it = await stub.SearchBlueprints(request)
    assert [item.name for item in [*first.blueprints, *rest_of_it.blueprints]] == ["b0", "b1", "b2"]
    request.tag_expression = "conv2d"
    with pytest.raises(InvalidInputError, match="page_token must be empty or one this listing gave"):
        await stub.SearchBlueprints(request)
    same = {"tags": "old|conv2d", "page_token": first.next_page_token}
    assert await shown(rest, **same) == ["b2"]


async def test_a_genealogy_is_given_page_by_page_by_every_face(
    store: UrzaStore, stub: Any, sdk: AsyncUrzaClient, rest: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blueprint_store, "MAX_RELATIVES", 4)
    monkeypatch.setattr(sdk_urza, "_LINEAGE_PAGE", 2)
    parent = await store.blueprints.get("b0")
    for number in range(3, 8):
        lineage = Lineage(parent_ids=(parent.id,), operator="mutation", author="karn")
        await store.blueprints.create(BlueprintDraft(name="child", ir=graph(number), lineage=lineage))
    wanted = [(1, version) for version in range(1, 6)]
    assert [(depth, one.version) for depth, one in await sdk.get_lineage(parent.id, descendants=True)] == wanted
    down = pb.LINEAGE_DIRECTION_DESCENDANTS
    with pytest.raises(CapacityExceededError, match="at most 4 relatives"):
        await stub.GetLineage(pb.GetLineageRequest(blueprint_id=parent.id, direction=down))
    first = await stub.GetLineage(pb.GetLineageRequest(blueprint_id=parent.id, direction=down, page_size=3))
    asked = {"direction": "descendants", "page_token": first.next_page_token, "page_size": 3}
    last = (await rest.get("/v1/blueprints/b0/lineage", params=asked)).json()
    given = [*((one.depth, one.blueprint.version) for one in first.entries)]
    assert given + [(one["depth"], one["blueprint"]["version"]) for one in last["entries"]] == wanted
    assert last["next_page_token"] == ""
    refused = await rest.get("/v1/blueprints/b0/lineage", params={"direction": "descendants"})
    assert (refused.status_code, refused.json()["reason"]) == (429, "CAPACITY_EXCEEDED")


async def test_a_mistake_is_named_with_its_place_by_every_face(
    stub: Any, sdk: AsyncUrzaClient, rest: httpx.AsyncClient
) -> None:
    with pytest.raises(InvalidInputError, match=f"tag_expression {WHERE}") as caught:
        await stub.SearchBlueprints(pb.SearchBlueprintsRequest(tag_expression=BAD))
    assert caught.value.parameter == "tag_expression"
    with pytest.raises(InvalidInputError, match=f"tag_expression {WHERE}"):
        await sdk.search_blueprints(expression=BAD)
    answer = await rest.get("/v1/blueprints", params={"tags": BAD})
    assert (answer.status_code, answer.json()["reason"]) == (400, "INVALID_INPUT")
    assert answer.json()["detail"] == "tags must have a tag, '!' or '(' at character 13, got '&'"
    with pytest.raises(InvalidInputError, match=r"bounds.max_success_rate must be finite and within \[0, 1\], got 2"):
        await sdk.search_blueprints(bounds=BlueprintBounds(max_success_rate=2.0))
    answer = await rest.get("/v1/blueprints", params={"max_success_rate": 2})
    assert "bounds.max_success_rate must be finite and within [0, 1]" in answer.json()["detail"]
    answer = await rest.get("/v1/blueprints", params={"max_paramters": 2})
    assert (answer.status_code, answer.json()["detail"]) == (400, "max_paramters: Extra inputs are not permitted")


async def test_statistics_by_kernel_are_given_by_every_face(
    kernel: str, stub: Any, sdk: AsyncUrzaClient, rest: httpx.AsyncClient
) -> None:
    counted = KernelStatistics(trials=2, kept=2, mean_contribution=0.375, mean_latency_ms=2.5)
    assert await sdk.get_kernel_statistics(kernel) == counted
    by_id = await stub.GetKernel(pb.GetKernelRequest(artifact_id=kernel))
    by_key = await stub.GetKernel(pb.GetKernelRequest(content_key=by_id.manifest.content_key))
    assert (by_key.statistics.trials, by_key.statistics.mean_latency_ms) == (2, 2.5)
    answer = (await rest.get(f"/v1/kernels/{kernel}/statistics")).json()
    assert answer == {"statistics": {"trials": 2, "kept": 2, "mean_contribution": 0.375, "mean_latency_ms": 2.5}}
    blueprint = (await rest.get("/v1/blueprints/b2")).json()["blueprint"]
    assert blueprint["statistics"] == answer["statistics"]


async def test_a_kernel_nobody_reported_is_told_from_one_nobody_stored(
    store: UrzaStore, sdk: AsyncUrzaClient, rest: httpx.AsyncClient
) -> None:
    record, _ = await store.kernels.put(kernel_with_latency(7, 1.0))
    assert await sdk.get_kernel_statistics(record.artifact_id) is None
    assert (await rest.get(f"/v1/kernels/{record.artifact_id}/statistics")).json() == {"statistics": None}
    with pytest.raises(NotFoundError, match="artifact_id must name a stored kernel"):
        await sdk.get_kernel_statistics(UNKNOWN)
    assert (await rest.get(f"/v1/kernels/{UNKNOWN}/statistics")).status_code == 404
    await store.reports.record(replace(field_report("r1"), artifact_id=UNKNOWN))
    gone = (await rest.get(f"/v1/kernels/{UNKNOWN}/statistics")).json()["statistics"]
    assert (gone["trials"], gone["mean_latency_ms"]) == (1, None)

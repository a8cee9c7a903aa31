"""The REST face over ASGI: the same answers as over gRPC, and every error a problem with its reason."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from esper.contracts.blueprint import BlueprintMetadata
from esper.execution.artifact import verify
from esper.execution.keys import SigningKey
from esper.mesh.database import Database
from esper.services.urza.rest import build_app
from esper.services.urza.rules import BlueprintDraft
from esper.services.urza.store import UrzaStore
from esper.testing.urza_samples import field_report, graph, kernel_bytes
from esper.testing.urza_template import lay_out

KEY = SigningKey.generate()
TOKEN = "a-token-of-some-length"
GRAPH = {
    "nodes": [
        {"name": "down", "op": "linear", "inputs": ["h"], "attributes": {"features": {"expression": "max(4, C // 4)"}}},
        {"name": "act", "op": "activation", "inputs": ["down"], "attributes": {"fn": "gelu"}},
        {"name": "up", "op": "linear", "inputs": ["act"], "attributes": {"init": "zero"}},
        {"name": "scaled", "op": "scale", "inputs": ["up"], "attributes": {"value": 0.5}},
    ],
    "output": "scaled",
}


@pytest.fixture
async def database() -> AsyncIterator[Database]:
    async with Database.open("sqlite://") as opened:
        yield opened


@pytest.fixture
async def store(database: Database) -> UrzaStore:
    await lay_out(database)
    return UrzaStore(database, key_ring=KEY.ring())


def client_of(store: UrzaStore, **options: Any) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(build_app(store, **options), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://localhost")


@pytest.fixture
async def client(store: UrzaStore) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(store) as client:
        yield client


def problem(response: httpx.Response, status: int, reason: str) -> str:
    """Give the words of a problem once its form is right."""
    assert response.headers["content-type"] == "application/problem+json"
    body = response.json()
    assert (response.status_code, body["status"], body["reason"]) == (status, status, reason)
    assert body["type"] == f"https://esper.dev/errors/{reason.lower().replace('_', '-')}"
    return str(body["detail"])


async def fill(store: UrzaStore) -> None:
    for number, tags in enumerate((["validated", "conv2d"], ["validated"], ["conv2d"], ["cheap"])):
        metadata = BlueprintMetadata(tags=tags)
        await store.blueprints.create(BlueprintDraft(name=f"b{number}", ir=graph(number), metadata=metadata))


async def test_a_blueprint_is_created_once_and_read_back(client: httpx.AsyncClient) -> None:
    body = {"name": "adapter", "ir": GRAPH, "metadata": {"tags": ["adapter"], "site_kinds": ["LINEAR"]}}
    response = await client.post("/v1/blueprints", json=body)
    assert response.status_code == 201
    created = response.json()
    assert created["created"]
    assert (created["blueprint"]["version"], created["blueprint"]["state"]) == (1, "DRAFT")
    assert response.headers["location"] == f"/v1/blueprints/{created['blueprint']['id']}"
    again = await client.post("/v1/blueprints", json=body)
    assert (again.status_code, again.json()) == (200, created | {"created": False})
    for reference in ("adapter", "adapter@1", created["blueprint"]["id"]):
        found = (await client.get(f"/v1/blueprints/{reference}")).json()
        assert found["blueprint"] == created["blueprint"]
    assert found["blueprint"]["ir"]["nodes"][0]["attributes"] == {"features": {"expression": "max(4, C // 4)"}}
    assert [step["to_state"] for step in found["history"]] == ["DRAFT"]


async def test_tags_find_those_and_only_those(store: UrzaStore, client: httpx.AsyncClient) -> None:
    await fill(store)
    both = await client.get("/v1/blueprints", params={"all_tags": ["validated", "conv2d"]})
    assert [item["name"] for item in both.json()["blueprints"]] == ["b0"]
    either = await client.get("/v1/blueprints", params={"any_tags": ["validated", "cheap"], "no_tags": "conv2d"})
    assert [item["name"] for item in either.json()["blueprints"]] == ["b1", "b3"]


async def test_pages_are_those_of_the_other_face(store: UrzaStore, client: httpx.AsyncClient) -> None:
    await fill(store)
    first = (await client.get("/v1/blueprints", params={"page_size": 3})).json()
    rest = await client.get("/v1/blueprints", params={"page_size": 3, "page_token": first["next_page_token"]})
    assert [item["name"] for item in first["blueprints"] + rest.json()["blueprints"]] == ["b0", "b1", "b2", "b3"]


async def test_statistics_are_shown_and_absent_ones_are_null(store: UrzaStore, client: httpx.AsyncClient) -> None:
    blueprint, _ = await store.blueprints.create(BlueprintDraft(name="b", ir=graph(1)))
    assert (await client.get("/v1/blueprints/b")).json()["blueprint"]["statistics"] is None
    await store.reports.record(field_report("r1", blueprint_id=blueprint.id))
    shown = (await client.get("/v1/blueprints/b")).json()["blueprint"]["statistics"]
    assert shown == {"trials": 1, "kept": 1, "mean_contribution": None, "mean_latency_ms": None}


async def test_the_genealogy_is_given(store: UrzaStore, client: httpx.AsyncClient) -> None:
    parent, _ = await store.blueprints.create(BlueprintDraft(name="parent", ir=graph(1)))
    body = {"name": "child", "ir": GRAPH, "lineage": {"parent_ids": [parent.id], "operator": "mutation"}}
    await client.post("/v1/blueprints", json=body)
    up = (await client.get("/v1/blueprints/child/lineage")).json()["entries"]
    down = (await client.get("/v1/blueprints/parent@1/lineage", params={"direction": "descendants"})).json()["entries"]
    assert [(entry["blueprint"]["name"], entry["depth"]) for entry in up + down] == [("parent", 1), ("child", 1)]


async def test_the_life_cycle_is_followed(store: UrzaStore, client: httpx.AsyncClient) -> None:
    await store.blueprints.create(BlueprintDraft(name="b", ir=graph(1)))
    step = {"state": "VALIDATED", "actor": "ann", "reason": "passed"}
    assert (await client.post("/v1/blueprints/b/state", json=step)).json()["state"] == "VALIDATED"
    posing = await client.post("/v1/blueprints/b/state", json=step | {"state": "ACTIVE", "actor": "registry"})
    assert "actor must not be 'registry'" in problem(posing, 400, "INVALID_INPUT")
    refused = await client.post("/v1/blueprints/b/state", json=step | {"state": "RETIRED"})
    assert "VALIDATED leads to ACTIVE" in problem(refused, 409, "INVALID_TRANSITION")
    for state in ("ACTIVE", "DEPRECATED", "ACTIVE"):
        answer = await client.post("/v1/blueprints/b/state", json=step | {"state": state, "reason": "tried"})
        assert answer.json()["state"] == state
    history = (await client.get("/v1/blueprints/b")).json()["history"]
    assert [(one["actor"], one["from_state"], one["to_state"]) for one in history[-1:]] == [
        ("ann", "DEPRECATED", "ACTIVE")
    ]


async def test_a_kernel_is_listed_described_and_streamed(store: UrzaStore, client: httpx.AsyncClient) -> None:
    payload = kernel_bytes(KEY, weight_floats=200_000)
    record, _ = await store.kernels.put(payload)
    listed = (await client.get("/v1/kernels", params={"blueprint_id": record.blueprint_id})).json()["kernels"]
    described = (await client.get(f"/v1/kernels/{record.artifact_id}")).json()
    assert listed == [described]
    assert (described["size_bytes"], described["sha256"]) == (len(payload), record.sha256.hex())
    assert (described["validated"], described["signed_by"], described["site_kind"]) == (True, KEY.key_id, "LINEAR")
    response = await client.get(f"/v1/kernels/{record.artifact_id}/content")
    assert response.headers["content-length"] == str(len(payload))
    assert verify(response.content, KEY.ring()).artifact_id == record.artifact_id


async def test_a_broken_transfer_goes_on(store: UrzaStore, client: httpx.AsyncClient) -> None:
    payload = kernel_bytes(KEY, weight_floats=200_000)
    record, _ = await store.kernels.put(payload)
    path = f"/v1/kernels/{record.artifact_id}/content"
    rest = await client.get(path, headers={"range": "bytes=300000-"})
    assert (rest.status_code, rest.content) == (206, payload[300_000:])
    assert rest.headers["content-range"] == f"bytes 300000-{len(payload) - 1}/{len(payload)}"
    beyond = await client.get(path, headers={"range": f"bytes={len(payload)}-"})
    assert "range must begin before the end" in problem(beyond, 416, "REQUESTED_RANGE_NOT_SATISFIABLE")
    assert beyond.headers["content-range"] == f"bytes */{len(payload)}"


@pytest.mark.parametrize(
    ("path", "status", "reason", "words"),
    [
        ("/v1/blueprints/nothing", 404, "NOT_FOUND", "reference must name a stored blueprint, got 'nothing'"),
        ("/v1/blueprints/Bad%20Name", 400, "INVALID_INPUT", "reference must match"),
        ("/v1/blueprints?page_size=9999", 400, "INVALID_INPUT", "page_size must be 1 to 500"),
        ("/v1/blueprints?page_token=forged", 400, "INVALID_INPUT", "page_token must be empty or one"),
        ("/v1/blueprints?all_tags=NO", 400, "INVALID_INPUT", "all_tags[0] must match"),
        ("/v1/blueprints?states=OLD", 400, "INVALID_INPUT", "states.0: Input should be 'DRAFT'"),
        ("/v1/kernels/..%2f..%2fetc", 404, "NOT_FOUND", "Not Found"),
        ("/v1/kernels/kernel_123", 400, "INVALID_INPUT", "artifact_id must be 'k' and 32 lower-case hex digits"),
        (f"/v1/kernels/k{'0' * 32}/content", 404, "NOT_FOUND", "artifact_id must name a stored kernel"),
        ("/v2", 404, "NOT_FOUND", "Not Found"),
    ],
)
async def test_errors_are_problems(client: httpx.AsyncClient, path: str, status: int, reason: str, words: str) -> None:
    assert words in problem(await client.get(path), status, reason)


@pytest.mark.parametrize(
    ("body", "reason", "words"),
    [
        ({"name": "b"}, "INVALID_INPUT", "ir: Field required"),
        ({"name": "b", "ir": GRAPH, "more": 1}, "INVALID_INPUT", "more: Extra inputs are not permitted"),
        ({"name": "NO", "ir": GRAPH}, "INVALID_INPUT", "name must match"),
        ({"name": "b", "ir": GRAPH | {"output": "x"}}, "INVALID_BLUEPRINT", "output must name a node of the graph"),
        ({"name": "b", "ir": GRAPH, "state": "RETIRED"}, "INVALID_INPUT", "state must be one of DRAFT"),
        ({"name": "b", "ir": GRAPH, "lineage": {"operator": "magic"}}, "INVALID_INPUT", "lineage.operator must be"),
    ],
)
async def test_bad_blueprints_are_problems(
    client: httpx.AsyncClient, body: dict[str, Any], reason: str, words: str
) -> None:
    assert words in problem(await client.post("/v1/blueprints", json=body), 400, reason)


async def test_a_graph_of_another_name_is_a_conflict(client: httpx.AsyncClient) -> None:
    await client.post("/v1/blueprints", json={"name": "first", "ir": GRAPH})
    other = await client.post("/v1/blueprints", json={"name": "second", "ir": GRAPH})
    assert "got the one of first@1" in problem(other, 409, "ALREADY_EXISTS")


async def test_a_body_beyond_the_bound_is_refused(client: httpx.AsyncClient) -> None:
    async def endless() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b"x" * 65_536

    response = await client.post("/v1/blueprints", content=endless(), headers={"content-type": "application/json"})
    assert "the body must be at most 262144 bytes" in problem(response, 413, "CAPACITY_EXCEEDED")


async def test_a_store_that_is_away_is_unavailable(database: Database, client: httpx.AsyncClient) -> None:
    assert (await client.get("/readyz")).json() == {"status": "ok"}
    async with database.reading():  # the one connection of a store in memory
        database._engine.sync_engine.pool._timeout = 0.05  # type: ignore[attr-defined]
        response = await client.get("/readyz")
    assert "had no free connection in time" in problem(response, 503, "UNAVAILABLE")
    assert response.headers["retry-after"] == "1"
    assert (await client.get("/healthz")).json() == {"status": "ok"}


async def test_a_defect_shows_an_incident_and_nothing_else(store: UrzaStore, client: httpx.AsyncClient) -> None:
    async def broken() -> None:
        raise ZeroDivisionError("secret words")

    store.ping = broken  # type: ignore[method-assign]
    response = await client.get("/readyz")
    detail = problem(response, 500, "INTERNAL")
    assert "secret words" not in response.text
    assert response.json()["incident_id"] in detail


async def test_changes_need_the_token_and_reading_does_not(store: UrzaStore) -> None:
    async with client_of(store, write_token=TOKEN) as client:
        body = {"name": "adapter", "ir": GRAPH}
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": f"Basic {TOKEN}"}):
            refused = await client.post("/v1/blueprints", json=body, headers=headers)
            assert "must be a bearer token" in problem(refused, 403, "PERMISSION_DENIED")
        allowed = await client.post("/v1/blueprints", json=body, headers={"authorization": f"Bearer {TOKEN}"})
        assert allowed.status_code == 201
        assert (await client.get("/v1/blueprints/adapter")).status_code == 200


async def test_a_kernel_is_pinned_unpinned_and_swept_by_who_may(store: UrzaStore) -> None:
    record, _ = await store.kernels.put(kernel_bytes(KEY))
    place, said = f"/v1/kernels/{record.artifact_id}", {"actor": "ann", "reason": "a baseline"}
    async with client_of(store, write_token=TOKEN) as client:
        for path, body in ((f"{place}/pin", said), (f"{place}/unpin", said), ("/v1/sweep", {})):
            assert problem(await client.post(path, json=body), 403, "PERMISSION_DENIED")
        client.headers["authorization"] = f"Bearer {TOKEN}"
        for changed in (True, False):
            assert (await client.post(f"{place}/pin", json=said)).json() == {"pinned": True, "changed": changed}
        assert problem(await client.post(f"{place}/pin", json={"actor": "ann"}), 400, "INVALID_INPUT")
        missing = await client.post(f"/v1/kernels/k{'0' * 32}/pin", json=said)
        assert problem(missing, 404, "NOT_FOUND")
        for changed in (True, False):
            assert (await client.post(f"{place}/unpin", json=said)).json() == {"pinned": False, "changed": changed}
        for body in ({"dry_run": True}, {}):
            assert (await client.post("/v1/sweep", json=body)).json() == {
                "artifact_ids": [],
                "kernel_bytes": 0,
                "held_bytes": record.size_bytes,
                "reports": 0,
                "uploads": 0,
            }


async def test_another_host_name_is_refused(store: UrzaStore) -> None:
    async with client_of(store, allowed_hosts=("localhost",)) as client:
        assert (await client.get("/healthz")).status_code == 200
        assert (await client.get("/healthz", headers={"host": "evil.example"})).status_code == 400


async def test_the_description_names_every_path_and_the_problem(client: httpx.AsyncClient) -> None:
    described = (await client.get("/openapi.json")).json()
    assert set(described["paths"]) == {
        "/healthz",
        "/readyz",
        "/v1/blueprints",
        "/v1/blueprints/{reference}",
        "/v1/blueprints/{reference}/lineage",
        "/v1/blueprints/{reference}/state",
        "/v1/field-reports",
        "/v1/kernels",
        "/v1/kernels/by-content-key/{content_key}",
        "/v1/kernels/uploads/{sha256}",
        "/v1/kernels/{artifact_id}",
        "/v1/kernels/{artifact_id}/content",
        "/v1/kernels/{artifact_id}/pin",
        "/v1/kernels/{artifact_id}/statistics",
        "/v1/kernels/{artifact_id}/unpin",
        "/v1/sweep",
    }
    search = described["paths"]["/v1/blueprints"]["get"]
    assert "application/problem+json" in search["responses"]["default"]["content"]
    figures = ("parameters", "flops", "latency_ms", "success_rate")
    assert {parameter["name"] for parameter in search["parameters"]} == {
        *("tags", "all_tags", "any_tags", "no_tags", "states", "text", "site_kind", "page_size", "page_token"),
        *(f"{end}_{figure}" for end in ("min", "max") for figure in figures),
    }
    assert (await client.get("/docs")).status_code == 200

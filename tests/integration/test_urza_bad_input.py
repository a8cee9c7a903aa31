"""What nobody may bring into the library, over its sockets: kernels with one bit changed, and names that are paths."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from esper.contracts.errors import CorruptDataError, EsperError, InvalidInputError, NotFoundError
from esper.contracts.wire import to_message
from esper.execution.tier_urza import UrzaTier, upload_kernel
from esper.mesh import MeshServer, open_channel
from esper.services.urza.server import UrzaConfig, UrzaService
from esper.testing.urza_samples import graph
from esper.v1 import blueprint_pb2
from esper.v1 import urza_service_pb2 as pb
from esper.v1.urza_service_pb2_grpc import UrzaServiceStub
from tests.damaged_kernels import KEY, damaged, kernel_bytes

ID, DATA = kernel_bytes()
PATHS = ("../etc/passwd", "/etc/passwd", "..", "a/../../b", "a/b", "a\\b", "a\0b", "C:\\b", "file:///etc/passwd", "~/b")
PLACES = ("blueprints/{}", "blueprints/{}/lineage", "kernels/{}", "kernels/{}/content", "kernels/uploads/{}")
GRAPH = to_message(graph(1), blueprint_pb2.BlueprintIR)
DOWN = pb.LINEAGE_DIRECTION_DESCENDANTS
ACTIVE = blueprint_pb2.BLUEPRINT_STATE_ACTIVE


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[UrzaService]:
    config = UrzaConfig(
        database_url=f"sqlite:///{tmp_path}/urza.db",
        blobs_url=f"file://{tmp_path}/blobs",
        seed_templates=False,
        rest=True,
        rest_port=0,
    )
    async with UrzaService(config, key_ring=KEY.ring()) as service:
        yield service


@pytest.fixture
async def stub(service: UrzaService) -> AsyncIterator[Any]:
    server = MeshServer()
    service.add_to(server)
    async with server, open_channel(server.address) as channel:
        yield UrzaServiceStub(channel)


@pytest.fixture
async def rest(service: UrzaService) -> AsyncIterator[httpx.AsyncClient]:
    assert service.rest_url is not None
    async with httpx.AsyncClient(base_url=service.rest_url, timeout=30) as client:
        yield client


async def refused(call: Awaitable[object], *errors: type[EsperError]) -> bool:
    """Say whether a call was refused by one of these errors; any other error rises."""
    try:
        await call
    except errors:
        return True
    return False


def files(root: Path) -> set[str]:
    return {str(path) for path in root.rglob("*") if path.is_file() and path.name[:8] != "urza.db-"}


async def test_a_kernel_with_any_one_bit_changed_is_refused_and_the_whole_one_is_taken(
    stub: Any, rest: httpx.AsyncClient, tmp_path: Path
) -> None:
    """The sender's digest is that of the damaged bytes, so that the transfer itself finds nothing wrong."""
    before = files(tmp_path)
    taken = [name for name, data in damaged(DATA) if not await refused(upload_kernel(stub, data), CorruptDataError)]
    assert taken == []
    assert not (await stub.ListKernels(pb.ListKernelsRequest())).kernels
    assert (await rest.get("/v1/kernels")).json()["kernels"] == []
    assert files(tmp_path) == before, "no copy is left behind"
    assert await upload_kernel(stub, DATA) == (ID, True)
    assert await UrzaTier(stub).read(ID) == DATA


def requests(path: str) -> list[tuple[str, Any]]:
    """Give a request of every kind that holds a name or an id, with a path in its place."""
    return [
        ("CreateBlueprint", pb.CreateBlueprintRequest(name=path, ir=GRAPH)),
        (
            "CreateBlueprint",
            pb.CreateBlueprintRequest(name="b", ir=GRAPH, lineage=blueprint_pb2.Lineage(parent_ids=[path])),
        ),
        (
            "CreateBlueprint",
            pb.CreateBlueprintRequest(name="b", ir=GRAPH, metadata=blueprint_pb2.BlueprintMetadata(tags=[path])),
        ),
        ("GetBlueprint", pb.GetBlueprintRequest(reference=path)),
        ("GetBlueprint", pb.GetBlueprintRequest(reference=f"{path}@1")),
        ("GetLineage", pb.GetLineageRequest(blueprint_id=path, direction=DOWN)),
        ("SetBlueprintState", pb.SetBlueprintStateRequest(blueprint_id=path, state=ACTIVE, actor="a", reason="b")),
        ("SearchBlueprints", pb.SearchBlueprintsRequest(all_tags=[path])),
        ("SearchBlueprints", pb.SearchBlueprintsRequest(page_token=path)),
        ("GetKernel", pb.GetKernelRequest(artifact_id=path)),
        ("GetKernel", pb.GetKernelRequest(content_key=path)),
        ("PinKernel", pb.PinKernelRequest(artifact_id=path, actor="a", reason="b")),
        ("ListKernels", pb.ListKernelsRequest(blueprint_id=path)),
        ("GetKernelUpload", pb.GetKernelUploadRequest(sha256=path.encode(), total_bytes=9)),
    ]


@pytest.mark.parametrize("path", PATHS)
async def test_a_path_in_the_place_of_a_name_is_refused_by_both_faces(
    stub: Any, rest: httpx.AsyncClient, tmp_path: Path, path: str
) -> None:
    before = files(tmp_path)
    asked = requests(path)
    errors = (InvalidInputError, NotFoundError)
    taken = [method for method, request in asked if not await refused(getattr(stub, method)(request), *errors)]
    assert taken == []
    with pytest.raises(InvalidInputError, match="artifact_id must be 'k' and 32"):
        await anext(aiter(stub.DownloadKernel(pb.DownloadKernelRequest(artifact_id=path))))
    for place in PLACES if path != ".." else ():  # a client itself takes that for the folder above
        answer = await rest.get(f"/v1/{place.format(quote(path, safe=''))}")
        assert answer.status_code in (400, 404), (place, answer.text)
    body = {"name": path, "ir": {"nodes": [{"name": "a", "op": "scale", "inputs": ["h"]}], "output": "a"}}
    answer = await rest.post("/v1/blueprints", json=body)
    assert (answer.status_code, answer.json()["reason"]) == (400, "INVALID_INPUT"), answer.text
    assert not (await stub.SearchBlueprints(pb.SearchBlueprintsRequest())).blueprints
    assert files(tmp_path) == before

"""The gRPC face through a channel within the process; every error comes with its class and its words."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

import pytest

from esper.contracts.blueprint import Blueprint, BlueprintState, BlueprintStateChange
from esper.contracts.chunks import Assembler, Chunk, split
from esper.contracts.errors import (
    CapacityExceededError,
    CorruptDataError,
    InvalidBlueprintError,
    InvalidInputError,
    InvalidTransitionError,
    NotFoundError,
    SignatureError,
)
from esper.contracts.kernel import KernelManifest
from esper.contracts.wire import from_wire, to_wire
from esper.execution.artifact import verify
from esper.execution.keys import SigningKey
from esper.mesh.database import Database
from esper.mesh.in_process import InProcessChannel
from esper.services.urza.server import register
from esper.services.urza.service import UrzaServicer
from esper.services.urza.store import StoreLimits, UrzaStore
from esper.testing.urza_samples import field_report, graph, kernel_bytes
from esper.testing.urza_template import lay_out
from esper.v1 import blueprint_pb2, urza_service_pb2
from esper.v1 import urza_service_pb2 as pb
from esper.v1.urza_service_pb2_grpc import UrzaServiceStub

KEY = SigningKey.generate()
LIMITS = StoreLimits(max_kernel_bytes=2_000_000)


@pytest.fixture
async def store() -> AsyncIterator[UrzaStore]:
    async with Database.open("sqlite://") as database:
        store = UrzaStore(database, key_ring=KEY.ring(), limits=LIMITS)
        await lay_out(database)
        yield store


@pytest.fixture
async def stub(store: UrzaStore) -> AsyncIterator[Any]:
    channel = InProcessChannel()
    register(channel, UrzaServicer(store, upload_budget_bytes=2_000_000))
    yield UrzaServiceStub(channel)
    await channel.close()


def create_request(number: int = 1, name: str = "scale", tags: Iterable[str] = ()) -> pb.CreateBlueprintRequest:
    metadata = blueprint_pb2.BlueprintMetadata(tags=list(tags))
    ir = to_wire(graph(number))
    assert isinstance(ir, blueprint_pb2.BlueprintIR)
    return pb.CreateBlueprintRequest(name=name, ir=ir, metadata=metadata)


async def create(stub: Any, number: int = 1, name: str = "scale", tags: Iterable[str] = ()) -> Blueprint:
    response = await stub.CreateBlueprint(create_request(number, name, tags))
    assert response.created
    return from_wire(response.blueprint, Blueprint)


def requests(chunks: Iterable[Chunk]) -> list[pb.UploadKernelRequest]:
    return [pb.UploadKernelRequest(**dataclasses.asdict(chunk)) for chunk in chunks]


async def upload(stub: Any, payload: bytes) -> pb.UploadKernelResponse:
    response = await stub.UploadKernel(iter(requests(split(payload))))
    assert isinstance(response, pb.UploadKernelResponse)
    return response


async def test_a_blueprint_is_created_once_and_found(stub: Any) -> None:
    blueprint = await create(stub, tags=["conv2d", "optimized"])
    again = await stub.CreateBlueprint(create_request())
    assert (from_wire(again.blueprint, Blueprint), again.created) == (blueprint, False)
    found = await stub.GetBlueprint(pb.GetBlueprintRequest(reference="scale@1"))
    assert from_wire(found.blueprint, Blueprint) == blueprint
    assert blueprint.metadata.tags == ["conv2d", "optimized"]
    (step,) = (from_wire(change, BlueprintStateChange) for change in found.history)
    assert (step.from_state, step.to_state, step.actor) == (None, BlueprintState.DRAFT, "unknown")


async def test_a_lineage_left_out_means_by_hand(stub: Any) -> None:
    assert (await create(stub)).lineage.operator == "manual"


async def test_an_illegal_graph_is_refused_with_the_node_at_fault(stub: Any) -> None:
    request = create_request()
    request.ir.nodes[0].op = "exec"
    with pytest.raises(InvalidBlueprintError, match="node 'scaled' operator must be one of"):
        await stub.CreateBlueprint(request)


async def test_a_request_beyond_its_bound_is_refused_before_any_work(stub: Any) -> None:
    request = create_request()
    request.metadata.description = "x" * 300_000
    with pytest.raises(InvalidInputError, match="request must be at most 262144 bytes"):
        await stub.CreateBlueprint(request)


async def test_a_bad_name_is_refused(stub: Any) -> None:
    with pytest.raises(InvalidInputError, match="name must match") as caught:
        await stub.CreateBlueprint(create_request(name="No Good"))
    assert caught.value.parameter == "name"


async def test_mission_stage_four_those_and_only_those(stub: Any) -> None:
    await create(stub, 1, "both", ["validated", "conv2d", "cheap"])
    await create(stub, 2, "validated-alone", ["validated"])
    await create(stub, 3, "conv-alone", ["conv2d"])
    found = await stub.SearchBlueprints(pb.SearchBlueprintsRequest(all_tags=["validated", "conv2d"]))
    assert [blueprint.name for blueprint in found.blueprints] == ["both"]


async def test_a_search_goes_page_by_page(stub: Any) -> None:
    for number in range(5):
        await create(stub, number, f"b{number}")
    seen: list[str] = []
    request = pb.SearchBlueprintsRequest(page_size=2)
    while True:
        page = await stub.SearchBlueprints(request)
        seen += [blueprint.name for blueprint in page.blueprints]
        if not page.next_page_token:
            break
        request.page_token = page.next_page_token
    assert seen == ["b0", "b1", "b2", "b3", "b4"]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (pb.SearchBlueprintsRequest(page_size=501), "page_size must be 1 to 500"),
        (pb.SearchBlueprintsRequest(page_token="forged"), "page_token must be empty or one this listing gave"),
        (pb.SearchBlueprintsRequest(all_tags=["NO"]), r"all_tags\[0\] must match"),
        (pb.SearchBlueprintsRequest(states=[blueprint_pb2.BLUEPRINT_STATE_UNSPECIFIED]), "states must be one of DRAFT"),
        (pb.SearchBlueprintsRequest(site_kind=99), "site_kind must be one of LINEAR"),  # type: ignore[arg-type]
    ],
)
async def test_bad_searches_are_refused(stub: Any, request_: pb.SearchBlueprintsRequest, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        await stub.SearchBlueprints(request_)


async def test_the_genealogy_is_given(stub: Any) -> None:
    parent = await create(stub, 1, "parent")
    request = create_request(2, "child")
    request.lineage.CopyFrom(blueprint_pb2.Lineage(parent_ids=[parent.id], operator="mutation", author="karn"))
    await stub.CreateBlueprint(request)
    down = urza_service_pb2.LINEAGE_DIRECTION_DESCENDANTS
    found = await stub.GetLineage(pb.GetLineageRequest(blueprint_id=parent.id, direction=down))
    assert [(entry.blueprint.name, entry.depth) for entry in found.entries] == [("child", 1)]
    with pytest.raises(InvalidInputError, match="direction must be one of ANCESTORS, DESCENDANTS"):
        await stub.GetLineage(pb.GetLineageRequest(blueprint_id=parent.id))


async def test_the_life_cycle_is_followed(stub: Any) -> None:
    blueprint = await create(stub)
    request = pb.SetBlueprintStateRequest(
        blueprint_id=blueprint.id, state=blueprint_pb2.BLUEPRINT_STATE_VALIDATED, actor="ann", reason="passed"
    )
    response = await stub.SetBlueprintState(request)
    assert response.blueprint.state == blueprint_pb2.BLUEPRINT_STATE_VALIDATED
    request.state, request.actor = blueprint_pb2.BLUEPRINT_STATE_ACTIVE, "registry"
    with pytest.raises(InvalidInputError, match="actor must not be 'registry', which is the library itself"):
        await stub.SetBlueprintState(request)
    request.state, request.actor = blueprint_pb2.BLUEPRINT_STATE_RETIRED, "ann"
    with pytest.raises(InvalidTransitionError, match="VALIDATED leads to ACTIVE"):
        await stub.SetBlueprintState(request)
    request.state = blueprint_pb2.BLUEPRINT_STATE_UNSPECIFIED
    with pytest.raises(InvalidInputError, match="state must be one of DRAFT"):
        await stub.SetBlueprintState(request)


async def test_what_is_deprecated_is_offered_again_on_request(stub: Any) -> None:
    blueprint = await create(stub)
    steps = ("VALIDATED", "ACTIVE", "DEPRECATED", "ACTIVE")
    for state in steps:
        number = blueprint_pb2.BlueprintState.Value(f"BLUEPRINT_STATE_{state}")
        request = pb.SetBlueprintStateRequest(blueprint_id=blueprint.id, state=number, actor="ann", reason=state)
        assert (await stub.SetBlueprintState(request)).blueprint.state == number
    history = (await stub.GetBlueprint(pb.GetBlueprintRequest(reference=blueprint.id))).history
    assert [(step.actor, step.reason) for step in history[1:]] == [("ann", state) for state in steps]
    assert history[-1].from_state == blueprint_pb2.BLUEPRINT_STATE_DEPRECATED


async def test_a_kernel_goes_up_and_comes_down_and_verifies(stub: Any) -> None:
    payload = kernel_bytes(KEY, weight_floats=200_000)
    response = await upload(stub, payload)
    assert response.created
    assert not (await upload(stub, payload)).created
    assembler = Assembler(max_bytes=len(payload))
    async for chunk in stub.DownloadKernel(pb.DownloadKernelRequest(artifact_id=response.artifact_id)):
        assert len(chunk.data) <= 256 * 1024
        assembler.add(chunk)
    assert assembler.finish() == payload
    assert verify(payload, KEY.ring(), artifact_id=response.artifact_id).artifact_id == response.artifact_id


async def test_a_broken_download_goes_on(stub: Any) -> None:
    payload = kernel_bytes(KEY, weight_floats=200_000)
    artifact_id = (await upload(stub, payload)).artifact_id
    assembler = Assembler(max_bytes=len(payload))
    call = stub.DownloadKernel(pb.DownloadKernelRequest(artifact_id=artifact_id))
    async for chunk in call:
        assembler.add(chunk)
        break
    call.cancel()
    rest = stub.DownloadKernel(pb.DownloadKernelRequest(artifact_id=artifact_id, offset=assembler.offset))
    async for chunk in rest:
        assembler.add(chunk)
    assert assembler.finish() == payload


async def test_manifests_are_given_by_id_by_key_and_in_pages(stub: Any) -> None:
    payloads = [kernel_bytes(KEY, number) for number in range(3)]
    ids = [(await upload(stub, payload)).artifact_id for payload in payloads]
    by_id = await stub.GetKernel(pb.GetKernelRequest(artifact_id=ids[0]))
    assert by_id.size_bytes == len(payloads[0])
    by_key = await stub.GetKernel(pb.GetKernelRequest(content_key=by_id.manifest.content_key))
    assert by_key == by_id
    assert from_wire(by_id.manifest, KernelManifest).validated
    first = await stub.ListKernels(pb.ListKernelsRequest(page_size=2))
    rest = await stub.ListKernels(pb.ListKernelsRequest(page_size=2, page_token=first.next_page_token))
    assert [manifest.artifact_id for manifest in [*first.kernels, *rest.kernels]] == ids[::-1]


async def test_unknown_and_malformed_kernels_are_told_apart(stub: Any) -> None:
    with pytest.raises(NotFoundError, match="artifact_id must name a stored kernel"):
        await stub.GetKernel(pb.GetKernelRequest(artifact_id="k" + "0" * 32))
    with pytest.raises(InvalidInputError, match="key must be exactly one of"):
        await stub.GetKernel(pb.GetKernelRequest())
    with pytest.raises(InvalidInputError, match="artifact_id must be 'k' and 32 lower-case hex digits"):
        await anext(aiter(stub.DownloadKernel(pb.DownloadKernelRequest(artifact_id="../../etc/passwd"))))


def _flipped(messages: list[pb.UploadKernelRequest]) -> None:
    messages[1].data = bytes([messages[1].data[0] ^ 1]) + messages[1].data[1:]


def _misplaced(messages: list[pb.UploadKernelRequest]) -> None:
    messages[1].offset += 1


def _false_digest(messages: list[pb.UploadKernelRequest]) -> None:
    messages[0].sha256 = bytes(32)


def _cut_short(messages: list[pb.UploadKernelRequest]) -> None:
    messages.pop()


def _swapped(messages: list[pb.UploadKernelRequest]) -> None:
    messages[1], messages[2] = messages[2], messages[1]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_flipped, "crc32 must match the data"),
        (_misplaced, "offset must be 262144, where the chunk before ended, got 262145"),
        (_false_digest, "sha256 must match"),
        (_cut_short, "the chunks must hold .* bytes as announced, got 786432"),
        (_swapped, "offset must be 262144"),
    ],
)
async def test_a_damaged_upload_is_refused_and_leaves_nothing(
    stub: Any, damage: Callable[[list[pb.UploadKernelRequest]], None], message: str
) -> None:
    messages = requests(split(kernel_bytes(KEY, weight_floats=200_000)))
    damage(messages)
    with pytest.raises(CorruptDataError, match=message):
        await stub.UploadKernel(iter(messages))
    assert not (await stub.ListKernels(pb.ListKernelsRequest())).kernels


async def test_an_upload_that_a_stranger_signed_is_refused(stub: Any) -> None:
    with pytest.raises(SignatureError, match="signing key must be a trusted one"):
        await upload(stub, kernel_bytes(SigningKey.generate()))


async def test_an_upload_of_nothing_is_refused(stub: Any) -> None:
    with pytest.raises(CorruptDataError, match="must hold an unknown number of bytes as announced, got 0"):
        await stub.UploadKernel(iter([]))


async def test_an_upload_beyond_the_bound_is_refused_at_once(stub: Any) -> None:
    first = pb.UploadKernelRequest(total_bytes=2_000_001, sha256=bytes(32))
    question = pb.GetKernelUploadRequest(total_bytes=2_000_001, sha256=bytes(32))
    for asked in (lambda: stub.UploadKernel(iter([first])), lambda: stub.GetKernelUpload(question)):
        # Not RESOURCE_EXHAUSTED, which says to try again: no waiting makes it smaller.
        with pytest.raises(InvalidInputError, match="total_bytes must be at most 2000000 bytes, got 2000001"):
            await asked()


async def test_uploads_under_way_share_a_budget_and_give_it_back(stub: Any) -> None:
    began, go_on = asyncio.Event(), asyncio.Event()
    payload = kernel_bytes(KEY, weight_floats=300_000)

    async def slowly() -> AsyncIterator[pb.UploadKernelRequest]:
        for message in requests(split(payload)):
            yield message
            began.set()
            await go_on.wait()

    slow = asyncio.ensure_future(stub.UploadKernel(slowly()))
    await began.wait()

    async def upload_until_refused() -> None:
        async with asyncio.timeout(10):
            for number in itertools.count(1):
                await upload(stub, kernel_bytes(KEY, number, weight_floats=300_000))

    # The servicer has counted the slow upload once another one finds no room.
    with pytest.raises(CapacityExceededError, match="uploads under way must hold at most 2000000 bytes together"):
        await upload_until_refused()
    go_on.set()
    assert (await slow).created
    assert (await upload(stub, kernel_bytes(KEY, 1_000_000, weight_floats=300_000))).created


async def test_a_field_report_counts_once(stub: Any) -> None:
    blueprint = await create(stub)
    report = to_wire(field_report("r1", blueprint_id=blueprint.id, estimate=0.25))
    request = pb.RecordFieldReportRequest(report=report)  # type: ignore[arg-type]
    assert (await stub.RecordFieldReport(request)).recorded
    assert not (await stub.RecordFieldReport(request)).recorded
    found = await stub.GetBlueprint(pb.GetBlueprintRequest(reference=blueprint.id))
    assert (found.blueprint.statistics.trials, found.blueprint.statistics.mean_contribution) == (1, 0.25)
    with pytest.raises(InvalidInputError, match="report must be set"):
        await stub.RecordFieldReport(pb.RecordFieldReportRequest())


async def test_every_method_of_the_service_is_offered() -> None:
    service = urza_service_pb2.DESCRIPTOR.services_by_name["UrzaService"]
    assert {method.name for method in service.methods} <= vars(UrzaServicer).keys()

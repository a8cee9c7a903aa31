"""The library over a real socket, a real NATS and a real end of its process: what the other services meet."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from esper.contracts import wire
from esper.contracts.chunks import split
from esper.contracts.errors import CorruptDataError, NotFoundError, SignatureError
from esper.execution.artifact import verify
from esper.execution.keys import SigningKey
from esper.execution.tier_urza import UrzaTier, upload_kernel
from esper.mesh import MeshServer, open_channel
from esper.services.urza.rules import BlueprintDraft, PageRequest
from esper.services.urza.server import UrzaConfig, UrzaService
from esper.telemetry.nats_bus import NatsBus
from esper.telemetry.nats_server import NatsServer, NatsServerConfig
from esper.telemetry.subjects import Kind, build_subject
from esper.testing.urza_samples import field_report, graph, kernel_bytes
from esper.v1 import urza_service_pb2 as pb
from esper.v1.urza_service_pb2_grpc import UrzaServiceStub

KEY = SigningKey.generate()


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[UrzaService]:
    config = UrzaConfig(database_url=f"sqlite:///{tmp_path}/urza.db", seed_templates=False)
    async with UrzaService(config, key_ring=KEY.ring()) as service:
        yield service


@pytest.fixture
async def stub(service: UrzaService) -> AsyncIterator[Any]:
    server = MeshServer()
    service.add_to(server)
    async with server:
        channel = open_channel(server.address)
        yield UrzaServiceStub(channel)
        await channel.close()


async def until_held(service: UrzaService, num_bytes: int) -> None:
    """Return once uploads under way hold this many bytes."""
    async with asyncio.timeout(10):
        while service.servicer.upload_bytes_held != num_bytes:
            await service.ready()


async def test_the_third_cache_tier_reads_what_a_worker_uploaded(stub: Any) -> None:
    payload = kernel_bytes(KEY, weight_floats=700_000)
    artifact_id, created = await upload_kernel(stub, payload)
    assert created
    fetched = await UrzaTier(stub).read(artifact_id)
    assert verify(fetched, KEY.ring(), artifact_id=artifact_id).size_bytes == len(payload)
    assert await upload_kernel(stub, payload) == (artifact_id, False)


async def test_errors_keep_their_class_over_the_socket(stub: Any) -> None:
    with pytest.raises(SignatureError, match="signing key must be a trusted one"):
        await upload_kernel(stub, kernel_bytes(SigningKey.generate()))
    with pytest.raises(NotFoundError, match="artifact_id must name a stored kernel"):
        await UrzaTier(stub).read("k" + "0" * 32)


async def test_a_bit_flipped_on_the_way_is_data_loss_and_nothing_is_stored(stub: Any) -> None:
    async def damaged() -> AsyncIterator[pb.UploadKernelRequest]:
        for chunk in split(kernel_bytes(KEY, weight_floats=200_000)):
            data = chunk.data if chunk.offset == 0 else bytes([chunk.data[0] ^ 1]) + chunk.data[1:]
            yield pb.UploadKernelRequest(**dataclasses.asdict(dataclasses.replace(chunk, data=data)))

    with pytest.raises(CorruptDataError, match="crc32 must match the data of the chunk at offset 262144"):
        await stub.UploadKernel(damaged())
    assert not (await stub.ListKernels(pb.ListKernelsRequest())).kernels


async def test_an_upload_that_its_caller_leaves_stores_nothing_and_frees_its_bytes(
    service: UrzaService, stub: Any
) -> None:
    payload = kernel_bytes(KEY, weight_floats=200_000)

    async def half() -> AsyncIterator[pb.UploadKernelRequest]:
        yield pb.UploadKernelRequest(**dataclasses.asdict(next(split(payload))))
        await asyncio.Event().wait()

    call = stub.UploadKernel(half())
    waiting = asyncio.ensure_future(_outcome(call))
    await until_held(service, len(payload))
    waiting.cancel()
    await until_held(service, 0)
    assert (await service.store.kernels.list(PageRequest())).items == ()


async def _outcome(call: Any) -> Any:
    return await call


async def test_field_reports_reach_the_library_through_nats_and_survive_its_restart(tmp_path: Path) -> None:
    config = UrzaConfig(database_url=f"sqlite:///{tmp_path}/urza.db", seed_templates=False)
    subject = build_subject("run-1", Kind.FIELD_REPORT)
    async with NatsServer(NatsServerConfig(store_dir=tmp_path / "nats")) as nats:
        bus = await NatsBus.connect(nats.url)
        await bus.ensure_streams()
        async with UrzaService(config, bus=bus, key_ring=KEY.ring()) as service:
            blueprint, _ = await service.store.blueprints.create(BlueprintDraft(name="b", ir=graph(1)))
            await bus.publish(subject, _report("r1", blueprint.id), durable=True)
            await _until_trials(service, blueprint.id, 1)
        # Published while the library is away, once under a known id: counted when it is back, and only once.
        for report_id in ("r1", "r2"):
            await bus.publish(subject, _report(report_id, blueprint.id), durable=True)
        async with UrzaService(config, bus=bus, key_ring=KEY.ring()) as service:
            await _until_trials(service, blueprint.id, 2)
        await bus.close()


def _report(report_id: str, blueprint_id: str) -> bytes:
    return wire.serialize(field_report(report_id, blueprint_id=blueprint_id, estimate=0.5))


async def _until_trials(service: UrzaService, blueprint_id: str, trials: int) -> None:
    async with asyncio.timeout(20):
        while True:
            statistics = await service.store.reports.statistics(blueprint_id)
            if statistics is not None and statistics.trials >= trials:
                assert statistics.trials == trials
                return


WRITER = """
import asyncio, json, sys
from esper.mesh.database import Database
from esper.services.urza.rules import BlueprintDraft
from esper.services.urza.store import UrzaStore
from esper.testing.urza_samples import graph

async def main() -> None:
    store = UrzaStore(Database.open(sys.argv[1]))
    await store.migrate()
    for number in range(100_000):
        blueprint, _ = await store.blueprints.create(BlueprintDraft(name="scale", ir=graph(number)))
        print(json.dumps([blueprint.id, blueprint.version]), flush=True)

asyncio.run(main())
"""


async def test_what_was_answered_is_there_after_the_process_was_killed(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/urza.db"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    writer = await asyncio.create_subprocess_exec(
        sys.executable, "-c", WRITER, url, stdout=asyncio.subprocess.PIPE, env=environment
    )
    assert writer.stdout is not None
    answered = [json.loads(await writer.stdout.readline()) for _ in range(20)]
    writer.kill()
    rest = await writer.stdout.read()
    await writer.wait()
    answered += [json.loads(line) for line in rest.splitlines() if line.endswith(b"]")]
    async with UrzaService(UrzaConfig(database_url=url, seed_templates=False), key_ring=KEY.ring()) as service:
        for blueprint_id, version in answered:
            assert (await service.store.blueprints.get(blueprint_id)).version == version
        newest = await service.store.blueprints.get("scale")
        assert len(answered) <= newest.version <= len(answered) + 1
        following, _ = await service.store.blueprints.create(BlueprintDraft(name="scale", ir=graph(200_000)))
        assert following.version == newest.version + 1

"""A kernel that was looked at before is asked for in few words, of a real library; never answered without it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from esper.contracts.blueprint import Blueprint
from esper.contracts.errors import CorruptDataError, InvalidInputError, NotFoundError
from esper.contracts.kernel import CompileSpec
from esper.execution.artifact import artifact_bytes
from esper.execution.keys import SigningKey
from esper.mesh import InProcessChannel
from esper.mesh.database import Database
from esper.services.tezzeret.content_key import content_key
from esper.services.tezzeret.library import KernelLookup
from esper.services.tezzeret.worker import TezzeretWorker
from esper.services.urza.server import register
from esper.services.urza.service import UrzaServicer
from esper.services.urza.store import UrzaStore
from esper.v1 import urza_service_pb2 as pb
from esper.v1.urza_service_pb2_grpc import UrzaServiceStub

KEY = SigningKey.generate()


class Library:
    """A library in memory, asked over its own RPCs; notes what it answers."""

    def __init__(self, store: UrzaStore, channel: InProcessChannel) -> None:
        self.store = store
        self.stub: Any = UrzaServiceStub(channel)
        self.answers: list[pb.GetKernelResponse] = []
        self.lookup = KernelLookup(self)

    async def GetKernel(self, request: Any, timeout: float) -> Any:  # noqa: ASYNC109
        self.answers.append(await self.stub.GetKernel(request, timeout=timeout))
        return self.answers[-1]

    def manifests(self) -> list[bool]:
        """Say of each answer so far whether it held a manifest."""
        return [answer.HasField("manifest") for answer in self.answers]


@pytest.fixture
async def library() -> AsyncIterator[Library]:
    async with Database.open("sqlite://") as database:
        store = UrzaStore(database, key_ring=KEY.ring())
        await store.migrate()
        channel = InProcessChannel()
        register(channel, UrzaServicer(store))
        yield Library(store, channel)
        await channel.close()


def kernel_of(spec: CompileSpec, blueprint: Blueprint) -> bytes:
    made = TezzeretWorker(signer=KEY).compile_blueprint(blueprint, site=spec.site, random_seed=spec.random_seed)
    return artifact_bytes(made.artifact)


async def test_a_second_look_is_answered_without_the_manifest_and_a_removed_kernel_is_not_there(
    library: Library, spec: CompileSpec, blueprint: Blueprint
) -> None:
    key = content_key(spec)
    record, _ = await library.store.kernels.put(kernel_of(spec, blueprint))
    assert record.content_key == key
    first = await library.lookup.find(spec, key)
    assert (first.artifact_id, first.size_bytes) == (record.artifact_id, record.size_bytes)
    assert await library.lookup.find(spec, key) == first
    assert library.manifests() == [True, False]
    assert await library.store.kernels.remove(record.artifact_id)
    with pytest.raises(NotFoundError, match="must name a stored kernel"):
        await library.lookup.find(spec, key)


async def test_a_kernel_that_was_made_anew_is_looked_through_again(
    library: Library, spec: CompileSpec, blueprint: Blueprint
) -> None:
    """Another manifest under the same key: its archive and the time it took to make are others."""
    key = content_key(spec)
    before, _ = await library.store.kernels.put(kernel_of(spec, blueprint))
    await library.lookup.find(spec, key)
    await library.store.kernels.remove(before.artifact_id)
    now, _ = await library.store.kernels.put(kernel_of(spec, blueprint))
    assert now.manifest != before.manifest
    found = await library.lookup.find(spec, key)
    assert found.artifact_id == now.artifact_id
    assert library.manifests() == [True, True]
    await library.lookup.find(spec, key)
    assert library.manifests() == [True, True, False]


async def test_a_size_that_does_not_fit_what_is_known_is_not_believed(
    library: Library, spec: CompileSpec, blueprint: Blueprint
) -> None:
    key = content_key(spec)
    await library.store.kernels.put(kernel_of(spec, blueprint))
    first = await library.lookup.find(spec, key)
    honest = library.stub.GetKernel

    def oversized(request: Any, timeout: float) -> Any:
        async def answer() -> Any:
            given = await honest(request, timeout=timeout)
            return given if given.HasField("manifest") else pb.GetKernelResponse(size_bytes=given.size_bytes + 1)

        return answer()

    library.stub.GetKernel = oversized
    assert await library.lookup.find(spec, key) == first
    assert library.manifests() == [True, False, True]


async def test_an_answer_without_a_manifest_says_nothing_to_who_knows_none(
    library: Library, spec: CompileSpec, blueprint: Blueprint
) -> None:
    record, _ = await library.store.kernels.put(kernel_of(spec, blueprint))

    async def silent(request: Any, timeout: float) -> Any:  # noqa: ASYNC109
        del request, timeout
        return pb.GetKernelResponse(size_bytes=record.size_bytes)

    library.stub.GetKernel = silent
    with pytest.raises(CorruptDataError, match="must give a legal manifest"):
        await library.lookup.find(spec, content_key(spec))


async def test_a_digest_of_another_length_is_refused(library: Library, spec: CompileSpec) -> None:
    with pytest.raises(InvalidInputError, match="manifest_sha256 must be 32 bytes"):
        await library.stub.GetKernel(
            pb.GetKernelRequest(content_key=content_key(spec), manifest_sha256=b"short"), timeout=5
        )

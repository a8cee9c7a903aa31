"""Kernels at rest on SQLite: rot, what sweeps take, uploads that go on; with bytes inside and outside the database."""

from __future__ import annotations

import asyncio
import uuid
from pathlib import Path
from typing import Any

import pytest

from esper.contracts.errors import ConfigError, UnavailableError
from esper.mesh.database import Database
from esper.services.urza.blobs import Blobs
from esper.services.urza.retention import RetentionPolicy
from esper.services.urza.rules import PageRequest
from esper.services.urza.server import UrzaConfig, UrzaService
from esper.services.urza.store import UrzaStore
from esper.testing.urza_contract import content
from esper.testing.urza_kernel_contract import (
    KEY,
    Clock,
    OutsideKernelStoreContract,
    RetentionContract,
    RotContract,
    UploadStoreContract,
)
from esper.testing.urza_samples import kernel_bytes
from tests import urza_on_sqlite

database, path = urza_on_sqlite.database, urza_on_sqlite.path
rot, texts_may_break = urza_on_sqlite.rot, urza_on_sqlite.texts_may_break


@pytest.fixture(params=["database", "file", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    urls = {"file": f"file://{tmp_path}/blobs", "memory": f"memory://urza-{uuid.uuid4().hex}"}
    return urls.get(request.param, "database")


class TestKernelStoreOutside(OutsideKernelStoreContract):
    @pytest.fixture(params=["file", "memory"])
    def place(self, request: pytest.FixtureRequest, tmp_path: Path) -> str:
        return f"file://{tmp_path}/blobs" if request.param == "file" else f"memory://urza-{uuid.uuid4().hex}"


class TestRot(RotContract):
    pass


class TestRetention(RetentionContract):
    pass


class TestUploadStore(UploadStoreContract):
    @pytest.fixture
    def place(self) -> str:
        return "database"


def test_a_place_that_nobody_knows_is_refused() -> None:
    with pytest.raises(ConfigError, match="blobs_url must be a URL that fsspec knows, such as file:///path"):
        Blobs("/a/path")
    with pytest.raises(ConfigError, match="blobs_url must have a scheme that fsspec knows, got gopher"):
        Blobs("gopher://secret@host/path")


async def test_a_place_that_is_away_is_unavailable_and_costs_no_kernel(database: Database, tmp_path: Path) -> None:
    place = tmp_path / "blobs"
    store = UrzaStore(database, key_ring=KEY.ring(), blobs=Blobs(f"file://{place}"))
    await store.migrate()
    payload = kernel_bytes(KEY)
    record, _ = await store.kernels.put(payload)
    await store.ping()
    place.rename(tmp_path / "elsewhere")
    with pytest.raises(UnavailableError, match=r"blobs_url file://\.\.\. cannot be used: .* its mark esper-blobs"):
        await content(store, record.artifact_id)
    with pytest.raises(UnavailableError, match="its mark esper-blobs is not there"):
        await store.ping()
    with pytest.raises(UnavailableError, match="its mark esper-blobs is not there"):
        await store.kernels.put(kernel_bytes(KEY, 1))
    assert not place.exists(), "a place that is gone is not made anew"
    (tmp_path / "elsewhere").rename(place)
    assert await content(store, record.artifact_id) == payload


async def test_kernels_stay_where_they_were_stored(database: Database, tmp_path: Path) -> None:
    outside = UrzaStore(database, key_ring=KEY.ring(), blobs=Blobs(f"file://{tmp_path}/blobs"))
    inside = UrzaStore(database, key_ring=KEY.ring())
    await outside.migrate()
    first, _ = await inside.kernels.put(kernel_bytes(KEY, 1))
    second, _ = await outside.kernels.put(kernel_bytes(KEY, 2))
    assert await content(outside, first.artifact_id) == kernel_bytes(KEY, 1)
    assert await content(outside, second.artifact_id) == kernel_bytes(KEY, 2)
    with pytest.raises(UnavailableError, match="blobs_url must name the place where kernels of this library rest"):
        await content(inside, second.artifact_id)
    assert await content(outside, second.artifact_id) == kernel_bytes(KEY, 2)


async def test_the_service_sweeps_by_itself(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"database_url": f"sqlite:///{tmp_path}/urza.db", "seed_templates": False}
    policy = RetentionPolicy(keep_unreferenced_days=1e-9, keep_young_days=0)
    config = UrzaConfig(**settings, retention=policy, sweep_interval_s=0.05, blobs_url=f"file://{tmp_path}/blobs")
    async with UrzaService(config, key_ring=KEY.ring()) as service:
        await service.store.kernels.put(kernel_bytes(KEY))
        async with asyncio.timeout(20):
            while (await service.store.kernels.list(PageRequest())).items or list((tmp_path / "blobs").glob("??/*")):
                pass


async def test_a_library_with_bytes_outside_goes_back_to_an_earlier_form(database: Database, tmp_path: Path) -> None:
    from esper.services.urza.migrate import migrate

    store = UrzaStore(database, key_ring=KEY.ring(), blobs=Blobs(f"file://{tmp_path}/blobs"), clock=Clock())
    await store.migrate()
    payload = kernel_bytes(KEY)
    await store.kernels.put(payload)
    await migrate(database, "r0003")
    await store.migrate()
    record, created = await store.kernels.put(payload)
    assert created
    assert await content(store, record.artifact_id) == payload

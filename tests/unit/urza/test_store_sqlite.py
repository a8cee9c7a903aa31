"""The store's contract on SQLite, in memory and in a file."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from esper.mesh.database import Database
from esper.mesh.driver_reads import ReadScript, Row
from esper.services.urza import kernel_store
from esper.services.urza.models import KernelRow
from esper.services.urza.store import UrzaStore
from esper.testing.urza_contract import (
    KEY,
    BlueprintStoreContract,
    KernelStoreContract,
    MigrationContract,
    ReportStoreContract,
    content,
)
from esper.testing.urza_query_contract import (
    BoundsContract,
    FiguresMigrationContract,
    KernelStatisticsContract,
    TagExpressionContract,
    TotalContract,
)
from esper.testing.urza_samples import kernel_bytes
from esper.testing.urza_template import lay_out


@pytest.fixture(params=["memory", "file"])
async def empty_database(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Database]:
    url = "sqlite://" if request.param == "memory" else f"sqlite:///{tmp_path}/state/urza.db"
    async with Database.open(url) as opened:
        yield opened


@pytest.fixture
async def database(empty_database: Database) -> Database:
    await lay_out(empty_database)
    return empty_database


class TestBlueprintStore(BlueprintStoreContract):
    pass


class TestKernelStore(KernelStoreContract):
    pass


class TestReportStore(ReportStoreContract):
    pass


class TestTagExpressions(TagExpressionContract):
    pass


class TestBounds(BoundsContract):
    pass


class TestKernelStatistics(KernelStatisticsContract):
    pass


class TestTotal(TotalContract):
    pass


class TestFiguresMigration(FiguresMigrationContract):
    pass


class TestMigrations(MigrationContract):
    pass


async def test_the_first_piece_of_a_transfer_does_not_wait_for_others(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted: list[range] = []
    read = kernel_store.find_pieces

    def noted(row: KernelRow, index: int, end: int) -> ReadScript[Sequence[Row] | None]:
        wanted.append(range(index, end))
        return read(row, index, end)

    monkeypatch.setattr(kernel_store, "find_pieces", noted)
    store = UrzaStore(database, key_ring=KEY.ring())
    payload = kernel_bytes(KEY, weight_floats=1_200_000)
    record, _ = await store.kernels.put(payload)
    assert await content(store, record.artifact_id) == payload
    assert wanted == [range(1), range(1, 9), range(9, 17), range(17, 19)]

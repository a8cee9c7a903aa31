"""The store's contract on SQLite, in memory and in a file."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from esper.mesh.database import Database
from esper.testing.urza_contract import (
    BlueprintStoreContract,
    KernelStoreContract,
    MigrationContract,
    ReportStoreContract,
)
from esper.testing.urza_query_contract import (
    BoundsContract,
    FiguresMigrationContract,
    KernelStatisticsContract,
    TagExpressionContract,
    TotalContract,
)
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

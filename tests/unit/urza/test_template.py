"""Tests begin from what the migrations make, though these run once."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import Connection, text

from esper.mesh.database import Database
from esper.services.urza.migrate import current_revision, migrate, newest_revision
from esper.testing.urza_template import lay_out, rows_of


def _schema(connection: Connection) -> list[tuple[str, ...]]:
    found = connection.execute(text("SELECT type, name, tbl_name, coalesce(sql, '') FROM sqlite_master"))
    return sorted(tuple(row) for row in found)


@pytest.mark.parametrize("place", ["memory", "file"])
async def test_a_library_that_was_laid_out_is_one_that_was_migrated(tmp_path: Path, place: str) -> None:
    urls = [f"sqlite:///{tmp_path}/{name}.db" if place == "file" else "sqlite://" for name in ("laid", "migrated")]
    async with Database.open(urls[0]) as laid, Database.open(urls[1]) as migrated:
        await lay_out(laid)
        await migrate(migrated)
        schema = await laid.run_sync(_schema)
        assert len(schema) > 20
        assert schema == await migrated.run_sync(_schema)
        assert await rows_of(laid) == await rows_of(migrated)
        assert await current_revision(laid) == newest_revision()

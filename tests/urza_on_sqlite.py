"""Fixtures of a library on SQLite whose rows a stranger can damage; modules import what they need by name."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from esper.mesh.database import Database
from esper.testing.urza_template import lay_out


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "urza.db"


@pytest.fixture
async def database(path: Path) -> AsyncIterator[Database]:
    async with Database.open(f"sqlite:///{path}") as opened:
        await lay_out(opened)
        yield opened


@pytest.fixture
def rot(path: Path) -> Any:
    """A stranger's connection knows no foreign keys."""

    async def write(table: str, column: str, value: Any) -> None:
        with sqlite3.connect(path) as connection:
            (kind,) = connection.execute(f"SELECT typeof({column}) FROM {table}").fetchone()
            shown = "CAST(? AS TEXT)" if kind == "text" else "?"
            assert connection.execute(f"UPDATE {table} SET {column} = {shown}", (value,)).rowcount == 1
        connection.close()

    return write


@pytest.fixture
def texts_may_break() -> bool:
    return True

"""`SqliteLog`: what was committed reaches the file without a commit that waits for it."""

from __future__ import annotations

import logging
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from esper.mesh.sqlite_log import SqliteLog


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.db"


@pytest.fixture
def writer(path: Path) -> Iterator[sqlite3.Connection]:
    """Stays open, for the last connection that closes would write the log back itself."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("CREATE TABLE numbers (number INTEGER)")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        yield connection


def in_file_alone(path: Path) -> list[int]:
    """Give what the file holds without its log."""
    copy = shutil.copy(path, path.with_name("alone.db"))
    with closing(sqlite3.connect(copy)) as connection:
        return [number for (number,) in connection.execute("SELECT number FROM numbers ORDER BY number")]


async def test_what_was_committed_is_written_back(path: Path, writer: sqlite3.Connection) -> None:
    log = SqliteLog(path, busy_timeout_s=5)
    writer.execute("INSERT INTO numbers VALUES (1)")
    assert in_file_alone(path) == []
    log.write_back()
    await log.close()
    assert in_file_alone(path) == [1]


async def test_after_its_end_it_writes_nothing(path: Path, writer: sqlite3.Connection) -> None:
    log = SqliteLog(path, busy_timeout_s=5)
    await log.close()
    writer.execute("INSERT INTO numbers VALUES (1)")
    log.write_back()
    await log.close()
    assert in_file_alone(path) == []


async def test_a_failure_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = SqliteLog(tmp_path / "missing" / "x.db", busy_timeout_s=5)
    log.write_back()
    under_way = log._under_way
    assert under_way is not None
    with caplog.at_level(logging.WARNING), pytest.raises(sqlite3.OperationalError, match="unable to open"):
        await under_way
    assert [record.message for record in caplog.records] == ["sqlite_log_not_written_back"]
    await log.close()

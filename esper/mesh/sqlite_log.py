"""SQLite's write-ahead log, written back into its file in the background, so that no commit of many pages waits for it.

A commit that takes the log beyond ``LOG_PAGES`` writes it back by itself, before it returns: that keeps the log small
where nobody asks.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

log = logging.getLogger(__name__)

LOG_PAGES: Final = 4_000
"""Pages of the log beyond which a commit writes it back; 16 MB, four times what SQLite would take."""


class SqliteLog:
    """Writes one file's log back when asked. Belongs to one event loop."""

    def __init__(self, path: Path, *, busy_timeout_s: float) -> None:
        self._path = path
        self._busy_timeout_s = busy_timeout_s
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="esper-database-log")
        self._connection: sqlite3.Connection | None = None
        self._under_way: asyncio.Future[None] | None = None
        self._closed = False

    def write_back(self) -> None:
        """Have what was committed so far written back soon; what is committed meanwhile, the next time.

        After `close` there is nothing to do: the last connection that closes writes all of it back.
        """
        if self._closed or self._under_way is not None:
            return
        self._under_way = asyncio.get_running_loop().run_in_executor(self._thread, self._write_back)
        self._under_way.add_done_callback(self._done)

    async def close(self) -> None:
        """Wait for what is under way, then let go of the connection. Idempotent."""
        self._closed = True
        await asyncio.to_thread(self._thread.shutdown)
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _write_back(self) -> None:
        if self._connection is None:
            self._connection = sqlite3.connect(
                self._path, timeout=self._busy_timeout_s, isolation_level=None, check_same_thread=False
            )
            self._connection.execute("PRAGMA synchronous = FULL")
        # Passive: it waits for nobody, and nobody waits for it; pages that a reader still needs stay for the next time.
        self._connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()

    def _done(self, future: asyncio.Future[None]) -> None:
        self._under_way = None
        error = None if future.cancelled() else future.exception()
        if error is not None:  # nothing is lost: the log stays, and a later commit writes it back
            log.warning("sqlite_log_not_written_back", extra={"error": str(error)})

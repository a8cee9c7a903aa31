"""The second cache tier as a local directory of signed artefacts: ``<root>/<2 hex>/<artifact id>.kernel``.

Bounded in bytes: what was read or written longest ago goes first. Several processes may share a directory; each entry
is written whole or not at all.
"""

from __future__ import annotations

import asyncio
import logging
import os
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from esper.contracts.errors import (
    CapacityExceededError,
    CorruptDataError,
    InvalidInputError,
    NotFoundError,
    StorageFullError,
    UnavailableError,
)
from esper.execution.artifact import MAX_ARTIFACT_BYTES, require_artifact_id
from esper.execution.durable_file import TEMPORARY_SUFFIX, replace_file

log = logging.getLogger(__name__)

SUFFIX: Final = ".kernel"
"""Suffix of an entry's file."""

_STALE_AFTER_S: Final = 3600.0
_EVICT_TO: Final = 0.9


class DirectoryTier:
    """A directory of artefacts; safe to call from several loops and threads at once. File work runs in threads."""

    def __init__(self, root: Path, *, max_bytes: int = 8 * 1024**3) -> None:
        """Use a directory, made when it is not there.

        Raises:
            InvalidInputError: ``max_bytes`` is not above 0.
            UnavailableError: The directory cannot be made or read.
        """
        if max_bytes < 1:
            raise InvalidInputError.of("max_bytes", "be > 0 bytes", max_bytes)
        self._root = root
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        try:
            root.mkdir(parents=True, exist_ok=True)
            self._remove_stale()
            self._held_bytes = sum(size for _, size, _ in self._entries())
        except OSError as error:
            raise UnavailableError(f"cache directory {root} cannot be used: {error}") from error

    @property
    def bytes_held(self) -> int | None:
        """Bytes of all entries, as far as this process knows."""
        return self._held_bytes

    async def read(self, artifact_id: str) -> bytes:
        """Give an entry's bytes and note that it was used.

        Raises:
            NotFoundError: There is no such entry.
            CorruptDataError: The entry is no regular file, or larger than any artefact.
            UnavailableError: The file cannot be read.
        """
        return await asyncio.to_thread(self._read, self.path_of(artifact_id))

    async def write(self, artifact_id: str, data: bytes) -> None:
        """Keep an entry; on disk when this returns.

        Raises:
            StorageFullError: The disk has no room; nothing half-written stays.
            CapacityExceededError: The entry alone is larger than the directory may be.
            UnavailableError: The file cannot be written.
        """
        path = self.path_of(artifact_id)
        if len(data) > self._max_bytes:
            raise CapacityExceededError(
                f"artefact {artifact_id} must be at most {self._max_bytes} bytes, got {len(data)} bytes"
            )
        await asyncio.to_thread(self._write, path, data)

    async def erase(self, artifact_id: str) -> None:
        """Drop an entry; no error when there is none.

        Raises:
            UnavailableError: The file cannot be removed.
        """
        await asyncio.to_thread(self._erase, self.path_of(artifact_id))

    async def close(self) -> None:
        """Nothing is held open."""

    def path_of(self, artifact_id: str) -> Path:
        """Give the file of an entry.

        Raises:
            InvalidInputError: The id is not well formed.
        """
        require_artifact_id(artifact_id)
        return self._root / artifact_id[1:3] / f"{artifact_id}{SUFFIX}"

    def _read(self, path: Path) -> bytes:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            with os.fdopen(descriptor, "rb") as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_ARTIFACT_BYTES:
                    raise CorruptDataError(
                        f"cache entry {path.name} must be a file of at most {MAX_ARTIFACT_BYTES} bytes"
                    )
                data = file.read()
                os.utime(file.fileno())
        except FileNotFoundError as error:
            raise NotFoundError(f"cache directory {self._root} has no {path.stem}") from error
        except OSError as error:
            raise UnavailableError(f"cache entry {path.name} cannot be read: {error.strerror}") from error
        return data

    def _write(self, path: Path, data: bytes) -> None:
        with self._lock:
            try:
                path.parent.mkdir(exist_ok=True)
                before = _size_of(path)
                replace_file(path, data, mode=0o644)
            except StorageFullError:
                raise
            except OSError as error:
                raise UnavailableError(f"cache entry {path.name} cannot be written: {error}") from error
            self._held_bytes += len(data) - before
            if self._held_bytes > self._max_bytes:
                self._evict(keep=path)

    def _erase(self, path: Path) -> None:
        with self._lock:
            try:
                size = _size_of(path)
                path.unlink(missing_ok=True)
            except OSError as error:
                raise UnavailableError(f"cache entry {path.name} cannot be removed: {error.strerror}") from error
            self._held_bytes -= size

    def _evict(self, *, keep: Path) -> None:
        """Remove the entries used longest ago; counts anew, since other processes may write here too."""
        entries = sorted(self._entries())
        self._held_bytes = sum(size for _, size, _ in entries)
        bound = int(self._max_bytes * _EVICT_TO)
        for _, size, path in entries:
            if self._held_bytes <= bound:
                return
            if path != keep:
                path.unlink(missing_ok=True)
                self._held_bytes -= size
                log.info("cache_entry_evicted", extra={"artifact_id": path.stem, "size_bytes": size})

    def _entries(self) -> Iterator[tuple[float, int, Path]]:
        """Give time of last use, size and path of every entry."""
        for path in self._root.glob(f"??/*{SUFFIX}"):
            try:
                status = path.lstat()
            except FileNotFoundError:
                continue
            yield status.st_mtime, status.st_size, path

    def _remove_stale(self) -> None:
        """Remove what writers that died left unfinished."""
        oldest = time.time() - _STALE_AFTER_S
        for path in self._root.glob(f"??/.*{TEMPORARY_SUFFIX}"):
            if path.lstat().st_mtime < oldest:
                path.unlink(missing_ok=True)


def _size_of(path: Path) -> int:
    try:
        return path.lstat().st_size
    except FileNotFoundError:
        return 0

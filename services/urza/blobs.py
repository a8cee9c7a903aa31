"""Bytes of kernels outside the database: a directory, a bucket, or whatever else ``fsspec`` reaches by URL.

    URL/esper-blobs          a mark: where it is missing, the place itself is away and nothing is judged by its absence
    URL/ab/abcdef...         one copy of one kernel under its copy id; written once, never changed

A blob counts only once a kernel's row names it, so one that was cut short is never served.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable
from typing import Final, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from esper.contracts.errors import ConfigError, StorageFullError, UnavailableError
from esper.services.urza.kernel_rows import COPY_ID

T = TypeVar("T")

_MARK: Final = "esper-blobs"
_FULL: Final = {errno.ENOSPC, errno.EDQUOT}


class Blobs:
    """Copies of kernels under a URL. Safe for many tasks; the file system's calls run in threads."""

    def __init__(self, url: str) -> None:
        """Name the place; `prepare` reaches it.

        Args:
            url: ``file:///path``, ``memory://name``, ``s3://bucket/path`` or another that ``fsspec`` knows. All
                replicas of a library must see the same bytes there.

        Raises:
            ConfigError: The URL has no scheme, or one for which nothing is installed.
        """
        if "://" not in url:
            raise ConfigError(
                "blobs_url must be a URL that fsspec knows, such as file:///path, got one without a scheme",
                parameter="blobs_url",
            )
        scheme = url.partition("://")[0]
        try:
            self._files, self._root = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise ConfigError(
                f"blobs_url must have a scheme that fsspec knows, got {scheme}: {error}", parameter="blobs_url"
            ) from error
        self._shown = f"{scheme}://..."  # the rest may hold a secret

    async def prepare(self) -> None:
        """Make the place ready: its root and its mark.

        Raises:
            UnavailableError: It cannot be reached or written.
        """
        await self._run(self._prepare)

    async def ping(self) -> None:
        """Return when the place is there.

        Raises:
            UnavailableError: It is not.
        """
        await self._run(self._require_mark)

    async def write(self, copy_id: str, payload: bytes) -> None:
        """Write one copy; durable where the place is a directory.

        Raises:
            UnavailableError: The place cannot be reached.
            StorageFullError: It has no room left.
        """
        path = self._path(copy_id)
        await self._run(lambda: self._write(path, payload))

    async def read(self, copy_id: str, start: int, end: int) -> bytes | None:
        """Give the bytes from ``start`` to ``end`` of a copy, fewer where it ends; ``None`` where there is no copy.

        Raises:
            UnavailableError: The place cannot be reached.
        """
        path = self._path(copy_id)
        return await self._run(lambda: self._read(path, start, end))

    async def delete(self, copy_id: str) -> None:
        """Remove a copy; one that is not there is none.

        Raises:
            UnavailableError: The place cannot be reached.
        """
        path = self._path(copy_id)
        await self._run(lambda: self._delete(path))

    def _path(self, copy_id: str) -> str:
        assert COPY_ID.fullmatch(copy_id)
        return f"{self._root}/{copy_id[:2]}/{copy_id}"

    def _prepare(self) -> None:
        mark = f"{self._root}/{_MARK}"
        if not self._files.exists(mark):
            self._files.makedirs(self._root, exist_ok=True)
            self._put(mark, b"Kernels of Esper's library; its database names them.\n")

    def _require_mark(self) -> None:
        if not self._files.exists(f"{self._root}/{_MARK}"):
            raise FileNotFoundError(f"its mark {_MARK} is not there")

    def _write(self, path: str, payload: bytes) -> None:
        try:
            self._put(path, payload)
        except FileNotFoundError:
            self._require_mark()  # or a place that is gone would be made anew, and hold this copy alone
            self._files.makedirs(path.rpartition("/")[0], exist_ok=True)
            self._put(path, payload)

    def _put(self, path: str, payload: bytes) -> None:
        with self._files.open(path, "wb") as file:
            file.write(payload)
            if isinstance(self._files, LocalFileSystem):
                file.flush()
                os.fsync(file.fileno())

    def _read(self, path: str, start: int, end: int) -> bytes | None:
        try:
            found: bytes = self._files.cat_file(path, start=start, end=end)
        except FileNotFoundError:
            self._require_mark()
            return None
        except OSError as error:  # object stores refuse a range that begins at the end, or after it
            if error.errno != errno.EINVAL or start < self._files.size(path):
                raise
            return b""
        return found

    def _delete(self, path: str) -> None:
        try:
            self._files.rm_file(path)
        except FileNotFoundError:
            self._require_mark()

    async def _run(self, work: Callable[[], T]) -> T:
        try:
            return await asyncio.to_thread(work)
        except Exception as error:  # every file system raises its own kinds
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            if isinstance(error, OSError) and error.errno in _FULL:
                raise StorageFullError(f"blobs_url {self._shown} has no room left: {reason}") from error
            raise UnavailableError(f"blobs_url {self._shown} cannot be used: {reason}") from error

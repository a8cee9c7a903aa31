"""Writing files so that a reader sees all of the old, all of the new, or nothing: temporary file, fsync, rename."""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Final

from esper.contracts.errors import StorageFullError

TEMPORARY_SUFFIX: Final = ".tmp"
"""Suffix of files that are not finished; one left by a crash may be removed."""

_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def replace_file(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Write a file, taking the place of one that is there; on disk when this returns.

    Raises:
        StorageFullError: No room; nothing half-written stays.
        OSError: The directory cannot be written.
    """
    _write(path, data, mode, lambda temporary: temporary.replace(path))


def link_new(path: Path, data: bytes, *, mode: int = 0o600) -> bool:
    """Write a file unless one is there; say whether this call wrote it.

    Raises:
        StorageFullError: No room; nothing half-written stays.
        OSError: The directory cannot be written.
    """
    try:
        _write(path, data, mode, path.hardlink_to)
    except FileExistsError:
        return False
    return True


def _write(path: Path, data: bytes, mode: int, publish: Callable[[Path], object]) -> None:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}{TEMPORARY_SUFFIX}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        publish(temporary)
    except OSError as error:
        if error.errno in _FULL:
            raise StorageFullError(f"{path} must have room for {len(data)} bytes, got: {error.strerror}") from error
        raise
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
    _sync_directory(path.parent)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Files that are there whole or not at all."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path
from typing import Final

from esper.contracts.errors import StorageFullError

_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def write_atomically(path: Path, payload: bytes) -> None:
    """Write a file that appears under its name only when all of it is on the device.

    Raises:
        StorageFullError: There is no room; nothing stays behind.
        OSError: The device failed in another way; nothing stays behind.
    """
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".partial-", delete=False) as file:
            temporary = file.name
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)  # noqa: PTH105 - the rename is the point where the file comes to be
        _sync_directory(path.parent)
    except OSError as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        if error.errno in _FULL:
            message = f"{path} must have room for {len(payload)} bytes, got {error.strerror}"
            raise StorageFullError(message, parameter=str(path)) from error
        raise


def _sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

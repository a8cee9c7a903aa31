"""Files that commands write."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from esper.contracts.errors import AlreadyExistsError, StorageFullError, UnavailableError

Force = Annotated[bool, typer.Option("--force", help="Take the place of a file that is there.")]


def write_file(file: Path, data: bytes, *, force: bool) -> None:
    """Write a file as a whole, readable by everybody; one that is there stays unless ``force`` says otherwise.

    Raises:
        AlreadyExistsError: One is there.
        StorageFullError: No room.
        UnavailableError: The place cannot be written to.
    """
    from esper.execution.durable_file import link_new, replace_file  # torch is behind it: only who needs it waits

    try:
        if force:
            replace_file(file, data, mode=0o644)
        elif not link_new(file, data, mode=0o644):
            raise AlreadyExistsError(f"file must not be there yet (or take --force), got {file}", parameter="file")
    except (FileExistsError, StorageFullError):
        raise
    except OSError as error:
        raise UnavailableError(f"file must be writable, got {file}: {error.strerror}", parameter="file") from error

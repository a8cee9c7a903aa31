"""Failed allocations told from other errors: they say nothing of what was tried, only of the room there was for it."""

from __future__ import annotations

import errno
from typing import Final

from google.protobuf.message import EncodeError

from esper.contracts.errors import CapacityExceededError

MEMORY: Final = "memory"
"""Parameter of the error."""

_WORDS: Final = ("can't allocate memory", "Cannot allocate memory", "bad_alloc")


def raise_if_out_of_memory(error: Exception) -> None:
    """Raise a typed error in place of a failed allocation, whichever library asked for the memory; else return.

    Protobuf raises its `EncodeError`; torch's CPU allocator and C++ (``std::bad_alloc``) have no type of their own.

    Raises:
        CapacityExceededError: ``error`` is a failed allocation.
    """
    if (
        isinstance(error, MemoryError | EncodeError)
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or (isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS))
    ):
        words = " ".join(str(error).split())[:200]
        text = f"memory must suffice, it ran out: {type(error).__name__}: {words}"
        raise CapacityExceededError(text.rstrip(": "), parameter=MEMORY) from error

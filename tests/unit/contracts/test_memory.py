"""Failed allocations are told from every other error."""

from __future__ import annotations

import errno

import pytest
import torch
from google.protobuf.message import EncodeError

from esper.contracts.errors import CapacityExceededError
from esper.contracts.memory import MEMORY, raise_if_out_of_memory


def _of_torch() -> Exception:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    return caught.value


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        EncodeError("Failed to serialize proto"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("std::bad_alloc"),
        _of_torch(),
    ],
    ids=["python", "protobuf", "system", "c++", "torch"],
)
def test_a_failed_allocation_is_a_bound_that_broke(error: Exception) -> None:
    with pytest.raises(CapacityExceededError, match="memory must suffice, it ran out") as caught:
        raise_if_out_of_memory(error)
    assert caught.value.parameter == MEMORY
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    "error", [RuntimeError("shape"), OSError(errno.ENOSPC, "full"), ValueError("can't allocate memory")]
)
def test_other_errors_are_left_alone(error: Exception) -> None:
    raise_if_out_of_memory(error)

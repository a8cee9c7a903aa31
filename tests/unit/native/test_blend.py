"""The native blend against the same sum in torch (csrc/tests/blend_contract.h holds it against exact arithmetic)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from esper.contracts.errors import InvalidInputError, UnavailableError
from esper.execution._native import all_finite, blend, cuda_available, cuda_blend

DTYPES = ("float32", "float16", "bfloat16")


def in_torch(h: Tensor, deltas: list[Tensor], alpha: Tensor) -> Tensor:
    total = h.float()
    for delta, weight in zip(deltas, alpha, strict=True):
        total = total + weight * delta.float()
    return total.to(h.dtype)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(DTYPES), st.integers(0, 300), st.integers(0, 16), st.integers(0, 2**31))
def test_it_gives_the_bits_of_torch(name: str, numel: int, num_deltas: int, seed: int) -> None:
    torch.manual_seed(seed)
    dtype = getattr(torch, name)
    h, alpha = torch.randn(numel).to(dtype), torch.rand(num_deltas) + 0.01
    deltas = [torch.randn(numel).to(dtype) for _ in range(num_deltas)]
    out = torch.empty_like(h)
    blend(h.data_ptr(), [d.data_ptr() for d in deltas], alpha.data_ptr(), out.data_ptr(), numel, name)
    assert torch.equal(out, in_torch(h, deltas, alpha))


def test_the_result_may_replace_the_host() -> None:
    h, delta, alpha = torch.arange(5.0), torch.ones(5), torch.tensor([0.5])
    blend(h.data_ptr(), [delta.data_ptr()], alpha.data_ptr(), h.data_ptr(), 5, "float32")
    assert h.tolist() == [0.5, 1.5, 2.5, 3.5, 4.5]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, [], 0, 1, 1, "float64"), "dtype must be 'float32', 'float16' or 'bfloat16', got 'float64'"),
        ((1, [1] * 17, 1, 1, 1, "float32"), "deltas must be at most 16, got 17"),
        ((0, [], 0, 1, 1, "float32"), "operands must have an address each, got a null pointer"),
    ],
)
def test_bad_input_is_named(arguments: Any, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        blend(*arguments)
    with pytest.raises(InvalidInputError, match=message):
        cuda_blend(*arguments, 0)


@pytest.mark.skipif(cuda_available(), reason="a CUDA device is there")
def test_without_a_device_it_says_so() -> None:
    with pytest.raises(UnavailableError, match="cuda"):
        cuda_blend(0, [], 0, 0, 0, "float32", 0)


def test_arrays_are_looked_at_for_what_is_not_finite() -> None:
    arrays = [torch.ones(300), torch.full((7,), torch.finfo(torch.float32).max)]
    at, counts = [array.data_ptr() for array in arrays], [array.numel() for array in arrays]
    assert all_finite(at, counts)
    assert all_finite([], [])
    arrays[0][299] = torch.nan
    assert not all_finite(at, counts)
    with pytest.raises(InvalidInputError, match="numels must be one an array, 2, got 1"):
        all_finite(at, [300])
    with pytest.raises(InvalidInputError, match="arrays must have an address each, got a null pointer"):
        all_finite([0], [1])

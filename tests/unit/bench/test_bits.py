"""Tensors compared to the bit."""

from __future__ import annotations

import pytest
import torch

from bench.bits import differing_bits, differing_values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_equal_values_do_not_differ(dtype: torch.dtype) -> None:
    one = torch.tensor([[0, 1], [1, 1]]).to(dtype)
    assert (differing_bits(one, one.clone()), differing_values(one, one.clone())) == (0, 0)


def test_a_sign_of_zero_is_one_bit_of_one_value() -> None:
    assert differing_bits(torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0])) == 1
    assert differing_values(torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0])) == 1


def test_a_value_counts_once_however_many_of_its_bits_differ() -> None:
    one, other = torch.tensor([0, 7, 0, 3]), torch.tensor([0, 0, 0, 0])
    assert (differing_bits(one, other), differing_values(one, other)) == (5, 2)


def test_part_of_a_larger_tensor_is_looked_at_alone() -> None:
    one, other = torch.zeros(4), torch.tensor([1.0, 0.0, 0.0, 1.0])
    assert differing_values(one[1:3], other[1:3]) == 0
    assert differing_values(one[2:], other[2:]) == 1


def test_other_shapes_and_types_differ_in_everything() -> None:
    assert differing_bits(torch.zeros(2), torch.zeros(3)) == 96
    assert differing_bits(torch.zeros(2), torch.zeros(2, dtype=torch.int32)) == 64
    assert differing_values(torch.zeros(2), torch.zeros(3)) == 2
    assert (differing_bits(torch.zeros(0), torch.zeros(0)), differing_values(torch.zeros(0), torch.zeros(0))) == (0, 0)

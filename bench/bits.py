"""Comparing tensors to the bit."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def differing_bits(ours: Tensor, other: Tensor) -> int:
    """Give how many bits of two tensors differ: every bit of the larger where their shapes or types do."""
    if ours.shape != other.shape or ours.dtype != other.dtype:
        return 8 * max(ours.nbytes, other.nbytes)
    return int(np.unpackbits(_bytes(ours) ^ _bytes(other)).sum())


def differing_values(ours: Tensor, other: Tensor) -> int:
    """Give how many values of two tensors differ in a bit or more: all of ours where their shapes or types do."""
    if ours.shape != other.shape or ours.dtype != other.dtype:
        return ours.numel()
    apart = _bytes(ours) != _bytes(other)
    return int(apart.reshape(ours.numel(), -1).any(axis=1).sum()) if ours.numel() else 0


def _bytes(value: Tensor) -> NDArray[np.uint8]:
    """Give the bytes of a tensor, one value after the other."""
    bytes_of: NDArray[np.uint8] = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return bytes_of

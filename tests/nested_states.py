"""Nested states of a run, compared to the bit."""

from __future__ import annotations

from typing import Any

import torch


def differences(left: Any, right: Any, path: str = "") -> list[str]:
    """Give the places where two nested states differ, to the bit."""
    if isinstance(left, torch.Tensor):
        return [] if torch.equal(left, right) else [path]
    if isinstance(left, dict):
        if list(left) != list(right):
            return [f"{path}: {list(left)} != {list(right)}"]
        return [found for key in left for found in differences(left[key], right[key], f"{path}.{key}")]
    if isinstance(left, list | tuple):
        if len(left) != len(right):
            return [path]
        return [f for i, pair in enumerate(zip(left, right, strict=True)) for f in differences(*pair, f"{path}.{i}")]
    if type(left).__module__ == "numpy":
        return [] if (left == right).all() else [path]
    return [] if left == right else [f"{path}: {left!r} != {right!r}"]

"""The FLOPs of a host's forward pass."""

from __future__ import annotations

import torch

from esper.blueprints.flops import count_flops
from esper.execution.overrides import GrowingModel, evaluating


def forward_flops(model: GrowingModel, example: torch.Tensor) -> int:
    """Give the FLOPs of one forward pass of one example; a multiply-add counts 2, elementwise work is not counted."""
    with evaluating(model):
        return count_flops(lambda: model(example))

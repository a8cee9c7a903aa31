"""Counting forward FLOPs with torch's own counter."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from esper.execution.overrides import GrowingModel, evaluating


def forward_flops(model: GrowingModel, example: torch.Tensor) -> int:
    """Give the FLOPs of one forward pass of one example; a multiply-add counts 2, elementwise work is not counted."""
    with evaluating(model), FlopCounterMode(display=False) as counter:
        model(example)
    return int(counter.get_total_flops())

"""Whether a pass with lanes gave what its lanes give alone: held against a pass of a few of its examples.

Rows that stand where lanes have them, and that know nothing of each other, are the same in both: at every layer at
which lanes may differ, in the model's output, and in the loss. They are not where a host normalises by the batch, folds
a sequence in front of it, draws random numbers in eval mode or knows its batch size; nor need this be told of any of
it. The pass holds other examples beside the few, so that this shows whatever the seeds do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from esper.execution.lanes import LanePass

_TRIED_EXAMPLES: Final = 4


def num_tried(num_examples: int) -> int:
    """Give how many examples of a batch are tried alone: at most half of them; 0 where none can be."""
    return min(_TRIED_EXAMPLES, num_examples // 2)


def show_end(one: LanePass, outputs: Any, losses: Tensor) -> None:
    """Keep of a pass's end what a check is to see: losses, and outputs that are of single examples."""
    blocks = one.num_examples * len(one.groups)
    for value in (*tree_leaves(outputs), losses):
        if isinstance(value, Tensor) and value.dim() and value.is_floating_point() and len(value) % blocks == 0:
            one.show(value)


def difference(alone: LanePass, together: LanePass) -> str:
    """Say in words how the last lane of a pass differs from a pass of its first examples alone; empty where not.

    Alike are values whose difference is at most the square root of their type's rounding unit, over the largest of
    them: 3.5e-4 for float32, 0.09 for bfloat16.

    REQUIRES: both have shown the same number of examples.
    """
    if not alone.is_sound or alone.visits != together.visits or len(alone.shown) != len(together.shown):
        return "alone it comes by other layers or rows"
    tolerance = _tolerance(alone.shown)
    for own, value in zip(alone.shown, together.shown, strict=True):
        if own.shape != value.shape:
            return f"a value of shape {tuple(value.shape)} has shape {tuple(own.shape)} alone"
        # Not "greater than": a difference that is no number is one.
        if own.numel() and not float((value - own).abs().max()) <= tolerance * float(own.abs().max()):
            return "a value is another alone"
    return ""


def _tolerance(values: Sequence[Tensor]) -> float:
    types = {value.dtype for value in values}
    for device in {value.device.type for value in values}:
        if torch.is_autocast_enabled(device):
            types.add(torch.get_autocast_dtype(device))
    return float(max(torch.finfo(found).eps for found in types) ** 0.5)

"""Seeds of a model that several ranks train together: what a rank owes the others.

Ranks average gradients in one order that all of them keep to. A rank on which a seed takes no part in a pass, because
its kernel failed there, has no gradients for it, and the others wait for them: so it gives zeros (:func:`with_absent`).
For the same reason no rank cuts a seed off by itself: at a step boundary they agree on it (:func:`agree_on_open`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn

if TYPE_CHECKING:
    from esper.execution.seed import Seed


def is_sharded(module: nn.Module) -> bool:
    """Whether ``fully_shard`` manages the module, and reduces its gradients inside the backward pass.

    The parameters do not tell: inside a pass, where this is asked, they are whole. The mark is one that ``fully_shard``
    leaves for dynamo on every module of a unit, under a private name.
    """
    return "_is_fsdp_managed_module" in module.__dict__


def with_absent(total: Tensor, absent: Sequence[Seed]) -> Tensor:
    """Give a copy of a layer's output through which the parameters of these seeds get gradients of zero."""
    places = [place for seed in absent for place in seed.parameter_places()]
    parameters = [found for own, name in places if (found := own[name]) is not None and found.requires_grad]
    if not parameters or not torch.is_grad_enabled():
        return total
    given: Tensor = _Absent.apply(total, *parameters)  # type: ignore[no-untyped-call]
    return given


class _Absent(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, total: Tensor, *parameters: Tensor) -> Tensor:
        # Not the parameters themselves: fully_shard takes their memory away before the backward pass.
        ctx.kinds = [(value.shape, value.dtype, value.device) for value in parameters]
        return total.clone()  # what autograd has of a view may not be written in place, which hosts do

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return (grad, *(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.kinds))


def agree_on_open(seeds: Sequence[Seed]) -> list[Seed]:
    """Give those seeds whose breaker is open on any rank. All ranks must ask, of the same seeds, at the same step."""
    agreed = []
    for ranks in dict.fromkeys(seed.breaker.ranks for seed in seeds):
        among = [seed for seed in seeds if seed.breaker.ranks is ranks]
        is_open = torch.tensor(
            [seed.breaker.is_open for seed in among], dtype=torch.int32, device=among[0].alpha.device
        )
        distributed.all_reduce(is_open, op=distributed.ReduceOp.MAX, group=ranks)
        agreed += [seed for seed, found in zip(among, is_open.tolist(), strict=True) if found]
    return agreed

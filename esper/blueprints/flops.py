"""Counting the FLOPs of one thread's work, whatever other threads do meanwhile.

``torch.utils.flop_counter.FlopCounterMode`` uses the same formulas, but sets hooks on every module of the process:
beside a compile in another thread (as in the embedded mesh) it breaks that compile. It also leaves out attention on the
CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


def _cpu_attention_flops(query: torch.Tensor, key: torch.Tensor, *_: Any, **__: Any) -> int:
    """Count the two products of a (batch, heads, length, features) attention."""
    shape: Sequence[int] = key.shape
    return 4 * math.prod(query.shape) * shape[-2]


_OURS: Final[Mapping[Any, Callable[..., int]]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention_flops,
}


class ThreadFlops(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what the thread that enters it computes, forward and backward: ``total``.

    A multiply-add counts 2; matrix products, convolutions and attention are counted, elementwise work is not, nor what
    is done on meta tensors, which have shapes and no values.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total: int = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        named = kwargs or {}
        out = func(*args, **named)
        operator = func._overloadpacket
        if args and isinstance(args[0], torch.Tensor) and args[0].is_meta:
            return out
        if operator in _OURS:
            self.total += _OURS[operator](*args, **named)
        elif operator in flop_registry:
            self.total += int(flop_registry[operator](*args, **named, out_val=out))
        return out


def count_flops(run: Callable[[], object]) -> int:
    """Give the operations of matrix products, convolutions and attention that a call performs."""
    counter = ThreadFlops()
    with counter:
        run()
    return counter.total

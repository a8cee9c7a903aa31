"""Counting the FLOPs of one thread's work, whatever other threads do meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class ThreadFlops(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what the thread that enters it computes, forward and backward, by torch's own formulas.

    A multiply-add counts 2, elementwise work nothing. ``torch.utils.flop_counter.FlopCounterMode`` gives the same sums
    but sets hooks on every module of the process, which breaks compilers that work in other threads.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total: int = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula: Callable[..., int] | None = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += int(formula(*args, **kwargs, out_val=out))
        return out


def count_flops(work: Callable[[], object]) -> int:
    """Give the FLOPs of a piece of work."""
    counter = ThreadFlops()
    with counter:
        work()
    return counter.total

"""What one pass of a kernel costs besides its result: how long it holds training up, and the memory that it makes."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from esper.execution.circuit_breaker import FailureKind, KernelFaultError

WATCH_INTERVAL_PASSES: Final = 16
"""Every so many passes of a kernel, all that it computes is watched; in the others what it is given and gives back."""


class Deadline:
    """The time that one pass of a kernel may take; a pass that is over it has failed, though its result came.

    Python cannot end a pass that never comes back. Kernels made of blueprints have no loops; the limit is for others.
    """

    __slots__ = ("_limit_ms", "_start_ns")

    def __init__(self, limit_ms: float) -> None:
        self._limit_ms = limit_ms
        self._start_ns = time.perf_counter_ns()

    def check(self) -> None:
        """Check the time taken so far.

        Raises:
            KernelFaultError: It is over the limit.
        """
        elapsed_ms = (time.perf_counter_ns() - self._start_ns) / 1e6
        if elapsed_ms > self._limit_ms:
            detail = f"a pass must take at most {self._limit_ms:g} ms, took {elapsed_ms:.0f} ms"
            raise KernelFaultError(FailureKind.SLOW, detail)


class MemoryWatch(TorchDispatchMode):
    """Notes the memory of every tensor that is computed inside it, but for the module's own state and what is known."""

    def __init__(self, module: nn.Module, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        state = (*module.parameters(), *module.buffers(), *known)
        self._own = {value.untyped_storage()._cdata for value in state}
        self._seen: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        del types
        found = func(*args, **(kwargs or {}))
        for value in tree_leaves(found):
            if isinstance(value, Tensor) and value.layout is torch.strided:
                storage = value.untyped_storage()
                if storage._cdata not in self._own:
                    self._seen[storage._cdata] = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        return found

    def storages(self) -> list[StorageWeakRef]:
        """Give what was computed, each piece of memory once."""
        return list(self._seen.values())


def storages_of(values: Iterable[Tensor]) -> list[StorageWeakRef]:
    """Give the memory of tensors."""
    return [StorageWeakRef(value.untyped_storage()) for value in values]  # type: ignore[no-untyped-call]

"""What stops gradients of kernels' parameters that are not finite where the pass was a compiled graph.

A graph gates what its kernels read (``device_guard``); the gradients of their own parameters leave it as they are, and
one norm over all gradients, as clipping takes it, would spread one that is not finite over the host. So a parameter
has a hook from the first time on that its kernel is traced.

    CPU      when the backward pass is over, the kernel's gradients are zeroed and a failure is counted; not where the
             layer's own gradients are not finite either, for then it was the loss
    device   each gradient is zeroed there; nothing waits, and nothing is counted
    ranks    each gradient is zeroed, and counted on the CPU, before it is averaged; the loss is not asked

Under float16 what overflows is left to a gradient scaler, as ``gradient_gate`` does it.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Final
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.utils.weak import WeakIdKeyDictionary

from esper.execution.circuit_breaker import FailureKind, are_finite, is_finite
from esper.execution.gradient_gate import autocasts_to_half, own_gradients, zeroed

if TYPE_CHECKING:
    from esper.execution.layers.holder import SeedHolder
    from esper.execution.seed import Seed

_DETAIL: Final = "gradient of a parameter holds NaN or infinity, in a compiled pass"

_watched: Final = WeakIdKeyDictionary()
"""Parameters that have been given their hook; a copy of one has none."""

_scaled: Final[WeakKeyDictionary[Seed, bool]] = WeakKeyDictionary()
"""Whether a seed was traced under float16 last."""

_spoilt: Final[WeakKeyDictionary[Seed, tuple[int, bool]]] = WeakKeyDictionary()
"""Seeds looked at when a backward pass is over: its number, and whether one was not finite before averaging."""


def watch_traced(layer: SeedHolder, seeds: Iterable[Seed]) -> None:
    """Look at the gradients of these seeds' parameters from now on; for seeds that are being traced."""
    for seed in seeds:
        _scaled[seed] = autocasts_to_half(seed.alpha.device.type)
        look = partial(_look, ref(layer), ref(seed))
        for own, name in seed.parameter_places():
            parameter = own[name]
            if parameter is not None and parameter.requires_grad and parameter not in _watched:
                _watched[parameter] = True
                parameter.register_hook(look)  # type: ignore[no-untyped-call]


def _look(layer_ref: ReferenceType[SeedHolder], seed_ref: ReferenceType[Seed], gradient: Tensor) -> Tensor | None:
    seed, layer = seed_ref(), layer_ref()
    if seed is None or layer is None or seed.breaker.gate is not None:  # a gate looks at this pass
        return None
    if _scaled.get(seed, False) or gradient.dtype is torch.float16:
        return None
    if gradient.device.type != "cpu":
        return zeroed(gradient)
    task = torch._C._current_graph_task_id()
    if _spoilt.get(seed, (-1, False))[0] != task:  # the first of this pass; one that raised has left its own behind
        _spoilt[seed] = task, False
        Variable._execution_engine.queue_callback(partial(_settle, layer, seed))
    if seed.breaker.ranks is None or is_finite(gradient):  # without other ranks all are looked at together, later
        return None
    _spoilt[seed] = task, True
    return torch.zeros_like(gradient)


@torch.no_grad()
def _settle(layer: SeedHolder, seed: Seed) -> None:
    """Zero what is not finite and count one failure; a sound pass ends the row."""
    _, is_spoilt = _spoilt.pop(seed, (-1, False))
    if seed.breaker.has_failed_backward:  # an eager pass, which has settled this itself
        return
    own = own_gradients((seed,))
    if not is_spoilt and are_finite(own):
        seed.breaker.failures_in_row = 0
    elif seed.breaker.ranks is not None or are_finite(_gradients_of(layer)):
        for gradient in own:
            gradient.copy_(zeroed(gradient))
        layer.note_failure(seed, FailureKind.NON_FINITE, _DETAIL)


def _gradients_of(layer: SeedHolder) -> list[Tensor]:
    return [value.grad for value in layer.parameters(recurse=False) if value.grad is not None]

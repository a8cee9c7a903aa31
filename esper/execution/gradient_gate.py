"""What stops gradients that are not finite on their way from blueprints' kernels to the host, or to an optimizer.

    x, h      read by the kernels through one view each (a skip seed's x through its own), whose gradient is zeroed
              where it is not finite
    weights   the kernels' own gradients are looked at when the backward pass is over: one norm over all gradients, as
              clipping takes it, would spread theirs over the host

The seeds of a layer share one gate, so several cost hardly more than one. Where the shared gradient is spoilt and no
kernel's own gradients say whose fault it is, the layer's later passes have a gate for each seed.

Under float16 a gradient that overflows belongs to training: a gradient scaler sees it, leaves the step out, and lowers
its scale. There the weights' gradients stay as they are, and no kernel is blamed.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd import Variable

from esper.execution.circuit_breaker import FailureKind, are_finite, is_finite
from esper.execution.device_guard import gated

if TYPE_CHECKING:
    from esper.execution.layers.holder import SeedHolder
    from esper.execution.seed import Seed

_AT_LAYER = "gradient at the layer holds NaN or infinity"
_OF_PARAMETER = "gradient of a parameter holds NaN or infinity"


class GradientGate:
    """One pass of the kernels of one layer, or of one of them; closed once they have run."""

    __slots__ = ("h_view", "is_scaled", "is_spoilt", "layer", "seeds", "views")

    def __init__(self, layer: SeedHolder, h: Tensor) -> None:
        self.layer = layer
        self.is_scaled = h.dtype is torch.float16 or _autocasts_to_half(h.device.type)
        self.seeds: list[Seed] = []
        self.views: dict[str, Tensor] = {}
        self.h_view: Tensor | None = None
        self.is_spoilt = False

    def inputs(self, seed: Seed, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """Give x and h for a kernel to read."""
        self.seeds.append(seed)
        view = self.views.get(seed.source)
        if view is None:
            view = self.views[seed.source] = self._on(x)
        if self.h_view is None:
            self.h_view = self._on(h)
        return view, self.h_view

    def close(self, result: Tensor | None) -> None:
        """Watch what comes back through the kernels' delta, or through the layer's output with all of them."""
        self.views, self.h_view = {}, None  # their hooks lead to the gate: kept, neither would ever be freed
        if result is not None and self.seeds and result.requires_grad:
            result.register_hook(self._see_incoming)  # type: ignore[no-untyped-call]

    def _on(self, value: Tensor) -> Tensor:
        if value.device.type != "cpu":
            return gated(value)
        if not value.requires_grad:
            return readable(value)
        view = value.view_as(value)
        view.register_hook(self._check)  # type: ignore[no-untyped-call]
        return view

    def _see_incoming(self, incoming: Tensor) -> None:
        Variable._execution_engine.queue_callback(partial(self._settle, incoming))

    def _check(self, gradient: Tensor) -> Tensor | None:
        if is_finite(gradient):
            return None
        self.is_spoilt = True
        return torch.zeros_like(gradient)

    @torch.no_grad()
    def _settle(self, incoming: Tensor) -> None:
        """Look at the kernels' own gradients, and count whose fault the pass was; when the backward pass is over.

        Where what came in was not finite already, no kernel is to blame.
        """
        is_spoilt, self.is_spoilt = self.is_spoilt, False
        if self.is_scaled:
            return
        if incoming.device.type != "cpu":
            for gradient in own_gradients(self.seeds):
                gradient.copy_(zeroed(gradient))
        elif (is_spoilt or not are_finite(own_gradients(self.seeds))) and is_finite(incoming):
            self._blame(is_spoilt=is_spoilt)

    def _blame(self, *, is_spoilt: bool) -> None:
        guilty = [seed for seed in self.seeds if not are_finite(own_gradients((seed,)))]
        for seed in guilty:
            for gradient in own_gradients((seed,)):
                gradient.zero_()
            note_backward(self.layer, seed, FailureKind.NON_FINITE, _AT_LAYER if is_spoilt else _OF_PARAMETER)
        if guilty:
            return
        if len(self.seeds) == 1:
            note_backward(self.layer, self.seeds[0], FailureKind.NON_FINITE, _AT_LAYER)
        else:
            self.layer.separate_gates()


def _autocasts_to_half(device_type: str) -> bool:
    return torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type) is torch.float16


def readable(value: Tensor) -> Tensor:
    """Give a kernel's input as it may be read: an image that no gradient is asked of lies without gaps on the CPU.

    There the backward pass of torch's GroupNorm (2.13) crashes where its channels-last input needs no gradient.
    """
    is_image = value.dim() >= 4
    return value.contiguous() if is_image and not value.requires_grad and value.device.type == "cpu" else value


def own_gradients(seeds: Iterable[Seed]) -> list[Tensor]:
    """Give the gradients of kernels' parameters; of sharded ones this rank's part."""
    parameters = (own[name] for seed in seeds for own, name in seed.parameter_places())
    found = (parameter.grad for parameter in parameters if parameter is not None)
    return [value if type(value) is Tensor else _local(value) for value in found if value is not None]


def _local(value: Tensor) -> Tensor:
    part: Tensor = getattr(value, "_local_tensor", value)
    return part


def zeroed(value: Tensor) -> Tensor:
    """Give the value, or zeros where it is not finite; waits for no device."""
    return torch.where(torch.isfinite(value).all(), value, torch.zeros_like(value))


def note_backward(layer: SeedHolder, seed: Seed, kind: FailureKind, detail: str) -> None:
    """Count a failed backward pass once, however many gradients it spoils."""
    if not seed.breaker.has_failed_backward:
        seed.breaker.has_failed_backward = True
        layer.note_failure(seed, kind, detail)

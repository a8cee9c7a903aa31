"""What stops gradients that are not finite on their way from blueprints' kernels to the host, or to an optimizer.

    x, h      read by the kernels through one view each (a skip seed's x through its own), whose gradient is zeroed
              where it is not finite
    weights   the kernels' own gradients are looked at when the backward pass is over: one norm over all gradients, as
              clipping takes it, would spread theirs over the host

The seeds of a layer share one gate, so several cost hardly more than one. Where the shared gradient is spoilt and no
kernel's own gradients say whose fault it is, the layer's later passes have a gate for each seed.

Under float16 a gradient that overflows belongs to training: a gradient scaler sees it, leaves the step out, and lowers
its scale. There the weights' gradients stay as they are, and no kernel is blamed, for ``SCALER_PATIENCE`` steps in a
row: what overflows still is the kernel's fault, and would let no step be taken for ever.

Where ranks average gradients, each is looked at before it is averaged: ``DistributedDataParallel`` and ``fully_shard``
begin with that while the backward pass goes on, and what they have averaged comes to the parameters when it is over. A
layer that ``fully_shard`` manages shows its kernels whole while they run, so the hooks stand on those whole parameters,
which ``fully_shard`` keeps from pass to pass.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Final
from weakref import ReferenceType, ref

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.utils.weak import WeakIdKeyDictionary

from esper.execution.circuit_breaker import FailureKind, are_finite, is_finite
from esper.execution.device_guard import gated
from esper.execution.spread import is_sharded

if TYPE_CHECKING:
    from esper.execution.layers.holder import SeedHolder
    from esper.execution.seed import Seed

SCALER_PATIENCE: Final = 8
"""Steps in a row whose gradients may overflow under float16; a scaler has lowered its scale 256-fold by then."""

_AT_LAYER = "gradient at the layer holds NaN or infinity"
_OF_PARAMETER = "gradient of a parameter holds NaN or infinity"


_watched: Final = WeakIdKeyDictionary()
"""Parameters that have been given their hook; a copy of one has none."""


class GradientGate:
    """One pass of the kernels of one layer, or of one of them; closed once they have run."""

    __slots__ = (
        "fresh",
        "h_view",
        "incoming",
        "is_averaged",
        "is_scaled",
        "is_spoilt",
        "layer",
        "seeds",
        "stopped",
        "views",
    )

    def __init__(self, layer: SeedHolder, h: Tensor, *, is_averaged: bool = False) -> None:
        self.layer = layer
        self.is_scaled = h.dtype is torch.float16 or autocasts_to_half(h.device.type)
        self.is_averaged = is_averaged
        self.seeds: list[Seed] = []
        self.views: dict[str, Tensor] = {}
        self.h_view: Tensor | None = None
        self.is_spoilt = False
        self.incoming: Tensor | None = None
        self.stopped: list[Seed] = []
        self.fresh: list[Seed] = []

    def inputs(self, seed: Seed, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """Give x and h for a kernel to read."""
        self.seeds.append(seed)
        if self.is_averaged or is_sharded(seed):
            self.is_averaged = True
            _watch_parameters(seed)
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
        if self.is_averaged:
            self.incoming = incoming
            for seed in self.seeds:
                seed.breaker.gate = self
        if self.is_scaled and incoming.device.type == "cpu":
            # What overflowed earlier in the step is no second failure.
            self.fresh = [seed for seed in self.seeds if are_finite(own_gradients((seed,)))]
        Variable._execution_engine.queue_callback(partial(self._settle, incoming))

    def stop(self, seed: Seed, gradient: Tensor) -> Tensor | None:
        """Give zeros for the gradient of a kernel's parameter that must not be averaged; ``None`` for any other."""
        if gradient.device.type != "cpu":
            return None if self.is_scaled else zeroed(gradient)
        assert self.incoming is not None
        if is_finite(gradient) or not is_finite(self.incoming):
            return None
        if seed not in self.stopped:
            self.stopped.append(seed)
        is_left = self.is_scaled and seed.breaker.num_overflows < SCALER_PATIENCE
        return None if is_left else torch.zeros_like(gradient)

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
        if self.is_averaged:
            self.incoming = None
            for seed in self.seeds:
                seed.breaker.gate = None
        if incoming.device.type != "cpu":
            if not self.is_scaled and not self.is_averaged:
                for gradient in own_gradients(self.seeds):
                    gradient.copy_(zeroed(gradient))
        elif self.is_scaled:
            self._settle_scaled(incoming)
        elif (is_spoilt or self._guilty()) and is_finite(incoming):
            self._blame(is_spoilt=is_spoilt)
        self.stopped = []

    def _settle_scaled(self, incoming: Tensor) -> None:
        """Count the steps in a row in which a kernel's gradients overflowed; past a scaler's help it is blamed."""
        fresh, self.fresh = self.fresh, []
        guilty = self._guilty()
        for seed in fresh:
            if seed not in guilty:
                seed.breaker.num_overflows = 0
            elif is_finite(incoming):
                seed.breaker.num_overflows += 1
                if seed.breaker.num_overflows > SCALER_PATIENCE:
                    self._drop(seed, _OF_PARAMETER)

    def _guilty(self) -> list[Seed]:
        """Give the seeds whose own gradients are spoilt; averaged ones may not have come yet."""
        if self.is_averaged:
            return self.stopped
        if are_finite(own_gradients(self.seeds)):
            return []
        return [seed for seed in self.seeds if not are_finite(own_gradients((seed,)))]

    def _drop(self, seed: Seed, detail: str) -> None:
        """Zero a seed's gradients, unless ``stop`` has done so, and count a failure."""
        if not self.is_averaged:
            for gradient in own_gradients((seed,)):
                gradient.zero_()
        note_backward(self.layer, seed, FailureKind.NON_FINITE, detail)

    def _blame(self, *, is_spoilt: bool) -> None:
        guilty = self._guilty()
        for seed in guilty:
            self._drop(seed, _AT_LAYER if is_spoilt else _OF_PARAMETER)
        if guilty:
            return
        if len(self.seeds) == 1:
            note_backward(self.layer, self.seeds[0], FailureKind.NON_FINITE, _AT_LAYER)
        else:
            self.layer.separate_gates()


def _watch_parameters(seed: Seed) -> None:
    """Let the gate of the pass see each gradient of the kernel's parameters, before it is averaged."""
    watcher = partial(_stop_gradient, ref(seed))
    for own, name in seed.parameter_places():
        parameter = own[name]
        if parameter is not None and parameter.requires_grad and parameter not in _watched:
            _watched[parameter] = True
            parameter.register_hook(watcher)  # type: ignore[no-untyped-call]


def _stop_gradient(seed_ref: ReferenceType[Seed], gradient: Tensor) -> Tensor | None:
    seed = seed_ref()
    gate = None if seed is None else seed.breaker.gate
    return None if seed is None or gate is None else gate.stop(seed, gradient)


def autocasts_to_half(device_type: str) -> bool:
    """Whether autocast is on for float16."""
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

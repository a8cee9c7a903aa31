"""How a seed learns behind the host's back: from a loss that contains its own effect; the host sees nothing of it.

    symbol   meaning                                               shape
    x, h     the layer's input and its host's output               (batch, ...)
    d        the seed's delta, ``kernel(x, h)``                    as h
    g        gradient of the loss at h, dL/dh                      as h
    a        trial alpha                                           scalar
    r        reach: size of the step wanted, relative to h         scalar

**Trial branch** (the default). The whole model runs with the seed blended at a, its host parameters frozen, and the
caller's loss is differentiated with respect to the seed alone. Exact: it is the loss that the seed will have when it
is grafted. Costs a forward pass and the backward pass down to the seed's layer, on as large a share of the batch as
the caller gives it.

**Local regression.** To second order around h, L(h + d) = L(h) + <g, d> + d'Hd / 2. With H replaced by lambda * I the
seed minimises

    J(d) = <g, d> + lambda / 2 * |d|^2  =  lambda / 2 * |d + g / lambda|^2 - const,

least squares towards -g / lambda with d itself in the residual: one step of gradient boosting (Friedman, "Greedy
function approximation: a gradient boosting machine", Annals of Statistics 29, 2001). lambda = |g| / (r |h|) makes the
best step r times as large as h, whatever the scale of the loss; J is divided by |g| |h|, so it has no unit. Costs no
pass through the rest of the network, and knows nothing of the loss beyond its gradient at the present h.

A straight-through estimate of g never contains d and overshoots without bound, so neither way uses one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from esper.contracts.errors import InvalidInputError, InvalidStateError
from esper.execution.layers.base import KasminaLayer
from esper.execution.overrides import GrowingModel, SeedRef, find_seed, frozen_buffers, frozen_streams, seeds_at


@contextmanager
def trial_forward(model: GrowingModel, seeds: Iterable[SeedRef], alpha: float = 1.0) -> Iterator[list[nn.Parameter]]:
    """Run the model with these live seeds blended at ``alpha`` and everything else frozen; gives their parameters.

    Modes stay as they are; buffers (running statistics too) and random streams are as before afterwards. Gradients
    are for ``torch.autograd.grad`` with respect to the parameters given: no ``.grad`` of the host is touched.

    Raises:
        InvalidInputError: No seed is given, or alpha is outside [0, 1].
        NotFoundError, InvalidStateError: No kernel stands at a seed.
    """
    chosen = {ref: find_seed(model, ref) for ref in seeds}
    if not chosen:
        raise InvalidInputError.of("seeds", "name at least one live seed", "none")
    learning = [parameter for seed in chosen.values() for parameter in seed.parameters() if parameter.requires_grad]
    spared = {id(parameter) for parameter in learning}
    frozen = [value for value in model.parameters() if value.requires_grad and id(value) not in spared]
    with seeds_at(model, dict.fromkeys(chosen, alpha)), frozen_buffers(model), frozen_streams():
        for parameter in frozen:
            parameter.requires_grad_(False)
        try:
            yield learning
        finally:
            for parameter in frozen:
                parameter.requires_grad_(True)


def trial_backward(
    model: GrowingModel, seeds: Iterable[SeedRef], loss: Callable[[], Tensor], *, alpha: float = 1.0
) -> float:
    """Add the gradients of a trial's loss to the seeds' own ``.grad``; gives the loss.

    ``loss`` runs the model and gives a scalar. Nothing but the seeds' gradients changes; a seed whose kernel failed in
    this pass gets none.

    Raises:
        As :func:`trial_forward`.
    """
    with trial_forward(model, seeds, alpha) as parameters, torch.enable_grad():
        value = loss()
        if not value.requires_grad:  # every seed was cut off: nothing in the loss is theirs
            return float(value)
        gradients = torch.autograd.grad(value, parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
    return float(value.detach())


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteSample:
    """One training step seen at a site."""

    x: Tensor
    """The layer's input, detached, the batch dimension first."""
    h: Tensor
    """The host's output, detached."""
    g: Tensor
    """Gradient of the training loss at h."""


class SiteCapture:
    """What passes at one layer; ``sample`` is there after the backward pass."""

    def __init__(self, layer: KasminaLayer) -> None:
        self._layer = layer
        self._x: Tensor | None = None
        self._h: Tensor | None = None
        self._g: Tensor | None = None

    @property
    def sample(self) -> SiteSample:
        """The step that was seen.

        Raises:
            InvalidStateError: No forward and backward pass came by.
        """
        if self._x is None or self._h is None or self._g is None:
            raise InvalidStateError(f"layer {self._layer.layer_name!r} must see a forward and a backward pass first")
        return SiteSample(x=self._x, h=self._h, g=self._g)

    def see(self, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> None:
        """Keep x and h, and wait for the gradient; a forward hook."""
        h = self._layer.seed_output(out)
        if not h.requires_grad:
            return
        self._x = self._layer.to_site(self._layer.seed_input(args, dict(kwargs))).detach().clone()
        self._h = self._layer.to_site(h).detach().clone()
        h.register_hook(self._take)  # type: ignore[no-untyped-call]

    def _take(self, gradient: Tensor) -> None:
        self._g = self._layer.to_site(gradient).detach().clone()


@contextmanager
def captured(layer: KasminaLayer) -> Iterator[SiteCapture]:
    """Keep x, h and dL/dh of the training step that runs meanwhile; the step's own figures are untouched.

    Raises:
        InvalidStateError: Seeds are blended at the layer, so that its output is not its host's.
    """
    if layer._kasmina.terms:
        raise InvalidStateError(f"layer {layer.layer_name!r} must have no blended seed for local regression")
    capture = SiteCapture(layer)
    handle = layer.register_forward_hook(capture.see, with_kwargs=True)
    try:
        yield capture
    finally:
        handle.remove()


def local_regression_loss(kernel: nn.Module, sample: SiteSample, *, reach: float = 0.1) -> Tensor:
    """Give J(d) of the legend above, a scalar without unit; it is 0 at d = 0 and at best -reach / 2.

    Raises:
        InvalidInputError: ``reach`` is not > 0.
    """
    if not reach > 0.0:
        raise InvalidInputError.of("reach", "be > 0", reach)
    d = kernel(sample.x, sample.h)
    g_size = torch.linalg.vector_norm(sample.g.float()).clamp_min(1e-30)
    h_size = torch.linalg.vector_norm(sample.h.float()).clamp_min(1e-30)
    direction = (sample.g.float() / g_size * (d.float() / h_size)).sum()
    size = (d.float() / h_size).square().sum()
    loss: Tensor = direction + size / (2.0 * reach)
    return loss

"""How a seed learns behind the host's back: from a loss that contains its own effect; the host sees nothing of it.

    symbol   meaning                                               shape
    x, h     the layer's input and its host's output               (batch, ...)
    d        the seed's delta, ``kernel(x, h)``                    as h
    g        gradient of the loss at h, dL/dh                      as h
    a        trial alpha                                           scalar
    z, z_s   the model's output without the seed, and with it      (batch, ...)
    c        share of z that a damped trial keeps                  scalar, 0 to 1
    r        reach: size of the step wanted, relative to h         scalar

**Trial branch.** The whole model runs with the seed blended at a, its host parameters frozen, and the
caller's loss is differentiated with respect to the seed alone. Exact: it is the loss that the seed will have when it
is grafted. Batch norms stand on their running statistics in it, as in the evaluation that decides on the graft: those
are the host's, and a seed that learnt under statistics of its own would do harm under them (decision 0007). Costs a
forward pass and the backward pass down to the seed's layer, on as large a share of the batch as the caller gives it.

**Damped trial.** A host that knows its training set leaves a seed next to nothing to learn: gradients are gone, and
what the seed could say better is never asked. So the loss is taken of c z + (z_s - z), a host less sure of itself with
all of the seed's own effect. Right where a surer output costs little, as in classification; a squared error would have
the seed say again what was taken away. Costs one forward pass more than a trial. Experiment 0008 has the figures.

**Local regression.** To second order around h, L(h + d) = L(h) + <g, d> + d'Hd / 2. With H replaced by lambda * I the
seed minimises

    J(d) = <g, d> + lambda / 2 * |d|^2  =  lambda / 2 * |d + g / lambda|^2 - const,

least squares towards -g / lambda with d itself in the residual: one step of gradient boosting (Friedman, "Greedy
function approximation: a gradient boosting machine", Annals of Statistics 29, 2001). lambda = |g| / (r |h|) makes the
best step r times as large as h, whatever the scale of the loss; J is divided by |g| |h|, so it has no unit. Costs no
pass through the rest of the network, and knows nothing of the loss beyond its gradient at the present h. Where the
loss is a sum of equal squares at h (a regression's last layer), some r makes its optimum that of the loss, and
``measure_reach`` finds it: boosting's line search. Anywhere else H is no multiple of I, and its optimum is another.

A straight-through estimate of g never contains d and overshoots without bound, so neither way uses one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from esper.contracts.errors import InvalidInputError, InvalidStateError
from esper.execution.circuit_breaker import fault_of
from esper.execution.gradient_gate import readable
from esper.execution.layers.base import KasminaLayer
from esper.execution.overrides import GrowingModel, SeedRef, find_seed, frozen_buffers, seeds_at
from esper.execution.random_streams import frozen_streams

Norms = Literal["running", "batch"]
"""What norms with running statistics normalise by in a trial."""


@contextmanager
def trial_forward(
    model: GrowingModel, seeds: Iterable[SeedRef], alpha: float = 1.0, *, norms: Norms = "running"
) -> Iterator[list[nn.Parameter]]:
    """Run the model with these live seeds blended at ``alpha`` and everything else frozen; gives their parameters.

    Modes stay as they are, but for the norms that ``norms`` puts on running statistics; modes, buffers and random
    streams are as before afterwards. Gradients are for ``torch.autograd.grad`` with respect to the parameters given:
    no ``.grad`` of the host is touched.

    Raises:
        InvalidInputError: No seed is given, or alpha is outside [0, 1].
        NotFoundError, InvalidStateError: No kernel stands at a seed.
    """
    chosen = list(seeds)
    with learning_alone(model, chosen, norms=norms) as learning, seeds_at(model, dict.fromkeys(chosen, alpha)):
        yield learning


@contextmanager
def learning_alone(
    model: GrowingModel, seeds: Iterable[SeedRef], *, norms: Norms = "running"
) -> Iterator[list[nn.Parameter]]:
    """Freeze everything but these live seeds; gives their parameters. The rest is as :func:`trial_forward` has it.

    Raises:
        As :func:`trial_forward`.
    """
    chosen = [find_seed(model, ref) for ref in seeds]
    if not chosen:
        raise InvalidInputError.of("seeds", "name at least one live seed", "none")
    learning = [parameter for seed in chosen for parameter in seed.parameters() if parameter.requires_grad]
    spared = {id(parameter) for parameter in learning}
    frozen = [value for value in model.parameters() if value.requires_grad and id(value) not in spared]
    steady = _steady_norms(model) if norms == "running" else nullcontext()
    with steady, frozen_buffers(model), frozen_streams():
        for parameter in frozen:
            parameter.requires_grad_(False)
        try:
            yield learning
        finally:
            for parameter in frozen:
                parameter.requires_grad_(True)


def output_without(
    model: GrowingModel, seeds: Iterable[SeedRef], run: Callable[[], Any], *, norms: Norms = "running"
) -> Any:
    """Give what ``run`` gives with these live seeds off, as a trial would see it; without gradients.

    Raises:
        As :func:`trial_forward`.
    """
    with trial_forward(model, seeds, 0.0, norms=norms), torch.no_grad():
        return run()


@contextmanager
def _steady_norms(model: GrowingModel) -> Iterator[None]:
    """Let norms that keep running statistics use them, as in evaluation; modes are as before afterwards."""
    norms = [module for module in model.modules() if isinstance(module, _NormBase) and module.training]
    norms = [module for module in norms if module.running_mean is not None]
    for module in norms:
        module.training = False
    try:
        yield
    finally:
        for module in norms:
            module.training = True


def trial_backward(
    model: GrowingModel,
    seeds: Iterable[SeedRef],
    loss: Callable[[], Tensor],
    *,
    alpha: float = 1.0,
    norms: Norms = "running",
) -> float:
    """Add the gradients of a trial's loss to the seeds' own ``.grad``; gives the loss.

    ``loss`` runs the model and gives a scalar. Nothing but the seeds' gradients changes; a seed whose kernel failed in
    this pass gets none.

    Raises:
        As :func:`trial_forward`.
    """
    with trial_forward(model, seeds, alpha, norms=norms) as parameters, torch.enable_grad():
        value = loss()
        add_gradients(value, parameters)
    return float(value.detach())


def add_gradients(value: Tensor, parameters: Sequence[nn.Parameter]) -> None:
    """Add the gradients of ``value`` to the parameters' own ``.grad``; those that it does not know get none."""
    if not value.requires_grad:  # every seed was cut off: nothing in the loss is theirs
        return
    gradients = torch.autograd.grad(value, parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


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
    """What passes at one layer; ``sample`` is there after the backward pass.

    For a skip seed x comes by ``see_input``, from the layer that it reads.
    """

    def __init__(self, layer: KasminaLayer, *, reads_own_input: bool = True) -> None:
        self._layer = layer
        self._reads_own_input = reads_own_input
        self._x: Tensor | None = None
        self._h: Tensor | None = None
        self._g: Tensor | None = None

    @property
    def sample(self) -> SiteSample:
        """The step that was seen.

        Raises:
            InvalidStateError: No forward and backward pass came by.
        """
        found = self.seen
        if found is None:
            raise InvalidStateError(f"layer {self._layer.layer_name!r} must see a forward and a backward pass first")
        return found

    @property
    def seen(self) -> SiteSample | None:
        """The step that was seen; ``None`` where no forward and backward pass came by."""
        if self._x is None or self._h is None or self._g is None:
            return None
        return SiteSample(x=self._x, h=self._h, g=self._g)

    def see(self, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> None:
        """Keep x and h, and wait for the gradient; a forward hook."""
        h = self._layer.seed_output(out)
        if not h.requires_grad:
            return
        if self._reads_own_input:
            self.see_input(self._layer, args, kwargs)
        self._h = self._layer.to_site(h).detach().clone()
        h.register_hook(self._take)  # type: ignore[no-untyped-call]

    def see_input(self, layer: KasminaLayer, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Keep x, the input of this layer: the source's, for a skip seed."""
        self._x = layer.to_site(layer.seed_input(args, kwargs)).detach().clone()

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
        KernelFaultError: The kernel gives no delta of the site.
    """
    if not reach > 0.0:
        raise InvalidInputError.of("reach", "be > 0", reach)
    # The entries of J's gradient are about 1 / |h|: too small for float16, so autocast stays out of it.
    with torch.autocast(sample.h.device.type, enabled=False):
        x, h = (as_weights(kernel, readable(value)) for value in (sample.x, sample.h))
        d = kernel(x, h)
        if (fault := fault_of(d, h)) is not None:
            raise fault
        g_size = torch.linalg.vector_norm(sample.g.float()).clamp_min(1e-30)
        h_size = torch.linalg.vector_norm(h.float()).clamp_min(1e-30)
        direction = (sample.g.float() / g_size * (d.float() / h_size)).sum()
        size = (d.float() / h_size).square().sum()
        loss: Tensor = direction + size / (2.0 * reach)
    return loss


def measure_reach(model: GrowingModel, ref: SeedRef, loss: Callable[[], Tensor]) -> float | None:
    """Give the reach at which the regression is as curved as the loss is along the seed's present delta.

    lambda is the secant of the loss's gradient between h + d / 2 and h + d, <g(h + d) - g(h + d / 2), d> / (|d|^2 / 2);
    g at h is extrapolated from both. Two trials; nothing is left behind. ``None`` where the delta is zero, was dropped,
    or the loss does not curve upwards along it.

    Raises:
        As :func:`trial_forward`.
    """
    whole, half = (_seen_at(model, ref, loss, alpha) for alpha in (1.0, 0.5))
    if whole is None or half is None:
        return None
    (out, g_whole), (out_half, g_half) = whole, half
    d = 2.0 * (out - out_half)
    size = float(d.square().sum())
    curvature = 2.0 * float(((g_whole - g_half) * d).sum()) / size if size > 0.0 else 0.0
    h_size, g_size = float((out - d).norm()), float((2.0 * g_half - g_whole).norm())
    reach = g_size / (curvature * h_size) if curvature > 0.0 and h_size > 0.0 else 0.0
    return reach if 0.0 < reach < float("inf") else None


def _seen_at(
    model: GrowingModel, ref: SeedRef, loss: Callable[[], Tensor], alpha: float
) -> tuple[Tensor, Tensor] | None:
    """Give a layer's blended output in a trial and the loss's gradient at it, float32; ``None`` without a delta."""
    layer, seen = model.kasmina_layers[ref.layer], list[Tensor]()

    def see(module: nn.Module, args: object, out: object) -> None:
        del module, args
        seen.append(layer.seed_output(out))

    with trial_forward(model, [ref], alpha), torch.enable_grad():
        handle = layer.register_forward_hook(see)
        try:
            value = loss()
        finally:
            handle.remove()
        if not seen or not seen[-1].requires_grad or not value.requires_grad:
            return None
        (gradient,) = torch.autograd.grad(value, seen[-1])
    return seen[-1].detach().float(), gradient.float()


def as_weights(kernel: nn.Module, value: Tensor) -> Tensor:
    """Give a floating value in the kernel's own type; autocast hands h over in a shorter one."""
    own = next((item.dtype for item in kernel.parameters() if item.is_floating_point()), None)
    return value if own is None or not value.is_floating_point() else value.to(own)

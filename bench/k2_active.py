"""K2: what seeds that take part cost, over the same maths written by hand in plain PyTorch.

    total = h + sum_i alpha_i * up_i(gelu(down_i(norm_i(h))))        h: output of the host's own layer

By hand means: a subclass of the layer whose forward says just that, with adapters that are ordinary modules and alphas
that are tensors (so that they can be ramped). Both sides have the same weights, and give the same output to the bit
before anything is timed. Ours also looks whether the sum is finite, counts passes and keeps the host's result where a
kernel fails; what that look costs by itself is a figure of its own.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn

import esper
from bench.hosts import HOSTS, Host
from bench.k1_dormant import Pass, training_call
from bench.paired import PairedTimes, calls_lasting, time_pair
from bench.report import Figure, Result, at_most
from esper.blueprints import default_registry
from esper.contracts.errors import InvalidStateError
from esper.contracts.lifecycle import SeedLifecycleState
from esper.core.wrap import SkippedLayersWarning
from esper.execution.circuit_breaker import is_finite

GOAL: Final = at_most(1.05)
NUM_SEEDS: Final = (1, 2, 4)
_SAMPLE_S: Final = 0.0005
_MIN_ROUNDS: Final = 8
_COPIES: Final = 3


class Adapter(nn.Module):
    """A bottleneck adapter as one writes it by hand: norm, down, GELU, up."""

    def __init__(self, norm: nn.Module, down: nn.Module, up: nn.Module) -> None:
        super().__init__()
        self.norm, self.down, self.up = norm, down, up

    def forward(self, h: Tensor) -> Tensor:
        """Give the delta of a layer's output."""
        out: Tensor = self.up(nn.functional.gelu(self.down(self.norm(h))))
        return out


class _WithAdapters(nn.Module):
    """What a layer written by hand does beside its host."""

    adapters: nn.ModuleList
    alphas: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Give the host's output plus the shares of the adapters."""
        h: Tensor = super().forward(x)
        total = h
        for adapter, alpha in zip(self.adapters, self.alphas.unbind(), strict=True):
            total = total + adapter(h) * alpha
        return total


class LinearWithAdapters(_WithAdapters, nn.Linear):
    """A linear layer with adapters, by hand."""


class ConvWithAdapters(_WithAdapters, nn.Conv2d):
    """A convolution with adapters, by hand."""


def measure(*, quick: bool) -> Result:
    """Measure every host with 1, 2 and 4 seeds, eager and compiled."""
    torch.set_num_threads(1)
    seconds = 1.0 if quick else 12.0
    figures = [
        active_figure(host, num_seeds, mode, seconds, is_compiled=False)
        for host in HOSTS
        for num_seeds in NUM_SEEDS
        for mode in ("forward", "step")
    ]
    figures += [check_figure(host, seconds / 4) for host in HOSTS]
    for host in HOSTS[:1] if quick else HOSTS:
        for num_seeds in (1,) if quick else NUM_SEEDS:
            figures += [active_figure(host, num_seeds, mode, seconds, is_compiled=True) for mode in ("forward", "step")]
    return Result(name="k2_active", figures=tuple(figures), notes=_NOTES)


def active_figure(host: Host, num_seeds: int, mode: Pass, seconds: float, *, is_compiled: bool) -> Figure:
    """Give the ratio of one host with so many seeds at its site."""
    found: PairedTimes | None = None
    batch = host.batch()
    with torch.set_grad_enabled(mode == "step"):
        for _ in range(_COPIES):
            pair: Sequence[Any] = grown_pair(host, num_seeds)
            if is_compiled:
                torch.compiler.reset()
                pair = [torch.compile(model, fullgraph=True) for model in pair]
            calls = [training_call(model, batch, mode) for model in pair]
            repeats = calls_lasting(calls[1], _SAMPLE_S, time.thread_time_ns)
            times = time_pair(
                *calls, seconds=seconds / _COPIES, calls=repeats, min_rounds=_MIN_ROUNDS, clock=time.thread_time_ns
            )
            found = times if found is None else found + times
    assert found is not None
    name = f"{host.name} {mode}, {num_seeds} live, {'compiled' if is_compiled else 'eager'}"
    return Figure(name=name, value=found.ratio, unit="ratio", goal=GOAL, spread=found.spread, certain=found.certain)


def grown_pair(host: Host, num_seeds: int) -> tuple[nn.Module, nn.Module]:
    """Give a grown model and the same by hand, with equal weights.

    Raises:
        InvalidStateError: Their outputs differ in a bit.
    """
    ours = grown_model(host, num_seeds)
    by_hand = host.make()
    layer: Any = by_hand.get_submodule(host.site)
    seeds = ours.kasmina_layer(host.site).live_seeds()
    layer.adapters = nn.ModuleList(_adapter(seed.kernel) for seed in seeds)
    layer.register_buffer("alphas", torch.stack([seed.alpha for seed in seeds]))
    layer.__class__ = LinearWithAdapters if isinstance(layer, nn.Linear) else ConvWithAdapters
    with torch.no_grad():
        same = torch.equal(ours.eval()(host.batch()), by_hand.eval()(host.batch()))
    if not same:
        raise InvalidStateError(f"{host.name} grown must give what the same maths by hand gives, got another output")
    return ours, by_hand


def grown_model(host: Host, num_seeds: int) -> esper.MorphableModel:
    """Give the wrapped host with so many bottleneck adapters that take part at its site, each with its own weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SkippedLayersWarning)
        model = esper.wrap(host.make(), telemetry=False)
    with torch.no_grad():
        model.eval()(host.batch())
    layer = model.kasmina_layer(host.site)
    ir = default_registry().create_blueprint("bottleneck_adapter").ir
    for index in range(num_seeds):
        seed = layer.germinate(index, ir, random_seed=index)
        with torch.no_grad():
            for parameter in seed.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)) * 0.01)
        layer.transition(index, SeedLifecycleState.EVALUATING)
        layer.set_alpha(index, (index + 1) / (num_seeds + 1))
    return model


def check_figure(host: Host, seconds: float) -> Figure:
    """Give the part of a forward pass that the look for non-finite values alone takes: the floor of the overhead."""
    _, by_hand = grown_pair(host, 1)
    batch, shown = host.batch(), []
    handle = by_hand.get_submodule(host.site).register_forward_hook(lambda *seen: shown.append(seen[-1]))
    with torch.no_grad():
        by_hand(batch)
        handle.remove()
        times = time_pair(
            partial(is_finite, shown[0]),
            partial(by_hand, batch),
            seconds=seconds,
            calls=1,
            min_rounds=_MIN_ROUNDS,
            clock=time.thread_time_ns,
        )
    name = f"{host.name} forward, 1 live: the finite check over the pass by hand"
    return Figure(name=name, value=times.ratio, unit="ratio", spread=times.spread)


def _adapter(kernel: nn.Module) -> Adapter:
    """Give the kernel's maths by hand, with copies of its weights."""
    parts = {name.removeprefix("node_"): copy.deepcopy(part) for name, part in kernel.named_children()}
    return Adapter(parts["normed"], parts["down"], parts["up"])


_NOTES: Final = (
    "One layer of each host holds the seeds: the MLP's first, the CNN's second convolution, one convolution of "
    "ResNet-18's second stage, the transformer's second feed-forward layer.",
    "Ours keeps the host's result where a kernel raises or gives what is not finite; by hand nothing is looked at.",
    "Processor time of the training thread, one thread; forward in evaluation mode without gradients, step with SGD.",
    "'holds' compares the 99 % interval of the median with the goal; 'unsure' where the goal lies inside it.",
)

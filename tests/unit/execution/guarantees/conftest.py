"""One small net per kind of layer, a twin of it, and a delta whose effect can be written down by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from esper.contracts.blueprint import SiteKind
from esper.contracts.lifecycle import SeedLifecycleState as State
from esper.core.morphable import MorphableModel
from esper.core.wrap import LayerTelemetry, wrap
from esper.execution.layers import kasmina_class_of, register_layer


class Affine(nn.Module):
    """A user's own kind of layer, registered by these tests."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, features))
        self.bias = nn.Parameter(torch.zeros(features))

    def forward(self, value: Tensor) -> Tensor:
        return torch.tanh(value * self.weight + self.bias)


class Net(nn.Module):
    """Something trainable before the layer, so that the gradient through it shows, and a nonlinearity behind it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor([1.25]))
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.gain
        out = self.layer(x, x, x)[0] if isinstance(self.layer, nn.MultiheadAttention) else self.layer(x)
        return torch.sigmoid(out)


class Written(nn.Module):
    """``h + alpha * delta(x, h)`` written by hand around an untouched layer: what a live seed must equal."""

    def __init__(self, net: Net, delta: nn.Module, alpha: float) -> None:
        super().__init__()
        self.net, self.delta = net, delta
        self.register_buffer("alpha", torch.tensor(alpha))

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.net.gain
        layer = self.net.layer
        h = layer(x, x, x)[0] if isinstance(layer, nn.MultiheadAttention) else layer(x)
        return torch.sigmoid(h + (self.delta(x, h) * self.alpha).to(h.dtype))


class Delta(nn.Module):
    """A delta with a weight of its own that reads x and h."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.75]))

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(h) * self.weight * x.mean()


@dataclass(frozen=True)
class Kind:
    """A kind of layer: how to make one, and the shape of its input with the batch in front."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    is_halved: bool = False
    """Whether autocast computes it in half precision."""

    def net(self) -> Net:
        torch.manual_seed(0)
        return Net(self.make())

    def out_dtype(self, autocast: torch.dtype) -> torch.dtype:
        """Give the type of the output under autocast."""
        return autocast if self.is_halved else torch.float32

    def batch(self, seed: int = 1) -> Tensor:
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(seed))

    def wrapped(self, **settings: Any) -> tuple[MorphableModel, Net]:
        """Give a wrapped net and its untouched twin."""
        net = self.net()
        return wrap(net, **settings), copy.deepcopy(net)

    def grown(self, alpha: float = 0.5, **settings: Any) -> tuple[MorphableModel, Written]:
        """Give a net with one blended seed, and the same maths written by hand."""
        model, twin = self.wrapped(**settings)
        model.eval()
        with torch.no_grad():
            model(self.batch())
        grow(model.layer, Delta(), alpha)
        return model.train(), Written(twin, Delta(), alpha)


def grow(layer: Any, delta: nn.Module, alpha: float, index: int = 0) -> None:
    """Bring a delta to EVALUATING at a layer, with a share."""
    layer.attach_module(index, delta)
    layer.transition(index, State.EVALUATING)
    layer.set_alpha(index, alpha)


def affine() -> nn.Module:
    if kasmina_class_of(Affine) is None:
        register_layer(Affine, kind=SiteKind.LINEAR)
    return Affine(6)


KINDS: dict[str, Kind] = {
    "linear": Kind(lambda: nn.Linear(6, 4), (5, 6), is_halved=True),
    "conv1d": Kind(lambda: nn.Conv1d(3, 4, 3, padding=1), (4, 3, 9), is_halved=True),
    "conv2d": Kind(lambda: nn.Conv2d(3, 4, 3, padding=1), (4, 3, 6, 6), is_halved=True),
    "attention": Kind(lambda: nn.MultiheadAttention(8, 2, batch_first=True), (4, 5, 8), is_halved=True),
    "layer_norm": Kind(lambda: nn.LayerNorm(6), (5, 6)),
    "batch_norm1d": Kind(lambda: nn.BatchNorm1d(6), (5, 6)),
    "batch_norm2d": Kind(lambda: nn.BatchNorm2d(3), (4, 3, 5, 5)),
    "registered": Kind(affine, (5, 6)),
}


@pytest.fixture(params=list(KINDS))
def kind(request: Any) -> Kind:
    return KINDS[request.param]


@pytest.fixture(params=[False, True], ids=["silent", "measured"])
def telemetry(request: Any) -> bool | LayerTelemetry:
    return LayerTelemetry(interval_steps=1) if request.param else False


@pytest.fixture
def kinds() -> dict[str, Kind]:
    return KINDS


@pytest.fixture
def plant() -> Callable[..., None]:
    return grow


@pytest.fixture
def delta() -> type[nn.Module]:
    return Delta


def weighed(out: Tensor) -> Tensor:
    """Give a loss in which every element of the output has a weight of its own."""
    return (out * torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype).reshape(out.shape)).sum()


def losses_and_state(model: nn.Module, batches: list[Tensor], optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Train over the batches; gives every loss, every input gradient, and all parameters and buffers at the end."""
    found = []
    for batch in batches:
        x = batch.clone().requires_grad_()
        loss = weighed(model(x))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert x.grad is not None
        found += [loss.detach(), x.grad]
    return [*found, *(value.detach().clone() for value in model.parameters()), *model.buffers()]


def scaled_losses_and_state(
    model: nn.Module, batches: list[Tensor], optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
) -> list[Tensor]:
    """Train as :func:`losses_and_state` does, in float16 under autocast, with the loss scaled."""
    found = []
    for batch in batches:
        x = batch.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.float16):
            out = model(x)
        loss = weighed(out.float())
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert x.grad is not None
        found += [loss.detach(), x.grad.nan_to_num(), torch.tensor(scaler.get_scale())]
    return [*found, *(value.detach().clone() for value in model.parameters()), *model.buffers()]


@pytest.fixture
def train_scaled() -> Callable[..., list[Tensor]]:
    return scaled_losses_and_state


@pytest.fixture
def train() -> Callable[..., list[Tensor]]:
    return losses_and_state


@pytest.fixture
def weigh() -> Callable[[Tensor], Tensor]:
    return weighed


def all_equal(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.fixture
def same() -> Callable[[list[Tensor], list[Tensor]], bool]:
    return all_equal

"""A small host with a convolution, a norm and linear layers, and what the tests of this folder do with it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper.core.morphable import MorphableModel
from esper.core.wrap import wrap


class Host(nn.Module):
    """Convolution, batch norm, two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.layer1 = nn.Linear(8 * 16, 32)
        self.head = nn.Linear(32, 5)

    def forward(self, image: Tensor) -> Tensor:
        image = F.relu(self.norm(self.conv(image)), inplace=True)
        return self.head(F.relu(self.layer1(F.adaptive_avg_pool2d(image, 4).flatten(1))))


@dataclass
class Pair:
    """A wrapped host and an untouched twin with the same weights."""

    model: MorphableModel
    twin: Host
    x: Tensor
    y: Tensor

    def losses(self) -> tuple[Tensor, Tensor]:
        return F.cross_entropy(self.model(self.x), self.y), F.cross_entropy(self.twin(self.x), self.y)

    def backward(self) -> None:
        """One backward pass of both; outputs must be equal to the bit."""
        ours, theirs = self.losses()
        assert torch.equal(ours, theirs)
        ours.backward()
        theirs.backward()

    def same_gradients(self) -> bool:
        """Whether the gradients of all host parameters are equal to the bit."""
        ours = dict(self.model.named_parameters())
        return all(
            theirs.grad is not None and torch.equal(ours[name].grad, theirs.grad)
            for name, theirs in self.twin.named_parameters()
        )


@pytest.fixture
def make_pair() -> Callable[..., Pair]:
    def make(**settings: object) -> Pair:
        torch.manual_seed(0)
        host = Host()
        twin = copy.deepcopy(host)
        return Pair(wrap(host, **settings), twin, torch.randn(4, 3, 8, 8), torch.randint(0, 5, (4,)))

    return make


@pytest.fixture
def pair(make_pair: Callable[..., Pair]) -> Pair:
    return make_pair()


@pytest.fixture
def warm(pair: Pair) -> Pair:
    """The pair after one forward pass, so that every layer knows its site."""
    pair.model.eval()
    pair.twin.eval()
    pair.model(pair.x)
    return pair


class Scale(nn.Module):
    """A delta that reads x's mean and h: ``weight * h``."""

    def __init__(self, value: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(value))

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return h * self.weight


@pytest.fixture
def scale() -> type[Scale]:
    return Scale


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Dynamo with nothing compiled yet, and nothing left over."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()

"""The networks that measures wrap: small ones of every common kind, with the batches they are timed on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


class TransformerBlock(nn.Module):
    """A pre-norm transformer block: attention, then a feed-forward part of four times the width."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, num_heads, batch_first=True)
        self.norm_2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Give the block's output for batch x length x features."""
        normed = self.norm_1(x)
        mixed = x + self.attention(normed, normed, normed, need_weights=False)[0]
        out: Tensor = mixed + self.down(nn.functional.gelu(self.up(self.norm_2(mixed))))
        return out


class ResidualPair(nn.Module):
    """Two 3x3 convolutions with their norms, added to what came in (He et al., arXiv:1512.03385)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv_1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm_1 = nn.BatchNorm2d(outputs)
        self.conv_2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm_2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Give the pair's output for batch x channels x height x width."""
        inner = torch.relu(self.norm_1(self.conv_1(x)))
        return torch.relu(self.norm_2(self.conv_2(inner)) + self.shortcut(x))


def _resnet18() -> nn.Module:
    """Give ResNet-18 as its authors have it: a 7x7 stem, four stages of two pairs, 11.7 million parameters."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 7, 2, 3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
    ]
    inputs = 64
    for outputs, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [ResidualPair(inputs, outputs, stride), ResidualPair(outputs, outputs, 1)]
        inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000))


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10))


def _cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(64, 128, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


def _block() -> nn.Module:
    return TransformerBlock(256, 4)


@dataclass(frozen=True, kw_only=True, slots=True)
class Host:
    """A network and the batch it is timed on."""

    name: str
    """What a table calls it."""
    build: Callable[[], nn.Module]
    """Makes the network."""
    input_shape: tuple[int, ...]
    """Shape of a batch."""
    site: str
    """Dotted name of the layer at which measures let seeds stand."""

    def make(self, seed: int = 0) -> nn.Module:
        """Give the network with weights that depend on the seed alone."""
        torch.manual_seed(seed)
        return self.build()

    def batch(self, seed: int = 1) -> Tensor:
        """Give a batch that depends on the seed alone."""
        return torch.randn(*self.input_shape, generator=torch.Generator().manual_seed(seed))


HOSTS = (
    Host(name="mlp", build=_mlp, input_shape=(64, 784), site="0"),
    Host(name="cnn", build=_cnn, input_shape=(32, 3, 32, 32), site="3"),
    Host(name="resnet18", build=_resnet18, input_shape=(8, 3, 64, 64), site="6.conv_2"),
    Host(name="transformer", build=_block, input_shape=(8, 128, 256), site="down"),
)
"""MLP 784-256-10; three 3x3 convolutions of 32, 64, 128 channels; ResNet-18 on 64 x 64 pictures; one transformer block
of 256 features and 4 heads."""

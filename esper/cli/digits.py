"""The demo's task: scikit-learn's digits in three splits, a small host, and the controls beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from esper.contracts.errors import UnavailableError

NUM_TRAIN: Final = 1097
NUM_CONTROL: Final = 350
BATCH_SIZE: Final = 32
LEARNING_RATE: Final = 5e-3
WEIGHT_DECAY: Final = 1e-2
HIDDEN: Final = 16
NUM_PIXELS: Final = 64
NUM_CLASSES: Final = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class DigitsSplits:
    """1,797 handwritten digits of 8x8 pixels in three splits that share no example."""

    train: TensorDataset
    """What is learned from."""
    control: TensorDataset
    """Held out; decisions about growth see it."""
    sealed: TensorDataset
    """Held out; read once, at the end."""

    def train_loader(self, seed: int) -> DataLoader[tuple[torch.Tensor, ...]]:
        """Give the training batches, shuffled by the seed alone, so that every arm sees the same order."""
        generator = torch.Generator().manual_seed(seed)
        return DataLoader(self.train, batch_size=BATCH_SIZE, shuffle=True, generator=generator)

    def control_loader(self) -> DataLoader[tuple[torch.Tensor, ...]]:
        """Give the control batches."""
        return DataLoader(self.control, batch_size=512)


def load_digits(split_seed: int = 0) -> DigitsSplits:
    """Give the splits; no download, the data ships with scikit-learn.

    Raises:
        UnavailableError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise UnavailableError("the demo needs scikit-learn: pip install 'esper[demo]'") from error
    data = load()
    pixels = torch.tensor(data.data, dtype=torch.float32) / 16.0
    labels = torch.tensor(data.target, dtype=torch.long)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(split_seed))
    parts = torch.tensor_split(order, [NUM_TRAIN, NUM_TRAIN + NUM_CONTROL])
    train, control, sealed = (TensorDataset(pixels[part], labels[part]) for part in parts)
    return DigitsSplits(train=train, control=control, sealed=sealed)


def make_host(seed: int, hidden: int = HIDDEN) -> nn.Sequential:
    """Give a perceptron 64-hidden-10 with weights that depend on the seed alone."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(NUM_PIXELS, hidden), nn.ReLU(), nn.Linear(hidden, NUM_CLASSES))


def width_for(parameters: int) -> int:
    """Give the least hidden width at which the perceptron has at least so many parameters."""
    return math.ceil((parameters - NUM_CLASSES) / (NUM_PIXELS + 1 + NUM_CLASSES))


def make_optimizer(model: nn.Module) -> torch.optim.AdamW:
    """Give the optimizer that every arm uses."""
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)


def train_plain(model: nn.Module, splits: DigitsSplits, *, epochs: int, seed: int) -> None:
    """Train a control in plain PyTorch, on the same batches in the same order as the grown network."""
    optimizer, criterion = make_optimizer(model), nn.CrossEntropyLoss()
    loader = splits.train_loader(seed)
    model.train()
    for _ in range(epochs):
        for inputs, targets in loader:
            criterion(model(inputs), targets).backward()
            optimizer.step()
            optimizer.zero_grad()


@torch.no_grad()
def accuracy(model: nn.Module, dataset: TensorDataset) -> float:
    """Give the share of right answers, 0 to 1."""
    inputs, targets = dataset.tensors
    model.eval()
    return float((model(inputs).argmax(1) == targets).double().mean())


def count_parameters(model: nn.Module) -> int:
    """Give the number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def mean(values: Sequence[float]) -> float:
    """Give the mean."""
    return sum(values) / len(values)

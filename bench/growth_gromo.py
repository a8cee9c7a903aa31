"""gromo (growingnet/gromo, TINY: Verbockhaven et al., TMLR 2024) on the perceptrons of the growth measure.

The host is gromo's own network of the same layers and starts from the same weights. At some epochs its statistics are
gathered over an epoch's training examples, the best new units computed, their scale found by gromo's line search on
the training loss, and the units added: the procedure of gromo's tutorial. The hidden units of the whole budget are
asked for.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib.util import find_spec
from itertools import pairwise
from typing import Any, Final

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from bench.growth_hosts import Cell, Shape, inner_shape, make_net
from bench.growth_tasks import Task, load
from esper.contracts.errors import UnavailableError

SCHEDULES: Final = (4, 8)
"""Times that the network grows, spread evenly over the first half of its epochs, that the arm chooses from. One growth
adds no more units than the statistics' rank allows, which is about the number of classes."""
_SCALES: Final = (0.0, 0.1, 0.5, 1.0)


class GromoNet(nn.Module):
    """gromo's perceptron behind what turns the task's inputs into vectors."""

    def __init__(self, front: nn.Module, grown: Any) -> None:
        super().__init__()
        self.front = front
        self.grown = grown

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Give the logits."""
        out: torch.Tensor = self.grown(self.front(x))
        return out


def reason_not_measured(cell: Cell) -> str:
    """Say why gromo cannot be measured on a cell; empty where it can."""
    if cell.family != "mlp":
        return f"gromo's arm grows perceptrons; {cell.family} hosts are not among its layers here"
    if find_spec("gromo") is None:
        return "gromo is not installed: pip install 'esper[bench]'"
    return ""


def make_gromo(cell: Cell, *, seed: int) -> GromoNet:
    """Give gromo's form of the host, with the host's weights.

    Raises:
        UnavailableError: gromo cannot be measured on the cell.
    """
    reason = reason_not_measured(cell)
    if reason:
        raise UnavailableError(reason)
    from gromo.containers.growing_mlp import GrowingMLP

    host = make_net(cell, cell.host, seed)
    first, last = (module for module in host.modules() if isinstance(module, nn.Linear))
    front = nn.Sequential(*(m for m in host.children() if isinstance(m, nn.Embedding | nn.Flatten)))
    with torch.random.fork_rng(devices=[]):
        grown = GrowingMLP(
            in_features=first.in_features,
            out_features=last.out_features,
            hidden_size=first.out_features,
            number_hidden_layers=1,
            activation=nn.ReLU(),
            device=torch.device("cpu"),
        )
    for theirs, ours in zip(grown.layers, (first, last), strict=True):
        theirs.layer.load_state_dict(ours.state_dict())
    return GromoNet(front, grown)


def growth_plan(cell: Cell, times: int) -> dict[int, Callable[[nn.Module], nn.Module]]:
    """Give after how many epochs which growth is done."""
    shape: Shape = inner_shape(cell)
    widths = torch.linspace(cell.host.width, shape.width, times + 1).round().long().tolist()
    epochs = torch.linspace(0, cell.settings.epochs / 2, times + 1).round().long().tolist()[1:]
    task = load(cell.task)

    def growing(units: int) -> Callable[[nn.Module], nn.Module]:
        return lambda model: _grow(model, task, units)

    return {epoch: growing(after - before) for epoch, (before, after) in zip(epochs, pairwise(widths), strict=True)}


def _grow(model: nn.Module, task: Task, units: int) -> nn.Module:
    """Add units to the hidden layer, as gromo's tutorial does."""
    assert isinstance(model, GromoNet)
    grown = model.grown
    model.eval()
    grown.set_growing_layers(index=0)
    grown.init_computation()
    for inputs, targets in _parts(task):
        model.zero_grad()
        cross_entropy(model(inputs), targets, reduction="sum").backward()  # type: ignore[no-untyped-call]
        grown.update_computation()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using the pseudo-inverse")  # gromo says which of its ways it takes
        grown.compute_optimal_updates(maximum_added_neurons=units)
    grown.reset_computation()
    grown.dummy_select_update()
    grown.set_scaling_factor(min(_SCALES, key=lambda scale: _extended_loss(model, task, scale)))
    grown.apply_change()
    model.zero_grad()
    return model


@torch.no_grad()
def _extended_loss(model: GromoNet, task: Task, scale: float) -> float:
    """Give the training loss with the new units at a scale."""
    model.grown.set_scaling_factor(scale)
    losses = [
        float(cross_entropy(model.grown.extended_forward(model.front(inputs)), targets, reduction="sum"))
        for inputs, targets in _parts(task)
    ]
    return sum(losses)


def _parts(task: Task) -> zip[tuple[torch.Tensor, ...]]:
    examples = task.epoch_of_train
    return zip(torch.split(examples.inputs, 512), torch.split(examples.targets, 512), strict=True)

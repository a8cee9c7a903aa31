"""Training an arm of the growth measure in plain PyTorch, with its FLOPs and its curve, and what an arm came to.

Every arm of a seed starts from weights and sees batches that the seed alone decides. FLOPs are counted by torch's own
formulas: a multiply-add counts 2, elementwise work nothing. Counting is in no arm's wall time beyond its first step. A
static arm's looks at the control split are neither counted nor timed; growth's are both.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from bench.growth_hosts import Cell, Settings, Shape, make_net, num_parameters
from bench.growth_tasks import Batches, Examples, Task, load
from esper.blueprints.flops import ThreadFlops
from esper.contracts.run import GROWING_TYPES
from esper.core.pacing import tail_factor

RATE_FACTORS: Final = (0.5, 1.0, 2.0)
"""Learning rates, over the cell's, that an arm chooses from by the control split."""
TAILS: Final = (0.0, 1.0 / 3.0)
"""Last shares of the training in which the rate falls to 1 %, that an arm chooses from: grafted seeds have the last."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """An arm at the end of an epoch."""

    epoch: int
    """Epochs completed."""
    flops: int
    """FLOPs spent since the start."""
    seconds: float
    """Seconds since the start."""
    accuracy: float | None
    """Accuracy on the control split, 0 to 1; ``None`` where the arm learns from that split."""
    loss: float | None
    """Loss on the control split, in nats; ``None`` as well."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tried:
    """One adaptation of an arm that grows."""

    blueprint: str
    """Blueprint, or the kind of adaptation where it has none."""
    layer: str
    """Layer it stood at."""
    outcome: str
    """``kept``, ``culled``, ``failed``, ``rolled_back``."""
    group: str
    """Race it belonged to, or its own id: what one decision asked for."""
    confidence: float
    """Probability that one of its group pays, as the decision said."""
    contribution: float | None
    """Control loss with the seed off minus on; ``None`` when nothing was measured."""
    low: float | None
    """Lower end of its interval."""
    high: float | None
    """Upper end of its interval."""
    price: float | None
    """What the contribution had to beat."""
    parameters: int
    """Parameters of the seed."""
    begun_epoch: int
    """Epoch in which it began."""
    adaptation_type: str = "add_seed"
    """What was asked for."""

    @property
    def grew(self) -> bool:
        """Whether a seed was to germinate."""
        return self.adaptation_type in GROWING_TYPES

    @property
    def is_kept(self) -> bool:
        """Whether a seed was kept."""
        return self.grew and self.outcome == "kept"


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What one arm of one seed came to."""

    accuracy: float
    """Sealed accuracy, 0 to 1."""
    loss: float
    """Sealed cross-entropy, in nats."""
    parameters: int
    """Parameters at the end."""
    flops: int
    """FLOPs of the whole training."""
    own_flops: int = 0
    """Of these, growth's own work: all but the training steps' forward and backward passes."""
    seconds: float
    """Wall time of the training."""
    curve: tuple[Point, ...]
    """The arm epoch by epoch."""
    rate: float
    """Learning rate."""
    tail: float = 0.0
    """Last share of the training in which the rate fell."""
    choice: str = ""
    """What else was chosen on the control split, in words."""
    tried: tuple[Tried, ...] = ()
    """Adaptations, oldest first."""
    topology: tuple[str, ...] = ()
    """Kept seeds as plain data in base64; their weights are not in it."""
    is_repeated: bool | None = None
    """Whether a second run with the same seed came to the same; ``None`` where there was none."""

    def to_plain(self) -> dict[str, Any]:
        """Give the outcome as JSON has it."""
        return asdict(self)

    @classmethod
    def from_plain(cls, data: dict[str, Any]) -> Outcome:
        """Read what :meth:`to_plain` gave."""
        found = {
            **data,
            "curve": tuple(Point(**point) for point in data["curve"]),
            "tried": tuple(Tried(**item) for item in data["tried"]),
            "topology": tuple(data["topology"]),
        }
        return cls(**found)


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How a network is trained from its first step to its last."""

    settings: Settings
    """Rate, decay, batches, epochs."""
    min_flops: int = 0
    """Where above 0: train on after the last epoch until so many FLOPs are spent."""
    learns_control: bool = False
    """Whether the control split is learnt from as well; then nothing is held out."""
    stops_early: bool = False
    """Whether the epoch of least control loss is taken where it does better on the control split than the last."""
    changes: dict[int, Callable[[nn.Module], nn.Module]] = field(default_factory=dict)
    """After how many epochs the network is exchanged for another, whose optimizer starts anew."""


@dataclass(frozen=True, slots=True)
class Trained:
    """A network at the end of its training."""

    model: nn.Module
    """The network."""
    curve: tuple[Point, ...]
    """Its way."""
    best: Point
    """The epoch it was taken from."""


def train(task: Task, model: nn.Module, recipe: Recipe, *, seed: int) -> Trained:
    """Train a network of fixed shape, or one that is exchanged on its way."""
    settings = recipe.settings
    examples = task.train + task.control if recipe.learns_control else task.train
    batches = Batches(examples, batch_size=settings.batch_size, seed=seed, passes_per_epoch=task.passes_per_epoch)
    curve: list[Point] = []
    least: tuple[float, dict[str, torch.Tensor]] | None = None
    optimizer, step_flops = make_optimizer(model, settings), dict[int, int]()
    flops, seconds, planned = 0, 0.0, settings.epochs
    torch.manual_seed(seed)
    while len(curve) < settings.epochs or flops < recipe.min_flops:
        began_s = time.perf_counter()
        change = recipe.changes.get(len(curve))
        if change is not None:
            with ThreadFlops() as counter:
                model = change(model)
            flops += counter.total
            optimizer, step_flops = make_optimizer(model, settings), {}
        _set_rates(optimizer, settings.learning_rate * tail_factor(len(curve) / planned, settings.tail))
        spent = _epoch(model, optimizer, batches, step_flops)
        flops += spent
        # Steps of a fixed shape cost the same: after the first epoch it is known how many the compute is good for.
        planned = max(settings.epochs, -(-recipe.min_flops // spent))
        seconds += time.perf_counter() - began_s
        found = (None, None) if recipe.learns_control else evaluate(model, task.control)
        curve.append(Point(epoch=len(curve) + 1, flops=flops, seconds=seconds, accuracy=found[0], loss=found[1]))
        loss = curve[-1].loss
        if recipe.stops_early and loss is not None and (least is None or loss < least[0]):
            least = (loss, copy.deepcopy(model.state_dict()))
    return _taken(task, model, curve, least)


def _epoch(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Batches, step_flops: dict[int, int]) -> int:
    """Train for an epoch; gives its FLOPs. A step is counted once a batch size: a fixed shape repeats it exactly."""
    model.train()
    flops = 0
    for inputs, targets in batches:
        if len(inputs) in step_flops:
            _step(model, inputs, targets)
        else:
            with ThreadFlops() as counter:
                _step(model, inputs, targets)
            step_flops[len(inputs)] = counter.total
        flops += step_flops[len(inputs)]
        optimizer.step()
        optimizer.zero_grad()
    return flops


def _set_rates(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def _step(model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> None:
    cross_entropy(model(inputs), targets).backward()  # type: ignore[no-untyped-call]


def _taken(
    task: Task, model: nn.Module, curve: Sequence[Point], least: tuple[float, dict[str, torch.Tensor]] | None
) -> Trained:
    """Give the last epoch's network, or that of the least control loss where it does better on the control split."""
    best = curve[-1]
    if least is not None:
        early = min(curve, key=lambda point: math.inf if point.loss is None else point.loss)
        if score(task, early)[0] > score(task, best)[0]:  # equal accuracy says nothing for fewer steps
            model.load_state_dict(least[1])
            best = early
    return Trained(model, tuple(curve), best)


def score(task: Task, point: Point) -> tuple[float, float]:
    """Give how well a network does on the control split, greater being better: by accuracy, text by loss.

    REQUIRES: a point with figures.
    """
    assert point.accuracy is not None
    assert point.loss is not None
    return (-point.loss, point.accuracy) if task.is_language else (point.accuracy, -point.loss)


def make_optimizer(model: nn.Module, settings: Settings) -> torch.optim.AdamW:
    """Give the optimizer that every arm uses."""
    return torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)


@torch.no_grad()
def evaluate(model: nn.Module, examples: Examples) -> tuple[float, float]:
    """Give accuracy, 0 to 1, and mean cross-entropy in nats; the network is left in evaluation mode."""
    model.eval()
    outputs = model(examples.inputs)
    accuracy = float((outputs.argmax(1) == examples.targets).double().mean())
    return accuracy, float(cross_entropy(outputs.double(), examples.targets))


def outcome_of(task: Task, trained: Trained, *, rate: float, tail: float = 0.0, choice: str = "") -> Outcome:
    """Look at the sealed split, for the first and only time of this arm."""
    accuracy, loss = evaluate(trained.model, task.sealed)
    last = trained.curve[-1]
    early = [] if trained.best is last else [f"epoch {trained.best.epoch} of {last.epoch}"]
    return Outcome(
        accuracy=accuracy,
        loss=loss,
        parameters=num_parameters(trained.model),
        flops=last.flops,
        seconds=last.seconds,
        curve=trained.curve,
        rate=rate,
        tail=tail,
        choice=", ".join([choice, *early] if choice else early),
    )


def at_rate(settings: Settings, rate: float, tail: float = 0.0) -> Settings:
    """Give the settings at another learning rate, and with another fall of it."""
    return replace(settings, learning_rate=rate, tail=tail)


def train_shape(cell: Cell, shape: Shape, recipe: Recipe, *, seed: int) -> Trained:
    """Train a network of a shape from torch's own initial weights."""
    return train(load(cell.task), make_net(cell, shape, seed), recipe, seed=seed)

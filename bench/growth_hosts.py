"""The networks of the growth measure: small hosts of three families, and the wider and deeper ones beside them.

A shape is (width, depth, inner). The host of a cell (task, family) is its smallest shape; what growing may add is a
bound on parameters, and the static networks may have as many: the whole budget, whether growing used it or not.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final, Literal

import torch
from torch import Tensor, nn

from bench.growth_tasks import CONTEXT, VOCABULARY, TaskName
from esper.contracts.errors import InvalidInputError

FamilyName = Literal["mlp", "cnn", "transformer"]
FAMILIES: Final[tuple[FamilyName, ...]] = ("mlp", "cnn", "transformer")

BlueprintKinds = Literal["all", "dense"]
BLUEPRINT_KINDS: Final[dict[BlueprintKinds, str]] = {"all": "", "dense": "dense"}
"""What may grow in a cell, as ``GrowthConfig.allowed_blueprints`` has it."""

BUDGET_OVER_HOST: Final = 3.0
"""Parameters that a grown network may have, over the host's, where the task does not fix the number."""

_HEADS: Final = 2
_EMBEDDING: Final = 8
_NUM_CLASSES: Final[dict[TaskName, int]] = {"digits": 10, "mnist1d": 10, "chars": len(VOCABULARY)}
_MAX_WIDTH: Final = 512


@dataclass(frozen=True, slots=True)
class Shape:
    """Size of a network within its family."""

    width: int
    """Units of a hidden layer, channels of a convolution, features of a token."""
    depth: int
    """Hidden layers, convolutions, blocks."""
    inner: int = 0
    """Units within a block of a transformer; 0 in the other families."""

    def __str__(self) -> str:
        return f"{self.width}x{self.depth}" + (f"/{self.inner}" if self.inner else "")


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How an arm of a cell is trained: AdamW."""

    epochs: int
    """Epochs of every arm that is not given more compute."""
    batch_size: int
    """Examples of a step."""
    learning_rate: float
    """Middle of the rates that controls choose from."""
    weight_decay: float
    """Decoupled weight decay."""
    tail: float = 0.0
    """Last share of the training in which the rate falls to 1 %; 0 keeps it constant."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One task with one family of hosts."""

    task: TaskName
    """Task."""
    family: FamilyName
    """Family of the host."""
    host: Shape
    """Shape of the host."""
    settings: Settings
    """How its arms are trained."""
    max_parameters: int
    """Most parameters that a grown or static network may have."""
    rate_is_fixed: bool
    """Whether what grows under Esper stays at the settings' rate, rather than at the one that the host chose."""
    kinds: BlueprintKinds = "all"
    """Kinds of blueprint that may grow; no matter to a control that grows nothing of Esper's."""

    @property
    def name(self) -> str:
        """What a table calls it."""
        return f"{self.task}/{self.family}" + ("" if self.kinds == "all" else f"/{self.kinds}")


class Block(nn.Module):
    """A pre-norm transformer block: attention, then a feed-forward part of ``inner`` units."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, _HEADS, batch_first=True)
        self.norm_2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        """Give the block's output for batch x length x features."""
        normed = self.norm_1(x)
        mixed = x + self.attention(normed, normed, normed, need_weights=False)[0]
        out: Tensor = mixed + self.down(torch.relu(self.up(self.norm_2(mixed))))
        return out


class Transformer(nn.Module):
    """Tokens, their places, blocks, a norm, and a head on the mean of the tokens or on the last of them."""

    def __init__(self, tokens: nn.Module, length: int, shape: Shape, num_classes: int, *, reads_last: bool) -> None:
        super().__init__()
        self.tokens = tokens
        self.places = nn.Parameter(0.1 * torch.randn(length, shape.width))
        self.blocks = nn.Sequential(*(Block(shape.width, shape.inner) for _ in range(shape.depth)))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, num_classes)
        self.reads_last = reads_last

    def forward(self, x: Tensor) -> Tensor:
        """Give the logits."""
        mixed = self.norm(self.blocks(self.tokens(x) + self.places))
        out: Tensor = self.head(mixed[:, -1] if self.reads_last else mixed.mean(1))
        return out


class ChannelsFirst(nn.Module):
    """Batch x length x features to batch x features x length."""

    def forward(self, x: Tensor) -> Tensor:
        """Give the transposed tensor."""
        return x.transpose(1, 2)


def make_net(cell: Cell, shape: Shape, seed: int) -> nn.Module:
    """Give a network with torch's own initial weights, which depend on the seed alone; global streams are left alone.

    Raises:
        InvalidInputError: A transformer's width is not a multiple of its heads.
    """
    if cell.family == "transformer" and shape.width % _HEADS:
        raise InvalidInputError.of("shape.width", f"be a multiple of {_HEADS}", shape.width)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _BUILDERS[cell.family](cell.task, shape)


def _mlp(task: TaskName, shape: Shape) -> nn.Module:
    features = {"digits": 64, "mnist1d": 40, "chars": CONTEXT * _EMBEDDING}[task]
    parts: list[nn.Module] = [nn.Embedding(len(VOCABULARY), _EMBEDDING), nn.Flatten()] if task == "chars" else []
    for _ in range(shape.depth):
        parts += [nn.Linear(features, shape.width), nn.ReLU()]
        features = shape.width
    return nn.Sequential(*parts, nn.Linear(features, _NUM_CLASSES[task]))


def _cnn(task: TaskName, shape: Shape) -> nn.Module:
    """Two convolutions that shorten the signal to a quarter; those that deeper shapes have more keep its length."""
    width = shape.width
    parts: list[nn.Module]
    further: type[nn.Conv1d | nn.Conv2d]
    if task == "digits":
        parts = [nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        parts += [nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        further, places = nn.Conv2d, 4
    else:
        is_text = task == "chars"
        parts = [nn.Embedding(len(VOCABULARY), _EMBEDDING), ChannelsFirst()] if is_text else [nn.Unflatten(1, (1, 40))]
        parts += [nn.Conv1d(_EMBEDDING if is_text else 1, width, 5, stride=2, padding=2), nn.ReLU()]
        parts += [nn.Conv1d(width, width, 3, stride=2, padding=1), nn.ReLU()]
        further, places = nn.Conv1d, CONTEXT // 4 if is_text else 10
    for _ in range(shape.depth - 2):
        parts += [further(width, width, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(places * width, _NUM_CLASSES[task]))


def _transformer(task: TaskName, shape: Shape) -> nn.Module:
    tokens: nn.Module
    if task == "chars":
        tokens, length = nn.Embedding(len(VOCABULARY), shape.width), CONTEXT
    else:
        length, patch = (8, 8) if task == "digits" else (10, 4)
        tokens = nn.Sequential(nn.Unflatten(1, (length, patch)), nn.Linear(patch, shape.width))
    return Transformer(tokens, length, shape, _NUM_CLASSES[task], reads_last=task == "chars")


_BUILDERS: Final[dict[FamilyName, Callable[[TaskName, Shape], nn.Module]]] = {
    "mlp": _mlp,
    "cnn": _cnn,
    "transformer": _transformer,
}

_ISSUE_SETTINGS: Final[dict[TaskName, Settings]] = {
    "digits": Settings(epochs=40, batch_size=32, learning_rate=1e-2, weight_decay=1e-2),
    "mnist1d": Settings(epochs=60, batch_size=64, learning_rate=2e-2, weight_decay=0.1),
    "chars": Settings(epochs=24, batch_size=64, learning_rate=4e-3, weight_decay=1e-2),
}
_RATES: Final[dict[FamilyName, float]] = {"cnn": 1e-2, "transformer": 4e-3}
_HOSTS: Final[dict[tuple[TaskName, FamilyName], Shape]] = {
    ("digits", "mlp"): Shape(16, 1),
    ("digits", "cnn"): Shape(6, 2),
    ("digits", "transformer"): Shape(8, 1, 16),
    ("mnist1d", "mlp"): Shape(32, 1),
    ("mnist1d", "cnn"): Shape(8, 2),
    ("mnist1d", "transformer"): Shape(16, 1, 32),
    ("chars", "mlp"): Shape(32, 1),
    ("chars", "cnn"): Shape(16, 2),
    ("chars", "transformer"): Shape(16, 1, 32),
}
_FIXED_BUDGETS: Final[dict[tuple[TaskName, FamilyName], int]] = {("digits", "mlp"): 3610, ("mnist1d", "mlp"): 4906}


def make_cell(task: TaskName, family: FamilyName, kinds: BlueprintKinds = "all") -> Cell:
    """Give a cell; the settings of the perceptrons on digits and mnist1d are fixed by the measure's goals."""
    settings, host = _ISSUE_SETTINGS[task], _HOSTS[task, family]
    if family in _RATES:
        settings = replace(settings, learning_rate=_RATES[family])
    bare = Cell(
        task=task, family=family, host=host, settings=settings, max_parameters=0, rate_is_fixed=False, kinds=kinds
    )
    fixed = _FIXED_BUDGETS.get((task, family))
    budget = int(BUDGET_OVER_HOST * size_of(bare, host)) if fixed is None else fixed
    return replace(bare, max_parameters=budget, rate_is_fixed=fixed is not None)


def num_parameters(model: nn.Module) -> int:
    """Give the number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def size_of(cell: Cell, shape: Shape) -> int:
    """Give the number of parameters of a shape."""
    with torch.device("meta"):
        return num_parameters(_BUILDERS[cell.family](cell.task, shape))


def widest(cell: Cell, shape_at: Callable[[int], Shape], limit: float) -> Shape:
    """Give the largest of the shapes ``shape_at(1)``, ``shape_at(2)``, ... that has no more parameters than a limit.

    REQUIRES: each is larger than the one before.

    Raises:
        InvalidInputError: The first is too large.
    """
    fitting = bisect_right(range(1, _MAX_WIDTH), limit, key=lambda n: size_of(cell, shape_at(n)))
    if not fitting:
        raise InvalidInputError.of("limit", f"hold {size_of(cell, shape_at(1))} parameters", limit)
    return shape_at(fitting)


def wide_shapes(cell: Cell) -> list[Shape]:
    """Give shapes as deep as the host, up to the whole budget, that the static-wide control chooses from."""
    host, limit = cell.host, cell.max_parameters
    if cell.family != "transformer":
        return [widest(cell, lambda n: Shape(n, host.depth), share * limit) for share in (0.6, 0.8, 1.0)]
    return [_transformer_shape(cell, host.depth, 2), _transformer_shape(cell, host.depth, 4), inner_shape(cell)]


def _transformer_shape(cell: Cell, depth: int, ratio: int) -> Shape:
    """Give the widest shape whose blocks have ``ratio`` times as many inner units; these take what is then left."""
    limit = cell.max_parameters
    widths = widest(cell, lambda n: Shape(_HEADS * n, depth, ratio * _HEADS * n), limit)
    return widest(cell, lambda n: Shape(widths.width, depth, n), limit)


def inner_shape(cell: Cell) -> Shape:
    """Give the shape of the whole budget that widening can reach without changing the function.

    Of a transformer that is its feed-forward part: the norms on its residual stream see every feature of a token.
    """
    host, limit = cell.host, cell.max_parameters
    if cell.family != "transformer":
        return widest(cell, lambda n: Shape(n, host.depth), limit)
    return widest(cell, lambda n: Shape(host.width, host.depth, n), limit)


def deep_shapes(cell: Cell) -> list[Shape]:
    """Give shapes of one and two layers more than the host, of the whole budget."""
    host, limit = cell.host, cell.max_parameters
    depths = (host.depth + 1, host.depth + 2)
    if cell.family != "transformer":
        return [widest(cell, lambda n, depth=depth: Shape(n, depth), limit) for depth in depths]  # type: ignore[misc]
    return [_transformer_shape(cell, depth, 2) for depth in depths]

"""Every kind of layer in two real processes: DistributedDataParallel and ``fully_shard`` over gloo."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from esper.contracts.blueprint import SiteKind
from esper.contracts.errors import InvalidStateError
from esper.contracts.lifecycle import SeedLifecycleState as State
from esper.core.export import export
from esper.core.wrap import LayerTelemetry, unwrap, wrap
from esper.execution.layers import kasmina_class_of, register_layer
from tests.processes import in_processes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    # mp.spawn and the groups' own clean-up warn about themselves.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
SIZE = 2
SEEDED = ("conv", "attention", "norm1d")


class Shift(nn.Module):
    """A user's own kind of layer."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(4))

    def forward(self, value: Tensor) -> Tensor:
        return value + self.bias


class Delta(nn.Module):
    """A delta with one weight; not a scalar, which cannot be sharded."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.75, 0.5]))

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(h) * self.weight.sum()


class Host(nn.Module):
    """All kinds of layers in one row."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm2d = nn.BatchNorm2d(8)
        self.line = nn.Conv1d(8, 8, 1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.norm1d = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 4)
        self.shift = Shift()

    def forward(self, image: Tensor) -> Tensor:
        tokens = self.line(torch.relu(self.norm2d(self.conv(image))).flatten(2)).transpose(1, 2)
        mixed = self.norm(self.attention(tokens, tokens, tokens)[0]).mean(1)
        return self.shift(self.head(torch.relu(self.norm1d(mixed))))


class Written(nn.Module):
    """The deltas at three layers written by hand, as hooks on an untouched host."""

    def __init__(self, host: nn.Module) -> None:
        super().__init__()
        self.host = host
        self.deltas = nn.ModuleDict({name: Delta() for name in SEEDED})
        for name, delta in self.deltas.items():
            host.get_submodule(name).register_forward_hook(_adding(delta))

    def forward(self, image: Tensor) -> Tensor:
        return self.host(image)


def _adding(delta: nn.Module) -> Any:
    alpha = torch.tensor(0.5)

    def hook(_: nn.Module, args: tuple[Tensor, ...], out: Any) -> Any:
        h = out[0] if isinstance(out, tuple) else out
        total = h + delta(args[0], h) * alpha
        return (total, *out[1:]) if isinstance(out, tuple) else total

    return hook


def pair(live: bool) -> tuple[Any, nn.Module]:
    if kasmina_class_of(Shift) is None:
        register_layer(Shift, kind=SiteKind.LINEAR)
    torch.manual_seed(0)
    host = Host()
    twin = copy.deepcopy(host)
    model = wrap(host, telemetry=LayerTelemetry(interval_steps=1))
    if not live:
        return model, twin
    model.eval()
    with torch.no_grad():
        model(torch.randn(4, 3, 4, 4))
    for name in SEEDED:
        layer = model.kasmina_layer(name)
        layer.attach_module(0, Delta())
        layer.transition(0, State.EVALUATING)
        layer.set_alpha(0, 0.5)
    return model.train(), Written(twin)


def whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def steps(model: nn.Module, rank: int) -> dict[str, Tensor]:
    """Train three steps on this rank's share; gives losses and, by name, the parameters put together again."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    found: dict[str, Tensor] = {}
    for step in range(3):
        batch = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(step)).chunk(SIZE)[rank]
        optimizer.zero_grad()
        loss = model(batch).square().mean()
        loss.backward()
        optimizer.step()
        found[f"loss{step}"] = loss.detach()
    return found | {name: whole(value.detach()) for name, value in model.named_parameters()}


def shard(model: nn.Module) -> nn.Module:
    for name in ("attention", "head"):
        fully_shard((model.host if isinstance(model, Written) else model).get_submodule(name))
    return fully_shard(model)


def parallel(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def agree(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Check that a seed's parameters are those of its delta, and all others those of the host, to the bit."""
    for name, value in ours.items():
        plain = name.removeprefix("module.")
        layer, _, rest = plain.partition(".seeds.0.kernel.")
        wanted = [f"deltas.{layer}.{rest}"] if rest else [plain, f"host.{plain}"]
        (other,) = [found for key, found in theirs.items() if key.removeprefix("module.") in wanted]
        assert torch.equal(value, other), name
    assert len(ours) == len(theirs)


def everywhere_equal(found: dict[str, Tensor]) -> None:
    for name, value in found.items():
        if not name.startswith("loss"):
            gathered = [torch.empty_like(value) for _ in range(SIZE)]
            dist.all_gather(gathered, value.contiguous())
            assert torch.equal(*gathered), name


def _rank(rank: int, way: str) -> None:
    spread = shard if way == "fully_shard" else parallel
    for live in (False, True):
        model, twin = pair(live)
        before = {name: value.clone() for name, value in model.state_dict().items() if torch.is_tensor(value)}
        ours, theirs = steps(spread(model), rank), steps(spread(twin), rank)
        agree(ours, theirs)
        everywhere_equal(ours)
        assert all(not torch.equal(whole(value), before[name]) for name, value in model.named_parameters() if live)
        assert all(layer.state_layout.errors.sum() == 0 for layer in model.kasmina_layers.values())
    if way == "fully_shard":
        _check_shards()


def _check_shards() -> None:
    """Keys of a sharded dormant model are the host's, its values load back, and it cannot be taken apart."""
    model, twin = pair(live=False)
    shard(model)
    assert list(model.state_dict()) == list(twin.state_dict())
    assert isinstance(model.state_dict()["conv.weight"], DTensor)
    model.load_state_dict(model.state_dict())
    for name, value in model.state_dict().items():
        assert torch.equal(whole(value), twin.state_dict()[name]), name
    for back in (unwrap, export):
        with pytest.raises(InvalidStateError, match="model must be of the class that wrap"):
            back(model)


@pytest.mark.parametrize("way", ["ddp", "fully_shard"])
def test_dormant_and_grown_models_train_as_the_maths_written_by_hand(way: str, tmp_path: Path) -> None:
    in_processes(_rank, tmp_path, way, size=SIZE)

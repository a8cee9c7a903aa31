"""A grown model that was sharded over one mesh of devices is taken up whole, over another mesh, and under DDP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from esper.blueprints import default_registry
from esper.contracts.lifecycle import SeedLifecycleState as State
from esper.core.export import export
from esper.core.wrap import wrap
from tests.processes import in_processes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    # mp.spawn and the groups' own clean-up warn about themselves.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
SITES = {"conv": "conv1x1", "norm": "norm_shift", "head": "bottleneck_adapter"}


class Host(nn.Module):
    """A convolution, a norm and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 4)

    def forward(self, image: Tensor) -> Tensor:
        found: Tensor = self.head(self.norm(torch.relu(self.conv(image)).flatten(2).mean(2)))
        return found


def batch(step: int, rank: int, size: int) -> Tensor:
    return torch.randn(2 * size, 3, 5, 5, generator=torch.Generator().manual_seed(step)).chunk(size)[rank]


def grown() -> Any:
    model: Any = wrap(Host(), telemetry=False)
    with torch.no_grad():
        model(torch.randn(2, 3, 5, 5))
    for name, template in SITES.items():
        layer = model.kasmina_layer(name)
        layer.germinate(1, default_registry().create_blueprint(template).ir, random_seed=3)
        layer.transition(1, State.EVALUATING)
        layer.set_alpha(1, 0.25)
    model.head.transition(1, State.FOSSILIZED)
    return model


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, size: int, *, steps: int = 2) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        model(batch(step, rank, size)).square().mean().backward()
        optimizer.step()


def whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def _save(rank: int, path: str) -> None:
    """Train over two ranks, one unit a layer; leave everything in one file."""
    model = grown()
    fully_shard(model.conv)
    fully_shard(model)
    optimizer = adamw(model)
    train(model, optimizer, rank, 2)
    state = get_model_state_dict(model, options=WHOLE)
    moments = get_optimizer_state_dict(model, optimizer, options=WHOLE)
    if rank == 0:
        torch.save({"model": state, "optimizer": moments}, path)


def taken_up(path: str) -> tuple[Any, dict[str, Any]]:
    """Give a freshly wrapped host with what was saved, and what was saved."""
    saved = torch.load(path, weights_only=True)
    model: Any = wrap(Host(), telemetry=False)
    model.load_state_dict(saved["model"])
    return model, saved


def check_values(model: Any, saved: dict[str, Any]) -> None:
    found = model.state_dict()
    assert list(found) == list(saved["model"])
    for name, value in saved["model"].items():
        assert torch.equal(whole(found[name]), value), name
    states = {name: layer.state_layout.state(1) for name, layer in model.kasmina_layers.items()}
    assert states == {"conv": State.EVALUATING, "norm": State.EVALUATING, "head": State.FOSSILIZED}
    assert model.conv.find_seed(1).alpha == 0.25


def check_moments(model: nn.Module, optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Check what the optimizer holds for every parameter, by name and to the bit."""
    found = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
    for name, state in saved["optimizer"]["state"].items():
        for key, value in state.items():
            if dist.get_rank() == 0:
                assert torch.equal(found["state"][name][key], value), f"{name}.{key}"
    if dist.get_rank() == 0:
        assert len(found["state"]) == len(list(model.parameters()))


def _take_up_sharded(rank: int, path: str, size: int) -> None:
    """Over another number of ranks, the layers in other units."""
    model, saved = taken_up(path)
    mesh = init_device_mesh("cpu", (size,))
    fully_shard(model.norm, mesh=mesh)
    fully_shard(model, mesh=mesh)
    check_values(model, saved)
    optimizer = adamw(model)
    set_optimizer_state_dict(model, optimizer, saved["optimizer"], options=StateDictOptions(full_state_dict=True))
    check_moments(model, optimizer, saved)
    train(model, optimizer, rank, size)
    for name, value in model.named_parameters():
        assert not torch.equal(whole(value), saved["model"][name]), f"{name} goes on learning"


def _take_up_whole(rank: int, path: str, size: int) -> None:
    """Under ``DistributedDataParallel``, and out of it as plain torch."""
    model, saved = taken_up(path)
    check_values(model, saved)
    optimizer = adamw(model)
    parallel = DistributedDataParallel(model)
    set_optimizer_state_dict(parallel, optimizer, saved["optimizer"], options=StateDictOptions(full_state_dict=True))
    check_moments(parallel, optimizer, saved)
    train(parallel, optimizer, rank, size)
    for name in ("conv", "norm"):
        model.kasmina_layer(name).transition(1, State.FOSSILIZED)
    assert torch.equal(export(model)(batch(0, rank, size)), model(batch(0, rank, size)))


@pytest.mark.parametrize("take_up", [_take_up_sharded, _take_up_whole])
def test_what_two_ranks_saved_goes_on_over_three(take_up: Any, tmp_path: Path) -> None:
    path = str(tmp_path / "saved.pt")
    for name, work, args, size in (("two", _save, (path,), 2), ("three", take_up, (path, 3), 3)):
        (tmp_path / name).mkdir()
        in_processes(work, tmp_path / name, *args, size=size)

"""A seed that takes no part on one of two ranks: nobody waits for its gradients, and the ranks settle it together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from esper.blueprints import default_registry
from esper.contracts.lifecycle import SeedLifecycleState as State
from esper.core.wrap import wrap
from esper.execution.circuit_breaker import FAILURE_LIMIT
from tests.processes import in_processes

WAYS = ("ddp", "fully_shard", "fully_shard the layer")


class Moody(nn.Module):
    """A delta that fails as ``mood`` says."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.5, 0.25]))
        self.mood = "sound"

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        if self.mood == "raises":
            raise RuntimeError("on this rank alone")
        delta = torch.tanh(h) * self.weight.sum()
        return delta * torch.nan if self.mood == "NaN" else delta


class Host(nn.Module):
    """Two layers; the second gets seeds, and what comes behind writes in place."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(8, 8)
        self.act = nn.ReLU(inplace=True)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.second(self.first(x))))


def grown(width: int = 6) -> Any:
    """Give a model with a seed that may fail and one that does not at one layer."""
    model: Any = wrap(Host(), telemetry=False)
    with torch.no_grad():
        model(torch.randn(width, 6))
    layer = model.second
    layer.attach_module(0, Moody())
    layer.germinate(1, default_registry().create_blueprint("bottleneck_adapter").ir)
    for index in (0, 1):
        layer.transition(index, State.EVALUATING)
        layer.set_alpha(index, 0.5)
    return model


def spread(model: Any, way: str) -> nn.Module:
    if way == "ddp":
        return DistributedDataParallel(model)
    if way == "fully_shard the layer":
        fully_shard(model.second)
    return fully_shard(model)


def share_of(step: int, rank: int, rows: int = 6) -> Tensor:
    return torch.randn(2 * rows, 6, generator=torch.Generator().manual_seed(step)).chunk(2)[rank]


def whole(value: Tensor | None) -> Tensor:
    assert value is not None
    return value.full_tensor() if isinstance(value, DTensor) else value


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("module."): whole(value.grad).clone() for name, value in model.named_parameters()}


def backward(model: nn.Module, rank: int, step: int = 0, rows: int = 6) -> dict[str, Tensor]:
    model.zero_grad()
    model(share_of(step, rank, rows)).square().mean().backward()
    return gradients(model)


def alone(rank: int, rows: int, *, is_cut: bool) -> dict[str, Tensor]:
    """Give one rank's gradients by themselves; zeros for the first seed where it is cut."""
    model = grown(rows)
    if is_cut:
        model.second.set_alpha(0, 0.0)
    model(share_of(0, rank, rows)).square().mean().backward()
    return {
        name: torch.zeros_like(value) if value.grad is None else value.grad for name, value in model.named_parameters()
    }


def _waits_for_nobody(rank: int, way: str, mood: str, rows: int) -> None:
    model = grown(rows)
    moody = model.second.find_seed(0).kernel
    parallel = spread(model, way)
    backward(parallel, rank, rows=rows)
    moody.mood = mood if rank == 0 else "sound"
    found = backward(parallel, rank, rows=rows)
    wanted = [alone(number, rows, is_cut=number == 0) for number in (0, 1)]
    for name, value in found.items():
        torch.testing.assert_close(value, (wanted[0][name] + wanted[1][name]) / 2, msg=f"{way}, {mood}: {name}")
    assert found["second.seeds.0.kernel.weight"].any()
    assert model.second.state_layout.errors.tolist()[:2] == [int(rank == 0), 0]


def _settles_together(rank: int, way: str) -> None:
    model = grown()
    layer = model.second
    parallel = spread(model, way)
    layer.find_seed(0).kernel.mood = "raises" if rank == 0 else "sound"
    for step in range(FAILURE_LIMIT + 1):
        backward(parallel, rank, step)
        assert layer.state_layout.state(0) is State.EVALUATING, "no rank cuts it off alone"
    assert layer.state_layout.errors[0] == (FAILURE_LIMIT if rank == 0 else 0), "once open, it is not run any more"
    assert layer.find_seed(0).breaker.is_open is (rank == 0)
    model.settle_failures()
    assert layer.state_layout.state(0) is State.ERROR, "on both"
    assert layer.state_layout.state(1) is State.EVALUATING
    for step in range(2):  # DistributedDataParallel still waits for its parameters
        found = backward(parallel, rank, step)
        assert not found["second.seeds.0.kernel.weight"].any()
        assert found["second.seeds.1.kernel.node_up.weight"].any()
    assert model.settle_failures() == 0


def _a_share_of_zero_is_waited_for_too(rank: int, way: str) -> None:
    model = grown()
    model.second.set_alpha(0, 0.0)
    parallel = spread(model, way)
    for step in range(2):
        assert not backward(parallel, rank, step)["second.seeds.0.kernel.weight"].any()
    model.second.set_alpha(0, 0.5)
    assert backward(parallel, rank)["second.seeds.0.kernel.weight"].any()


class Checkpointed(nn.Module):
    """Runs the model under activation checkpointing."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = checkpoint(self.model, x, use_reentrant=False)
        return found


def _under_checkpointing_too(rank: int) -> None:
    model = grown()
    parallel = DistributedDataParallel(Checkpointed(model))
    model.second.find_seed(0).kernel.mood = "raises" if rank == 0 else "sound"
    for step in range(FAILURE_LIMIT + 1):
        found = backward(parallel, rank, step)
        assert found["model.second.seeds.0.kernel.weight"].any()
    assert model.second.state_layout.state(0) is State.EVALUATING
    model.settle_failures()
    assert model.second.state_layout.state(0) is State.ERROR


def _in_turn(rank: int) -> None:
    """All of them in the same two processes, whose start costs more than any of them."""
    for way in WAYS:
        _waits_for_nobody(rank, way, "raises", 6)
        _waits_for_nobody(rank, way, "NaN", 6)
        _settles_together(rank, way)
        _a_share_of_zero_is_waited_for_too(rank, way)
        dist.barrier()
    _waits_for_nobody(rank, "ddp", "NaN", 1 << 14)  # contributions are looked at one by one
    _under_checkpointing_too(rank)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_seed_that_fails_on_one_rank_stops_nobody(tmp_path: Path) -> None:
    in_processes(_in_turn, tmp_path)

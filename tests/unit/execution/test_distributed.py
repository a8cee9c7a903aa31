"""Wrapped models under DistributedDataParallel, with real process groups."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from esper.contracts.errors import UnwrappableModelError
from esper.contracts.lifecycle import SeedLifecycleState as State
from esper.core.wrap import wrap


class Lift(nn.Module):
    """A delta with one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return h * self.weight


def host() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_dormant_model_trains_as_its_host(group: None) -> None:
    net = host()
    twin = copy.deepcopy(net)
    ours, theirs = DistributedDataParallel(wrap(net)), DistributedDataParallel(twin)
    x = torch.randn(16, 6)
    for model in (ours, theirs):
        model(x).square().mean().backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_the_wrapping_comes_first(group: None) -> None:
    with pytest.raises(UnwrappableModelError, match="wrap the model first, then give it to DistributedDataParallel"):
        wrap(DistributedDataParallel(host()))


def _rank(rank: int, size: int, directory: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{directory}/group", rank=rank, world_size=size)
    torch.set_num_threads(1)
    model = wrap(host(), telemetry=False)
    batch = torch.randn(8, 6, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        model(batch)
    model[3].attach_module(0, Lift())
    model[3].transition(0, State.EVALUATING)
    model[3].set_alpha(0, 0.5)
    parallel = DistributedDataParallel(model)
    share = batch.chunk(size)[rank]
    parallel(share).square().sum().div(len(share)).backward()
    gradient = model[3].seed_parameters(0)[0].grad
    assert gradient is not None
    gathered = [torch.zeros_like(gradient) for _ in range(size)]
    dist.all_gather(gathered, gradient)
    assert torch.equal(gathered[0], gathered[1])
    assert gradient.abs() > 0
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_grown_model_synchronises_its_seeds_over_two_processes(tmp_path: Path) -> None:
    mp.spawn(_rank, args=(2, str(tmp_path)), nprocs=2, join=True)

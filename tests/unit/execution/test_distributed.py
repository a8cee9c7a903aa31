"""Wrapped models under DistributedDataParallel, with real process groups."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.exc import InternalTorchDynamoError
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from esper.blueprints import default_registry
from esper.contracts.errors import InvalidStateError, UnwrappableModelError
from esper.contracts.lifecycle import SeedLifecycleState as State
from esper.core.session import Session
from esper.core.wrap import wrap
from esper.execution.circuit_breaker import FAILURE_LIMIT
from tests.processes import in_processes


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


def spread_host() -> tuple[Any, Tensor]:
    """Give a wrapped host that has seen a batch, and the batch."""
    model = wrap(host(), telemetry=False)
    batch = torch.randn(8, 6, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        model(batch)
    return model, batch


def grow(model: Any, seed_index: int = 0) -> Tensor:
    """Blend a seed in; gives its one parameter."""
    model[3].attach_module(seed_index, Lift())
    model[3].transition(seed_index, State.EVALUATING)
    model[3].set_alpha(seed_index, 0.5)
    return model[3].seed_parameters(seed_index)[0]


def backward(parallel: nn.Module, batch: Tensor, rank: int) -> None:
    share = batch.chunk(2)[rank]
    parallel(share).square().sum().div(len(share)).backward()


def is_equal_everywhere(value: Tensor | None) -> bool:
    assert value is not None
    gathered = [torch.zeros_like(value) for _ in range(2)]
    dist.all_gather(gathered, value)
    return torch.equal(*gathered) and bool(value.abs().sum() > 0)


def _synchronises(rank: int) -> None:
    model, batch = spread_host()
    weight = grow(model)
    backward(DistributedDataParallel(model), batch, rank)
    assert is_equal_everywhere(weight.grad)


def _refuses_later_seeds(rank: int) -> None:
    model, batch = spread_host()
    parallel = DistributedDataParallel(model)
    compiled = torch.compile(parallel, backend="eager")
    compiled(batch)
    weight = grow(model)
    # While it traces, dynamo puts its own error around whatever is raised.
    for spread, error in ((parallel, InvalidStateError), (compiled, InternalTorchDynamoError)):
        with pytest.raises(error, match="seed 0 of layer '3' must be planted before"):
            spread(batch)
    assert model[3].state_layout.state(0) is State.EVALUATING
    assert model[3].state_layout.errors.sum() == 0
    backward(DistributedDataParallel(model), batch, rank)
    assert is_equal_everywhere(weight.grad)


def _refuses_sharded_layers(rank: int) -> None:
    model, batch = spread_host()
    structure = model.grown_structure()
    other, _ = spread_host()
    other[3].germinate(0, default_registry().create_blueprint("bottleneck_adapter").ir)
    grown = other.grown_structure()
    fully_shard(model)
    for plant in (lambda: grow(model), lambda: model.rebuild(grown)):
        with pytest.raises(InvalidStateError, match="layer '3' must hold its parameters whole to be grown"):
            plant()
    assert model[3].state_layout.state(0) is State.DORMANT
    assert model.grown_structure() == structure
    model(batch).sum().backward()


def overflowing() -> tuple[Any, Tensor, nn.Parameter]:
    """Give a host whose seed has a weight, given too, at which a large loss has too large a gradient; and a batch."""
    model, batch = spread_host()
    layer = model[3]
    layer.germinate(0, default_registry().create_blueprint("bottleneck_adapter").ir)
    layer.transition(0, State.EVALUATING)
    layer.set_alpha(0, 0.5)
    weights = dict(layer.find_seed(0).kernel.named_parameters())
    with torch.no_grad():
        weights["node_down.weight"].mul_(1e36)
        weights["node_up.weight"].zero_()
    return model, batch, weights["node_up.weight"]


def _stops_overflow_in_a_graph(rank: int) -> None:
    model, batch, weight = overflowing()
    parallel = DistributedDataParallel(model)
    compiled = torch.compile(parallel, backend="aot_eager")
    for failures in (1, 2):
        parallel.zero_grad()
        (compiled(batch.chunk(2)[rank]).square().sum() * (1e6 if rank == 0 else 1e-6)).backward()
        assert all(torch.isfinite(parameter.grad).all() for parameter in parallel.parameters())
        assert is_equal_everywhere(weight.grad)
        assert model[3].state_layout.errors[0] == (failures if rank == 0 else 0)


def _stops_overflow(rank: int) -> None:
    model, batch, weight = overflowing()
    layer, parallel = model[3], DistributedDataParallel(model)
    share = batch.chunk(2)[rank]
    for failures in range(1, FAILURE_LIMIT + 2):
        parallel.zero_grad()
        # Of the first rank's loss the gradient at one weight is above what float32 holds.
        (parallel(share).square().sum() * (1e6 if rank == 0 else 1e-6)).backward()
        assert all(torch.isfinite(parameter.grad).all() for parameter in parallel.parameters())
        assert is_equal_everywhere(weight.grad)
        # Once its breaker is open it is not run any more.
        assert layer.state_layout.errors[0] == (min(failures, FAILURE_LIMIT) if rank == 0 else 0)
    # One rank that cut it off alone would leave the other waiting for its gradients.
    assert layer.state_layout.state(0) is State.EVALUATING
    assert layer.find_seed(0).breaker.is_open is (rank == 0)


def _leaves_a_loss_that_is_not_finite(rank: int) -> None:
    model, batch = spread_host()
    model[3].germinate(0, default_registry().create_blueprint("bottleneck_adapter").ir)
    model[3].transition(0, State.EVALUATING)
    model[3].set_alpha(0, 0.5)
    parallel = DistributedDataParallel(model)
    (parallel(batch.chunk(2)[rank]).sum() * (torch.inf if rank == 0 else 1.0)).backward()
    assert not all(torch.isfinite(parameter.grad).all() for parameter in model[3].seed_parameters(0))
    assert model[3].state_layout.errors.sum() == 0


class Bare(nn.Module):
    """A norm without parameters between layers that have some; each may be a unit of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.inner = nn.Sequential(nn.LayerNorm(8, elementwise_affine=False), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.first(x))


def _refuses_sharded_layers_without_parameters(rank: int) -> None:
    for sharded, is_refused in (("", True), ("host", True), ("inner", True), ("first", False)):
        torch.manual_seed(0)
        model = wrap(Bare(), telemetry=False)
        with torch.no_grad():
            model(torch.randn(4, 6))
        norm = model.inner[0]
        fully_shard({"": model, "host": norm._kasmina.skips.host}.get(sharded) or model.get_submodule(sharded))
        if is_refused:
            with pytest.raises(InvalidStateError, match=r"layer 'inner\.0' must hold its parameters whole"):
                norm.attach_module(0, Lift())
            assert norm.state_layout.state(0) is State.DORMANT
        else:
            norm.attach_module(0, Lift())


def _refuses_sessions(rank: int) -> None:
    model, batch = spread_host()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    control = [(batch, torch.zeros(8, dtype=torch.long))]
    with pytest.raises(InvalidStateError, match="must be the only rank of its training, got a process group of 2"):
        Session(model, optimizer, loss_fn=nn.functional.cross_entropy, control_loader=control)


def _in_turn(rank: int) -> None:
    """All of them in the same two processes, whose start costs more than any of them."""
    for work in (
        _synchronises,
        _stops_overflow,
        _stops_overflow_in_a_graph,
        _leaves_a_loss_that_is_not_finite,
        _refuses_later_seeds,
        _refuses_sharded_layers,
        _refuses_sharded_layers_without_parameters,
        _refuses_sessions,
    ):
        work(rank)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_two_ranks_share_their_seeds_or_refuse_them(tmp_path: Path) -> None:
    in_processes(_in_turn, tmp_path)

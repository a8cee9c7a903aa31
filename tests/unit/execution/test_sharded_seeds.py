"""Blueprints' seeds under ``fully_shard``, in two processes: gradients are looked at before they are reduced."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from esper.blueprints import default_registry
from esper.contracts.lifecycle import SeedLifecycleState as State
from esper.core.wrap import wrap
from esper.execution.circuit_breaker import FAILURE_LIMIT
from tests.processes import in_processes

UNITS = ("whole", "layer", "inner")
"""What is a unit of its own beside the model: nothing, the layer with the seed, what stands around it."""


class Host(nn.Module):
    """Layers of three kinds, of which the one in the middle gets seeds."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 8)
        self.inner = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.ReLU())
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(self.first(x)))


class Written(nn.Module):
    """The same with the kernels of the seeds written by hand, as a hook on an untouched host."""

    def __init__(self, kernels: list[nn.Module]) -> None:
        super().__init__()
        self.host = Host()
        self.host.inner[1].kernels = nn.ModuleList(kernels)
        self.host.inner[1].register_forward_hook(
            lambda layer, args, h: sum((0.5 * kernel(args[0], h) for kernel in layer.kernels), start=h)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.host(x)


def grown(*templates: str) -> Any:
    """Give a wrapped host with blended seeds at its middle layer, their weights moved away from zero."""
    model: Any = wrap(Host(), telemetry=False)
    with torch.no_grad():
        model(torch.randn(8, 6))
    layer = model.inner[1]
    for index, template in enumerate(templates):
        layer.germinate(index, default_registry().create_blueprint(template).ir, random_seed=index)
        layer.transition(index, State.EVALUATING)
        layer.set_alpha(index, 0.5)
        with torch.no_grad():
            for parameter in layer.seed_parameters(index):
                parameter.add_(0.1)
    return model


def shard(host: Any, unit: str, **settings: Any) -> None:
    if unit != "whole":
        fully_shard(host.inner[1] if unit == "layer" else host.inner, **settings)


def share_of(step: int, rank: int) -> Tensor:
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(step)).chunk(2)[rank]


def whole(value: Tensor | None) -> Tensor:
    assert value is not None
    return value.full_tensor() if isinstance(value, DTensor) else value


def _trains_as_the_maths_written_by_hand(rank: int, unit: str) -> None:
    model = grown("bottleneck_adapter", "gated_mlp")
    kernels = [copy.deepcopy(seed.kernel) for seed in model.inner[1].live_seeds()]
    written = Written(kernels)
    shard(model, unit)
    shard(written.host, unit)
    pair = (fully_shard(model), fully_shard(written))
    rates = [torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9) for net in pair]
    for step in range(3):
        for net, optimizer in zip(pair, rates, strict=True):
            optimizer.zero_grad()
            net(share_of(step, rank)).square().mean().backward()
            optimizer.step()
    ours = {
        name.replace("seeds.0.kernel", "kernels.0").replace("seeds.1.kernel", "kernels.1"): value
        for name, value in model.named_parameters()
    }
    theirs = {name.removeprefix("host."): value for name, value in written.named_parameters()}
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(whole(value), whole(theirs[name])), name
    assert model.inner[1].state_layout.errors.sum() == 0


def overflowing() -> Any:
    """Give a model with a seed; at one of its weights the gradient of a large loss is above what float32 holds."""
    model = grown("bottleneck_adapter")
    weights = dict(model.inner[1].find_seed(0).kernel.named_parameters())
    with torch.no_grad():
        weights["node_down.weight"].mul_(1e36)
        weights["node_up.weight"].zero_()
    return model


def _stops_overflow(rank: int, unit: str) -> None:
    model = overflowing()
    layer = model.inner[1]
    shard(model, unit)
    fully_shard(model)
    for step in range(1, FAILURE_LIMIT):
        model.zero_grad()
        (model(share_of(0, rank)).square().sum() * (1e6 if rank == 0 else 1e-6)).backward()
        found = {name: whole(parameter.grad) for name, parameter in model.named_parameters()}
        assert [name for name, value in found.items() if not torch.isfinite(value).all()] == []
        assert found["inner.1.seeds.0.kernel.node_up.weight"].any(), "what the other rank gives counts"
        assert layer.state_layout.errors[0] == (step if rank == 0 else 0)


def _stops_overflow_over_accumulated_passes(rank: int, unit: str) -> None:
    model = overflowing()
    shard(model, unit)
    fully_shard(model)
    for number in range(2):
        model.set_requires_gradient_sync(number == 1)
        (model(share_of(0, rank)).square().sum() * (1e6 if (rank, number) == (0, 0) else 1e-6)).backward()
    assert all(torch.isfinite(whole(parameter.grad)).all() for parameter in model.parameters())
    assert model.inner[1].state_layout.errors[0] == (1 if rank == 0 else 0)


def _stops_overflow_of_parameters_in_bfloat16(rank: int, unit: str) -> None:
    model = overflowing()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    shard(model, unit, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    (model(share_of(0, rank)).float().square().sum() * (1e6 if rank == 0 else 1e-6)).backward()
    assert all(torch.isfinite(whole(parameter.grad)).all() for parameter in model.parameters())
    assert model.inner[1].state_layout.errors[0] == (1 if rank == 0 else 0)


def _leaves_a_loss_that_is_not_finite(rank: int, unit: str) -> None:
    model = grown("bottleneck_adapter")
    shard(model, unit)
    fully_shard(model)
    (model(share_of(0, rank)).sum() * (torch.inf if rank == 0 else 1.0)).backward()
    gradients = [whole(parameter.grad) for parameter in model.inner[1].seed_parameters(0)]
    assert not all(torch.isfinite(value).all() for value in gradients)
    assert model.inner[1].state_layout.errors.sum() == 0


def _in_turn(rank: int) -> None:
    """All of them in the same two processes, whose start costs more than any of them."""
    for unit in UNITS:
        for work in (
            _trains_as_the_maths_written_by_hand,
            _stops_overflow,
            _stops_overflow_over_accumulated_passes,
            _stops_overflow_of_parameters_in_bfloat16,
            _leaves_a_loss_that_is_not_finite,
        ):
            work(rank, unit)
            dist.barrier()


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_gradients_of_a_sharded_seed_are_looked_at_before_they_are_reduced(tmp_path: Path) -> None:
    in_processes(_in_turn, tmp_path)

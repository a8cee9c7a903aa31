"""Seeds join and leave live optimizers; the state of all others stays the same to the bit."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from esper.contracts.errors import InvalidInputError
from esper.core import optimizers

MAKERS: list[Callable[[list[nn.Parameter]], Optimizer]] = [
    lambda p: SGD(p, lr=0.1, momentum=0.9),
    lambda p: Adam(p, lr=0.1),
    lambda p: AdamW(p, lr=0.1, foreach=True),
    lambda p: AdamW(p, lr=0.1, fused=True),
]


def train(net: nn.Module, optimizer: Optimizer, steps: int) -> None:
    for step in range(steps):
        x = torch.full((2, 3), float(step + 1))
        net(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("make", MAKERS)
def test_a_passing_guest_leaves_no_bit_behind(make: Callable[[list[nn.Parameter]], Optimizer]) -> None:
    torch.manual_seed(0)
    net = nn.Linear(3, 2)
    twin = copy.deepcopy(net)
    optimizer, reference = make(list(net.parameters())), make(list(twin.parameters()))
    train(net, optimizer, 2)
    guest = nn.Parameter(torch.ones(4))
    optimizers.join(optimizer, [guest], 0)
    guest.grad = torch.ones(4)
    train(net, optimizer, 2)
    assert not torch.equal(guest.detach(), torch.ones(4))
    optimizers.leave(optimizer, [guest])
    train(net, optimizer, 2)
    for _ in range(3):
        train(twin, reference, 2)
    assert torch.equal(net.weight, twin.weight)
    assert guest not in optimizer.state


def test_the_group_of_a_layer_is_the_one_with_its_weights() -> None:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    optimizer = SGD([{"params": first.parameters()}, {"params": second.parameters(), "lr": 0.5}], lr=0.1)
    assert optimizers.group_of(optimizer, second) == 1


def test_a_scheduler_goes_on_over_joined_parameters() -> None:
    net = nn.Linear(2, 2)
    optimizer = SGD(net.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    guest = nn.Parameter(torch.zeros(1))
    optimizers.join(optimizer, [guest], 0)
    guest.grad = torch.ones(1)
    optimizer.step()
    scheduler.step()
    optimizer.step()
    assert guest.item() == -1.5


def test_joining_twice_is_refused() -> None:
    net = nn.Linear(2, 2)
    with pytest.raises(InvalidInputError, match="parameters must be new to the optimizer"):
        optimizers.join(SGD(net.parameters(), lr=1.0), [net.weight], 0)


def test_an_unknown_group_is_refused() -> None:
    optimizer = SGD(nn.Linear(2, 2).parameters(), lr=1.0)
    with pytest.raises(InvalidInputError, match=r"group_index must lie in \[0, 1\), got 3"):
        optimizers.join(optimizer, [nn.Parameter(torch.zeros(1))], 3)


def test_moments_are_carried_between_optimizers_of_one_class() -> None:
    parameter = nn.Parameter(torch.ones(2))
    source, target = Adam([parameter], lr=0.1), Adam([parameter], lr=0.2)
    parameter.grad = torch.ones(2)
    source.step()
    optimizers.carry_state(source, target, [parameter])
    assert torch.equal(target.state[parameter]["exp_avg"], source.state[parameter]["exp_avg"])
    assert target.state[parameter]["exp_avg"] is not source.state[parameter]["exp_avg"]

"""What an optimizer keeps of its parameters: begun anew as a fresh one would, and put back to the bit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, NAdam, Optimizer, RMSprop
from torch.optim.lr_scheduler import ExponentialLR, OneCycleLR

from esper.core import optimizers
from esper.core.capture import cloned
from esper.core.copies import StateCopy
from tests.nested_states import differences
from tests.optimizer_pairs import MuonAndAdamW

PATHS = {"loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
KINDS = {"sgd": partial(SGD, momentum=0.9, dampening=0.1), "adam": partial(Adam, amsgrad=True), "adamw": AdamW}
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    **{f"{kind}-{path}": partial(make, **how) for kind, make in KINDS.items() for path, how in PATHS.items()},
    "adagrad": Adagrad,
    "nadam": NAdam,
    "rmsprop": partial(RMSprop, momentum=0.5),
}
every_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def over(model: nn.Sequential, make: Callable[..., Optimizer]) -> Optimizer:
    """Make an optimizer with the model's last layer in its first group, its first layer in the second."""
    return make([{"params": list(model[at].parameters()), "lr": rate} for at, rate in ((2, 0.05), (0, 0.1))])


def step(model: nn.Sequential, optimizer: Any, numbers: Sequence[int], scheduler: Any = None) -> None:
    for number in numbers:
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(number))
        optimizer.zero_grad()
        (model(x) - 1.0).square().mean().backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def state_of(optimizer: Any) -> list[Any]:
    return [cloned(part.state_dict()["state"]) for part in optimizers.parts(optimizer)]


def kept_of(optimizer: Optimizer, group: int | None) -> list[Any]:
    values = [value for _, own in optimizers.chosen(optimizer, group) for value in own["params"]]
    return [cloned(dict(optimizer.state.get(value, {}))) for value in values]


@every_optimizer
def test_the_step_after_a_reset_is_a_fresh_optimizers_first(make: Any) -> None:
    model = net()
    optimizer = over(model, make)
    step(model, optimizer, range(3))
    twin, (other, kept) = copy.deepcopy(model), copy.deepcopy((model, optimizer))
    fresh = over(twin, make)
    optimizers.reset_state(optimizer, None)
    for number in (7, 8):
        step(model, optimizer, [number])
        step(twin, fresh, [number])
        step(other, kept, [number])
        assert differences(dict(model.state_dict()), dict(twin.state_dict())) == []
        assert differences(state_of(optimizer), state_of(fresh)) == []
        assert not torch.equal(model[0].weight, other[0].weight), "the reset changed nothing"


SCHEDULES = {
    "exponential": lambda one: ExponentialLR(one, gamma=0.7),
    "one_cycle": lambda one: OneCycleLR(one, max_lr=[0.1, 0.2], total_steps=20, cycle_momentum=False),
}


@every_optimizer
@pytest.mark.parametrize("group", [None, 0, 1])
@pytest.mark.parametrize("steps_before", [0, 3])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_state_is_back_to_the_bit_after_steps_and_a_schedule(
    make: Any, group: int | None, steps_before: int, schedule: Any
) -> None:
    model = net()
    optimizer = over(model, make)
    scheduler = schedule(optimizer)
    step(model, optimizer, range(steps_before), scheduler)
    before = kept_of(optimizer, group)
    held = StateCopy.of(optimizer, group)
    optimizers.reset_state(optimizer, group)
    step(model, optimizer, range(10, 14), scheduler)
    assert differences(before, kept_of(optimizer, group)) != []
    rates = [own["lr"] for own in optimizer.param_groups]
    held.put_back(group)
    assert differences(before, kept_of(optimizer, group)) == []
    assert [own["lr"] for own in optimizer.param_groups] == rates, "the schedule goes on"
    step(model, optimizer, [20], scheduler)
    held.put_back(group)
    assert differences(before, kept_of(optimizer, group)) == [], "a step has written into the copy"


@every_optimizer
@pytest.mark.parametrize("group", [0, 1])
def test_a_reset_of_one_group_leaves_the_other_to_the_bit(make: Any, group: int) -> None:
    model = net()
    optimizer = over(model, make)
    step(model, optimizer, range(3))
    before = state_of(optimizer)[0]
    optimizers.reset_state(optimizer, group)
    fresh = over(net(), make).state_dict()["state"]  # Adagrad's is there from the start
    mine, others = ({0, 1}, {2, 3}) if group == 0 else ({2, 3}, {0, 1})
    after = state_of(optimizer)[0]
    assert differences({key: before[key] for key in others}, {key: after[key] for key in others}) == []
    assert differences({key: fresh.get(key) for key in mine}, {key: after.get(key) for key in mine}) == []


def test_groups_count_through_the_optimizers_of_a_wrapper() -> None:
    model = net()
    pair = MuonAndAdamW(model.parameters(), muon_lr=0.02, adamw_lr=0.01, defaults={})
    step(model, pair, range(3))
    muon, adamw = state_of(pair)
    optimizers.reset_state(pair, 1)
    assert pair.optimizers[1].state_dict()["state"] == {}
    assert differences(muon, state_of(pair)[0]) == []
    step(model, pair, [3])
    held = StateCopy.of(pair, None)
    at_four = state_of(pair)
    step(model, pair, [4])
    held.put_back(None)
    assert differences(at_four, state_of(pair)) == []
    assert differences(adamw, at_four[1]) != []


def test_after_a_reset_fused_momentum_waits_for_gradients_that_come_late() -> None:
    ends = []
    for path in ("loop", "fused"):
        model = net()
        optimizer = over(model, partial(SGD, momentum=0.9, **PATHS[path]))
        step(model, optimizer, range(3))
        optimizers.reset_state(optimizer, None)
        model[2].bias.requires_grad_(False)
        model[2].bias.grad = None
        step(model, optimizer, [4])
        model[2].bias.requires_grad_(True)
        step(model, optimizer, [5, 6])
        ends.append(dict(model.state_dict()))
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name])


def test_parameters_that_came_keep_their_state_and_those_that_went_get_none() -> None:
    model, late = net(), nn.Linear(4, 2)
    optimizer = over(model, AdamW)
    step(model, optimizer, range(3))
    held = StateCopy.of(optimizer, 0)
    gone = optimizer.param_groups[0]["params"].pop(0)
    del optimizer.state[gone]
    optimizer.param_groups[0]["params"].append(late.weight)
    late.weight.grad = torch.ones_like(late.weight)
    step(model, optimizer, [4])
    optimizer.state[late.weight] = {"step": torch.tensor(1.0), "exp_avg": late.weight.detach().clone()}
    kept = cloned(optimizer.state[late.weight])
    held.put_back(0)
    assert gone not in optimizer.state
    assert differences(kept, dict(optimizer.state[late.weight])) == []
    assert float(optimizer.state[model[2].bias]["step"]) == 3.0


def test_fused_momentum_put_back_from_before_the_first_step_waits_beside_who_has_some() -> None:
    model, late = net(), nn.Parameter(torch.ones(4))
    optimizer = over(model, partial(SGD, momentum=0.9, fused=True))
    held = StateCopy.of(optimizer, 0)
    optimizer.param_groups[0]["params"].append(late)
    for number in range(4):
        if number == 3:
            held.put_back(0)
        late.grad = torch.ones_like(late)
        model(torch.randn(5, 3, generator=torch.Generator().manual_seed(number))).square().mean().backward()
        optimizer.step()
    moments = [optimizer.state[value]["momentum_buffer"] for value in model[2].parameters()]
    assert all(moment.isfinite().all() for moment in moments)


def test_a_copy_from_a_checkpoint_stands_where_torch_keeps_it() -> None:
    """A checkpoint is read into the host's memory; moments belong beside their parameter, wherever that is."""
    saved = {"weight": {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2, 3)}}
    places = {}
    for fused in (False, True):
        model = nn.Linear(3, 2, bias=False, device="meta")
        optimizer = AdamW(model.parameters())
        optimizer.param_groups[0]["fused"] = fused
        StateCopy.from_state(optimizer, model, saved).put_back(None)
        places[fused] = {key: value.device.type for key, value in optimizer.state[model.weight].items()}
    assert places[False] == {"step": "cpu", "exp_avg": "meta"}
    assert places[True] == {"step": "meta", "exp_avg": "meta"}

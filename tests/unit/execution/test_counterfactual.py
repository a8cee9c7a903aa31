from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper.contracts.errors import InvalidInputError, InvalidStateError, NotFoundError
from esper.contracts.lifecycle import SeedLifecycleState as State
from esper.core.wrap import wrap
from esper.execution.counterfactual import (
    evaluate_configurations,
    measure_contribution,
    paired_interval,
)
from esper.execution.overrides import SeedRef


def squared(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().mean(1)


class Shift(nn.Module):
    """Adds a constant to every output."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return self.value.expand_as(h)


@pytest.fixture
def task() -> Any:
    """A linear model whose outputs are 1 too low, and batches that say so."""
    torch.manual_seed(0)
    model = wrap(nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 3)))
    batches = []
    with torch.no_grad():
        for _ in range(4):
            x = torch.randn(8, 6)
            batches.append((x, model[1](x) + 1.0 + 0.1 * torch.randn(8, 3)))
    return model, batches


def plant(model: Any, value: float, *states: State, index: int = 0) -> None:
    model[1].attach_module(index, Shift(value))
    for state in states:
        model[1].transition(index, state)


@pytest.mark.parametrize("states", [(), (State.EVALUATING,), (State.EVALUATING, State.FOSSILIZED)])
def test_a_seed_that_helps_has_a_positive_effect_in_every_live_state(task: Any, states: tuple[State, ...]) -> None:
    model, batches = task
    plant(model, 1.0, *states)
    found = measure_contribution(model, batches, squared, layer="1", seed_index=0)
    assert found.num_examples == 32
    assert 0.9 < found.low < found.estimate < found.high < 1.1


def test_a_seed_that_harms_has_a_negative_effect(task: Any) -> None:
    model, batches = task
    plant(model, -1.0)
    assert measure_contribution(model, batches, squared, layer="1", seed_index=0).high < 0


def test_alpha_scales_what_is_measured(task: Any) -> None:
    model, batches = task
    plant(model, 1.0)
    half = measure_contribution(model, batches, squared, layer="1", seed_index=0, alpha=0.5)
    assert half.estimate == pytest.approx(0.75, abs=0.1)


def test_losses_of_a_configuration_are_those_of_the_model_as_configured(task: Any) -> None:
    model, batches = task
    plant(model, 0.3)
    losses = evaluate_configurations(model, batches, squared, [{}, {SeedRef("1", 0): 1.0}])
    model.eval()
    with torch.no_grad():
        host = torch.cat([squared(model(x), y) for x, y in batches]).double()
        shifted = torch.cat([squared(model(x) + 0.3, y) for x, y in batches]).double()
    assert losses.dtype == torch.float64
    assert torch.equal(losses[0], host)
    torch.testing.assert_close(losses[1], shifted, rtol=1e-5, atol=1e-6)


def test_nothing_is_left_behind(warm: Any, scale: Any) -> None:
    model = warm.model
    model.train()
    model.layer1.attach_module(0, scale(0.7))
    model.conv.attach_module(1, scale(0.2))
    model.conv.transition(1, State.EVALUATING)
    model.conv.set_alpha(1, 0.25)
    model.norm.eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    snapshot, health = model.seed_states.snapshot(), model.layer1.get_health_signal()
    streams = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002

    def noisy(outputs: Tensor, targets: Tensor) -> Tensor:
        torch.rand(1), random.random(), np.random.rand()  # noqa: NPY002
        return F.cross_entropy(outputs, targets, reduction="none")

    batches = [(warm.x, warm.y)]
    measure_contribution(model, batches, noisy, layer="layer1", seed_index=0)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert model.layer1.get_health_signal() == health
    assert [term.index for term in model.conv._kasmina.terms] == [1]
    assert model.layer1._kasmina.terms == ()
    assert torch.equal(torch.get_rng_state(), streams[0])
    assert random.getstate() == streams[1]
    assert np.random.get_state()[1].tolist() == streams[2]  # noqa: NPY002
    assert all(parameter.grad is None for parameter in model.parameters())
    forwards = model.conv.state_layout.forwards[1]
    model.seed_states.restore(snapshot)
    assert forwards >= model.conv.state_layout.forwards[1], "only the count of kernel passes moved"


def test_a_loss_that_raises_leaves_the_model_as_it_was(task: Any) -> None:
    model, batches = task
    plant(model, 1.0)

    def broken(outputs: Tensor, targets: Tensor) -> Tensor:
        raise ArithmeticError("broken loss")

    with pytest.raises(ArithmeticError, match="broken loss"):
        measure_contribution(model, batches, broken, layer="1", seed_index=0)
    assert model[1]._kasmina.terms == ()
    assert model.training


def test_a_seed_that_is_not_there_is_refused(task: Any) -> None:
    model, batches = task
    with pytest.raises(InvalidStateError, match="seed 0 of layer '1' must hold a kernel"):
        measure_contribution(model, batches, squared, layer="1", seed_index=0)
    with pytest.raises(NotFoundError, match="layer must be one of 1, got 'nowhere'"):
        measure_contribution(model, batches, squared, layer="nowhere", seed_index=0)


def test_a_mean_loss_is_refused(task: Any) -> None:
    model, batches = task
    plant(model, 1.0)
    with pytest.raises(InvalidInputError, match=r"loss must give shape \(8,\), got \(\)"):
        measure_contribution(model, batches, F.mse_loss, layer="1", seed_index=0)


def test_no_batches_and_no_configurations_are_refused(task: Any) -> None:
    model, _ = task
    with pytest.raises(InvalidInputError, match="batches must hold at least one batch"):
        evaluate_configurations(model, [], squared, [{}])
    with pytest.raises(InvalidInputError, match="configurations must hold at least one"):
        evaluate_configurations(model, [], squared, [])


def test_the_interval_is_students() -> None:
    found = paired_interval(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), confidence_level=0.95)
    reach = 2.776445 * (2.5**0.5) / 5**0.5
    assert found.estimate == pytest.approx(3.0)
    assert (found.low, found.high) == (pytest.approx(3.0 - reach, abs=1e-6), pytest.approx(3.0 + reach, abs=1e-6))
    assert (found.num_examples, found.confidence_level) == (5, 0.95)


def test_the_interval_covers_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    found = [
        paired_interval(torch.randn(20, generator=generator, dtype=torch.float64), confidence_level=0.9)
        for _ in range(2000)
    ]
    covered = sum(interval.low <= 0.0 <= interval.high for interval in found) / len(found)
    assert covered == pytest.approx(0.9, abs=0.02)


def test_one_example_or_a_silly_level_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="differences must hold at least two examples"):
        paired_interval(torch.tensor([1.0]))
    with pytest.raises(InvalidInputError, match="confidence_level must be within"):
        paired_interval(torch.tensor([1.0, 2.0]), confidence_level=1.0)


class DropsByItself(nn.Module):
    """Asks its own mode whether to drop units, as many a user's outermost module does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(F.dropout(x, 0.5, self.training))


def test_the_wrapped_module_itself_is_measured_in_eval_mode_and_goes_on_in_its_own() -> None:
    model = wrap(DropsByItself())
    x = torch.randn(64, 6)
    expected = squared(model.eval()(x), torch.zeros(64, 3)).double()
    model.train()
    (found,) = evaluate_configurations(model, [(x, torch.zeros(64, 3))], squared, [{}])
    assert torch.equal(found, expected.detach())
    assert model.host_module.training
    assert not torch.equal(model(x), model(x))

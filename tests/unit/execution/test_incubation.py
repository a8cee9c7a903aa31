"""Seeds learn behind the host's back, from a loss that contains their own effect."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper.contracts.errors import InvalidInputError, InvalidStateError
from esper.contracts.lifecycle import SeedLifecycleState as State
from esper.core.wrap import wrap
from esper.execution.incubation import captured, local_regression_loss, trial_backward, trial_forward
from esper.execution.overrides import SeedRef, seeds_at


class Bump(nn.Module):
    """A small tanh network on x with a zero outgoing map."""

    def __init__(self, inputs: int, outputs: int, width: int = 16) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.up = nn.Parameter(torch.randn(inputs, width, generator=generator))
        self.down = nn.Parameter(torch.zeros(width, outputs))

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(x @ self.up) @ self.down


@pytest.fixture
def toy() -> Any:
    """A linear host that has learnt all it can of y = W x + sin(2 x), with a seed behind its back."""
    torch.manual_seed(0)
    x = torch.randn(256, 4)
    y = x @ torch.randn(4, 3) + torch.sin(2.0 * x[:, :3])
    solution = torch.linalg.lstsq(torch.cat([x, torch.ones(256, 1)], 1), y).solution
    model = wrap(nn.Sequential(nn.Linear(4, 3)))
    with torch.no_grad():
        model[0].weight.copy_(solution[:4].T)
        model[0].bias.copy_(solution[4])
    model(x)
    model[0].attach_module(0, Bump(4, 3))
    return model, x, y


REF = SeedRef("0", 0)


def loss_with_seed(model: Any, x: Tensor, y: Tensor) -> float:
    with torch.no_grad(), seeds_at(model, {REF: 1.0}):
        return float(F.mse_loss(model(x), y))


def test_a_trial_teaches_the_seed_and_not_the_host(toy: Any) -> None:
    model, x, y = toy
    host = [value.clone() for value in (model[0].weight, model[0].bias)]
    before_out, before = model(x).detach().clone(), loss_with_seed(model, x, y)
    optimizer = torch.optim.Adam(model[0].seed_parameters(0), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        trial_backward(model, [REF], lambda: F.mse_loss(model(x), y))
        optimizer.step()
    assert loss_with_seed(model, x, y) < 0.4 * before
    assert torch.equal(model(x), before_out)
    assert torch.equal(model[0].weight, host[0])
    assert torch.equal(model[0].bias, host[1])
    assert model[0].weight.grad is None


def test_a_trial_gives_the_gradient_that_a_graft_would(toy: Any) -> None:
    model, x, y = toy
    with torch.no_grad():
        model[0].find_seed(0).kernel.down.normal_()
    value = trial_backward(model, [REF], lambda: F.mse_loss(model(x), y), alpha=0.5)
    ours = [parameter.grad.clone() for parameter in model[0].seed_parameters(0)]
    model[0].transition(0, State.EVALUATING)
    model[0].set_alpha(0, 0.5)
    model.zero_grad()
    grafted = F.mse_loss(model(x), y)
    grafted.backward()
    assert value == grafted.item()
    assert all(torch.equal(a, p.grad) for a, p in zip(ours, model[0].seed_parameters(0), strict=True))


def test_gradients_of_several_trials_add_up(toy: Any) -> None:
    model, x, y = toy
    for _ in range(2):
        trial_backward(model, [REF], lambda: F.mse_loss(model(x), y))
    twice = model[0].find_seed(0).kernel.down.grad.clone()
    model.zero_grad()
    trial_backward(model, [REF], lambda: F.mse_loss(model(x), y))
    torch.testing.assert_close(twice, 2 * model[0].find_seed(0).kernel.down.grad)


class Stateful(nn.Module):
    """Counts its passes in a buffer, as running statistics of users' own modules do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, value: Tensor) -> Tensor:
        self.passes += 1
        return value


def test_a_trial_leaves_buffers_streams_modes_and_pending_gradients_alone(scale: Any) -> None:
    torch.manual_seed(0)
    host = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), Stateful(), nn.Dropout(0.5), nn.Linear(8, 2))
    model = wrap(host, telemetry=False)
    x = torch.randn(16, 6)
    model(x)
    model[0].attach_module(0, scale(0.5))
    ours = model(x)  # a graph that is still to be differentiated
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    stream, wanted = torch.get_rng_state(), [value.requires_grad for value in model.parameters()]
    trial_backward(model, [SeedRef("0", 0)], lambda: model(x).square().sum())
    for name, value in model.named_buffers():
        assert torch.equal(value, buffers[name]) or name.endswith("trial_alpha")
    assert torch.equal(torch.get_rng_state(), stream)
    assert [value.requires_grad for value in model.parameters()] == wanted
    assert all(module.training for module in model.modules())
    assert model[1].track_running_stats
    assert model[0].weight.grad is None
    ours.sum().backward()
    assert model[0].weight.grad is not None


def test_batch_norm_in_a_trial_stands_on_running_statistics_as_in_evaluation(scale: Any) -> None:
    torch.manual_seed(0)
    model = wrap(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8)), telemetry=False)
    x = torch.randn(16, 6)
    trained = model(x)
    model[0].attach_module(0, scale(0.0))
    evaluated = model.eval()(x)
    model.train()
    with trial_forward(model, [SeedRef("0", 0)]):
        torch.testing.assert_close(model(x), evaluated)
    with trial_forward(model, [SeedRef("0", 0)], norms="batch"):
        torch.testing.assert_close(model(x), trained)
    assert model[1].training


def test_a_seed_that_fails_in_its_trial_gets_no_gradient_and_no_error(toy: Any) -> None:
    model, x, y = toy
    with torch.no_grad():
        model[0].find_seed(0).kernel.down.fill_(torch.nan)
    value = trial_backward(model, [REF], lambda: F.mse_loss(model(x), y))
    assert value == pytest.approx(F.mse_loss(model(x), y).item())
    assert model[0].find_seed(0).kernel.down.grad is None
    assert model[0].state_layout.errors[0] == 1


def test_three_failed_trials_cut_the_seed_off(toy: Any) -> None:
    model, x, y = toy
    with torch.no_grad():
        model[0].find_seed(0).kernel.down.fill_(torch.nan)
    for _ in range(3):
        trial_backward(model, [REF], lambda: F.mse_loss(model(x), y))
    assert model[0].state_layout.state(0) is State.ERROR


def test_a_trial_of_nothing_is_refused(toy: Any) -> None:
    model, x, y = toy
    with pytest.raises(InvalidInputError, match="seeds must name at least one live seed"):
        trial_backward(model, [], lambda: F.mse_loss(model(x), y))
    with pytest.raises(InvalidInputError, match=r"alpha of 0\[0\] must be in \[0, 1\], got 1.5"):
        trial_backward(model, [REF], lambda: F.mse_loss(model(x), y), alpha=1.5)


def test_local_regression_teaches_the_seed_and_not_the_host(toy: Any) -> None:
    model, x, y = toy
    layer, before = model[0], loss_with_seed(model, x, y)
    out = model(x).detach().clone()
    with captured(layer) as capture:
        F.mse_loss(model(x), y).backward()
    sample = capture.sample
    assert torch.equal(sample.x, x)
    assert torch.equal(sample.h, out)
    torch.testing.assert_close(sample.g, 2.0 * (out - y) / y.numel())
    optimizer = torch.optim.Adam(layer.seed_parameters(0), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        local_regression_loss(layer.find_seed(0).kernel, sample, reach=0.3).backward()
        optimizer.step()
    assert loss_with_seed(model, x, y) < 0.8 * before
    assert torch.equal(model(x), out)


def test_the_regressions_optimum_is_a_step_of_the_size_asked_for_down_the_gradient(toy: Any) -> None:
    model, x, y = toy
    with captured(model[0]) as capture:
        F.mse_loss(model(x), y).backward()
    sample, reach = capture.sample, 0.2

    class Free(nn.Module):
        """Any delta at all."""

        def __init__(self) -> None:
            super().__init__()
            self.d = nn.Parameter(torch.zeros_like(sample.h))

        def forward(self, x: Tensor, h: Tensor) -> Tensor:
            return self.d

    free = Free()
    assert local_regression_loss(free, sample, reach=reach) == 0.0
    with torch.no_grad():
        free.d.copy_(-sample.g * reach * sample.h.norm() / sample.g.norm())
    best = local_regression_loss(free, sample, reach=reach)
    best.backward()
    assert best.item() == pytest.approx(-reach / 2, rel=1e-5)
    assert free.d.grad.abs().max() < 1e-6
    assert (free.d.norm() / sample.h.norm()).item() == pytest.approx(reach, rel=1e-5)


def test_a_capture_does_not_touch_the_step(pair: Any) -> None:
    pair.model.train()
    with captured(pair.model.conv) as capture:
        pair.backward()
    assert pair.same_gradients()
    assert capture.sample.g.shape == (4, 8, 8, 8)
    assert not pair.model.conv._forward_hooks


def test_a_capture_without_a_backward_pass_says_so(pair: Any) -> None:
    with captured(pair.model.conv) as capture:
        pair.model(pair.x)
    with pytest.raises(InvalidStateError, match="'conv' must see a forward and a backward pass first"):
        _ = capture.sample


def test_a_layer_with_blended_seeds_has_no_local_regression(warm: Any, scale: Any) -> None:
    warm.model.conv.attach_module(0, scale())
    warm.model.conv.transition(0, State.EVALUATING)
    with pytest.raises(InvalidStateError, match="'conv' must have no blended seed"), captured(warm.model.conv):
        pass


def test_a_reach_of_zero_is_refused(toy: Any) -> None:
    model, x, y = toy
    with captured(model[0]) as capture:
        F.mse_loss(model(x), y).backward()
    with pytest.raises(InvalidInputError, match="reach must be > 0, got 0"):
        local_regression_loss(model[0].find_seed(0).kernel, capture.sample, reach=0)

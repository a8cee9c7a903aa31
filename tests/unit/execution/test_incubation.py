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
from esper.execution.incubation import captured, local_regression_loss, measure_reach, trial_backward, trial_forward
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


class Lacking(nn.Module):
    """The part that the known host lacks: Phi B, with B zero at birth."""

    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Parameter(torch.zeros(5, 3))

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.sin(2.0 * x) @ self.b


class Known:
    """A linear host at its optimum, whose targets hold an additive part that it lacks: the best B is in closed form.

    ``behind`` is the map behind the site; as it is invertible, the best B does not depend on it.
    """

    def __init__(self, behind: Tensor) -> None:
        draw = torch.Generator().manual_seed(4)
        self.x = torch.randn(128, 5, generator=draw)
        phi = torch.sin(2.0 * self.x)
        wanted = self.x @ torch.randn(5, 3, generator=draw) + phi @ torch.randn(5, 3, generator=draw)
        wanted += 0.1 * torch.randn(128, 3, generator=draw)
        solution = torch.linalg.lstsq(self.x, wanted).solution
        self.missing = wanted - self.x @ solution
        self.best = torch.linalg.lstsq(phi, self.missing).solution
        self.y = wanted @ behind
        self.model = wrap(nn.Sequential(nn.Linear(5, 3, bias=False), nn.Linear(3, 3, bias=False)))
        with torch.no_grad():
            self.model[0].weight.copy_(solution.T)
            self.model[1].weight.copy_(behind.T)
        self.model(self.x)
        self.model[0].attach_module(0, Lacking())

    def loss(self) -> Tensor:
        return F.mse_loss(self.model(self.x), self.y)

    @property
    def seed(self) -> Lacking:
        return self.model[0].find_seed(0).kernel

    def sample(self) -> Any:
        with captured(self.model[0]) as capture:
            self.loss().backward()
        self.model.zero_grad()
        return capture.sample

    def distance(self) -> float:
        return float((self.seed.b.detach() - self.best).norm() / self.best.norm())

    def descend(self, gradient: Any, *, rate: float, steps: int = 200) -> list[float]:
        """Let the seed take plain gradient steps; gives its distance to the optimum after each."""
        found = []
        for _ in range(steps):
            self.seed.b.grad = None
            gradient()
            with torch.no_grad():
                self.seed.b -= rate * self.seed.b.grad
            found.append(self.distance())
        return found


EVEN = torch.eye(3)
STRETCHED = torch.diag(torch.tensor([1.0, 0.6, 0.3]))


@pytest.mark.parametrize("behind", [EVEN, STRETCHED], ids=["even", "stretched"])
def test_a_trial_converges_to_the_known_optimum_wherever_the_site_is(behind: Tensor) -> None:
    known = Known(behind)
    distances = known.descend(lambda: trial_backward(known.model, [REF], known.loss), rate=2.0, steps=600)
    assert distances[0] > 0.1
    assert distances[-1] < 1e-3


def test_local_regression_converges_to_the_known_optimum_with_the_reach_that_is_measured() -> None:
    known = Known(EVEN)
    assert measure_reach(known.model, REF, known.loss) is None  # no delta yet, so no direction to look along
    sample = known.sample()
    known.descend(lambda: local_regression_loss(known.seed, sample, reach=0.1).backward(), rate=0.1, steps=3)
    reach = measure_reach(known.model, REF, known.loss)
    assert reach == pytest.approx(float(known.missing.norm() / sample.h.norm()), rel=1e-3)
    distances = known.descend(
        lambda: local_regression_loss(known.seed, sample, reach=reach).backward(), rate=0.5 * 3 * reach, steps=400
    )
    assert distances[-1] < 1e-2


def test_behind_a_stretched_map_the_regressions_optimum_is_another_whatever_the_reach() -> None:
    known = Known(STRETCHED)
    sample = known.sample()
    direction = torch.linalg.lstsq(torch.sin(2.0 * sample.x), -sample.g).solution  # of J's optimum, for every reach
    length = (direction * known.best).sum() / direction.square().sum()
    assert ((length * direction - known.best).norm() / known.best.norm()).item() > 0.2
    even = Known(EVEN)
    sample = even.sample()
    direction = torch.linalg.lstsq(torch.sin(2.0 * sample.x), -sample.g).solution
    length = (direction * even.best).sum() / direction.square().sum()
    assert ((length * direction - even.best).norm() / even.best.norm()).item() < 1e-4


def test_a_straight_through_estimate_overshoots_without_bound() -> None:
    known = Known(EVEN)
    sample = known.sample()
    distances = known.descend(lambda: (sample.g * known.seed(sample.x, sample.h)).sum().backward(), rate=2.0)
    assert min(distances) < 0.5  # the direction is right ...
    assert distances[-1] > 10.0  # ... and nothing ever stops it
    assert distances[-1] > 1.9 * distances[len(distances) // 2]


def test_a_measured_reach_leaves_nothing_behind(toy: Any) -> None:
    model, x, y = toy
    with torch.no_grad():
        model[0].find_seed(0).kernel.down.normal_()
    stream, out = torch.get_rng_state(), model(x).detach().clone()
    assert measure_reach(model, REF, lambda: F.mse_loss(model(x), y)) is not None
    assert torch.equal(torch.get_rng_state(), stream)
    assert torch.equal(model(x), out)
    assert all(value.grad is None for value in model.parameters())
    assert not [hook for hook in model[0]._forward_hooks.values() if "see" in hook.__qualname__]


def test_no_reach_is_measured_where_the_loss_does_not_curve_upwards(toy: Any) -> None:
    model, x, _ = toy
    with torch.no_grad():
        model[0].find_seed(0).kernel.down.normal_()
    assert measure_reach(model, REF, lambda: -model(x).square().mean()) is None


def test_a_seed_that_fails_has_no_reach(toy: Any) -> None:
    model, x, y = toy
    with torch.no_grad():
        model[0].find_seed(0).kernel.down.fill_(torch.nan)
    assert measure_reach(model, REF, lambda: F.mse_loss(model(x), y)) is None


def test_local_regression_runs_in_the_kernels_own_type_under_autocast(toy: Any) -> None:
    model, x, y = toy
    with captured(model[0]) as capture, torch.autocast("cpu", torch.bfloat16):
        F.mse_loss(model(x), y).backward()
    assert capture.sample.h.dtype == torch.bfloat16
    kernel = model[0].find_seed(0).kernel
    with torch.autocast("cpu", torch.bfloat16):
        local_regression_loss(kernel, capture.sample).backward()
    assert kernel.down.grad.dtype == torch.float32
    assert kernel.down.grad.abs().max() > 0

"""Faulty kernels inside a compiled model: their share is dropped on the device, and counted at the step boundary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from esper.blueprints import default_registry
from esper.contracts.lifecycle import SeedLifecycleState as State
from esper.execution.circuit_breaker import FAILURE_LIMIT

pytestmark = [
    pytest.mark.usefixtures("fresh_compiler"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),  # of dynamo's own
]


class Fault(nn.Module):
    """Does ``fault`` to its delta, for as long as ``strength`` is 1; the value changes without a recompile."""

    strength: Tensor

    def __init__(self, fault: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.register_buffer("strength", torch.zeros(()))
        self.fault = fault

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return self.fault(h * self.weight, h, self.strength)


def non_finite(value: float) -> Callable[..., Tensor]:
    return lambda delta, _h, strength: torch.where(strength > 0.5, delta * value, delta)


def writing(delta: Tensor, h: Tensor, strength: Tensor) -> Tensor:
    h.mul_(0.0)
    return delta * (1.0 - strength)


def plant(pair: Any, fault: Callable[..., Tensor]) -> tuple[Any, Fault]:
    layer, kernel = pair.model.layer1, Fault(fault)
    layer.attach_module(0, kernel)
    layer.transition(0, State.EVALUATING)
    layer.set_alpha(0, 0.5)
    return layer, kernel


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_delta_that_is_not_finite_is_dropped_in_the_graph(warm: Any, value: float) -> None:
    layer, kernel = plant(warm, non_finite(value))
    compiled = torch.compile(warm.model, backend="aot_eager", fullgraph=True)
    compiled(warm.x).sum().backward()
    kernel.strength.fill_(1.0)
    for _ in range(FAILURE_LIMIT):
        warm.model.zero_grad()
        warm.twin.zero_grad()
        out, wanted = compiled(warm.x), warm.twin(warm.x)
        assert torch.equal(out, wanted)
        out.sum().backward()
        wanted.sum().backward()
        assert warm.same_gradients()
    assert warm.model.settle_failures() == FAILURE_LIMIT
    assert layer.state_layout.state(0) is State.ERROR


def test_a_kernel_that_writes_to_h_writes_to_a_copy_in_the_graph_too(warm: Any) -> None:
    _, kernel = plant(warm, writing)
    kernel.strength.fill_(1.0)
    compiled = torch.compile(warm.model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():  # with gradients, autograd refuses a kernel that overwrites what it has yet to differentiate
        assert torch.equal(compiled(warm.x), warm.twin(warm.x))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_a_kernel_that_raises_falls_back_to_the_eager_breaker(warm: Any) -> None:
    def raising(delta: Tensor, h: Tensor, strength: Tensor) -> Tensor:
        raise RuntimeError("while it was traced")

    layer, kernel = plant(warm, writing)
    kernel.fault = raising
    compiled = torch.compile(warm.model, backend="aot_eager")
    for _ in range(FAILURE_LIMIT):
        assert torch.equal(compiled(warm.x), warm.twin(warm.x))
    assert layer.state_layout.state(0) is State.ERROR


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # dynamo looks at it after a graph break
@pytest.mark.parametrize("recompile_limit", [2, 8])
def test_a_seed_cut_off_while_a_compiled_frame_runs_may_drop_that_frame(warm: Any, recompile_limit: int) -> None:
    def breaking(delta: Tensor, h: Tensor, strength: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return delta * torch.nan

    layer, kernel = plant(warm, non_finite(1.0))
    with torch._dynamo.config.patch(recompile_limit=recompile_limit):
        compiled = torch.compile(warm.model, backend="aot_eager")
        compiled(warm.x)
        kernel.fault = breaking
        for _ in range(FAILURE_LIMIT + 2):
            out = compiled(warm.x)
            assert torch.equal(out, warm.twin(warm.x))
            out.sum().backward()
            warm.model.settle_failures()
    assert layer.state_layout.state(0) is State.ERROR
    assert torch.equal(compiled(warm.x), warm.twin(warm.x))


@pytest.fixture
def overflowing(warm: Any) -> Any:
    """A pair whose seed has a weight at which the gradient of a large loss is above what float32 holds."""
    layer = warm.model.layer1
    layer.germinate(0, default_registry().create_blueprint("bottleneck_adapter").ir)
    layer.transition(0, State.EVALUATING)
    layer.set_alpha(0, 0.5)
    weights = dict(layer.find_seed(0).kernel.named_parameters())
    with torch.no_grad():
        weights["node_down.weight"].mul_(1e36)
        weights["node_up.weight"].zero_()
    return warm


def test_gradients_that_overflow_in_a_graph_reach_no_norm_over_all_of_them(overflowing: Any) -> None:
    model, layer = overflowing.model, overflowing.model.layer1
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for failures in range(1, FAILURE_LIMIT + 1):
        model.zero_grad()
        overflowing.twin.zero_grad()
        (compiled(overflowing.x).square().sum() * 1e6).backward()
        (overflowing.twin(overflowing.x).square().sum() * 1e6).backward()
        assert overflowing.same_gradients()
        assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())
        assert layer.state_layout.errors[0] == failures
    model.settle_failures()
    assert layer.state_layout.state(0) is State.ERROR


def test_a_sound_compiled_pass_ends_the_row(overflowing: Any) -> None:
    compiled = torch.compile(overflowing.model, backend="aot_eager", fullgraph=True)
    for scale in (1e6, 1e-30, 1e6, 1e-30, 1e6, 1e-30):
        overflowing.model.zero_grad()
        (compiled(overflowing.x).square().sum() * scale).backward()
    overflowing.model.settle_failures()
    assert overflowing.model.layer1.state_layout.errors[0] == 3
    assert overflowing.model.layer1.state_layout.state(0) is State.EVALUATING


def test_a_loss_that_is_not_finite_is_no_fault_of_a_kernel_in_a_graph(overflowing: Any) -> None:
    compiled = torch.compile(overflowing.model, backend="aot_eager", fullgraph=True)
    (compiled(overflowing.x).square().sum() * torch.inf).backward()
    assert overflowing.model.layer1.state_layout.errors[0] == 0
    gradients = [parameter.grad for parameter in overflowing.model.layer1.seed_parameters(0)]
    assert not all(torch.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo's own
def test_a_backward_pass_that_raised_blinds_nobody_to_the_next(overflowing: Any) -> None:
    """What the engine is to do when a pass is over it does not do after one that raised (out of memory, say)."""
    model, layer = overflowing.model, overflowing.model.layer1
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    inputs = overflowing.x.clone().requires_grad_() * 1.0
    inputs.register_hook(lambda _: 1 / 0)  # runs when the parameters have their gradients
    loss = compiled(inputs).square().sum() * 1e-30
    with pytest.raises(ZeroDivisionError):
        loss.backward()
    model.zero_grad()
    (compiled(overflowing.x).square().sum() * 1e6).backward()
    assert layer.state_layout.errors[0] == 1
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_eager_passes_of_a_compiled_model_count_a_failure_once(overflowing: Any) -> None:
    compiled = torch.compile(overflowing.model, backend="aot_eager", fullgraph=True)
    (compiled(overflowing.x).square().sum() * 1e-30).backward()
    for failures in range(1, FAILURE_LIMIT + 1):
        overflowing.model.zero_grad()
        (overflowing.model(overflowing.x).square().sum() * 1e6).backward()
        assert overflowing.model.layer1.state_layout.errors[0] == failures
    overflowing.model(overflowing.x)
    assert overflowing.model.layer1.state_layout.state(0) is State.ERROR

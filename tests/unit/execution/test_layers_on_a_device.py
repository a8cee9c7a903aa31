"""The way of live seeds on an accelerator: on a CUDA device where there is one, and the same code over CPU memory."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from esper.blueprints import default_registry
from esper.contracts.lifecycle import SeedLifecycleState as State
from esper.core.wrap import wrap
from esper.execution._native import cuda_available
from esper.execution.circuit_breaker import FAILURE_LIMIT
from esper.execution.layers import forward

TEMPLATES = ("bottleneck_adapter", "gated_mlp", "lora")
needs_device = [pytest.mark.gpu, pytest.mark.skipif(not cuda_available(), reason="needs a CUDA device")]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=needs_device)])
def device(request: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cpu":

        def as_on_a_device(layer: Any, x: Tensor, h: Tensor, *, sampled: bool, recomputing: bool) -> Tensor:
            return forward._sum_on_device(layer, x, h, recomputing=recomputing)

        monkeypatch.setattr(forward, "_sum_on_cpu", as_on_a_device)
    return str(request.param)


class Host(nn.Module):
    """Three layers, of which the middle one gets seeds; ``kernels`` of it are the same written by hand."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 8)
        self.layer = nn.Linear(8, 8)
        self.last = nn.Linear(8, 3)
        self.kernels: Any = ()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        h = self.layer(x)
        return self.last(torch.relu(sum((0.5 * kernel(x, h) for kernel in self.kernels), start=h)))


def grown(device: str, *templates: str) -> tuple[Any, Host]:
    """Give a wrapped host with blended seeds whose weights are not zero, and the same maths written by hand."""
    written = Host().to(device)
    model: Any = wrap(Host().to(device), telemetry=False)
    model(batch(device))
    for index, template in enumerate(templates):
        model.layer.germinate(index, default_registry().create_blueprint(template).ir, random_seed=index)
        blend(model.layer, index)
        with torch.no_grad():
            for parameter in model.layer.seed_parameters(index):
                parameter.add_(0.1)
    written.kernels = nn.ModuleList(copy.deepcopy(seed.kernel) for seed in model.layer.live_seeds())
    return model, written


def blend(layer: Any, index: int) -> None:
    layer.transition(index, State.EVALUATING)
    layer.set_alpha(index, 0.5)


def batch(device: str, step: int = 0) -> Tensor:
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(step)).to(device)


def pairs(model: Any, written: Host) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """Give every parameter of the maths written by hand behind the model's own."""
    found = []
    for name, value in written.named_parameters():
        _, _, rest = name.partition("kernels.")
        index, _, inside = rest.partition(".")
        found.append((model.get_parameter(f"layer.seeds.{index}.kernel.{inside}" if rest else name), value))
    return found


@pytest.mark.parametrize("templates", [TEMPLATES[:1], TEMPLATES], ids=["one", "three"])
def test_seeds_train_as_the_maths_written_by_hand(device: str, templates: tuple[str, ...]) -> None:
    nets = grown(device, *templates)
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9) for net in nets]
    for step in range(20):  # memory of a step is met again by the next
        losses = []
        for net, optimizer in zip(nets, optimizers, strict=True):
            optimizer.zero_grad()
            loss = net(batch(device, step)).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        torch.testing.assert_close(*losses)
    for ours, theirs in pairs(*nets):
        torch.testing.assert_close(ours, theirs)
    forwards = nets[0].layer.state_layout.forwards.tolist()
    assert forwards == [20] * len(templates) + [0] * (4 - len(templates))
    assert nets[0].settle_failures() == 0


class Moody(nn.Module):
    """A delta that fails as ``mood`` says."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.mood = "sound"

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        if self.mood == "raises":
            raise RuntimeError("in forward")
        return h * self.weight * (torch.nan if self.mood == "NaN" else 1.0)


@pytest.fixture
def failing(device: str) -> tuple[Any, Host, str]:
    """A model with a sound seed and one that may fail, which the maths written by hand leaves out."""
    model, written = grown(device, TEMPLATES[0])
    model.layer.attach_module(1, Moody())
    blend(model.layer, 1)
    return model, written, device


@pytest.mark.parametrize("mood", ["raises", "NaN"])
def test_a_seed_that_fails_costs_its_contribution_only(failing: tuple[Any, Host, str], mood: str) -> None:
    model, written, device = failing
    model.layer.find_seed(1).kernel.mood = mood
    for step in range(FAILURE_LIMIT):
        for net in (model, written):
            net.zero_grad()
            net(batch(device, step)).square().mean().backward()
        for ours, theirs in pairs(model, written):
            torch.testing.assert_close(ours.grad, theirs.grad)
    model.settle_failures()
    errors = model.layer.state_layout.errors.tolist()
    assert errors[0] == 0
    assert errors[1] >= FAILURE_LIMIT, "over CPU memory a NaN is seen in backward as well, and counted again"
    assert [model.layer.state_layout.state(index) for index in (0, 1)] == [State.EVALUATING, State.ERROR]


def test_a_gradient_that_overflows_reaches_no_norm_over_all_of_them(device: str) -> None:
    model, _ = grown(device, TEMPLATES[0])
    weights = dict(model.layer.find_seed(0).kernel.named_parameters())
    with torch.no_grad():
        weights["node_down.weight"].mul_(1e36)
        weights["node_up.weight"].zero_()
    (model(batch(device)).square().sum() * 1e6).backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert torch.isfinite(norm)
    assert model.first.weight.grad.any()


@pytest.mark.gpu
@pytest.mark.skipif(not cuda_available(), reason="needs a CUDA device")
def test_a_step_waits_for_nothing() -> None:
    model, _ = grown("cuda", *TEMPLATES)
    x = batch("cuda")
    model(x).square().mean().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(x).square().mean().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


class _Torn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, is_torn: bool) -> Tensor:
        ctx.is_torn = is_torn
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        if ctx.is_torn:
            raise RuntimeError("in backward")
        return grad, None


class Torn(nn.Module):
    """A delta whose backward pass raises while it is torn."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.is_torn = True

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        torn: Tensor = _Torn.apply(h * self.weight, self.is_torn)
        return torn


@pytest.mark.parametrize("is_in_row", [True, False])
def test_backward_passes_that_fail_in_a_row_open_the_breaker(device: str, is_in_row: bool) -> None:
    model, _ = grown(device)
    kernel = Torn()
    model.layer.attach_module(0, kernel)
    blend(model.layer, 0)
    for failure in range(1, FAILURE_LIMIT + 1):
        kernel.is_torn = True
        model(batch(device)).sum().backward()
        assert model.layer.state_layout.errors[0] == failure
        kernel.is_torn = is_in_row
        if not is_in_row:
            model(batch(device)).sum().backward()
    model.settle_failures()
    assert model.layer.state_layout.state(0) is (State.ERROR if is_in_row else State.EVALUATING)

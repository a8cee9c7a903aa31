"""A dormant layer is its parent, to the bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from esper.core.wrap import LayerTelemetry, wrap
from esper.execution.layers import KasminaLayer

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 4), (5, 6)),
    "linear_no_bias": (lambda: nn.Linear(6, 4, bias=False), (5, 6)),
    "linear_sequence": (lambda: nn.Linear(6, 4), (2, 7, 6)),
    "linear_unbatched": (lambda: nn.Linear(6, 4), (6,)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, padding=1), (2, 3, 9)),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3, stride=2), (2, 3, 8, 8)),
    "conv2d_reflect": (lambda: nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect", groups=3), (2, 3, 8, 8)),
    "conv2d_unbatched": (lambda: nn.Conv2d(3, 4, 3), (3, 8, 8)),
    "layer_norm": (lambda: nn.LayerNorm(6), (5, 6)),
    "batch_norm1d": (lambda: nn.BatchNorm1d(6), (5, 6)),
    "batch_norm2d": (lambda: nn.BatchNorm2d(3), (2, 3, 4, 4)),
}


def run(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    x = x.clone().requires_grad_()
    out = model(x)
    weights = torch.arange(out.numel(), dtype=out.dtype).reshape(out.shape)
    (out * weights).sum().backward()
    assert x.grad is not None
    gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    return out.detach(), x.grad, gradients


@pytest.mark.parametrize("telemetry", [False, LayerTelemetry(interval_steps=1)], ids=["silent", "measured"])
@pytest.mark.parametrize("name", LAYERS)
def test_outputs_gradients_and_buffers_are_the_parents(name: str, telemetry: bool | LayerTelemetry) -> None:
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    host = nn.Sequential(make())
    twin = copy.deepcopy(host)
    model = wrap(host, telemetry=telemetry)
    assert isinstance(model[0], KasminaLayer)
    for _ in range(3):
        x = torch.randn(shape)
        out, dx, gradients = run(model, x)
        twin_out, twin_dx, twin_gradients = run(twin, x)
        assert torch.equal(out, twin_out)
        assert torch.equal(dx, twin_dx)
        assert all(torch.equal(a, b) for a, b in zip(gradients, twin_gradients, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), twin.buffers(), strict=True))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_attention_is_the_parents(batch_first: bool, need_weights: bool) -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)
    host = nn.ModuleDict({"attention": attention})
    twin = copy.deepcopy(host)
    model = wrap(host)
    x = torch.randn(3, 5, 8)
    for _ in range(2):
        out, weights = model["attention"](x, x, x, need_weights=need_weights)
        twin_out, twin_weights = twin["attention"](x, x, x, need_weights=need_weights)
        assert torch.equal(out, twin_out)
        assert (weights is None) == (not need_weights)
        assert weights is None or torch.equal(weights, twin_weights)
    shape = (5, 8) if batch_first else (3, 8)
    assert model["attention"].site is not None
    assert model["attention"].site.output_shape == shape


def test_only_the_attention_itself_is_wrapped_not_its_projection() -> None:
    model = wrap(nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)}))
    assert list(model.kasmina_layers) == ["attention"]


def test_a_forward_keyword_works() -> None:
    model = wrap(nn.Sequential(nn.Linear(3, 2)), telemetry=LayerTelemetry(interval_steps=1))
    x = torch.randn(4, 3)
    assert torch.equal(model[0](input=x), model[0](x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_the_parents(dtype: torch.dtype) -> None:
    host = nn.Sequential(nn.Linear(6, 4)).to(dtype)
    twin = copy.deepcopy(host)
    model = wrap(host, telemetry=LayerTelemetry(interval_steps=1))
    x = torch.randn(5, 6, dtype=dtype)
    assert torch.equal(model(x), twin(x))
    assert model[0].get_health_signal().activation_entropy is not None


def test_autocast_is_the_parents(pair: Any) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = pair.losses()
    assert torch.equal(ours, theirs)
    ours.backward()
    theirs.backward()
    assert pair.same_gradients()


def test_channels_last_is_kept(pair: Any) -> None:
    pair.model.to(memory_format=torch.channels_last)
    pair.twin.to(memory_format=torch.channels_last)
    pair.x = pair.x.to(memory_format=torch.channels_last)
    pair.backward()
    assert pair.same_gradients()
    out = pair.model.conv(pair.x)
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_training_steps_are_the_hosts(pair: Any) -> None:
    ours = torch.optim.AdamW(pair.model.parameters(), lr=1e-2)
    theirs = torch.optim.AdamW(pair.twin.parameters(), lr=1e-2)
    for _ in range(4):
        pair.backward()
        ours.step()
        theirs.step()
        ours.zero_grad()
        theirs.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(pair.model.parameters(), pair.twin.parameters(), strict=True))


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_gives_the_hosts_gradients(pair: Any, reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    for module in (pair.model, pair.twin):
        x = pair.x.clone().requires_grad_()
        checkpoint(module, x, use_reentrant=reentrant).square().sum().backward()
    assert pair.same_gradients()


def test_vmap_and_functional_gradients_go_through_a_measured_layer() -> None:
    host = nn.Sequential(nn.Linear(6, 4))
    twin = copy.deepcopy(host)
    model = wrap(host, telemetry=LayerTelemetry(interval_steps=1))
    x = torch.randn(5, 6)

    def loss(net: nn.Module) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
        return lambda params, row: torch.func.functional_call(net, params, (row,)).square().sum()

    per_example = [
        torch.func.vmap(torch.func.grad(loss(net)), in_dims=(None, 0))(dict(net.named_parameters()), x)
        for net in (model, twin)
    ]
    assert torch.equal(per_example[0]["0.weight"], per_example[1]["0.weight"])


def test_symbolic_tracing_sees_the_hosts_graph() -> None:
    model = wrap(nn.Sequential(nn.Linear(6, 4), nn.ReLU()), telemetry=False)
    traced = torch.fx.symbolic_trace(model.host_module)
    x = torch.randn(2, 6)
    assert torch.equal(traced(x), model(x))

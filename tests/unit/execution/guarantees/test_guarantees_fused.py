"""Fused paths go around a submodule's forward: left alone while dormant, switched off while a seed inside is live."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from esper.core.wrap import LayerTelemetry, unwrap, wrap

FUSED_LAYER, FUSED_ATTENTION = "aten::_transformer_encoder_layer_fwd", "aten::_native_multi_head_attention"
INSIDE = ["self_attn", "linear1", "linear2", "norm1", "norm2"]

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")


class Half(nn.Module):
    """Adds half of h: what comes in may have any mean."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.5]))

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return h * self.weight


@pytest.fixture
def layer() -> nn.TransformerEncoderLayer:
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))


def fused(model: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, set[str]]:
    """Give the output without gradients, and which fused operators made it."""
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]) as seen:
        out = model(*args, **kwargs)
    return out, {event.key for event in seen.key_averages()} & {FUSED_LAYER, FUSED_ATTENTION}


@pytest.mark.parametrize("telemetry", [False, LayerTelemetry(interval_steps=1)], ids=["silent", "measured"])
def test_a_dormant_layer_keeps_its_fused_path(layer: Any, x: Tensor, telemetry: Any) -> None:
    twin = copy.deepcopy(layer).eval()
    model = wrap(layer, telemetry=telemetry).eval()
    ours, ran = fused(model, x)
    theirs, would_run = fused(twin, x)
    assert ran == would_run == {FUSED_LAYER, FUSED_ATTENTION}
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("inside", INSIDE)
def test_a_live_seed_switches_it_off_and_takes_part(layer: Any, x: Tensor, inside: str, plant: Any) -> None:
    model = wrap(layer)
    model(x)
    model.eval()
    dormant, _ = fused(model, x)
    plant(model.get_submodule(inside), Half(), 0.5)
    grown, ran = fused(model, x)
    assert FUSED_LAYER not in ran
    assert not torch.allclose(grown, dormant)
    with torch.enable_grad():
        torch.testing.assert_close(grown, model(x))
    model.get_submodule(inside).clear_seed(0)
    again, ran = fused(model, x)
    assert FUSED_LAYER in ran
    assert torch.equal(again, dormant)


def test_an_active_seed_behind_the_hosts_back_leaves_it_alone(layer: Any, x: Tensor, delta: Any) -> None:
    model = wrap(layer)
    model(x)
    model.linear1.attach_module(0, delta())
    assert fused(model.eval(), x)[1] >= {FUSED_LAYER}


def test_attention_alone_is_fused_below_its_seed(x: Tensor, plant: Any, delta: Any) -> None:
    """The host's own attention may be fused: the seed reads its output."""
    torch.manual_seed(0)
    host = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2, batch_first=True)})
    twin = copy.deepcopy(host).eval()
    model = wrap(host).eval()
    attention = model["attention"]
    (ours, _), ran = fused(attention, x, x, x, need_weights=False)
    (theirs, _), would_run = fused(twin["attention"], x, x, x, need_weights=False)
    assert ran == would_run == {FUSED_ATTENTION}
    assert torch.equal(ours, theirs)
    plant(attention, delta(), 0.5)
    (grown, _), ran = fused(attention, x, x, x, need_weights=False)
    assert ran == {FUSED_ATTENTION}
    with torch.no_grad():
        assert torch.equal(grown, theirs + delta()(x, theirs) * 0.5)


class TestNested:
    """``nn.TransformerEncoder`` packs padded input only while no seed inside is live."""

    @pytest.fixture
    def padding(self) -> Tensor:
        return torch.tensor([[False] * 5, [False] * 3 + [True] * 2])

    def test_packed_while_dormant(self, layer: Any, x: Tensor, padding: Tensor) -> None:
        encoder = nn.TransformerEncoder(layer, 2)
        twin = copy.deepcopy(encoder).eval()
        model = wrap(encoder).eval()
        ours, ran = fused(model, x, src_key_padding_mask=padding)
        theirs, _ = fused(twin, x, src_key_padding_mask=padding)
        assert FUSED_LAYER in ran
        assert torch.equal(ours, theirs)

    def test_a_switch_that_the_user_has_set_meanwhile_stays(
        self, layer: Any, x: Tensor, plant: Any, delta: Any
    ) -> None:
        model = wrap(nn.TransformerEncoder(layer, 2))
        model(x)
        model.use_nested_tensor = False
        inside = model.layers[1].linear1
        plant(inside, delta(), 0.5)
        inside.clear_seed(0)
        assert not model.use_nested_tensor
        assert not unwrap(model).use_nested_tensor

    def test_growing_and_back_restores_it(self, layer: Any, x: Tensor, padding: Tensor, plant: Any, delta: Any) -> None:
        model = wrap(nn.TransformerEncoder(layer, 2))
        model(x)
        for inside in (model.layers[0].norm1, model.layers[1].linear1):
            plant(inside, delta(), 0.5)
            assert not model.use_nested_tensor
        model.layers[0].norm1.clear_seed(0)
        assert not model.use_nested_tensor
        assert fused(model.eval(), x, src_key_padding_mask=padding)[1] >= {FUSED_LAYER}, "of the first layer alone"
        model.layers[1].linear1.clear_seed(0)
        assert model.use_nested_tensor

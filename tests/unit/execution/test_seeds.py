"""The life of a seed at a layer: germination, what the host sees of it, blending, leaving."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from esper.blueprints import default_registry
from esper.contracts.errors import InvalidInputError, InvalidStateError, InvalidTransitionError, ShapeMismatchError
from esper.contracts.lifecycle import SeedLifecycleState as State
from esper.contracts.run import Contribution
from esper.core.wrap import wrap

LAYERS = ["layer1", "conv"]


def layer_of(pair: Any, name: str) -> Any:
    return getattr(pair.model, name)


def grow(layer: Any, module: nn.Module, *states: State, index: int = 0) -> Any:
    seed = layer.attach_module(index, module)
    for state in states:
        layer.transition(index, state)
    return seed


@pytest.mark.parametrize("name", LAYERS)
def test_an_active_seed_leaves_outputs_and_gradients_to_the_host(warm: Any, name: str, scale: Any) -> None:
    warm.model.train()
    warm.twin.train()
    grow(layer_of(warm, name), scale())
    assert layer_of(warm, name).state_layout.lifecycle_states[0] == State.ACTIVE
    warm.backward()
    assert warm.same_gradients()
    assert layer_of(warm, name).seed_parameters(0)[0].grad is None


@pytest.mark.parametrize("name", LAYERS)
def test_an_evaluating_seed_adds_alpha_times_its_delta(warm: Any, name: str, scale: Any) -> None:
    layer = layer_of(warm, name)
    host_outputs: list[Tensor] = []
    x = warm.x if name == "conv" else torch.randn(4, 128)
    host_outputs.append(layer(x))
    grow(layer, scale(2.0), State.EVALUATING)
    assert torch.equal(layer(x), host_outputs[0]), "alpha is still 0"
    layer.set_alpha(0, 0.25)
    assert 0 < layer.state_layout.alpha_blend[0] < 1
    torch.testing.assert_close(layer(x), host_outputs[0] * 1.5)
    layer.transition(0, State.FOSSILIZED)
    assert layer.state_layout.alpha_blend[0] == 1.0
    torch.testing.assert_close(layer(x), host_outputs[0] * 3.0)


def test_seeds_all_read_the_hosts_output_and_add_up(warm: Any, scale: Any) -> None:
    layer, x = warm.model.layer1, torch.randn(4, 128)
    h = layer(x)
    for index in range(3):
        grow(layer, scale(1.0), State.EVALUATING, State.FOSSILIZED, index=index)
    torch.testing.assert_close(layer(x), h * 4.0)


def test_a_blended_seed_and_its_host_both_get_gradients(warm: Any, scale: Any) -> None:
    layer = warm.model.layer1
    grow(layer, scale(0.5), State.EVALUATING)
    layer.set_alpha(0, 0.5)
    layer(torch.randn(4, 128)).square().sum().backward()
    assert layer.seed_parameters(0)[0].grad.abs() > 0
    assert layer.weight.grad.abs().sum() > 0


def test_a_culled_seed_without_share_leaves_no_trace(warm: Any, scale: Any) -> None:
    layer = warm.model.layer1
    keys = list(warm.model.state_dict())
    grow(layer, scale())
    assert "seeds" in dict(layer.named_children())
    layer.transition(0, State.CULLED)
    assert "seeds" not in dict(layer.named_children())
    assert list(warm.model.state_dict()) == keys
    assert not layer._forward_hooks
    assert layer.state_layout.kernel_ids[0] == 0


def test_a_culled_seed_with_share_is_ramped_out_then_freed(warm: Any, scale: Any) -> None:
    layer, x = warm.model.layer1, torch.randn(4, 128)
    h = layer(x)
    grow(layer, scale(1.0), State.EVALUATING)
    layer.set_alpha(0, 1.0)
    layer.transition(0, State.CULLED)
    torch.testing.assert_close(layer(x), h * 2.0)
    layer.set_alpha(0, 0.5)
    torch.testing.assert_close(layer(x), h * 1.5)
    layer.set_alpha(0, 0.0)
    assert torch.equal(layer(x), h)
    assert layer.find_seed(0) is None


def test_an_embargo_frees_whatever_is_left(warm: Any, scale: Any) -> None:
    layer = warm.model.layer1
    grow(layer, scale(), State.EVALUATING)
    layer.set_alpha(0, 0.5)
    layer.transition(0, State.CULLED)
    layer.transition(0, State.EMBARGOED)
    assert layer.find_seed(0) is None
    assert layer.state_layout.alpha_blend[0] == 0.0
    layer.transition(0, State.DORMANT)


def test_a_seed_cannot_be_active_without_a_kernel(warm: Any) -> None:
    layer = warm.model.layer1
    layer.state_layout.transition(0, State.LOADING, 1)
    with pytest.raises(
        InvalidStateError, match="seed 0 of layer 'layer1' must hold a kernel, got none in state LOADING"
    ):
        layer.state_layout.transition(0, State.ACTIVE, 1)
    assert layer.state_layout.state(0) is State.LOADING


def test_a_seed_is_taken_only_once(warm: Any, scale: Any) -> None:
    grow(warm.model.layer1, scale())
    with pytest.raises(InvalidTransitionError, match="ACTIVE to LOADING"):
        warm.model.layer1.attach_module(0, scale())
    assert warm.model.layer1.state_layout.state(0) is State.ACTIVE


def test_a_share_is_only_for_blended_seeds(warm: Any, scale: Any) -> None:
    grow(warm.model.layer1, scale())
    with pytest.raises(
        InvalidStateError, match=r"must be EVALUATING, FOSSILIZED or CULLED to have a share, got ACTIVE"
    ):
        warm.model.layer1.set_alpha(0, 0.5)


def test_a_share_outside_zero_to_one_is_refused(warm: Any, scale: Any) -> None:
    grow(warm.model.layer1, scale(), State.EVALUATING)
    with pytest.raises(InvalidInputError, match="alpha"):
        warm.model.layer1.set_alpha(0, 1.5)
    assert warm.model.layer1.find_seed(0).alpha == 0.0


def test_a_layer_that_never_ran_has_no_site_to_germinate_at(pair: Any, scale: Any) -> None:
    with pytest.raises(InvalidStateError, match="'layer1' must know its shapes before a seed germinates"):
        pair.model.layer1.attach_module(0, scale())
    assert pair.model.layer1.state_layout.state(0) is State.DORMANT


class _Narrow(nn.Module):
    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return h[..., :-1]


def test_a_delta_of_another_shape_is_refused_at_the_door(warm: Any) -> None:
    with pytest.raises(ShapeMismatchError, match=r"must give a delta of shape \(2, 32\), got \(2, 31\)"):
        warm.model.layer1.attach_module(0, _Narrow())
    assert warm.model.layer1.state_layout.state(0) is State.CULLED
    assert warm.model.layer1.find_seed(0) is None


def test_parameters_of_a_seed_are_the_models_and_named_by_it(warm: Any, scale: Any) -> None:
    grow(warm.model.layer1, scale())
    assert "layer1.seeds.0.kernel.weight" in dict(warm.model.named_parameters())
    (parameter,) = warm.model.layer1.seed_parameters(0)
    assert parameter is warm.model.layer1.find_seed(0).kernel.weight
    with pytest.raises(InvalidStateError, match="seed 1"):
        warm.model.layer1.seed_parameters(1)


def test_moves_and_modes_reach_a_seed(warm: Any, scale: Any) -> None:
    grow(warm.model.layer1, scale())
    warm.model.double().train()
    seed = warm.model.layer1.find_seed(0)
    assert seed.kernel.weight.dtype == torch.float64
    assert seed.kernel.training
    warm.model.eval()
    assert not seed.kernel.training


def test_autocast_blends_in_the_hosts_dtype(warm: Any, scale: Any) -> None:
    grow(warm.model.layer1, scale(), State.EVALUATING)
    warm.model.layer1.set_alpha(0, 0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert warm.model.layer1(torch.randn(4, 128)).dtype == torch.bfloat16


@pytest.mark.parametrize(("make", "shape"), [(lambda: nn.Linear(6, 4), (6,)), (lambda: nn.Conv2d(3, 4, 3), (3, 6, 6))])
def test_unbatched_inputs_blend_too(make: Any, shape: tuple[int, ...], scale: Any) -> None:
    model = wrap(nn.Sequential(make()))
    x = torch.randn(shape)
    h = model(x)
    grow(model[0], scale(1.0), State.EVALUATING, State.FOSSILIZED)
    torch.testing.assert_close(model(x), h * 2.0)


@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_blends_batch_first_whatever_its_layout(batch_first: bool) -> None:
    class Mark(nn.Module):
        """Adds the number of the example, so that the batch dimension shows."""

        def forward(self, x: Tensor, h: Tensor) -> Tensor:
            numbers = torch.arange(h.shape[0], dtype=h.dtype, device=h.device)
            return numbers.view(-1, 1, 1).expand_as(h) + 0 * x

    model = wrap(nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2, batch_first=batch_first)}))
    attention = model["attention"]
    x = torch.randn(3, 5, 8) if batch_first else torch.randn(5, 3, 8)
    h, _ = attention(x, x, x)
    grow(attention, Mark(), State.EVALUATING, State.FOSSILIZED)
    out, weights = attention(x, x, x)
    numbers = torch.arange(3.0).view(3, 1, 1) if batch_first else torch.arange(3.0).view(1, 3, 1)
    torch.testing.assert_close(out - h, numbers.expand_as(h))
    assert weights is not None


def test_a_fused_encoder_steps_back_while_a_seed_inside_is_live(scale: Any) -> None:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0).eval()
    model = wrap(nn.ModuleDict({"encoder": encoder})).eval()
    x = torch.randn(2, 5, 8)
    model["encoder"](x)
    with torch.no_grad():
        plain = model["encoder"](x)
        layer = model["encoder"].linear1
        grow(layer, scale(1.0), State.EVALUATING)
        layer.set_alpha(0, 1.0)
        assert not torch.allclose(model["encoder"](x), plain)
        layer.clear_seed(0)
        torch.testing.assert_close(model["encoder"](x), plain)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_an_encoder_packs_nothing_while_a_seed_inside_is_live(scale: Any) -> None:
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    model = wrap(nn.Sequential(nn.TransformerEncoder(block, 2))).eval()
    encoder, x = model[0], torch.randn(2, 5, 8)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    model[0](x)
    layer = encoder.layers[1].linear1
    with torch.no_grad():
        packed = encoder(x, src_key_padding_mask=padding)
        grow(layer, scale(1.0), State.EVALUATING, State.FOSSILIZED)
        assert not encoder.use_nested_tensor
        grown = encoder(x, src_key_padding_mask=padding)
        assert not torch.allclose(grown[0], packed[0])
        assert layer.state_layout.errors[0] == 0
        layer.clear_seed(0)
        assert encoder.use_nested_tensor
        torch.testing.assert_close(encoder(x, src_key_padding_mask=padding), packed)


def test_every_template_of_a_site_stands_and_starts_at_zero(warm: Any) -> None:
    for name in LAYERS:
        layer = layer_of(warm, name)
        for blueprint in default_registry().for_site(layer.site):
            layer.germinate(0, blueprint.ir, blueprint_id=blueprint.id, adaptation_id="a1")
            layer.transition(0, State.EVALUATING)
            layer.set_alpha(0, 1.0)
            status = layer.layer_status().seeds[0]
            assert (status.blueprint_id, status.adaptation_id, status.alpha) == (blueprint.id, "a1", 1.0)
            assert status.parameters == sum(parameter.numel() for parameter in layer.seed_parameters(0))
            torch.testing.assert_close(warm.model(warm.x), warm.twin(warm.x), rtol=1e-5, atol=1e-5)
            layer.clear_seed(0)
    assert torch.equal(warm.model(warm.x), warm.twin(warm.x))


def test_statistics_speak_of_what_was_measured(warm: Any, scale: Any) -> None:
    layer = warm.model.layer1
    assert layer.get_layer_stats()["kernel_execution_latency_ms"] is None
    assert layer.get_layer_stats()["performance_improvement"] is None
    grow(layer, scale(), State.EVALUATING, State.FOSSILIZED)
    layer.record_contribution(0, Contribution(estimate=0.2, low=0.1, high=0.3, num_examples=50))
    stats = layer.get_layer_stats()
    assert 0 < stats["kernel_execution_latency_ms"] < 5.0
    assert stats["successful_adaptations"] == 1
    assert stats["performance_improvement"] == pytest.approx(0.2)
    assert warm.model.head.get_layer_stats()["performance_improvement"] is None
    assert stats["seeds_by_state"]["fossilized"] == 1
    layer.clear_seed(0)
    assert layer.get_layer_stats()["performance_improvement"] is None

"""What stands between a wrapped model and its host's forward: nothing, but for the pass that is measured."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from esper.contracts.lifecycle import SeedLifecycleState as State
from esper.core.export import export
from esper.core.wrap import LayerTelemetry, unwrap, wrap
from esper.execution.layers import kasmina_class_of, supported_classes
from esper.execution.overrides import unmeasured


class Block(nn.Module):
    """A part with code of its own, which is what torch compiles in place."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.linear(x))


def is_host_forward(layer: Any) -> bool:
    return "forward" not in vars(layer) and layer.forward.__func__ is type(layer).host_class.forward


def doubled(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: forward(x) * 2.0


def blend(layer: Any, module: nn.Module) -> None:
    layer.attach_module(0, module)
    layer.transition(0, State.EVALUATING)
    layer.set_alpha(0, 1.0)


@pytest.mark.parametrize("cls", supported_classes(), ids=lambda cls: cls.__name__)
def test_the_forward_of_a_kasmina_class_is_its_parents(cls: type[nn.Module]) -> None:
    found = kasmina_class_of(cls)
    assert found is not None
    assert found.forward is cls.forward


def test_without_telemetry_nothing_is_left_after_the_first_pass(make_pair: Any) -> None:
    pair = make_pair(telemetry=False)
    assert not is_host_forward(pair.model.layer1)
    pair.backward()
    assert all(is_host_forward(layer) for layer in pair.model.kasmina_layers.values())


def test_only_the_pass_that_is_due_goes_another_way(make_pair: Any) -> None:
    pair = make_pair(telemetry=LayerTelemetry(interval_steps=3))
    layer, seen = pair.model.layer1, []
    pair.model.conv.register_forward_hook(lambda *_: seen.append(not is_host_forward(layer)))
    for _ in range(7):
        pair.backward()
        assert is_host_forward(layer)
    assert seen == [True, False, False, True, False, False, True]
    assert layer.get_health_signal().count == 3


def test_a_pass_that_is_not_to_be_measured_is_not_counted(make_pair: Any) -> None:
    pair = make_pair(telemetry=LayerTelemetry(interval_steps=2))
    pair.backward()
    with unmeasured(pair.model):
        for _ in range(5):
            pair.backward()
    assert pair.model.layer1.get_layer_stats()["total_forwards"] == 1
    pair.backward()
    pair.backward()
    assert pair.model.layer1.get_health_signal().count == 2
    assert pair.model.layer1.get_layer_stats()["total_forwards"] == 3


def test_where_the_loop_goes_around_the_model_steps_count(make_pair: Any) -> None:
    pair = make_pair(telemetry=LayerTelemetry(interval_steps=3))
    for _ in range(7):
        pair.model.host_module(pair.x).sum().backward()
        pair.model.tick_step()
    # The first pass is measured before any step is counted; steps 1, 4 and 7 make the next ones due.
    assert pair.model.layer1.get_health_signal().count == 3


def test_steps_do_not_count_beside_passes(make_pair: Any) -> None:
    pair = make_pair(telemetry=LayerTelemetry(interval_steps=4))
    for _ in range(9):
        pair.backward()
        pair.model.tick_step()
    assert pair.model.layer1.get_health_signal().count == 3
    assert pair.model.layer1.get_layer_stats()["total_forwards"] == 9


def test_telemetry_of_one_layer_can_be_switched_on_alone(make_pair: Any) -> None:
    pair = make_pair(telemetry=False)
    pair.backward()
    pair.model.layer1.set_telemetry(True)
    pair.backward()
    assert pair.model.layer1.get_health_signal().count == 1
    assert pair.model.layer1.get_layer_stats()["total_forwards"] == 1
    assert is_host_forward(pair.model.conv)
    assert pair.model.conv.get_health_signal().count == 0


def test_a_live_seed_takes_part_at_once_and_leaves_nothing_behind(warm: Any, scale: Any) -> None:
    layer, x = warm.model.layer1, torch.randn(4, 128)
    before = layer(x)
    blend(layer, scale(1.0))
    torch.testing.assert_close(layer(x), before * 2.0)
    layer.clear_seed(0)
    assert is_host_forward(layer)
    assert torch.equal(layer(x), before)


def test_a_forward_patched_after_wrapping_stays_in_force(warm: Any, scale: Any) -> None:
    layer, x = warm.model.layer1, torch.randn(4, 128)
    host = layer(x)
    patched = layer.forward = doubled(layer.forward)
    blend(layer, scale(1.0))
    torch.testing.assert_close(layer(x), host * 4.0)
    layer.clear_seed(0)
    assert layer.forward is patched
    assert torch.equal(layer(x), host * 2.0)


def test_a_forward_patched_around_ours_blends_once(pair: Any, scale: Any) -> None:
    layer, x = pair.model.layer1, torch.randn(4, 128)
    pair.model.eval()
    host = nn.functional.linear(x, layer.weight, layer.bias)
    patched = layer.forward = doubled(layer.forward)  # armed, so that ours is what it calls
    pair.model(pair.x)
    assert layer.forward is patched
    for _ in range(2):
        blend(layer, scale(1.0))
        torch.testing.assert_close(layer(x), host * 4.0)
        layer.clear_seed(0)
        torch.testing.assert_close(layer(x), host * 2.0)
    del layer.forward
    blend(layer, scale(1.0))
    torch.testing.assert_close(layer(x), host * 2.0)


def test_a_copy_runs_on_its_own_weights(warm: Any, scale: Any) -> None:
    blend(warm.model.layer1, scale(1.0))
    twin = copy.deepcopy(warm.model)
    assert isinstance(twin.layer1.forward, MethodType)
    assert twin.layer1.forward.__self__ is twin.layer1
    with torch.no_grad():
        twin.layer1.weight.zero_()
        twin.layer1.bias.zero_()
    assert not twin.layer1(torch.randn(4, 128)).any()
    assert warm.model.layer1(torch.randn(4, 128)).any()


def test_a_copy_of_one_layer_brings_no_other_along(pair: Any) -> None:
    twin = copy.deepcopy(pair.model.layer1)
    assert torch.equal(twin(torch.ones(4, 128)), pair.model.layer1(torch.ones(4, 128)))
    assert twin._kasmina.pulse is not pair.model.layer1._kasmina.pulse


@pytest.mark.parametrize("restore", [unwrap, export], ids=["unwrap", "export"])
def test_an_armed_layer_is_given_back_whole(restore: Callable[..., nn.Module]) -> None:
    plain = restore(wrap(nn.Sequential(nn.Linear(4, 4))))
    assert "forward" not in vars(plain[0])
    assert type(plain[0]) is nn.Linear


def test_hooks_of_the_wrapper_and_of_the_host_are_called(warm: Any) -> None:
    seen: list[object] = []
    warm.model.register_forward_pre_hook(lambda module, _: seen.append(module))
    warm.model.register_forward_hook(lambda module, *_: seen.append(module))
    warm.model.host_module.register_forward_hook(lambda module, *_: seen.append(module))
    warm.model(warm.x)
    assert seen == [warm.model, warm.model.host_module, warm.model]


@pytest.mark.parametrize("in_place", [True, False])
def test_a_compiled_part_of_the_host_is_never_compiled_again_for_telemetry(in_place: bool) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    model = wrap(nn.Sequential(Block(), nn.Linear(4, 2)), telemetry=LayerTelemetry(interval_steps=2))
    x = torch.randn(3, 4)
    model(x)
    if in_place:
        model[0].compile(backend=counter, fullgraph=True)
    else:
        model.host_module[0] = torch.compile(model[0], backend=counter, fullgraph=True)
    for _ in range(6):
        model(x)
    assert counter.frame_count == 1
    assert model[1].get_health_signal().count == 4
    torch._dynamo.reset()


def test_the_wrapper_can_be_traced_by_torchscript(warm: Any) -> None:
    with pytest.warns(DeprecationWarning, match="torch.jit.trace"):
        traced = torch.jit.trace(warm.model, (warm.x,))
    torch.testing.assert_close(traced(warm.x), warm.twin(warm.x))

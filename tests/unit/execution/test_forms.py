"""The two forms of a layer's class: which one it has when, and what must not depend on it."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch._dynamo.guards as dynamo_guards
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils import parametrize

from esper.blueprints import default_registry
from esper.contracts.errors import InvalidStateError
from esper.contracts.lifecycle import SeedLifecycleState as State
from esper.core.export import export
from esper.core.wrap import LayerTelemetry, unwrap, wrap
from esper.execution.layers import KasminaLayer, KasminaLinear, supported_classes
from esper.execution.layers.forms import form_of
from esper.execution.layers.registry import kasmina_class_of

X = torch.randn(4, 128)


class Lift(nn.Module):
    """A delta that is half of h."""

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return h * 0.5


class InPlace(nn.Module):
    """A delta computed in the memory that it is given."""

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return h.mul_(0.5)


class Mark:
    """What ``fully_shard`` puts in front of a layer's class."""


class Double(nn.Module):
    """A parametrisation."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2.0


def blend(layer: Any, module: nn.Module | None = None) -> None:
    layer.attach_module(0, module or Lift())
    layer.transition(0, State.EVALUATING)
    layer.set_alpha(0, 1.0)


def is_busy(layer: KasminaLayer) -> bool:
    return type(layer).forward is KasminaLayer.busy_forward


def derive(layer: Any) -> None:
    """Do to a layer's class what ``fully_shard`` does."""
    layer.__class__ = type(f"Marked{type(layer).__name__}", (Mark, type(layer)), {})


@pytest.mark.parametrize("cls", supported_classes(), ids=lambda cls: cls.__name__)
def test_a_class_has_two_forms_of_one_name(cls: type[nn.Module]) -> None:
    at_rest = kasmina_class_of(cls)
    assert at_rest is not None
    busy = form_of(at_rest, is_busy=True)
    assert busy is not None
    assert issubclass(busy, at_rest)
    assert busy.forward is KasminaLayer.busy_forward
    assert at_rest.forward is cls.forward
    assert (busy.__name__, busy.host_class, at_rest.host_class) == (at_rest.__name__, at_rest, cls)
    assert form_of(busy, is_busy=False) is at_rest
    assert form_of(cls, is_busy=True) is None


def test_a_layer_is_busy_until_it_was_measured_and_while_seeds_take_part(make_pair: Any) -> None:
    pair = make_pair(telemetry=LayerTelemetry(interval_steps=2))
    layer, seen = pair.model.layer1, []
    pair.model.conv.register_forward_hook(lambda *_: seen.append(is_busy(layer)))
    for _ in range(4):
        pair.model(pair.x)
        assert type(layer) is KasminaLinear
    assert seen == [True, False, True, False]
    blend(layer)
    assert is_busy(layer)
    assert repr(layer).startswith("KasminaLinear(")
    layer.clear_seed(0)
    assert type(layer) is KasminaLinear


def test_the_layers_own_dictionary_gets_one_name_more(make_pair: Any) -> None:
    pair = make_pair()
    before = {*vars(pair.twin.layer1), "_kasmina"}
    layer = pair.model.layer1
    assert vars(layer).keys() == before
    pair.model(pair.x)
    blend(layer)
    assert vars(layer).keys() == before


def test_a_forward_that_the_hosts_class_is_given_later_is_obeyed(warm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = warm.model.layer1
    host = layer(X)
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: F.linear(x, self.weight, self.bias) * 3.0)
    assert torch.equal(layer(X), host * 3.0)
    blend(layer)
    torch.testing.assert_close(layer(X), host * 4.5)


@pytest.mark.parametrize("is_warm", [True, False], ids=["at rest", "busy"])
def test_a_class_derived_from_either_form_blends_and_rests(make_pair: Any, is_warm: bool) -> None:
    pair = make_pair()
    pair.model.eval()
    layer, host = pair.model.layer1, pair.twin.layer1(X)
    if is_warm:
        pair.model(pair.x)
    derive(layer)
    derived = type(layer)
    pair.model(pair.x)
    for _ in range(2):
        blend(layer)
        torch.testing.assert_close(layer(X), host * 1.5)
        layer.clear_seed(0)
        assert torch.equal(layer(X), host)
        assert "forward" not in vars(layer)
    assert type(layer) is derived
    for back in (unwrap, export):
        with pytest.raises(InvalidStateError, match="layer 'layer1' must be of the class that wrap"):
            back(pair.model)


@pytest.mark.parametrize("is_warm", [True, False], ids=["at rest", "busy"])
def test_a_parametrised_layer_blends_and_its_class_comes_back(make_pair: Any, is_warm: bool) -> None:
    pair = make_pair()
    pair.model.eval()
    layer, linear = pair.model.layer1, pair.twin.layer1
    if is_warm:
        pair.model(pair.x)
    parametrize.register_parametrization(layer, "weight", Double())
    pair.model(pair.x)
    blend(layer)
    torch.testing.assert_close(layer(X), F.linear(X, linear.weight * 2, linear.bias) * 1.5)
    parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
    torch.testing.assert_close(layer(X), linear(X) * 1.5)
    layer.clear_seed(0)
    assert torch.equal(layer(X), linear(X))
    assert type(layer) is KasminaLinear
    assert type(unwrap(pair.model).layer1) is nn.Linear


def test_a_forward_that_stood_around_the_busy_form_leaves_no_trace(pair: Any) -> None:
    layer = pair.model.eval().layer1
    forward = layer.forward
    layer.forward = lambda x: forward(x) * 2.0
    pair.model(pair.x)
    assert is_busy(layer)
    del layer.forward
    layer.set_telemetry(False)
    assert type(layer) is KasminaLinear
    assert torch.equal(layer(X), pair.twin.layer1(X))


def test_a_forward_given_once_more_after_ours_was_taken_out_is_below_ours_again(warm: Any) -> None:
    layer, host = warm.model.layer1, warm.twin.layer1(X)
    for _ in range(2):
        forward = layer.forward
        layer.forward = lambda x, forward=forward: forward(x) * 2.0
        blend(layer)  # ours stands around theirs, in the instance
        torch.testing.assert_close(layer(X), host * 3.0)
        del layer.forward
        layer.clear_seed(0)
        assert torch.equal(layer(X), host)


@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
def test_copies_are_of_the_same_form(warm: Any, protocol: int) -> None:
    blend(warm.model.layer1)
    for twin in (copy.deepcopy(warm.model), pickle.loads(pickle.dumps(warm.model, protocol))):
        assert type(twin.layer1) is type(warm.model.layer1)
        assert type(twin.head) is KasminaLinear
        assert torch.equal(twin(warm.x), warm.model(warm.x))
        twin.layer1.clear_seed(0)
        assert type(twin.layer1) is KasminaLinear
        assert is_busy(warm.model.layer1)


def compiled_guards(model: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> str:
    """Give the guards of a compiled forward pass in dynamo's own words, without the code that asked for them."""
    found: list[str] = []
    init = dynamo_guards.CheckFunctionManager.__init__

    def noting(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        found.append("\n".join(line.partition("  # ")[0] for line in str(self.guard_manager).splitlines()))

    monkeypatch.setattr(dynamo_guards.CheckFunctionManager, "__init__", noting)
    with torch.no_grad():
        torch.compile(model, backend="eager", fullgraph=True)(x)
    (guards,) = found
    return guards


@pytest.mark.usefixtures("fresh_compiler")
def test_dynamo_finds_what_it_asks_of_a_layer_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """No guard for a class passed over, for the module's own call, or for what a closed kernel was built from."""
    model = wrap(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), telemetry=False).eval()
    x = torch.randn(4, 8)
    model(x)
    ir = default_registry().create_blueprint("bottleneck_adapter").ir
    for index in range(2):
        model[0].germinate(index, ir, random_seed=index)
        model[0].transition(index, State.EVALUATING)
        model[0].set_alpha(index, 0.5)
    guards = compiled_guards(model, x, monkeypatch)
    assert "_kasmina.terms[1]" in guards
    for needless in ("__mro__", "_call_impl", ".ir,", ".source,", "gated", "kwdefaults", "fget"):
        assert needless not in guards, needless


@pytest.mark.usefixtures("fresh_compiler")
def test_a_kernel_changed_after_compiling_is_given_copies() -> None:
    model = wrap(nn.Sequential(nn.Linear(8, 8)), telemetry=False).eval()
    x = torch.randn(4, 8)
    host = model(x)
    seed = model[0].germinate(0, default_registry().create_blueprint("bottleneck_adapter").ir)
    model[0].transition(0, State.EVALUATING)
    model[0].set_alpha(0, 1.0)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        compiled(x)
        seed.kernel = InPlace()
        torch.testing.assert_close(compiled(x), host * 1.5)
    assert counter.frame_count == 2

"""Every kind of layer, dormant: training, saving, hooks, copies and sharing are the host's own, to the bit."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from esper.core.wrap import unwrap, wrap
from esper.execution.layers import KasminaLayer

HALVES = (torch.bfloat16, torch.float16)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
class TestBits:
    """Outputs, gradients, buffers and parameters after steps."""

    def test_three_steps_are_the_hosts(self, kind: Any, telemetry: Any, mode: bool, train: Any, same: Any) -> None:
        model, twin = kind.wrapped(telemetry=telemetry)
        batches = [kind.batch(seed) for seed in range(3)]
        ours = train(model.train(mode), batches, sgd(model))
        assert same(ours, train(twin.train(mode), batches, sgd(twin)))
        assert isinstance(model.layer, KasminaLayer)

    def test_an_optimizer_from_before_goes_on(
        self, kind: Any, telemetry: Any, mode: bool, train: Any, same: Any
    ) -> None:
        net = kind.net()
        twin = copy.deepcopy(net)
        before, theirs = (torch.optim.AdamW(module.parameters(), lr=0.1) for module in (net, twin))
        batches = [kind.batch(seed) for seed in range(3)]
        train(net.train(mode), batches[:1], before)
        train(twin.train(mode), batches[:1], theirs)
        model = wrap(net, telemetry=telemetry)
        assert same(train(model, batches[1:], before), train(twin, batches[1:], theirs))

    @pytest.mark.parametrize("dtype", HALVES, ids=str)
    def test_autocast(self, kind: Any, telemetry: Any, mode: bool, dtype: torch.dtype, weigh: Any, same: Any) -> None:
        model, twin = kind.wrapped(telemetry=telemetry)
        found = []
        for net in (model.train(mode), twin.train(mode)):
            x = kind.batch().requires_grad_()
            with torch.autocast("cpu", dtype=dtype):
                out = net(x)
            weigh(out.float()).backward()
            found.append([out.detach(), x.grad, *(parameter.grad for parameter in net.parameters()), *net.buffers()])
        assert found[0][0].dtype == found[1][0].dtype == kind.out_dtype(dtype)
        assert same(*found)

    def test_a_gradient_scaler_over_autocast(
        self, kind: Any, telemetry: Any, mode: bool, train_scaled: Any, same: Any
    ) -> None:
        model, twin = kind.wrapped(telemetry=telemetry)
        batches = [kind.batch(seed) for seed in range(4)]
        scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**16, backoff_factor=2.0**-6) for _ in range(2)]
        ours = train_scaled(model.train(mode), batches, sgd(model), scalers[0])
        assert same(ours, train_scaled(twin.train(mode), batches, sgd(twin), scalers[1]))
        assert scalers[0].state_dict() == scalers[1].state_dict()
        assert scalers[0].get_scale() == 2.0 ** (10 if kind.is_halved else 16), "float16 overflows, once"

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_activation_checkpointing(
        self, kind: Any, telemetry: Any, mode: bool, reentrant: bool, weigh: Any, same: Any
    ) -> None:
        model, twin = kind.wrapped(telemetry=telemetry)
        found = []
        for net in (model.train(mode), twin.train(mode)):
            x = kind.batch().requires_grad_()
            out = checkpoint(net, x, use_reentrant=reentrant)
            weigh(out).backward()
            found.append([out.detach(), x.grad, *(parameter.grad for parameter in net.parameters()), *net.buffers()])
        assert same(*found)


class TestSaving:
    """State dicts, copies, pickles."""

    def test_state_dicts_go_both_ways(self, kind: Any, same: Any) -> None:
        model, twin = kind.wrapped()
        assert list(model.state_dict()) == list(twin.state_dict())
        assert model.state_dict()._metadata == twin.state_dict()._metadata
        with torch.no_grad():
            for number, parameter in enumerate(twin.parameters()):
                parameter.add_(number + 1)
        assert model.load_state_dict(twin.state_dict()) == twin.load_state_dict(twin.state_dict())
        assert same(list(model.state_dict().values()), list(twin.state_dict().values()))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(2)
        twin.load_state_dict(model.state_dict())
        assert torch.equal(model.eval()(kind.batch()), twin.eval()(kind.batch()))

    def test_a_deepcopy_is_its_own(self, kind: Any, train: Any, same: Any) -> None:
        model, twin = kind.wrapped()
        model.eval()(kind.batch())
        double = copy.deepcopy(model).train()
        model.train()
        batches = [kind.batch(seed) for seed in range(2)]
        theirs = train(twin, batches, sgd(twin))
        assert same(train(double, batches, sgd(double)), theirs)
        assert double.layer.state_layout is not model.layer.state_layout
        assert same(train(model, batches, sgd(model)), theirs)

    @pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
    def test_a_pickle_is_a_working_copy(self, kind: Any, protocol: int, train: Any, same: Any) -> None:
        model, twin = kind.wrapped()
        double = pickle.loads(pickle.dumps(model, protocol))
        assert type(double.layer) is type(model.layer)
        assert double.layer is double.kasmina_layers["layer"]
        assert double.oona_client is None
        batches = [kind.batch(seed) for seed in range(2)]
        assert same(train(double, batches, sgd(double)), train(twin, batches, sgd(twin)))

    def test_torch_save_keeps_the_model(self, kind: Any) -> None:
        model, twin = kind.wrapped()
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        double = torch.load(buffer, weights_only=False)
        assert torch.equal(double.eval()(kind.batch()), twin.eval()(kind.batch()))

    def test_unwrap_restores_exactly(self, kind: Any, plant: Any, delta: Any) -> None:
        net = kind.net()
        attributes, hooks = dict(vars(net.layer)), dict(net.layer._forward_hooks)
        twin, layer, host_class = copy.deepcopy(net), net.layer, type(net.layer)
        model = wrap(net).eval()
        model(kind.batch())
        plant(model.layer, delta(), 0.5)
        model.layer.clear_seed(0)
        assert unwrap(model) is net
        assert net.layer is layer
        assert type(layer) is host_class
        layer.train()
        assert vars(layer).keys() == attributes.keys()
        assert all(vars(layer)[name] is value for name, value in attributes.items())
        assert layer._forward_hooks == hooks
        assert torch.equal(net.eval()(kind.batch()), twin.eval()(kind.batch()))


def listen(module: nn.Module, seen: list[str]) -> None:
    """Put a hook of each sort on a module."""
    module.register_forward_pre_hook(lambda _m, args: seen.append(f"pre {float(args[0].detach().sum())!r}"))
    module.register_forward_hook(lambda *_: seen.append("forward"))
    module.register_full_backward_pre_hook(lambda *_: seen.append("backward pre"))
    module.register_full_backward_hook(lambda _m, _i, out: seen.append(f"backward {float(out[0].sum())!r}"))
    module.register_state_dict_pre_hook(lambda *_: seen.append("save pre"))
    module.register_state_dict_post_hook(lambda *_: seen.append("save post"))
    module.register_load_state_dict_pre_hook(lambda *_: seen.append("load pre"))
    module.register_load_state_dict_post_hook(lambda *_: seen.append("load post"))


def use(model: nn.Module, x: Tensor) -> None:
    model(x.clone().requires_grad_()).square().sum().backward()
    model.load_state_dict(model.state_dict())


class TestHooks:
    """Hooks of every sort are called as often, in the same order, with the same values."""

    @pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
    def test_on_the_layer(self, kind: Any, telemetry: Any, after: bool) -> None:
        net = kind.net()
        twin = copy.deepcopy(net)
        ours: list[str] = []
        theirs: list[str] = []
        if not after:
            listen(net.layer, ours)
        model = wrap(net, telemetry=telemetry)
        if after:
            listen(model.layer, ours)
        listen(twin.layer, theirs)
        for _ in range(2):
            use(model, kind.batch())
            use(twin, kind.batch())
        assert ours == theirs
        assert len(theirs) == 16

    @pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
    def test_on_the_model(self, kind: Any, after: bool) -> None:
        net = kind.net()
        twin = copy.deepcopy(net)
        ours: list[str] = []
        theirs: list[str] = []
        if not after:
            listen(net, ours)
        model = wrap(net)
        if after:
            listen(model, ours)
        listen(twin, theirs)
        use(model, kind.batch())
        use(twin, kind.batch())
        assert ours == theirs
        assert len(theirs) == 8

    def test_of_a_host_inside_a_larger_module(self, kind: Any) -> None:
        seen: dict[str, list[str]] = {"ours": [], "theirs": []}
        net = kind.net()
        outer = {"ours": nn.Sequential(wrap(net)), "theirs": nn.Sequential(kind.net())}
        listen(net, seen["ours"])
        listen(outer["theirs"][0], seen["theirs"])
        for module in outer.values():
            use(module, kind.batch())
        assert seen["ours"] == seen["theirs"]
        assert len(seen["ours"]) == 8

    def test_a_hook_that_changes_the_output_is_obeyed(self, kind: Any) -> None:
        model, twin = kind.wrapped()
        for net in (model, twin):
            net.layer.register_forward_hook(lambda _m, _a, out: (2 * out[0], None) if type(out) is tuple else 2 * out)
            net.eval()
        assert torch.equal(model(kind.batch()), twin(kind.batch()))


class Twice(nn.Module):
    """One module under two names, called once by each, and once more."""

    def __init__(self, inner: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.first = inner
        self.second = inner
        self.last = nn.Linear(shape[-1], 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x + self.first(x * 0.5).mean() + self.second(x).mean() + self.first(x * 2).mean())


class Tied(nn.Module):
    """Two nets whose layers share their own parameters."""

    def __init__(self, one: nn.Module, other: nn.Module) -> None:
        super().__init__()
        self.one, self.other = one, other
        for name, parameter in one.layer.named_parameters(recurse=False):
            setattr(other.layer, name, parameter)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) * self.other(x * 0.5)


class TestShared:
    """Tied weights, one module at two places, and modules used twice in one forward."""

    def test_a_module_used_thrice_under_two_names(self, kind: Any, telemetry: Any, train: Any, same: Any) -> None:
        net = Twice(kind.net(), kind.shape)
        twin = copy.deepcopy(net)
        model = wrap(net, telemetry=telemetry)
        assert list(model.kasmina_layers) == ["first.layer", "last"]
        batches = [kind.batch(seed) for seed in range(2)]
        assert same(train(model, batches, sgd(model)), train(twin, batches, sgd(twin)))
        assert list(model.state_dict()) == list(twin.state_dict())

    def test_tied_weights(self, kind: Any, telemetry: Any, train: Any, same: Any) -> None:
        net = Tied(kind.net(), kind.net())
        twin = copy.deepcopy(net)
        model = wrap(net, telemetry=telemetry)
        assert list(model.kasmina_layers) == ["one.layer", "other.layer"]
        assert len(list(model.parameters())) < 2 * len(list(model.one.parameters()))
        batches = [kind.batch(seed) for seed in range(2)]
        assert same(train(model, batches, sgd(model)), train(twin, batches, sgd(twin)))
        ours, others = (list(module.layer.parameters(recurse=False)) for module in (model.one, model.other))
        assert all(a is b for a, b in zip(ours, others, strict=True))


class TestMemoryFormat:
    """Channels-last stays channels-last."""

    @pytest.mark.parametrize("name", ["conv2d", "batch_norm2d"])
    def test_outputs_gradients_and_format(self, name: str, kinds: Any, telemetry: Any, weigh: Any, same: Any) -> None:
        model, twin = kinds[name].wrapped(telemetry=telemetry)
        found = []
        for net in (model, twin):
            net.to(memory_format=torch.channels_last)
            x = kinds[name].batch().contiguous(memory_format=torch.channels_last).requires_grad_()
            out = net(x)
            assert out.is_contiguous(memory_format=torch.channels_last)
            weigh(out).backward()
            assert x.grad is not None
            assert x.grad.is_contiguous(memory_format=torch.channels_last)
            found.append([out.detach(), x.grad, *(parameter.grad for parameter in net.parameters())])
        assert same(*found)

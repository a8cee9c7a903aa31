from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper.contracts.blueprint import SiteKind
from esper.contracts.errors import (
    AlreadyExistsError,
    InvalidInputError,
    InvalidStateError,
    NotFoundError,
    UnsupportedLayerError,
    UnwrappableModelError,
)
from esper.contracts.lifecycle import SeedLifecycleState as State
from esper.core.export import export
from esper.core.morphable import MorphableModel
from esper.core.wrap import LayerTelemetry, SkippedLayersWarning, unwrap, wrap
from esper.execution.layers import KasminaConv2d, KasminaLayer, KasminaLinear, register_layer


class Host(nn.Module):
    """A model with attributes, a method and a name that a wrapper could hide."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(3, 4, 3), nn.Linear(4, 6)])
        self.net = nn.Linear(6, 2)
        self.register_buffer("offset", torch.ones(2))
        self.gain = nn.Parameter(torch.ones(2))
        self.temperature = 2.0

    def forward(self, image: Tensor, *, scale: float = 1.0) -> Tensor:
        pooled = F.relu(self.layers[0](image)).mean((2, 3))
        return self.net(F.relu(self.layers[1](pooled))) * self.gain * scale / self.temperature + self.offset

    def describe(self) -> str:
        return f"temperature {self.temperature}"


X = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def host() -> Host:
    torch.manual_seed(0)
    return Host()


class TestInPlace:
    """What wrapping must not change."""

    def test_layers_are_the_same_objects_of_a_class_that_holds_seeds(self, host: Host) -> None:
        layer, weight = host.layers[1], host.layers[1].weight
        model = wrap(host)
        assert isinstance(model, MorphableModel)
        assert isinstance(model.layers[1], KasminaLayer)
        assert isinstance(model.layers[1], nn.Linear)
        assert model.layers[1] is layer
        assert model.layers[1].weight is weight
        assert model.layers[1].num_seeds == 4
        assert isinstance(model.layers[0], KasminaConv2d)

    def test_names_keys_and_parameters_are_the_hosts(self, host: Host) -> None:
        twin = copy.deepcopy(host)
        model = wrap(host)
        assert [name for name, _ in model.named_modules()] == [name for name, _ in twin.named_modules()]
        assert [name for name, _ in model.named_parameters()] == [name for name, _ in twin.named_parameters()]
        assert [name for name, _ in model.named_buffers()] == [name for name, _ in twin.named_buffers()]
        assert list(model.state_dict()) == list(twin.state_dict())
        assert sum(1 for _ in model.parameters()) == sum(1 for _ in twin.parameters())

    def test_an_optimizer_from_before_goes_on(self, host: Host) -> None:
        twin = copy.deepcopy(host)
        ours, theirs = torch.optim.SGD(host.parameters(), 0.1), torch.optim.SGD(twin.parameters(), 0.1)
        model = wrap(host)
        for net, optimizer in ((model, ours), (twin, theirs)):
            net(X).square().sum().backward()
            optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))

    def test_hooks_are_kept(self, host: Host) -> None:
        seen: list[str] = []
        host.layers[1].register_forward_hook(lambda *_: seen.append("layer"))
        host.register_forward_hook(lambda *_: seen.append("model"))
        model = wrap(host)
        model.register_forward_hook(lambda *_: seen.append("wrapper"))
        model(X)
        assert seen == ["layer", "model", "wrapper"]

    def test_keyword_arguments_reach_the_host(self, host: Host) -> None:
        twin = copy.deepcopy(host)
        assert torch.equal(wrap(host)(X, scale=3.0), twin(X, scale=3.0))

    def test_state_dicts_go_both_ways(self, host: Host) -> None:
        twin = copy.deepcopy(host)
        other = Host()
        model = wrap(host)
        model.load_state_dict(other.state_dict())
        assert torch.equal(model(X), other(X))
        twin.load_state_dict(model.state_dict())
        assert torch.equal(twin(X), other(X))

    def test_a_state_dict_in_a_larger_module_has_its_prefix(self, host: Host) -> None:
        outer = nn.ModuleDict({"inner": wrap(host)})
        assert "inner.net.weight" in outer.state_dict()
        outer.load_state_dict({f"inner.{key}": value for key, value in Host().state_dict().items()})

    def test_tied_weights_stay_tied(self) -> None:
        net = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
        net["b"].weight = net["a"].weight
        model = wrap(net)
        assert model["a"].weight is model["b"].weight
        assert len(list(model.parameters())) == 3


class TestFallThrough:
    """The wrapper's attributes are the host's."""

    def test_reading(self, host: Host) -> None:
        model = wrap(host)
        assert model.temperature == 2.0
        assert model.describe() == "temperature 2.0"
        assert model.net is host.net
        assert model.layers is host.layers
        assert "temperature" in dir(model)
        with pytest.raises(AttributeError, match="nothing_here"):
            _ = model.nothing_here

    def test_writing_reaches_the_hosts_forward(self, host: Host) -> None:
        model = wrap(host)
        before = model(X)
        model.temperature = 4.0
        assert host.temperature == 4.0
        assert not torch.equal(model(X), before)
        model.gain = nn.Parameter(torch.zeros(2))
        assert torch.equal(model(X), torch.ones(2, 2))
        del model.temperature
        assert not hasattr(host, "temperature")

    def test_modes_moves_and_gradients_reach_the_host(self, host: Host) -> None:
        model = wrap(host)
        assert model.train(False) is model
        assert not host.training
        assert not host.net.training
        model.double()
        assert host.net.weight.dtype == torch.float64
        assert host.offset.dtype == torch.float64
        model.requires_grad_(False)
        assert not host.gain.requires_grad

    def test_a_new_class_is_the_wrappers(self, host: Host) -> None:
        class Sharded(MorphableModel):
            """What ``fully_shard`` makes of a module."""

        model = wrap(host)
        model.__class__ = Sharded
        assert type(model) is Sharded
        assert type(host) is Host

    def test_containers_stay_containers(self) -> None:
        model = wrap(nn.Sequential(nn.Linear(2, 3), nn.ReLU()))
        assert len(model) == 2
        assert [isinstance(module, KasminaLinear) for module in model] == [True, False]
        assert bool(model)
        assert "0" in wrap(nn.ModuleDict({"0": nn.Linear(1, 1)}))

    def test_unknown_layers_are_named(self, host: Host) -> None:
        with pytest.raises(NotFoundError, match=r"layer must be one of layers.0, layers.1, net, got 'head'"):
            wrap(host).kasmina_layer("head")


class TestUnwrap:
    """The way back is exact."""

    def test_the_very_same_modules_of_their_own_classes(self, host: Host) -> None:
        modules = dict(host.named_modules())
        attributes = {name: set(vars(module)) for name, module in modules.items()}
        twin = copy.deepcopy(host)
        model = wrap(host)
        model(X).sum().backward()
        plain = unwrap(model)
        assert plain is host
        assert {name: type(module) for name, module in plain.named_modules()} == {
            name: type(module) for name, module in twin.named_modules()
        }
        assert all(module is modules[name] for name, module in plain.named_modules())
        assert {name: set(vars(module)) for name, module in modules.items()} == attributes
        assert torch.equal(plain(X), twin(X))

    def test_a_host_can_be_wrapped_again(self, host: Host) -> None:
        unwrap(wrap(host))
        assert wrap(host, seeds_per_layer=2).net.num_seeds == 2

    def test_a_live_seed_forbids_it(self, host: Host) -> None:
        class Delta(nn.Module):
            def forward(self, x: Tensor, h: Tensor) -> Tensor:
                return h

        model = wrap(host)
        model(X)
        model.net.attach_module(2, Delta())
        with pytest.raises(InvalidStateError, match=r"every seed must be dormant, got kernels at net\[2\]"):
            unwrap(model)
        model.net.clear_seed(2)
        assert unwrap(model) is host

    def test_twice_is_refused(self, host: Host) -> None:
        model = wrap(host)
        unwrap(model)
        with pytest.raises(InvalidStateError, match="model must be wrapped, got one that was unwrapped before"):
            unwrap(model)

    def test_what_is_not_wrapped_is_refused(self, host: Host) -> None:
        with pytest.raises(InvalidInputError, match=r"model must be what wrap\(\) gave, got 'Host'"):
            unwrap(host)  # type: ignore[arg-type]


class TestChoice:
    """Which layers come to hold seeds."""

    def test_every_registered_kind_by_default(self) -> None:
        net = nn.Sequential(
            nn.Linear(4, 4),
            nn.Conv1d(1, 1, 1),
            nn.Conv2d(1, 1, 1),
            nn.LayerNorm(4),
            nn.BatchNorm1d(4),
            nn.BatchNorm2d(4),
            nn.MultiheadAttention(4, 2),
            nn.ReLU(),
            nn.Dropout(),
        )
        kinds = [layer.site_kind for layer in wrap(net).kasmina_layers.values()]
        assert kinds == [
            SiteKind.LINEAR,
            SiteKind.CONV1D,
            SiteKind.CONV2D,
            SiteKind.LAYER_NORM,
            SiteKind.BATCH_NORM1D,
            SiteKind.BATCH_NORM2D,
            SiteKind.ATTENTION,
        ]

    def test_targets_name_classes(self, host: Host) -> None:
        assert list(wrap(host, target_layers=(nn.Linear,)).kasmina_layers) == ["layers.1", "net"]

    def test_include_and_exclude_name_patterns(self, host: Host) -> None:
        model = wrap(host, include="layers.*", exclude=["*.0"])
        assert list(model.kasmina_layers) == ["layers.1"]

    def test_small_layers_can_be_left_out(self, host: Host) -> None:
        assert list(wrap(host, min_params=30).kasmina_layers) == ["layers.0", "layers.1"]

    def test_a_shared_module_is_one_layer(self) -> None:
        shared = nn.Linear(3, 3)
        model = wrap(nn.Sequential(shared, nn.ReLU(), shared))
        assert list(model.kasmina_layers) == ["0"]
        assert model[0] is model[2]
        assert model.seed_states.num_seeds == 4
        model(torch.randn(2, 3)).sum().backward()

    def test_seeds_per_layer(self, host: Host) -> None:
        model = wrap(host, seeds_per_layer=7)
        assert {layer.num_seeds for layer in model.kasmina_layers.values()} == {7}
        assert model.seed_states.num_seeds == 21
        assert all(state == State.DORMANT for state in model.net.state_layout.lifecycle_states)

    def test_old_weight_norm_keeps_working(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            net = nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 3)))
        x = torch.randn(2, 3)
        before = net(x)
        assert torch.equal(wrap(net)(x), before)


class _MyLinear(nn.Linear):
    """A user's own kind of linear layer."""


class _Affine(nn.Module):
    """A user's own layer of no known kind."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(3))

    def forward(self, value: Tensor) -> Tensor:
        return value * self.gain


class TestUnsupported:
    """What cannot hold seeds is skipped with one warning, or refused where it was asked for by name."""

    def test_one_warning_names_what_was_skipped_and_why(self) -> None:
        net = nn.Sequential(
            nn.Embedding(4, 3),
            nn.LSTM(3, 3),
            _MyLinear(3, 3),
            nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)),
            nn.LazyLinear(2),
            nn.Linear(3, 3),
        )
        with pytest.warns(SkippedLayersWarning) as caught:
            model = wrap(net)
        (warning,) = caught
        message = str(warning.message)
        assert "0: Embedding is not a registered kind" in message
        assert "2: _MyLinear is not a registered kind" in message
        assert "3: ParametrizedLinear is parametrised" in message
        assert warning.filename == __file__
        assert list(model.kasmina_layers) == ["5"]

    def test_targets_limit_what_is_worth_a_warning(self) -> None:
        net = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 3))
        assert list(wrap(net, target_layers=[nn.Linear]).kasmina_layers) == ["1"]

    def test_a_target_of_an_unknown_kind_is_refused(self, host: Host) -> None:
        with pytest.raises(UnsupportedLayerError, match=r"layer must be one of Linear, .*, got LSTM; register_layer"):
            wrap(host, target_layers=(nn.Linear, nn.LSTM))
        assert type(host.net) is nn.Linear

    def test_a_layer_named_in_full_is_refused(self) -> None:
        net = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 3))
        with pytest.raises(UnsupportedLayerError, match=r"layer '0' must be one of Linear, .*, got Embedding is not"):
            wrap(net, include=["0", "1"])
        assert type(net[1]) is nn.Linear

    @pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
    def test_quantised_layers_are_left_alone(self) -> None:
        net = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(3, 3)), {nn.Linear}, torch.qint8)
        with pytest.raises(UnwrappableModelError, match=r"0: Linear is quantised"):
            wrap(net)


class TestRefused:
    """Models that cannot be wrapped are refused with a reason, and stay as they were."""

    def test_wrapped_already(self, host: Host) -> None:
        model = wrap(host)
        for again in (model, host, nn.Sequential(model)):
            with pytest.raises(
                UnwrappableModelError, match="model must be wrapped once, got one that is wrapped already"
            ):
                wrap(again)

    def test_data_parallel(self, host: Host) -> None:
        with pytest.raises(
            UnwrappableModelError, match=r"must not hold a DataParallel: .* use DistributedDataParallel"
        ):
            wrap(nn.DataParallel(host))

    def test_replicas_of_a_wrapped_model(self, host: Host) -> None:
        twin = copy.deepcopy(host)
        model = wrap(host)
        assert torch.equal(nn.DataParallel(model)(X), nn.DataParallel(twin)(X))  # no accelerator: it only calls
        for module in (model, model.net):
            with pytest.raises(InvalidStateError, match=r"must not be replicated by nn.DataParallel.* use Distributed"):
                module._replicate_for_data_parallel()

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_scripting_a_wrapped_model(self, host: Host) -> None:
        model = wrap(host)
        for module in (model, model.host_module, model.net):
            with pytest.raises(InvalidStateError, match=r"must not be scripted.*: script what export\(\) gives"):
                torch.jit.script(module)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_a_wrapped_model_inside_a_scripted_one(self) -> None:
        net = nn.Sequential(nn.Linear(3, 3))
        scripted = nn.Sequential(nn.Linear(3, 3), torch.jit.script(net))
        with pytest.raises(UnwrappableModelError, match="must not hold a ScriptModule"):
            wrap(scripted)
        assert type(scripted[0]) is nn.Linear

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_scripted(self) -> None:
        with pytest.raises(UnwrappableModelError, match=r"must not hold a ScriptModule: .* before scripting"):
            wrap(torch.jit.script(nn.Sequential(nn.Linear(2, 2))))

    def test_compiled(self, host: Host) -> None:
        with pytest.raises(UnwrappableModelError, match="must be wrapped first, then compiled"):
            wrap(torch.compile(host, backend="eager"))

    def test_nothing_to_wrap(self) -> None:
        with pytest.raises(
            UnwrappableModelError, match=r"must have a layer that can hold seeds, got none \(no candidate"
        ):
            wrap(nn.Sequential(nn.ReLU()))

    def test_a_bare_layer(self) -> None:
        with pytest.raises(UnwrappableModelError, match=r"got a bare Linear: use nn.Sequential\(layer\)"):
            wrap(nn.Linear(2, 2))

    def test_no_module(self) -> None:
        with pytest.raises(UnwrappableModelError, match=r"model must be a torch.nn.Module, got int"):
            wrap(3)  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"seeds_per_layer": 0}, "seeds_per_layer must be 1 to 64 seeds, got 0"),
            ({"seeds_per_layer": 65}, "seeds_per_layer must be 1 to 64 seeds, got 65"),
            ({"seeds_per_layer": True}, "seeds_per_layer must be 1 to 64 seeds, got True"),
            ({"min_params": -1}, "min_params must be at least 0 parameters, got -1"),
            ({"target_layers": ()}, r"target_layers must name at least one class, got \(\)"),
            ({"include": ""}, "include must be one or more name patterns, got ''"),
            ({"exclude": [3]}, r"exclude must be one or more name patterns, got \[3\]"),
            ({"run_id": "Run 7"}, "run"),
        ],
    )
    def test_bad_settings(self, host: Host, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(InvalidInputError, match=message):
            wrap(host, **settings)
        assert type(host.net) is nn.Linear

    @pytest.mark.parametrize("settings", [{"interval_steps": 0}, {"ring_capacity": 1 << 25}, {"interval_steps": 1.5}])
    def test_bad_telemetry(self, settings: dict[str, Any]) -> None:
        with pytest.raises(InvalidInputError, match=rf"telemetry.{next(iter(settings))} must be 1 \w+ to 2\*\*24"):
            LayerTelemetry(**settings)


class TestParametrised:
    """Parametrisations put on a wrapped layer work, and forbid the way back until they are removed."""

    def test_a_weight_norm_from_after_is_the_hosts(self, host: Host) -> None:
        twin = copy.deepcopy(host)
        model = wrap(host)
        for net in (model, twin):
            nn.utils.parametrizations.weight_norm(net.net)
        for net in (model, twin):
            net(X).square().sum().backward()
        assert torch.equal(model(X), twin(X))
        ours, theirs = model.net.parametrizations.weight, twin.net.parametrizations.weight
        assert torch.equal(ours.original0.grad, theirs.original0.grad)
        assert list(model.state_dict()) == list(twin.state_dict())

    def test_it_forbids_the_way_back_until_it_is_removed(self, host: Host) -> None:
        model = wrap(host)
        nn.utils.parametrizations.weight_norm(model.net)
        for back in (unwrap, export):
            with pytest.raises(
                InvalidStateError, match=r"layer 'net' must be .* got ParametrizedKasminaLinear: remove"
            ):
                back(model)
        nn.utils.parametrize.remove_parametrizations(model.net, "weight")
        assert type(unwrap(model).net) is nn.Linear


class TestOwnKinds:
    """Users' own layers."""

    def test_a_registered_kind_holds_seeds(self) -> None:
        class Gain(_Affine):
            """Used by this test only."""

        kasmina = register_layer(Gain, kind=SiteKind.LINEAR)
        net = nn.Sequential(Gain())
        twin = copy.deepcopy(net)
        model = wrap(net, target_layers=[Gain])
        x = torch.randn(4, 3)
        assert isinstance(model[0], kasmina)
        assert type(model[0]).__name__ == kasmina.__name__ == "KasminaGain"
        assert torch.equal(model(x), twin(x))
        assert type(model[0]) is kasmina
        assert model[0].site.kind is SiteKind.LINEAR
        with pytest.raises(AlreadyExistsError, match="Gain must be registered once"):
            register_layer(Gain, kind=SiteKind.CONV2D)
        assert type(unwrap(model)[0]) is Gain

    def test_a_kind_whose_names_clash_is_refused(self) -> None:
        class Clash(_Affine):
            site = "mine"

        with pytest.raises(InvalidInputError, match="layer_class must leave the names site to Esper"):
            register_layer(Clash, kind=SiteKind.LINEAR)

    def test_only_classes_of_modules_are_registered(self) -> None:
        with pytest.raises(InvalidInputError, match=r"layer_class must be a subclass of torch.nn.Module"):
            register_layer(int, kind=SiteKind.LINEAR)  # type: ignore[arg-type]


def test_a_copy_is_a_model_of_its_own(host: Host) -> None:
    model = wrap(host)
    out = model(X)
    twin = copy.deepcopy(model)
    assert twin.host_module is not host
    assert twin.net is twin.host_module.net
    assert torch.equal(twin(X), out)
    with torch.no_grad():
        twin.gain.zero_()
    assert torch.equal(model(X), out)
    twin.net.transition(0, State.LOADING)
    assert model.net.state_layout.state(0) is State.DORMANT
    assert twin.kasmina_layers["net"] is twin.net


def test_its_face_says_what_it_is(host: Host) -> None:
    assert "Host, 12 seeds" in repr(wrap(host))

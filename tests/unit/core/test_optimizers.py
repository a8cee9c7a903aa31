"""Seeds join and leave live optimizers; the state of all others stays the same to the bit."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import LBFGS, SGD, Adagrad, Adam, AdamW, Muon, Optimizer, RMSprop, SparseAdam

import esper
from esper.blueprints.registry import default_registry
from esper.contracts.errors import CorruptDataError, InvalidInputError
from esper.contracts.lifecycle import SeedLifecycleState as State
from esper.core import optimizers
from esper.core.capture import capture_optimizer, restore_optimizer
from esper.core.flatten import flatten, unflatten
from esper.core.morphable import MorphableModel
from tests.optimizer_pairs import MuonAndAdamW

Maker = Callable[[Iterable[nn.Parameter]], Optimizer]
IMPLEMENTATIONS = {"loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
KINDS: dict[str, Any] = {
    "sgd": partial(SGD, lr=0.05),
    "momentum": partial(SGD, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "nesterov": partial(SGD, lr=0.05, momentum=0.9, nesterov=True),
    "adam": partial(Adam, lr=0.01, weight_decay=1e-3),
    "amsgrad": partial(Adam, lr=0.01, amsgrad=True),
    "adamw": partial(AdamW, lr=0.01),
    "adagrad": partial(Adagrad, lr=0.01, lr_decay=0.01, initial_accumulator_value=0.1),
}
MAKERS: dict[str, Maker] = {
    f"{kind}-{how}": partial(make, **settings)
    for kind, make in KINDS.items()
    for how, settings in IMPLEMENTATIONS.items()
}
MAKERS |= {
    f"{make.__name__.lower()}-{how}": partial(make, lr=0.01, **IMPLEMENTATIONS[how])
    for make in (RMSprop, torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adamax, torch.optim.Adadelta)
    for how in ("loop", "foreach")
}
MAKERS |= {"rmsprop-centered": partial(RMSprop, lr=0.01, momentum=0.9, centered=True)}
MAKERS |= {"adafactor": partial(torch.optim.Adafactor, lr=0.01), "rprop": partial(torch.optim.Rprop, lr=0.01)}
MAKERS |= {"asgd": partial(torch.optim.ASGD, lr=0.01)}


def pair(parameters: Iterable[nn.Parameter]) -> MuonAndAdamW:
    return MuonAndAdamW(parameters, muon_lr=0.02, adamw_lr=0.01, defaults={})


class Bare:
    """A wrapper that is no ``Optimizer``, by name."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        found = list(parameters)
        self.optimizers = {"first": SGD(found[:2], lr=0.05, momentum=0.9), "rest": Adam(found[2:], lr=0.01)}

    def step(self) -> None:
        for inner in self.optimizers.values():
            inner.step()

    def zero_grad(self) -> None:
        for inner in self.optimizers.values():
            inner.zero_grad()


WRAPPERS: dict[str, Any] = {"muon-and-adamw": pair, "bare": Bare}
EVERY = MAKERS | WRAPPERS


def host(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 2))


def train(net: nn.Module, optimizer: Any, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        net(torch.randn(5, 3, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def germinate(model: MorphableModel, layer: str = "0", index: int = 0, template: str = "bottleneck_adapter") -> Any:
    blueprint = default_registry().create_blueprint(template)
    found = model.kasmina_layers[layer]
    found.germinate(index, blueprint.ir, blueprint_id=blueprint.id, random_seed=index)
    return found


def enter(optimizer: Any, layer: Any, index: int = 0) -> list[nn.Parameter]:
    parameters = layer.seed_parameters(index)
    optimizers.join(optimizer, layer, parameters, layer_name=layer.layer_name)
    return parameters


def wrapped(seed: int = 0) -> MorphableModel:
    model = esper.wrap(host(seed))
    model(torch.zeros(2, 3))
    return model


def names_of(optimizer: Any, model: nn.Module) -> list[list[str]]:
    names = {id(value): name for name, value in model.named_parameters()}
    return [[names[id(value)] for value in group["params"]] for group in optimizers.groups(optimizer)]


def state_of(optimizer: Any, net: nn.Module) -> dict[str, Any]:
    names = {id(value): name for name, value in net.named_parameters()}
    return {
        f"{names[id(value)]}.{key}": item
        for part in optimizers.parts(optimizer)
        for value, state in part.state.items()
        for key, item in state.items()
    }


def assert_same(left: dict[str, Any], right: dict[str, Any]) -> None:
    assert left.keys() == right.keys()
    for key, value in left.items():
        same = torch.equal(value, right[key]) if isinstance(value, torch.Tensor) else value == right[key]
        assert same, key


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", EVERY)
def test_a_passing_guest_leaves_no_bit_behind(kind: str, when: str) -> None:
    plain, inner = host(), host()
    reference = EVERY[kind](plain.parameters())
    optimizer = EVERY[kind](inner.parameters()) if when == "before" else None
    model = esper.wrap(inner)
    optimizer = optimizer or EVERY[kind](model.parameters())
    train(model, optimizer, 2)
    layer = germinate(model)
    guests = enter(optimizer, layer)
    born = [guest.detach().clone() for guest in guests]
    for step in (2, 3):
        for guest in guests:  # what the seed learns behind the host's back; its alpha is 0
            guest.grad = torch.ones_like(guest)
        train(model, optimizer, 1, step)
    assert not any(torch.equal(guest, value) for guest, value in zip(guests, born, strict=True)), "all took steps"
    optimizers.leave(optimizer, guests)
    layer.clear_seed(0)
    train(model, optimizer, 3, 4)
    train(plain, reference, 7)
    assert_same(dict(plain.state_dict()), dict(model.state_dict()))
    assert_same(state_of(reference, plain), state_of(optimizer, model))
    assert names_of(optimizer, model) == names_of(reference, plain)


@pytest.mark.parametrize("kind", [kind for kind in EVERY if kind != "bare"])  # a scaler reads ``param_groups``
def test_a_passing_guest_leaves_no_bit_behind_under_a_scaler(kind: str) -> None:
    plain, model = host(), wrapped()
    reference, optimizer = EVERY[kind](plain.parameters()), EVERY[kind](model.parameters())
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3) for _ in range(2)]
    guests: list[nn.Parameter] = []
    for step in range(8):
        if step == 2:
            guests = enter(optimizer, germinate(model))
        if step == 6:
            optimizers.leave(optimizer, guests)
            model.kasmina_layers["0"].clear_seed(0)
            guests = []
        for net, one, scaler, its in ((plain, reference, scalers[0], []), (model, optimizer, scalers[1], guests)):
            x = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
            scaler.scale(net(x).square().mean()).backward()
            for guest in its:  # what the seed learns behind the host's back; its alpha is 0
                guest.grad = torch.ones_like(guest) * scaler.get_scale()
            if step in (2, 4):  # in the seed's first step and later: its gradient overflows, and the plain host's
                [*its, net[3].weight][0].grad.view(-1)[0] = float("inf")
            scaler.step(one)
            scaler.update()
            one.zero_grad()
        assert scalers[0].state_dict() == scalers[1].state_dict()
        mine = {key: value for key, value in state_of(optimizer, model).items() if ".seeds." not in key}
        assert_same(state_of(reference, plain), mine)
        assert_same(dict(plain.named_parameters()), {k: v for k, v in model.named_parameters() if ".seeds." not in k})
    assert names_of(optimizer, model) == names_of(reference, plain)
    assert scalers[0].get_scale() == 512.0, "two steps were skipped, and three in a row were not"


@pytest.mark.parametrize("reloaded", [False, True])
def test_a_seed_that_is_silent_in_the_first_step_of_all_learns_later(reloaded: bool) -> None:
    """A seed at alpha 0 is not run, so it gets no gradient; torch's fused SGD alone would fail when its first comes."""
    models = {}
    for how in ("fused", "foreach"):
        torch.manual_seed(0)
        model = wrapped()
        optimizer = KINDS["momentum"](model.parameters(), **{how: True})
        layer = germinate(model)
        guests = enter(optimizer, layer)
        layer.transition(0, State.EVALUATING)
        layer.set_alpha(0, 0.0)
        train(model, optimizer, 1)
        if reloaded:
            restore_optimizer(optimizer, model, capture_optimizer(optimizer, model))
        before = [guest.detach().clone() for guest in guests]
        layer.set_alpha(0, 0.5)
        train(model, optimizer, 3, 1)
        assert any(not torch.equal(old, new) for old, new in zip(before, guests, strict=True))
        models[how] = dict(model.named_parameters())
        optimizers.leave(optimizer, guests)
        assert not optimizer._optimizer_step_pre_hooks
    for name, value in models["foreach"].items():
        torch.testing.assert_close(models["fused"][name], value)


@pytest.mark.parametrize("kind", EVERY)
def test_a_guest_begins_as_a_fresh_parameter_would(kind: str) -> None:
    model = wrapped()
    optimizer = EVERY[kind](model.parameters())
    train(model, optimizer, 3)
    guests = enter(optimizer, germinate(model))
    twins = [nn.Parameter(guest.detach().clone()) for guest in guests]
    for guest, twin in zip(guests, twins, strict=True):
        (part,) = [
            p for p in optimizers.parts(optimizer) if any(v is guest for g in p.param_groups for v in g["params"])
        ]
        taken = inspect.signature(type(part)).parameters
        alone = type(part)([twin], **{key: value for key, value in part.defaults.items() if key in taken})
        for _ in range(2):
            guest.grad, twin.grad = torch.full_like(guest, 0.5), torch.full_like(twin, 0.5)
            optimizer.step()
            alone.step()
        assert torch.equal(guest, twin)
        guest.grad = None


@pytest.mark.parametrize("kind", EVERY)
def test_state_goes_into_an_optimizer_made_afresh_over_the_grown_model(kind: str) -> None:
    first = wrapped()
    optimizer = EVERY[kind](first.parameters())
    train(first, optimizer, 2)
    for name, index in (("0", 3), ("0", 1), ("3", 0), ("2", 2)):
        enter(optimizer, germinate(first, name, index), index)
        first.kasmina_layers[name].transition(index, State.EVALUATING)
        first.kasmina_layers[name].set_alpha(index, 0.5)
    train(first, optimizer, 2, 2)
    second = wrapped(seed=1)
    second.load_state_dict(first.state_dict())
    assert [name for name, _ in second.named_parameters()] == [name for name, _ in first.named_parameters()]
    afresh = EVERY[kind](second.parameters())
    if kind in MAKERS:  # a wrapper's own way of sharing a grown model out may be another
        assert names_of(afresh, second) == names_of(optimizer, first)
        for part, saved in zip(optimizers.parts(afresh), optimizers.parts(optimizer), strict=True):
            part.load_state_dict(copy.deepcopy(saved.state_dict()))
    restore_optimizer(afresh, second, capture_optimizer(optimizer, first))
    assert_same(state_of(optimizer, first), state_of(afresh, second))
    for net, one in ((first, optimizer), (second, afresh)):
        train(net, one, 3, 4)
    assert_same(dict(first.state_dict()), dict(second.state_dict()))
    assert_same(state_of(optimizer, first), state_of(afresh, second))


def test_torch_alone_loads_a_grown_optimizer() -> None:
    first = wrapped()
    optimizer = AdamW(first.parameters(), lr=0.01)
    for index in (3, 1):
        enter(optimizer, germinate(first, "0", index), index)
    for guest in first.kasmina_layers["0"].seed_parameters(3):
        guest.grad = torch.ones_like(guest)
    train(first, optimizer, 2)
    second = wrapped(seed=1)
    second.load_state_dict(first.state_dict())
    afresh = AdamW(second.parameters(), lr=0.5)
    afresh.load_state_dict(optimizer.state_dict())
    assert_same(state_of(optimizer, first), state_of(afresh, second))


def test_weight_and_bias_groups_take_their_own_kind() -> None:
    model = wrapped()
    layer = germinate(model)
    weights = [model[0].weight, model[3].weight]
    biases = [model[0].bias, model[2].weight, model[2].bias, model[3].bias]
    optimizer = AdamW([{"params": weights, "weight_decay": 0.1}, {"params": biases, "weight_decay": 0.0}])
    guests = enter(optimizer, layer)
    assert {guest.ndim for guest in guests} == {1, 2}
    for guest in guests:
        index = 0 if guest.ndim == 2 else 1
        assert any(value is guest for value in optimizer.param_groups[index]["params"])


def test_a_seed_joins_the_group_of_its_layer() -> None:
    model = wrapped()
    layers = [{"params": list(model[index].parameters())} for index in (3, 2, 0)]
    optimizer = SGD(layers, lr=0.1)
    enter(optimizer, germinate(model, "2"))
    assert names_of(optimizer, model)[0] == ["3.weight", "3.bias"]
    assert len(names_of(optimizer, model)[1]) > 2
    assert names_of(optimizer, model)[2] == ["0.weight", "0.bias"]


def test_a_seed_at_a_frozen_layer_joins_the_first_group_of_its_rank() -> None:
    model = wrapped()
    optimizer = SGD([{"params": [model[3].bias]}, {"params": [model[3].weight]}], lr=0.1)
    guests = enter(optimizer, germinate(model))
    ranks = [{value.ndim for value in group["params"]} for group in optimizer.param_groups]
    assert ranks == [{1}, {2}]
    assert sum(map(len, names_of(optimizer, model))) == len(guests) + 2


def test_an_optimizer_made_with_names_names_its_guests() -> None:
    model = wrapped()
    optimizer = AdamW(model.named_parameters(), lr=0.1)
    guests = enter(optimizer, germinate(model))
    (group,) = optimizer.param_groups
    assert group["param_names"] == [name for name, _ in model.named_parameters()]
    optimizers.leave(optimizer, guests)
    assert group["param_names"] == [name for name, _ in model.named_parameters() if "seeds" not in name]
    assert len(group["params"]) == len(group["param_names"])


def test_lists_that_others_hold_stay_the_same_lists() -> None:
    model = wrapped()
    optimizer = SGD(model.parameters(), lr=0.1)
    group, params = optimizer.param_groups[0], optimizer.param_groups[0]["params"]
    guests = enter(optimizer, germinate(model))
    captured = capture_optimizer(optimizer, model)
    optimizers.leave(optimizer, guests)
    assert optimizer.param_groups[0]["params"] is params
    assert len(params) == 6
    restore_optimizer(optimizer, model, captured)
    assert optimizer.param_groups[0] is group
    assert group["params"] is params
    assert len(params) == 6 + len(guests)


def test_muon_alone_refuses_vectors_and_changes_nothing() -> None:
    model = wrapped()
    optimizer = Muon([model[0].weight, model[3].weight], lr=0.02)
    layer = germinate(model)
    message = (
        r"parameter 0\.seeds\.0\.kernel\.\S+ must fit a group of the optimizer \(Muon takes 2-D parameters only.*\(\d"
    )
    with pytest.raises(InvalidInputError, match=message):
        enter(optimizer, layer)
    with pytest.raises(InvalidInputError, match=message):
        optimizers.check_fit(optimizer, layer, layer.seed_parameters(0), layer.layer_name)
    assert names_of(optimizer, model) == [["0.weight", "3.weight"]]


def test_groups_that_say_so_are_muons_in_one_optimizer_of_both() -> None:
    class MuonWithAuxAdam(SGD):
        """As the well-known one marks its groups."""

    model = wrapped()
    groups = [{"params": [model[0].weight], "use_muon": True}, {"params": [model[0].bias], "use_muon": False}]
    optimizer = MuonWithAuxAdam(groups, lr=0.1)
    guests = enter(optimizer, germinate(model))
    assert all(value.ndim == 2 for value in optimizer.param_groups[0]["params"])
    assert all(value.ndim == 1 for value in optimizer.param_groups[1]["params"])
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(guests) + 2


def test_a_wrappers_own_groups_follow_its_parts() -> None:
    model = wrapped()
    optimizer = pair(model.parameters())
    guests = enter(optimizer, germinate(model))
    held = {id(value) for value in optimizer.param_groups[0]["params"]}
    assert held == {id(value) for value in model.parameters()}
    captured = capture_optimizer(optimizer, model)
    optimizers.leave(optimizer, guests)
    assert len(optimizer.param_groups[0]["params"]) == 6
    restore_optimizer(optimizer, model, captured)
    assert {id(value) for value in optimizer.param_groups[0]["params"]} == held


def test_a_wrapper_of_one_is_reached_through() -> None:
    class Accelerated:
        def __init__(self, optimizer: Optimizer) -> None:
            self.optimizer = optimizer

        @property
        def param_groups(self) -> Any:
            return self.optimizer.param_groups

    model = wrapped()
    inner = SGD(model.parameters(), lr=0.1)
    enter(Accelerated(inner), germinate(model))
    assert names_of(inner, model) == [[name for name, _ in model.named_parameters()]]


def test_hooks_run_as_often_as_before() -> None:
    model, seen = wrapped(), list[int]()
    optimizer = SGD(model.parameters(), lr=0.1)
    optimizer.register_step_pre_hook(lambda *_: seen.append(1))
    optimizer.register_step_post_hook(lambda *_: seen.append(2))
    optimizer.register_state_dict_pre_hook(lambda *_: seen.append(3))
    guests = enter(optimizer, germinate(model))
    train(model, optimizer, 1)
    optimizer.state_dict()
    optimizers.leave(optimizer, guests)
    train(model, optimizer, 1)
    assert seen == [1, 2, 3, 1, 2]


def test_joining_twice_is_refused() -> None:
    model = wrapped()
    optimizer = SGD(model.parameters(), lr=1.0)
    with pytest.raises(InvalidInputError, match="parameters must be new to the optimizer"):
        optimizers.join(optimizer, model[0], [model[0].weight])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (LBFGS, "optimizer must take its step without a closure.*got 'LBFGS'"),
        (SparseAdam, "optimizer must take dense gradients.*got 'SparseAdam'"),
        (list, "optimizer must be a torch.optim.Optimizer, or hold some, got 'list'"),
    ],
)
def test_optimizers_that_cannot_grow_are_refused_with_a_reason(make: Any, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        optimizers.require_supported(make(host().parameters()))


@pytest.mark.parametrize("kind", EVERY)
def test_all_others_are_welcome(kind: str) -> None:
    optimizers.require_supported(EVERY[kind](host().parameters()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda one: one["parts"].append(one["parts"][0]), "optimizer must hold 2 optimizers, got 1"),
        (lambda one: one["parts"][0].update({"class": "SGD"}), "optimizer must be SGD as saved, got AdamW"),
        (lambda one: one["parts"][0]["names"].append([]), "optimizer must have 2 groups, got 1"),
        (lambda one: one["parts"][0]["names"][0].append("x"), r"model must have parameter 'x' \(1 are missing\)"),
        (
            lambda one: one["parts"][0]["names"][0].pop(),
            r"optimizer must name \[6\] parameters in its groups, got \[5\]",
        ),
        (lambda one: one.pop("parts"), "state must fit this run's optimizer, got KeyError"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(change: Any, message: str) -> None:
    model = wrapped()
    optimizer = AdamW(model.parameters(), lr=0.1)
    train(model, optimizer, 1)
    captured = capture_optimizer(optimizer, model)
    change(captured)
    before = copy.deepcopy(state_of(optimizer, model))
    with pytest.raises(CorruptDataError, match=message):
        restore_optimizer(optimizer, model, captured)
    assert_same(before, state_of(optimizer, model))


@hypothesis_settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(["momentum-foreach", "adamw-fused", "amsgrad-loop", "adagrad-foreach", "muon-and-adamw"]),
    program=st.lists(st.tuples(st.sampled_from(["0", "2", "3"]), st.integers(0, 3)), max_size=8),
)
def test_any_coming_and_going_leaves_the_hosts_state_alone(kind: str, program: list[tuple[str, int]]) -> None:
    plain, model = host(), wrapped()
    reference, optimizer = EVERY[kind](plain.parameters()), EVERY[kind](model.parameters())
    for step, (name, index) in enumerate(program):
        layer = model.kasmina_layers[name]
        if layer.find_seed(index) is None:
            enter(optimizer, germinate(model, name, index), index)
        else:
            optimizers.leave(optimizer, layer.seed_parameters(index))
            layer.clear_seed(index)
        if kind != "muon-and-adamw":
            assert names_of(optimizer, model) == [[found for found, _ in model.named_parameters()]]
        train(model, optimizer, 1, step)
        train(plain, reference, 1, step)
    mine = {key: value for key, value in state_of(optimizer, model).items() if ".seeds." not in key}
    assert_same(state_of(reference, plain), mine)
    theirs = {key: value for key, value in model.state_dict().items() if ".seeds." not in key}
    assert_same(dict(plain.state_dict()), theirs)


def test_a_state_goes_through_a_checkpoints_form_to_the_bit() -> None:
    model = wrapped()
    optimizer = pair(model.parameters())
    enter(optimizer, germinate(model))
    train(model, optimizer, 2)
    captured = capture_optimizer(optimizer, model)
    tree, tensors = flatten(captured)
    twin = copy.deepcopy(model)
    afresh = pair(twin.parameters())
    restore_optimizer(afresh, twin, unflatten(tree, tensors))
    assert_same(state_of(optimizer, model), state_of(afresh, twin))

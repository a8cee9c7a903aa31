"""What a checkpoint keeps of growth, and how a model is brought to it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from torch import Tensor, nn

from esper.blueprints import default_registry
from esper.contracts.errors import CorruptDataError, InvalidInputError, InvalidStateError, NotFoundError
from esper.contracts.lifecycle import SeedLifecycleState as State
from esper.core.wrap import wrap
from esper.execution.grown import GrownSeed
from esper.execution.state import SeedTransition


class Host(nn.Module):
    """A convolution and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(F.relu(self.conv(image)).mean((2, 3)))


X = torch.randn(4, 1, 6, 6, generator=torch.Generator().manual_seed(1))


def fresh() -> Any:
    torch.manual_seed(0)
    return wrap(Host())


def grow(model: Any, name: str, index: int, number: int, *states: State, alpha: float | None = None) -> None:
    layer = model.kasmina_layer(name)
    blueprint = default_registry().for_site(layer.site)[number]
    layer.germinate(index, blueprint.ir, blueprint_id=blueprint.id, adaptation_id=f"a{index}", random_seed=index)
    for state in states:
        layer.transition(index, state)
    if alpha is not None:
        layer.set_alpha(index, alpha)
    with torch.no_grad():
        for parameter in layer.seed_parameters(index):
            parameter.add_(torch.randn_like(parameter) * 0.1)


@pytest.fixture
def grown() -> Any:
    """One seed in every state in which a kernel stands."""
    model = fresh()
    model(X)
    grow(model, "conv", 0, 2, State.EVALUATING, State.FOSSILIZED)
    grow(model, "conv", 3, 5, State.EVALUATING, alpha=0.3)
    grow(model, "head", 0, 1)
    grow(model, "head", 1, 2, State.EVALUATING)
    model.head.transition(1, State.CULLED)
    grow(model, "head", 2, 3, State.EVALUATING, alpha=0.7)
    model.head.transition(2, State.CULLED)
    grow(model, "head", 3, 0, State.ERROR)
    return model.eval()


LIVE = [("conv", 0, "FOSSILIZED", 1.0), ("conv", 3, "EVALUATING", 0.3), ("head", 0, "ACTIVE", 0.0)]
LIVE += [("head", 2, "CULLED", 0.7), ("head", 3, "ERROR", 0.0)]


def summary(model: Any) -> list[tuple[str, int, str, float]]:
    return [
        (grown.layer, grown.seed_index, grown.state.name, pytest.approx(grown.alpha))
        for grown in model.grown_structure()
    ]


def test_the_structure_names_every_seed_that_stands(grown: Any) -> None:
    assert summary(grown) == LIVE


def test_a_structure_and_its_weights_rebuild_the_model_to_the_bit(grown: Any) -> None:
    model = fresh().eval()
    model.rebuild(grown.grown_structure())
    assert summary(model) == LIVE
    model.load_state_dict(grown.state_dict())
    assert torch.equal(model(X), grown(X))
    ours, theirs = model.state_dict(), grown.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_state_dict_alone_rebuilds_the_model_to_the_bit(grown: Any) -> None:
    model = fresh().eval()
    model.load_state_dict(grown.state_dict())
    assert torch.equal(model(X), grown(X))
    assert summary(model) == LIVE
    assert model.conv.site == grown.conv.site
    assert model.head.find_seed(0).adaptation_id == "a0"


def test_a_state_dict_goes_through_safetensors(grown: Any) -> None:
    model = fresh().eval()
    model.load_state_dict(load(save({key: value.contiguous() for key, value in grown.state_dict().items()})))
    assert torch.equal(model(X), grown(X))


def test_a_rebuilt_model_trains_on_as_the_first_would_have(grown: Any) -> None:
    model = fresh()
    model.load_state_dict(grown.state_dict())
    found = []
    for net in (model.train(), grown.train()):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            net(X).square().mean().backward()
            optimizer.step()
        found.append(net.state_dict())
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[1])


def test_an_older_state_dict_takes_growth_back(grown: Any) -> None:
    host = fresh().eval()
    grown.load_state_dict(host.state_dict())
    assert grown.grown_structure() == []
    assert torch.equal(grown(X), host(X))
    assert list(grown.state_dict()) == list(host.state_dict())
    assert all(state == State.DORMANT for state in (grown.conv.state_layout.state(index) for index in range(4)))


def test_a_loose_load_leaves_growth_alone(grown: Any) -> None:
    before = summary(grown)
    grown.load_state_dict({"head.bias": torch.zeros(3)}, strict=False)
    assert summary(grown) == before


def test_a_plain_host_refuses_a_grown_state_dict_as_torch_does(grown: Any) -> None:
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"conv.seeds.0"):
        Host().load_state_dict(grown.state_dict())


def test_rebuilding_tells_no_listener(grown: Any) -> None:
    model, heard = fresh(), list[SeedTransition]()
    model.seed_states.subscribe(heard.append)
    model.load_state_dict(grown.state_dict())
    model.rebuild([])
    assert heard == []


def test_rebuilding_to_the_present_structure_changes_nothing(grown: Any) -> None:
    seeds, before = {id(seed) for seed in grown.conv.live_seeds()}, grown(X)
    grown.rebuild(grown.grown_structure())
    assert {id(seed) for seed in grown.conv.live_seeds()} == seeds
    assert torch.equal(grown(X), before)


def test_a_snapshot_of_states_restores_counters_as_well(grown: Any) -> None:
    grown(X)
    model = fresh().eval()
    model.load_state_dict(grown.state_dict())
    model.seed_states.restore(grown.seed_states.snapshot())
    assert model.conv.state_layout.forwards.tolist() == grown.conv.state_layout.forwards.tolist()
    assert model.head.state_layout.state(1) is grown.head.state_layout.state(1)


def test_a_copy_of_a_grown_model_keeps_its_structure(grown: Any) -> None:
    twin = copy.deepcopy(grown)
    assert summary(twin) == LIVE
    assert torch.equal(twin(X), grown(X))
    twin.rebuild([])
    assert summary(grown) == LIVE


def test_structures_of_another_model_are_refused(grown: Any) -> None:
    model = fresh()
    (first, *_) = grown.grown_structure()

    def changed(**changes: Any) -> GrownSeed:
        return GrownSeed(**{name: changes.get(name, getattr(first, name)) for name in GrownSeed.__slots__})

    with pytest.raises(NotFoundError, match="layer must be one of conv, head, got 'tail'"):
        model.rebuild([changed(layer="tail")])
    with pytest.raises(InvalidInputError, match="seed_idx must be 0 to 3 for layer 'conv', got 9"):
        model.rebuild([changed(seed_index=9)])
    with pytest.raises(CorruptDataError, match="does not parse"):
        model.rebuild([changed(ir=b"\xff\xff")])


def test_a_bare_module_has_no_structure_but_loads_back_where_it_stands() -> None:
    class Bias(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.value = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor, h: Tensor) -> Tensor:
            return self.value.expand_as(h)

    model = fresh()
    model(X)
    model.head.attach_module(1, Bias())
    with pytest.raises(InvalidStateError, match="seed 1 of layer 'head' must come from a blueprint to be saved"):
        model.grown_structure()
    saved = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        model.head.find_seed(1).kernel.value.zero_()
    model.load_state_dict(saved)
    assert torch.equal(model.head.find_seed(1).kernel.value, torch.ones(3))
    with pytest.raises(InvalidStateError, match="seed 1 of layer 'head' must hold a kernel"):
        fresh().load_state_dict(saved)


KEY = "conv.seeds.0._extra_state"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"nothing of ours" + data, "a grown seed must begin with"),
        (lambda data: data[:-3], "must hold 6 parts, got 5"),
        (lambda data: data[:60], "of a grown seed must have .* bytes, got"),
        (lambda data: data[:14], "must hold 6 parts, got 0"),
        (lambda data: data + b"x", "must end after its parts, got 1 more bytes"),
    ],
)
def test_a_damaged_entry_is_refused(grown: Any, damage: Any, message: str) -> None:
    saved = dict(grown.state_dict())
    saved[KEY] = torch.frombuffer(bytearray(damage(saved[KEY].numpy().tobytes())), dtype=torch.uint8)
    with pytest.raises(CorruptDataError, match=message):
        fresh().load_state_dict(saved)


def test_an_entry_of_another_seed_or_type_is_refused(grown: Any) -> None:
    saved = dict(grown.state_dict())
    saved[KEY] = saved["conv.seeds.3._extra_state"]
    with pytest.raises(CorruptDataError, match=r"conv.seeds.0 must describe seed 0, got 3"):
        fresh().load_state_dict(saved)
    saved[KEY] = b"bytes"
    with pytest.raises(CorruptDataError, match=r"conv.seeds.0._extra_state must be a tensor of bytes, got bytes"):
        fresh().load_state_dict(saved)


def test_grown_seeds_survive_their_bytes(grown: Any) -> None:
    for seed in grown.grown_structure():
        assert GrownSeed.from_bytes(seed.to_bytes()) == seed
        assert seed.blueprint_ir().nodes

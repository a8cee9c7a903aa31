"""An average follows the model's structure: seeds come in with the model's value, are averaged, and leave."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

import esper
from esper.blueprints.registry import default_registry
from esper.contracts.errors import CorruptDataError, InvalidInputError, InvalidStateError
from esper.contracts.lifecycle import SeedLifecycleState as State
from esper.core.averaging import GrowingAverage
from esper.core.optimizers import join
from esper.recovery import CheckpointManager

X = torch.randn(16, 6, generator=torch.Generator().manual_seed(5))
DECAY = 0.75


def fresh() -> Any:
    torch.manual_seed(0)
    model = esper.wrap(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2)))
    model(X)
    return model


def germinate(model: Any, index: int = 0, template: str = "bottleneck_adapter", name: str = "0") -> Any:
    blueprint, layer = default_registry().create_blueprint(template), model.kasmina_layers[name]
    layer.germinate(index, blueprint.ir, blueprint_id=blueprint.id, adaptation_id=f"{template}{index}")
    return layer


def drift(model: Any, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model(X)


def averaged(average: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in average.module.named_parameters()}


AVERAGES: dict[str, dict[str, Any]] = {
    "ema": {"multi_avg_fn": get_ema_multi_avg_fn(DECAY)},
    "ema one by one": {"avg_fn": get_ema_avg_fn(DECAY)},
    "ema with buffers": {"multi_avg_fn": get_ema_multi_avg_fn(DECAY), "use_buffers": True},
    "swa": {},
}


@pytest.mark.parametrize("kind", AVERAGES)
def test_seeds_come_are_averaged_through_all_states_and_go(kind: str) -> None:
    model = fresh()
    average, plain = GrowingAverage(model, **AVERAGES[kind]), fresh()
    reference = AveragedModel(plain, **AVERAGES[kind])
    expected: dict[str, torch.Tensor] = {}
    for number in range(9):
        if number == 2:
            layer = germinate(model, 3)
            germinate(model, 1)
        if number == 4:
            layer.transition(3, State.EVALUATING)
            layer.set_alpha(3, 0.25)
        if number == 6:
            layer.transition(3, State.FOSSILIZED)
            layer.clear_seed(1)
        drift_host(model, plain, number)
        average.update_parameters(model)
        reference.update_parameters(plain)
        for name, value in model.named_parameters():
            if ".seeds." in name:
                before = expected.get(name)
                weight = 1 / (number + 1) if kind == "swa" else 1 - DECAY
                expected[name] = value.detach().clone() if before is None else before.lerp(value.detach(), weight)
        found = averaged(average)
        assert list(found) == [name for name, _ in model.named_parameters()]
        for name, value in found.items():
            if ".seeds." in name:
                assert torch.allclose(value, expected[name], atol=1e-6), (number, name)
    for name, value in averaged(reference).items():
        assert torch.equal(value, found[name]), "the host's average is the one without seeds"
    seed_layout = average.module.kasmina_layers["0"].state_layout
    assert seed_layout.state(3) is State.FOSSILIZED
    assert average.module.kasmina_layers["0"].find_seed(1) is None


def drift_host(model: Any, plain: Any, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    twins = dict(plain.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in twins:
                change = 0.1 * torch.randn(parameter.shape, generator=generator)
                parameter.add_(change)
                twins[name].add_(change)
            else:
                parameter.add_(0.01 * number)


def test_an_average_takes_the_alpha_of_its_model_and_exports_once_it_is_kept() -> None:
    model = fresh()
    average = GrowingAverage(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY), use_buffers=True)
    layer = germinate(model)
    layer.transition(0, State.EVALUATING)
    for number, alpha in enumerate((0.2, 0.4, 0.6)):
        layer.set_alpha(0, alpha)
        drift(model, number)
        average.update_parameters(model)
        seed = average.module.kasmina_layers["0"].find_seed(0)
        assert float(seed.alpha) == pytest.approx(alpha)
    with pytest.raises(InvalidStateError, match="every live seed must be FOSSILIZED to be exported"):
        esper.export(average.module)
    layer.transition(0, State.FOSSILIZED)
    drift(model, 9)
    average.update_parameters(model)
    average.eval()
    plain = esper.export(average.module)
    assert torch.equal(plain(X), average(X))
    assert not torch.equal(plain(X), model.eval()(X))


def test_another_seed_at_the_same_place_begins_anew() -> None:
    model = fresh()
    average = GrowingAverage(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    layer = germinate(model)
    drift(model, 1)
    average.update_parameters(model)
    layer.clear_seed(0)
    blueprint = default_registry().create_blueprint("bottleneck_adapter")
    layer.germinate(0, blueprint.ir, blueprint_id=blueprint.id, adaptation_id="another")
    drift(model, 2)
    average.update_parameters(model)
    first = {name: value for name, value in averaged(average).items() if "seeds" in name}
    assert all(torch.equal(value, dict(model.named_parameters())[name]) for name, value in first.items())
    drift(model, 3)
    average.update_parameters(model)
    assert not all(torch.equal(value, dict(model.named_parameters())[name]) for name, value in first.items())
    second = {name: value for name, value in averaged(average).items() if "seeds" in name}
    expected = {name: first[name].lerp(dict(model.named_parameters())[name].detach(), 1 - DECAY) for name in first}
    assert all(torch.allclose(value, expected[name], atol=1e-6) for name, value in second.items())


def test_a_saved_average_comes_back_to_the_bit() -> None:
    model = fresh()
    average = GrowingAverage(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    germinate(model, 2)
    for number in range(3):
        drift(model, number)
        average.update_parameters(model)
    saved = copy.deepcopy(average.state_dict())
    twin, second = fresh(), GrowingAverage(fresh(), multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    germinate(second.module, 0)
    second.load_state_dict(saved)
    assert list(second.state_dict()) == list(saved)
    assert all(torch.equal(value, saved[key]) for key, value in second.state_dict().items())
    twin.load_state_dict(model.state_dict())
    drift(model, 7)
    drift(twin, 7)
    average.update_parameters(model)
    second.update_parameters(twin)
    assert all(torch.equal(value, second.state_dict()[key]) for key, value in average.state_dict().items())
    before = {key: value.clone() for key, value in second.state_dict().items()}
    damaged = {key: value for key, value in saved.items() if key != "module.3.bias"}
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"module.3.bias\""):
        second.load_state_dict(damaged)
    assert all(torch.equal(value, second.state_dict()[key]) for key, value in before.items())


def test_a_model_that_is_not_wrapped_is_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"model must be wrapped: esper.wrap\(model\), got 'Linear'"):
        GrowingAverage(nn.Linear(2, 2))
    with pytest.raises(InvalidInputError, match=r"model must be wrapped: esper.wrap\(model\), got 'Linear'"):
        GrowingAverage(fresh()).update_parameters(nn.Linear(2, 2))


def test_a_session_refuses_an_average_that_cannot_grow(open_session: Any, task: Any) -> None:
    model = esper.wrap(task.host())
    session = open_session(model)
    with pytest.raises(InvalidInputError, match=r"'ema' must be a GrowingAverage .* got 'AveragedModel'"):
        session.track("ema", AveragedModel(model))
    session.track("ema", GrowingAverage(model))


def test_an_average_is_tracked_over_a_roll_back_and_a_checkpoint(open_session: Any, task: Any, tmp_path: Any) -> None:
    model = esper.wrap(task.host())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    session = open_session(model, optimizer, checkpoints=CheckpointManager(tmp_path))
    average = GrowingAverage(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    session.track("ema", average)
    layer = germinate(model)
    layer.transition(0, State.EVALUATING)
    layer.set_alpha(0, 0.5)
    join(optimizer, layer, layer.seed_parameters(0), "0")
    drift(model, 1)
    average.update_parameters(model)
    saved, checkpoint_id = copy.deepcopy(average.state_dict()), session.save_checkpoint()
    drift(model, 2)
    average.update_parameters(model)
    session.load_checkpoint(checkpoint_id)
    assert all(torch.equal(value, average.state_dict()[key]) for key, value in saved.items())
    layer.clear_seed(0)
    average.update_parameters(model)
    with pytest.raises(CorruptDataError, match="must"):
        average.load_state_dict({**saved, "module.0.seeds.0._extra_state": torch.zeros(3, dtype=torch.uint8)})

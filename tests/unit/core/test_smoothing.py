"""Effects are measured at the mean of an epoch's weights; afterwards the model stands where it stood, to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import esper
from esper.core.smoothing import EpochMean
from esper.execution.counterfactual import measure_contribution
from esper.recovery import CheckpointManager
from tests.unit.core.test_session import grow, train

GROWTH = esper.GrowthConfig(incubation_epochs=2, graft_epochs=1, price_per_host_share=0.0, confidence_level=1.0 - 1e-12)
"""No look of this run says anything for sure."""


def filled(model: nn.Module, value: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)


def test_the_mean_is_that_of_every_step_since_the_epoch_began() -> None:
    model = esper.wrap(nn.Sequential(nn.Linear(3, 2)))
    mean = EpochMean(model)
    filled(model, 100.0)
    mean.note()
    mean.restart()
    for value in (1.0, 2.0, 6.0):
        filled(model, value)
        mean.note()
    with mean.applied():
        assert all(bool(one.eq(3.0).all()) for one in model.parameters())
    assert all(bool(one.eq(6.0).all()) for one in model.parameters())


def test_without_a_step_the_model_is_measured_as_it_stands() -> None:
    model = esper.wrap(nn.Sequential(nn.Linear(3, 2)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with EpochMean(model).applied():
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_is_frozen_is_not_averaged_and_statistics_of_norms_are() -> None:
    model = esper.wrap(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    frozen = model.get_parameter("0.weight").requires_grad_(False)
    mean, statistics = EpochMean(model), model.get_buffer("1.running_mean")
    for value in (1.0, 3.0):
        with torch.no_grad():
            frozen.fill_(value)
            statistics.fill_(value)
        mean.note()
    with mean.applied():
        assert bool(frozen.eq(3.0).all())
        assert bool(statistics.eq(2.0).all())
    assert bool(statistics.eq(3.0).all())


def test_the_model_is_as_before_where_a_measurement_fails() -> None:
    model = esper.wrap(nn.Sequential(nn.Linear(3, 2)))
    mean = EpochMean(model)
    for value in (1.0, 3.0):
        filled(model, value)
        mean.note()
    with pytest.raises(RuntimeError, match="no figures"), mean.applied():
        raise RuntimeError("no figures")
    assert all(bool(one.eq(3.0).all()) for one in model.parameters())


def test_a_mean_goes_on_from_its_state() -> None:
    model, other = (esper.wrap(nn.Sequential(nn.Linear(3, 2))) for _ in range(2))
    mean, resumed = EpochMean(model), EpochMean(other)
    for value in (1.0, 2.0):
        filled(model, value)
        mean.note()
    filled(other, 2.0)
    resumed.load_state_dict(mean.state_dict())
    for one, at in ((mean, model), (resumed, other)):
        filled(at, 6.0)
        one.note()
        with one.applied():
            assert all(bool(parameter.eq(3.0).all()) for parameter in at.parameters())


class Joined(nn.Module):
    """A layer, and another from the middle of an epoch on."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x)


def with_a_joiner() -> tuple[Any, EpochMean]:
    """Give a model after the steps 1, 2, 6 and 11, of which a new layer saw the last two."""
    model = esper.wrap(Joined())
    mean = EpochMean(model)
    for step, value in enumerate((1.0, 2.0, 6.0, 11.0)):
        if step == 2:
            model.host_module.add_module("second", nn.Linear(2, 2))
            mean.welcome()
        filled(model, value)
        mean.note()
    return model, mean


def check_a_joiner(model: Any, mean: EpochMean) -> None:
    with mean.applied():
        assert all(bool(one.eq(5.0).all()) for one in model.get_submodule("first").parameters())
        assert all(bool(one.eq(8.5).all()) for one in model.get_submodule("second").parameters())
    assert all(bool(one.eq(11.0).all()) for one in model.parameters())


def test_what_joins_later_is_averaged_since_then() -> None:
    check_a_joiner(*with_a_joiner())


def test_a_mean_with_a_joiner_goes_on_from_its_state() -> None:
    model, mean = with_a_joiner()
    state = mean.state_dict()
    assert state["steps"] == 4
    resumed = EpochMean(model)
    resumed.load_state_dict(state)
    check_a_joiner(model, resumed)
    filled(model, 5.0)
    resumed.note()
    with resumed.applied():
        assert bool(model.get_parameter("first.bias").eq(5.0).all())
        assert bool(model.get_parameter("second.bias").sub(22.0 / 3.0).abs().max() < 1e-5)


def test_a_mean_of_an_earlier_version_has_one_count_for_all() -> None:
    model, mean = with_a_joiner()
    state = mean.state_dict()
    del state["steps_of"]
    resumed = EpochMean(model)
    resumed.load_state_dict(state)
    filled(model, 0.0)
    resumed.note()
    with resumed.applied():
        assert bool(model.get_parameter("first.bias").eq(4.0).all())


def test_a_graft_is_judged_at_the_mean_of_the_epoch(
    task: Any, line: Any, open_session: Any, decide: Any, kernel_for: Any
) -> None:
    model = esper.wrap(task.host())
    session = open_session(model, growth=GROWTH)
    decision = grow(session, line, decide, kernel_for, template="gated_mlp")
    train(session, task, 2)
    adaptation = session.orchestrator.adaptations[decision.adaptation_id]
    assert adaptation.state is not None
    weights: list[list[torch.Tensor]] = []
    criterion = session._context.loss_fn
    for x, y in task.train:
        loss = criterion(model(x), y)
        loss.backward()
        session.step(loss)
        weights.append([one.detach().clone() for one in model.parameters()])
    last = weights[-1]
    session.end_epoch()
    measured = adaptation.contribution
    assert measured is not None
    assert adaptation.looks == 1
    if adaptation.open:
        assert all(torch.equal(now, then) for now, then in zip(model.parameters(), last, strict=True))
    else:
        pytest.fail("the seed was judged at once, so there is nothing to measure again")
    control = session._context.control.batches
    level = measured.confidence_level

    def effect() -> float:
        found = measure_contribution(
            model,
            control,
            session._context.loss_rows,
            layer=adaptation.layer,
            seed_index=adaptation.seed_index,
            confidence_level=level,
        )
        return found.estimate

    assert effect() != pytest.approx(measured.estimate, rel=1e-9), "at the last step's weights it brings something else"
    with torch.no_grad():
        for place, parameter in enumerate(model.parameters()):
            parameter.copy_(torch.stack([step[place] for step in weights]).double().mean(0))
    assert effect() == pytest.approx(measured.estimate, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_late_step_counts_as_much_as_an_early_one_in_every_type(dtype: torch.dtype) -> None:
    model = esper.wrap(nn.Sequential(nn.Linear(3, 2)).to(dtype))
    mean = EpochMean(model)
    for step in range(1000):
        filled(model, 1.0 + step / 2000)
        mean.note()
    with mean.applied():
        assert all(parameter.dtype is dtype for parameter in model.parameters())
        assert all(bool((one - 1.25).abs().le(0.01).all()) for one in model.parameters())


def test_means_come_back_to_where_the_weights_are() -> None:
    """A checkpoint is read on the CPU, wherever the model stands."""
    mean = EpochMean(esper.wrap(nn.Sequential(nn.Linear(3, 2))))
    mean.note()
    elsewhere = esper.wrap(nn.Sequential(nn.Linear(3, 2)).to("meta"))
    resumed = EpochMean(elsewhere)
    resumed.load_state_dict(mean.state_dict())
    resumed.note()
    assert {one.device.type for one in resumed.state_dict()["means"].values()} == {"meta"}


def test_what_was_frozen_since_has_no_mean() -> None:
    model = esper.wrap(nn.Sequential(nn.Linear(3, 2)))
    mean = EpochMean(model)
    mean.note()
    state = mean.state_dict()
    frozen = model.get_parameter("0.weight").requires_grad_(False)
    resumed = EpochMean(model)
    resumed.load_state_dict(state)
    filled(model, 5.0)
    with resumed.applied():
        assert bool(frozen.eq(5.0).all())
        assert not bool(model.get_parameter("0.bias").eq(5.0).any())


def test_a_checkpoint_after_a_removal_amid_an_epoch_can_be_loaded(
    task: Any, line: Any, open_session: Any, decide: Any, kernel_for: Any, tmp_path: Any
) -> None:
    model = esper.wrap(task.host())
    store = CheckpointManager(tmp_path)
    session = open_session(model, growth=GROWTH, checkpoints=store)
    decision = grow(session, line, decide, kernel_for)
    train(session, task, 1)
    for x, y in list(task.train)[:2]:
        loss = session._context.loss_fn(model(x), y)
        loss.backward()
        session.step(loss)
    session.orchestrator.remove_seed(decision.layer, decision.seed_index, "a test")
    checkpoint_id = session.save_checkpoint()
    session.load_checkpoint(checkpoint_id)
    train(session, task, 1)
    assert session.orchestrator.ongoing() == []


def test_a_run_that_ends_with_its_epoch_is_judged_by_the_look_that_the_epoch_had(
    task: Any, line: Any, open_session: Any, decide: Any, kernel_for: Any
) -> None:
    model = esper.wrap(task.host())
    session = open_session(model, growth=GROWTH)
    decision = grow(session, line, decide, kernel_for, template="gated_mlp")
    train(session, task, 3)
    adaptation = session.orchestrator.adaptations[decision.adaptation_id]
    assert (adaptation.looks, adaptation.open) == (1, True)
    measured = adaptation.contribution
    session.finish()
    assert (adaptation.looks, adaptation.open) == (1, False)
    assert adaptation.contribution is measured, "no second look by another measure"


def test_what_was_replaced_since_is_not_told_by_the_mean_of_another() -> None:
    model = esper.wrap(nn.Sequential(nn.Linear(3, 2)))
    mean = EpochMean(model)
    mean.note()
    model.get_submodule("0").weight = nn.Parameter(torch.ones(2, 3))
    assert list(mean.state_dict()["means"]) == ["0.bias"]

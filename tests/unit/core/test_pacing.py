"""Grafted seeds take their own share of the optimizer's steps, and nobody else notices."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import esper
from esper.contracts.errors import InvalidInputError
from esper.contracts.lifecycle import SeedLifecycleState as State
from esper.core.clock import RunClock
from esper.core.growth import GrowthConfig
from esper.core.pacing import SeedPacer
from tests.unit.core.test_session import grow, state_of, train

OPTIMIZERS = {
    "sgd": lambda values, lr: torch.optim.SGD(values, lr=lr, momentum=0.9, weight_decay=0.1),
    "adam": lambda values, lr: torch.optim.Adam(values, lr=lr),
    "adamw": lambda values, lr: torch.optim.AdamW(values, lr=lr, weight_decay=0.1),
    "adamw foreach": lambda values, lr: torch.optim.AdamW(values, lr=lr, foreach=True),
    "adamw fused": lambda values, lr: torch.optim.AdamW(values, lr=lr, fused=True),
}


class Own(nn.Module):
    """A user's seed: a linear map of the layer's input."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.map = nn.Linear(features, features)

    def forward(self, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        del h
        return self.map(x)


def grown(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = esper.wrap(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2)), telemetry=False)
    layer = model.kasmina_layers["0"]
    model(torch.zeros(2, 6))
    layer.attach_module(0, Own(6))
    layer.state_layout.transition(0, State.EVALUATING, 0)
    layer.set_alpha(0, 0.5)
    return model, layer


def steps(model: Any, optimizer: Any, count: int, clock: RunClock) -> None:
    for number in range(count):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(number))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        clock.step += 1


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_pace_is_a_learning_rate_of_its_own(kind: str) -> None:
    model, layer = grown()
    twin, twin_layer = grown()
    own = list(twin_layer.seed_parameters(0))
    others = [value for value in twin.parameters() if all(value is not seed for seed in own)]
    reference = OPTIMIZERS[kind](others, 0.02)
    reference.add_param_group({"params": own, "lr": 0.005})
    host = [value for value in model.parameters() if all(value is not seed for seed in layer.seed_parameters(0))]
    optimizer, clock = OPTIMIZERS[kind](host, 0.02), RunClock()
    pacer = SeedPacer(optimizer, clock, GrowthConfig(graft_rate=0.25))
    pacer.join(layer, "0", 0)
    steps(model, optimizer, 12, clock)
    steps(twin, reference, 12, RunClock())
    for (name, value), expected in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.allclose(value, expected, rtol=1e-5, atol=1e-6), name
    assert len(optimizer.param_groups) == 1


def test_at_a_pace_of_one_not_a_bit_differs() -> None:
    results = []
    for paced in (False, True):
        model, layer = grown()
        optimizer, clock = torch.optim.AdamW(list(model.parameters()), lr=0.02), RunClock()
        if paced:
            pacer = SeedPacer(optimizer, clock, GrowthConfig(graft_rate=1.0))
            pacer._pace(layer, ("0", 0), 0)
        steps(model, optimizer, 5, clock)
        results.append([value.detach().clone() for value in model.parameters()])
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_the_pace_falls_towards_the_planned_end() -> None:
    clock = RunClock(planned_epochs=10, last_epoch_steps=10)
    pacer = SeedPacer(
        torch.optim.SGD(nn.Linear(1, 1).parameters()), clock, GrowthConfig(graft_rate=0.5, graft_tail=0.5)
    )
    seen = {}
    for clock.step in (20, 40, 60, 80, 100, 120):
        seen[clock.step] = pacer.pace(20)
    assert seen[20] == seen[40] == seen[60] == 0.5
    assert seen[80] == pytest.approx(0.5 * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi / 2))))
    assert seen[100] == seen[120] == pytest.approx(0.005), "a run may be longer than planned"


@pytest.mark.parametrize(("planned", "tail"), [(None, 0.5), (10, 0.0)])
def test_without_a_plan_or_a_tail_the_pace_stays(planned: int | None, tail: float) -> None:
    clock = RunClock(planned_epochs=planned, last_epoch_steps=10, step=99)
    pacer = SeedPacer(torch.optim.SGD(nn.Linear(1, 1).parameters()), clock, GrowthConfig(graft_tail=tail))
    assert pacer.pace(20) == 1.0


def test_with_its_last_seed_the_hooks_go() -> None:
    model, layer = grown()
    host = [value for value in model.parameters() if all(value is not seed for seed in layer.seed_parameters(0))]
    optimizer = torch.optim.AdamW(host, lr=0.02)
    pacer = SeedPacer(optimizer, RunClock(), GrowthConfig(graft_rate=0.5))
    pacer.join(layer, "0", 0)
    assert len(optimizer._optimizer_step_pre_hooks) == len(optimizer._optimizer_step_post_hooks) == 1
    pacer.leave(layer, "0", 0)
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert len(optimizer.param_groups[0]["params"]) == 4


def test_a_run_goes_back_to_the_pace_it_had(
    large_task: Any, line: Any, open_session: Any, decide: Any, kernel_for: Any
) -> None:
    growth = GrowthConfig(
        incubation_epochs=1, graft_epochs=1, max_looks=9, confidence_level=1.0 - 1e-12, price_per_host_share=0.0
    )
    session = open_session(
        control=large_task.control,
        growth=replace(growth, graft_rate=0.5, graft_tail=0.9, cull_epochs=0),
        planned_epochs=6,
    )
    grow(session, line, decide, kernel_for, template="gated_mlp")
    train(session, large_task, 3)
    assert state_of(session) is State.EVALUATING
    paces = session.orchestrator.state_dict()["paces"]
    assert [row[:2] for row in paces["begun"]] == [("0", 0)]
    session._memory.roll_back("a test")
    assert session.orchestrator.state_dict()["paces"] == paces
    train(session, large_task, 1)
    session.orchestrator.remove_seed("0", 0, "a test")
    assert session.orchestrator.state_dict()["paces"] == {"begun": []}


@pytest.mark.parametrize(
    ("setting", "rule"),
    [
        ({"graft_rate": 0.0}, r"growth\.graft_rate must be finite and > 0, got 0"),
        ({"graft_rate": math.inf}, r"growth\.graft_rate must be finite and > 0, got inf"),
        ({"graft_tail": 1.5}, r"growth\.graft_tail must lie in \[0, 1\], got 1\.5"),
    ],
)
def test_a_pace_out_of_range_is_refused(setting: dict[str, float], rule: str) -> None:
    with pytest.raises(InvalidInputError, match=rule):
        GrowthConfig(**setting)

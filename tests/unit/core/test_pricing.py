"""What a seed is charged: its parameters, its FLOPs, and its time where that is asked for."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
import torch

import esper
from esper.blueprints import cost as cost_of
from esper.contracts.blueprint import BlueprintCost
from esper.contracts.errors import InvalidInputError
from esper.core.pricing import price_of, slowdown_of
from esper.execution.overrides import SeedRef
from esper.telemetry.subjects import Kind
from tests.unit.core.test_session import grow, train

PRICES = esper.GrowthConfig(price_per_host_share=0.02, price_per_host_flops=0.001)


def cost(parameters: int, flops: int) -> BlueprintCost:
    return BlueprintCost(parameters=parameters, flops=flops, activation_bytes=0)


def test_a_price_is_the_sum_of_its_parts_as_shares_of_the_control_loss(open_session: Any) -> None:
    context = open_session(growth=PRICES)._context
    host, flops, loss = context.host_parameters, context.host_flops, context.control_loss
    light, heavy = price_of(cost(host, flops), context), price_of(cost(host, 10 * flops), context)
    assert light == pytest.approx(loss * 0.021, rel=1e-12)
    assert heavy - light == pytest.approx(loss * 0.009, rel=1e-12), "equal parameters, ten times the FLOPs"
    assert price_of(cost(2 * host, 0), context) == pytest.approx(loss * 0.04, rel=1e-12)


def test_without_a_price_of_flops_it_is_what_it_was_to_the_bit(open_session: Any) -> None:
    context = open_session(growth=esper.GrowthConfig(price_per_host_flops=0.0))._context
    for parameters in (1, 7, 86, 12345):
        share = parameters / context.host_parameters
        assert price_of(cost(parameters, 10**9), context) == 0.02 * share * context.control_loss


def test_a_host_without_flops_has_no_price_of_them(open_session: Any) -> None:
    context = open_session(growth=PRICES)._context
    context.host_flops = 0
    assert price_of(cost(context.host_parameters, 10**9), context) == 0.02 * context.control_loss


def test_the_default_is_a_thousandth_for_the_flops_and_nothing_for_the_time() -> None:
    growth = esper.GrowthConfig()
    assert (growth.price_per_host_share, growth.price_per_host_flops, growth.price_per_host_latency) == (0.02, 1e-3, 0)


@pytest.mark.parametrize("name", ["price_per_host_share", "price_per_host_flops", "price_per_host_latency"])
@pytest.mark.parametrize("value", [-0.1, math.inf, math.nan])
def test_a_price_is_finite_and_not_below_nothing(name: str, value: float) -> None:
    with pytest.raises(InvalidInputError, match=rf"growth\.{name} must be finite and >= 0, got {value}"):
        esper.GrowthConfig(**{name: value})


def test_the_field_report_carries_the_price_of_both(
    task: Any, line: Any, open_session: Any, decide: Any, kernel_for: Any
) -> None:
    session = open_session(growth=esper.GrowthConfig(incubation_epochs=9, price_per_host_flops=0.5))
    context, at_start = session._context, session._context.control_loss
    decision = grow(session, line, decide, kernel_for)
    train(session, task, 1)
    session.finish()
    found = cost_of(decision.blueprint.ir, decision.site)
    shares = 0.02 * found.parameters / context.host_parameters + 0.5 * found.flops / context.host_flops
    (report,) = line.values(Kind.FIELD_REPORT)
    assert report.price == pytest.approx(at_start * shares, rel=1e-12)


def slow(seed: Any, seconds: float) -> None:
    """Let a seed's kernel sleep in every forward pass."""
    seed.kernel.register_forward_hook(lambda *_: time.sleep(seconds))


def test_time_is_measured_only_where_it_has_a_price_and_charged_once(
    task: Any, line: Any, open_session: Any, decide: Any, kernel_for: Any
) -> None:
    growth = esper.GrowthConfig(incubation_epochs=9, price_per_host_flops=0.0, price_per_host_latency=0.1)
    model = esper.wrap(task.host())
    session = open_session(model, growth=growth)
    at_start = session._context.control_loss
    decision = grow(session, line, decide, kernel_for)
    x, y = next(iter(task.train))
    for _ in range(2):  # the kernel comes after the first step
        session._context.loss_fn(model(x), y).backward()
        session.step(torch.tensor(0.5))
    slow(model.kasmina_layers["0"].find_seed(0), 0.01)
    adaptation = session.orchestrator.adaptations[decision.adaptation_id]
    counted = adaptation.price
    assert counted == pytest.approx(0.02 * adaptation.cost.parameters / session._context.host_parameters * at_start)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    session.end_epoch()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert adaptation.slowdown > 2, "10 ms beside a host that takes a part of one"
    assert adaptation.price == pytest.approx(counted + 0.1 * adaptation.slowdown * at_start, rel=1e-9)
    priced = adaptation.price
    session.end_epoch()
    assert adaptation.price == priced


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_where_the_loss_is_no_number_time_is_charged_later(
    task: Any, line: Any, open_session: Any, decide: Any, kernel_for: Any, loss: float
) -> None:
    session = open_session(growth=esper.GrowthConfig(incubation_epochs=9, price_per_host_latency=0.1))
    decision = grow(session, line, decide, kernel_for)
    train(session, task, 1)
    adaptation = session.orchestrator.adaptations[decision.adaptation_id]
    adaptation.price, adaptation.slowdown = 0.01, None  # as of a kernel that came in this epoch
    session._context.control_loss = loss
    session.end_epoch()
    assert (adaptation.price, adaptation.slowdown) == (0.01, None)
    session.end_epoch()
    assert adaptation.slowdown is not None
    assert math.isfinite(adaptation.price)


def test_by_default_nothing_is_timed(task: Any, line: Any, open_session: Any, decide: Any, kernel_for: Any) -> None:
    session = open_session(growth=esper.GrowthConfig(incubation_epochs=9))
    decision = grow(session, line, decide, kernel_for)
    train(session, task, 1)
    assert session.orchestrator.adaptations[decision.adaptation_id].slowdown is None


def test_a_seed_that_takes_no_time_is_not_paid_for_it(
    task: Any, line: Any, open_session: Any, decide: Any, kernel_for: Any
) -> None:
    model = esper.wrap(task.host())
    session = open_session(model, growth=esper.GrowthConfig(incubation_epochs=9))
    grow(session, line, decide, kernel_for)
    train(session, task, 1)
    model[2].register_forward_hook(lambda *_: time.sleep(0.01))
    assert 0.0 <= slowdown_of(session._context, SeedRef("0", 0)) < 1.0

"""The growth measure in its smallest form: margins from given outcomes, random growth, and one seed of all arms."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import pytest

import esper
from bench.growth import CONTROLS, SeedRun, figures_of, loss_margin, margin, run_seed
from bench.growth_arms import Outcome, epoch_flops, epochs_for, grow, train_fixed
from bench.random_growth import RandomMesh, draws
from esper.blueprints.plan import is_legal
from esper.cli import digits
from esper.contracts.decision import AdaptationDecision
from esper.contracts.run import BudgetStatus, RunPhase, SystemStatePacket
from esper.core.link import KernelArrival
from esper.core.report import RunReport
from esper.telemetry.subjects import Kind

SPLITS = digits.load_digits()


def outcome(accuracy: float) -> Outcome:
    return Outcome(accuracy=accuracy, loss=1 - accuracy, parameters=100, flops=1000)


def runs(*pairs: tuple[float, float]) -> list[SeedRun]:
    report = RunReport(run_id="r", phase="finished", host_params=50, final_params=100)
    return [
        SeedRun(
            seed=seed,
            arms={"grown": outcome(grown)} | {name: outcome(control) for name in CONTROLS},
            report=report,
        )
        for seed, (grown, control) in enumerate(pairs)
    ]


def test_a_margin_is_the_mean_of_paired_differences_with_its_interval() -> None:
    figure = margin(runs((0.97, 0.95), (0.96, 0.95), (0.98, 0.95)), "host")
    assert figure.value == pytest.approx(2.0)
    assert figure.spread is not None
    assert figure.spread.low == pytest.approx(2.0 - 4.303 / 3**0.5, abs=1e-3)
    assert figure.holds is False


def test_a_clear_margin_holds() -> None:
    assert margin(runs((0.97, 0.95), (0.971, 0.95), (0.969, 0.95)), "static").holds is True


def test_a_worse_result_is_said_as_it_is() -> None:
    figure = margin(runs((0.94, 0.95), (0.93, 0.95)), "host")
    assert figure.value == pytest.approx(-1.5)
    assert figure.holds is False


def test_loss_margins_are_positive_where_growing_is_better() -> None:
    figure = loss_margin(runs((0.97, 0.95), (0.96, 0.95)), "host")
    assert figure.value == pytest.approx(0.015)


def test_every_control_has_margins_and_an_accuracy() -> None:
    names = [figure.name for figure in figures_of(runs((0.9, 0.8), (0.9, 0.7)))]
    for control in CONTROLS:
        assert f"grown minus {control}, sealed accuracy" in names
        assert f"{control}, sealed accuracy" in names


def test_same_compute_is_rounded_up() -> None:
    one = epoch_flops(SPLITS, digits.HIDDEN)
    assert epochs_for(3 * one, SPLITS, hidden=digits.HIDDEN) == 3
    assert epochs_for(3 * one + 1, SPLITS, hidden=digits.HIDDEN) == 4


def test_controls_depend_on_the_seed_alone() -> None:
    first, again, other = (train_fixed(SPLITS, hidden=8, epochs=1, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other


def packet(**budget: int) -> SystemStatePacket:
    model = esper.wrap(digits.make_host(0))
    model(SPLITS.sealed.tensors[0])
    layers = tuple(layer.layer_status() for layer in model.kasmina_layers.values())
    return SystemStatePacket(
        run_id="r",
        sequence=1,
        phase=RunPhase.TRAINING,
        epoch=5,
        step=1,
        layers=layers,
        budget=BudgetStatus(**budget),
        host_parameters=1210,
        current_parameters=1210,
        created_at=datetime.now(UTC),
    )


def test_random_draws_span_layers_and_legal_affordable_templates() -> None:
    everything = draws(packet())
    assert {draw.layer for draw in everything} == {"0", "2"}
    assert all(is_legal(draw.blueprint.ir, draw.site) for draw in everything)
    cheap = draws(packet(max_added_parameters=100))
    assert 0 < len(cheap) < len(everything)
    assert not draws(packet(max_added_parameters=0))


def test_random_growth_asks_for_nothing_before_its_first_epoch() -> None:
    link = RandomMesh(0).open_link("r", esper.wrap(digits.make_host(0)))
    link.send(Kind.STATE, replace(packet(), epoch=4))
    assert not list(link.arrivals())
    link.send(Kind.STATE, packet())
    decision, kernel = link.arrivals()
    assert isinstance(decision, AdaptationDecision)
    assert isinstance(kernel, KernelArrival)
    assert kernel.ready.adaptation_id == decision.adaptation_id


@pytest.mark.slow
def test_random_growth_lives_the_same_life_and_is_reproducible() -> None:
    first, report = grow(RandomMesh(3), SPLITS, epochs=10, seed=3, wait_s=0.0)
    again, second = grow(RandomMesh(3), SPLITS, epochs=10, seed=3, wait_s=0.0)
    assert first == again
    assert [item.blueprint for item in report.adaptations] == [item.blueprint for item in second.adaptations]
    assert report.adaptations
    assert all(item.begun_epoch >= 5 for item in report.adaptations)
    assert all(item.outcome in {"kept", "culled"} for item in report.adaptations)
    assert report.final_params <= 3 * report.host_params


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_one_seed_of_every_arm() -> None:
    run = run_seed(SPLITS, seed=0, epochs=2)
    assert set(run.arms) == {"grown", *CONTROLS}
    assert all(0 < arm.accuracy <= 1 for arm in run.arms.values())
    assert run.arms["host, same compute"].flops >= run.arms["grown"].flops

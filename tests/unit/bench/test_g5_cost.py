"""G5 in its smallest form: what is counted against what."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from bench import g5_cost
from bench.g5_cost import PHASES, Grown, Step, grow, grow_pair, held_figures, share_figures
from bench.growth_hosts import make_cell
from bench.random_growth import RandomMesh
from esper.contracts.errors import InvalidStateError
from esper.contracts.run import GrowthCost, GrowthPhase
from esper.core.report import RunReport
from tests.unit.core.test_report import summary

REPORT = RunReport(run_id="r", phase="finished", host_params=1, final_params=1)


def step(cpu_s: float, growth_s: float = 0.0) -> Step:
    return Step(cpu_s=cpu_s, wall_s=2.0, growth_s=growth_s)


def grown(*steps: Step, step_flops: int = 0, **costs: GrowthCost) -> Grown:
    told = tuple(costs.get(phase.name, GrowthCost(phase=phase, seconds=0.0, flops=0)) for phase in GrowthPhase)
    return Grown(steps=steps, step_flops=step_flops, costs=told, report=REPORT)


def test_shares_are_of_steps_and_growth_together() -> None:
    isolation = GrowthCost(phase=GrowthPhase.ISOLATION, seconds=1.0, flops=150)
    race = GrowthCost(phase=GrowthPhase.RACE, seconds=2.0, flops=50)
    counted = grown(step_flops=300, ISOLATION=isolation, RACE=race)
    timed = grown(step(1.0), step(2.0, growth_s=1.0), ISOLATION=replace(isolation, flops=None), RACE=race)
    figures = {one.name: one for one in share_figures("cell", [(counted, timed)])}
    assert len(figures) == 2 * (len(PHASES) + 2)
    assert figures["cell: FLOPs, isolation"].value == pytest.approx(0.3)
    assert figures["cell: FLOPs, screen"].value == 0.0
    assert figures["cell: FLOPs, growth's own in all"].value == pytest.approx(0.4)
    assert figures["cell: FLOPs, growth's own in all"].holds is False
    assert figures["cell: time, race"].value == pytest.approx(2.0 / (3.0 + 3.0)), "4 s of steps, 1 s of them growth's"
    assert figures["cell: time, growth's own in all"].holds is None
    order = [name for name in figures if "FLOPs" in name]
    assert order[1].endswith("screen"), "phases in the order of the measures' page"


def test_held_steps_are_held_against_the_median_of_the_others() -> None:
    run = grown(step(1.0), step(2.0), step(9.0), step(3.0, growth_s=0.5), step(8.0, growth_s=0.5))
    median, high, longest, share = held_figures("cell", [run])
    assert (median.value, longest.value, longest.holds) == (2.75, 4.0, False)
    assert high.value == pytest.approx(3.975)
    assert share.value == pytest.approx(0.4)


def test_a_run_without_steps_of_both_kinds_is_no_measure() -> None:
    with pytest.raises(InvalidStateError, match="steps with growth and without, got 0 with"):
        held_figures("cell", [grown(step(1.0))])


def test_a_grown_run_books_its_phases_and_its_steps() -> None:
    cell = make_cell("digits", "mlp")
    small = replace(cell, settings=replace(cell.settings, epochs=5))
    run = grow(RandomMesh(0), small, seed=0, counts_flops=True, wait_s=0.0)
    costs = {cost.phase: cost for cost in run.costs}
    assert len(run.steps) == run.report.history[-1].step
    held = [one.growth_s > 0 for one in run.steps]
    per_epoch = len(run.steps) // 5
    assert not any(held[: 3 * per_epoch]), "nothing is tried before the third epoch is over"
    assert all(held[3 * per_epoch :])
    assert run.step_flops >= len(run.steps) * 2 * 3 * (64 * 16 + 16 * 10), "two passes' worth at least, of full batches"
    assert all(costs[phase].flops for phase in (GrowthPhase.BIRTH, GrowthPhase.ISOLATION, GrowthPhase.CONTROL))
    figures = share_figures("cell", [(run, run)])
    assert all(one.value is not None and 0 <= one.value < 1 for one in figures)


def test_runs_that_came_to_other_ends_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = iter(["kept", "culled"])

    @contextmanager
    def open_mesh() -> Iterator[Any]:
        yield None

    def other(*_: Any, **__: Any) -> Grown:

        return replace(grown(step(1.0)), report=replace(REPORT, adaptations=(summary(outcome=next(ends)),)))

    monkeypatch.setattr(g5_cost, "grow", other)
    with pytest.raises(InvalidStateError, match="both runs of seed 4 must come to the same"):
        grow_pair(open_mesh, make_cell("digits", "mlp"), seed=4)

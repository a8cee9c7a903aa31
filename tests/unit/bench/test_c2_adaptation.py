"""C2 in its smallest form: percentiles from given times, and two real adaptations through a local mesh."""

from __future__ import annotations

from pathlib import Path

import pytest

import esper
from bench.adaptation_run import AdaptationRun, Latency
from bench.c2_adaptation import (
    GOAL_COLD_MS,
    GOAL_L1_MS,
    Trial,
    bring_near,
    latency_figures,
    time_cold,
    time_in_l1,
    warm_up,
)


def trial(to_active_ms: float) -> Trial:
    latency = Latency(to_plan_ms=to_active_ms / 4, to_active_ms=to_active_ms)
    return Trial(latency=latency, reference_ms=to_active_ms / 2, germination_ms=5.0)


def test_percentiles_are_held_against_the_goal() -> None:
    p50, p99, plan, germination, ratio = latency_figures(
        "cold", [trial(ms) for ms in (100, 200, 900)], GOAL_COLD_MS, "r"
    )
    assert (p50.value, p50.holds) == (200, True)
    assert p99.holds is False
    assert plan.value == 50
    assert germination.value == 5.0
    assert ratio.value == 2.0


def test_the_goals_are_the_missions() -> None:
    assert (GOAL_COLD_MS.limit, GOAL_L1_MS.limit) == (500.0, 50.0)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_adaptations_reach_active_through_a_local_mesh(tmp_path: Path) -> None:
    with esper.Mesh.local(tmp_path) as mesh:
        assert mesh.settings is not None
        with AdaptationRun(mesh, mesh.settings) as run:
            warm_up(run)
            cold = time_cold(run, 0)
            bring_near(run)
            for found in (cold, time_in_l1(run, 0.05)):
                assert 0 < found.latency.to_plan_ms < found.latency.to_active_ms < 60_000
                assert found.reference_ms > 0
                assert found.germination_ms > 0
            tiers = {tier.tier: tier for tier in mesh.kernel_source.stats()}
    assert tiers["l1"].hits >= 1

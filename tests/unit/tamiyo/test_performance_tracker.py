"""The performance tracker: averages, trends and rewards from what it was shown."""

from __future__ import annotations

from dataclasses import replace

import pytest

from esper.contracts.errors import InvalidInputError, NotFoundError
from esper.contracts.lifecycle import SeedLifecycleState
from esper.contracts.run import HealthSummary, SeedEvent
from esper.services.tamiyo.performance_tracker import PerformanceTracker


def with_health(layer, entropy):
    return replace(layer, health=HealthSummary(count=1, activation_entropy=entropy, latency_ms=0.5))


@pytest.fixture
def tracker(make_packet, make_layer):
    tracker = PerformanceTracker(window=4)
    for place in range(1, 7):
        layer = with_health(make_layer("hidden"), 2.0 + 0.1 * place)
        tracker.observe_packet(make_packet(place, 1.0 / place, control_accuracy=0.5 + 0.05 * place, layers=(layer,)))
    return tracker


async def test_averages_and_trends_are_those_of_the_window(tracker):
    metrics = await tracker.get_seed_metrics("hidden", seed_idx=0)
    assert metrics.num_samples == 4
    assert metrics.accuracy_trend == pytest.approx(0.05)
    assert metrics.accuracy == pytest.approx(0.725)
    assert metrics.activation_entropy == pytest.approx(2.45)
    assert metrics.loss_trend < 0
    assert metrics.latency_ms == pytest.approx(0.5)
    assert metrics.gradient_variance is None


async def test_events_and_rewards_reach_their_seed(tracker, make_report, make_packet):
    event = SeedEvent(
        run_id="run-1",
        layer="hidden",
        seed_index=1,
        from_state=SeedLifecycleState.ACTIVE,
        to_state=SeedLifecycleState.EVALUATING,
        step=500,
        epoch=6,
        alpha=0.25,
        created_at=make_packet(1, 1.0).created_at,
    )
    tracker.observe_event(event)
    tracker.observe_report(make_report("r1", 0.04, seed_index=1))
    tracker.observe_report(make_report("r2", 0.02, seed_index=1))
    metrics = await tracker.get_seed_metrics("hidden", seed_idx=1)
    assert metrics.state is SeedLifecycleState.EVALUATING
    assert metrics.alpha == 0.25
    assert metrics.mean_reward == pytest.approx(0.03)
    assert metrics.transitions == 1


async def test_a_packet_seen_again_counts_once(tracker, make_packet, make_layer):
    before = await tracker.get_seed_metrics("hidden")
    tracker.observe_packet(make_packet(6, 9.0, layers=(make_layer("hidden"),)))
    assert await tracker.get_seed_metrics("hidden") == before


async def test_what_nobody_measured_is_absent(make_packet, make_layer):
    tracker = PerformanceTracker()
    tracker.observe_packet(make_packet(1, None, layers=(make_layer("hidden"),)))
    metrics = await tracker.get_seed_metrics("hidden")
    assert metrics.accuracy_trend is None
    assert metrics.control_loss is None
    assert metrics.mean_reward is None


async def test_runs_are_kept_apart(tracker, make_packet):
    tracker.observe_packet(make_packet(1, 5.0, run_id="run-2"))
    assert (await tracker.get_seed_metrics("hidden")).control_loss == 5.0
    assert (await tracker.get_seed_metrics("hidden", run_id="run-1")).control_loss < 1.0
    assert tracker.layers("run-2") == ("hidden", "head")


async def test_an_unknown_seed_is_not_found(tracker):
    with pytest.raises(NotFoundError, match="nothing was heard of seed 9 of layer 'hidden' in run run-1"):
        await tracker.get_seed_metrics("hidden", 9, run_id="run-1")


def test_a_window_of_one_is_refused():
    with pytest.raises(InvalidInputError, match="window must be >= 2 packets, got 1"):
        PerformanceTracker(window=1)

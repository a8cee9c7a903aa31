"""Figures of one run from its messages."""

from __future__ import annotations

from typing import Any

import pytest

from esper.contracts.blueprint import Site, SiteKind
from esper.contracts.decision import PlanStatus
from esper.contracts.kernel import KernelReady
from esper.contracts.lifecycle import SeedLifecycleState
from esper.contracts.metrics import SystemMetrics
from esper.contracts.run import AdaptationOutcome, CacheTierStatus, RunPhase
from esper.services.nissa.aggregate import RunAggregate, combine

SITE = Site(kind=SiteKind.LINEAR, input_shape=(4,), output_shape=(4,))


def metrics_of(make: Any, *events: Any) -> SystemMetrics:
    aggregate = RunAggregate("run-1")
    for event in events:
        aggregate.apply(event, make.at(0))
    return aggregate.metrics(read_at=make.at(100))


def test_a_run_that_said_nothing_has_no_figures(make: Any) -> None:
    metrics = metrics_of(make)
    assert metrics.training.loss is None
    assert metrics.morphogenetic.active_seeds_total == 0
    assert metrics.morphogenetic.performance_improvement is None


def test_training_figures_are_those_of_the_last_packet_that_measured_them(make: Any) -> None:
    ended = make.packet(3, phase=RunPhase.FINISHED, train_loss=None, control_loss=None, gradient_norm=None)
    training = metrics_of(make, make.packet(1), make.packet(2, control_accuracy=0.5), ended).training
    assert (training.loss, training.accuracy, training.epoch, training.step) == (make.healthy_loss[1], 0.5, 3, 96)


def test_a_stale_packet_changes_nothing(make: Any) -> None:
    assert metrics_of(make, make.packet(2), make.packet(1)).training.loss == make.healthy_loss[1]


def test_seeds_follow_packets_and_newer_events(make: Any) -> None:
    fresh = metrics_of(make, make.packet(1), make.event(SeedLifecycleState.ACTIVE, step=40)).morphogenetic
    assert fresh.seeds_by_state == {"active": 1, "dormant": 1}
    assert fresh.active_seeds_total == 1
    stale = metrics_of(make, make.packet(4), make.event(SeedLifecycleState.ACTIVE, step=40)).morphogenetic
    assert stale.seeds_by_state == {"dormant": 2}


def test_adaptations_count_once_by_identity(make: Any) -> None:
    growth = metrics_of(
        make, make.plan(), make.event(SeedLifecycleState.ACTIVE), make.report(), make.plan(PlanStatus.COMPLETED)
    ).morphogenetic
    assert (growth.adaptations_attempted, growth.adaptations_kept, growth.adaptations_removed) == (1, 1, 0)


def test_a_rejected_plan_is_no_attempt(make: Any) -> None:
    assert metrics_of(make, make.plan(PlanStatus.REJECTED)).morphogenetic.adaptations_attempted == 0


@pytest.mark.parametrize("adaptation_type", ["remove_seed", "optimize_parameters", "recheck"])
def test_what_germinated_no_seed_is_none_that_was_kept(adaptation_type: str, make: Any) -> None:
    other = make.report(None, adaptation_id="a" + "3" * 32, adaptation_type=adaptation_type)
    growth = metrics_of(make, make.report(), other).morphogenetic
    assert (growth.adaptations_attempted, growth.adaptations_kept) == (1, 1)


@pytest.mark.parametrize("outcome", [AdaptationOutcome.CULLED, AdaptationOutcome.FAILED, AdaptationOutcome.ROLLED_BACK])
def test_what_was_not_kept_is_removed_and_improves_nothing(outcome: AdaptationOutcome, make: Any) -> None:
    growth = metrics_of(make, make.report(outcome=outcome)).morphogenetic
    assert (growth.adaptations_kept, growth.adaptations_removed) == (0, 1)
    assert growth.performance_improvement is None


def test_improvement_adds_what_stands_and_the_ends_of_the_intervals(make: Any) -> None:
    second = make.report(0.02, adaptation_id="a" + "2" * 32, seed_index=1)
    growth = metrics_of(make, make.report(0.05), second).morphogenetic
    assert growth.performance_improvement == pytest.approx(0.07)
    assert growth.performance_improvement_low == pytest.approx(0.03)
    assert growth.performance_improvement_high == pytest.approx(0.09)
    assert combine(()) is None


def test_a_seed_that_is_removed_later_takes_its_improvement_with_it(make: Any) -> None:
    culled = make.event(SeedLifecycleState.CULLED, step=500)
    assert metrics_of(make, make.report(), culled).morphogenetic.performance_improvement is None


def test_a_kept_seed_that_was_never_measured_adds_no_figure(make: Any) -> None:
    growth = metrics_of(make, make.report(None)).morphogenetic
    assert (growth.adaptations_kept, growth.performance_improvement) == (1, None)


def test_kernels_count_by_job(make: Any) -> None:
    ready = KernelReady(job_id="j1", blueprint_id="b", site=SITE, artifact_id="k1")
    failed = KernelReady(job_id="j2", blueprint_id="b", site=SITE, error="no")
    tier = CacheTierStatus(tier="l1", hits=3)
    kernels = metrics_of(make, make.packet(1, cache_tiers=(tier,)), ready, ready, failed).kernels
    assert (kernels.kernels_ready, kernels.kernels_failed, kernels.tiers) == (1, 1, (tier,))


def test_drops_are_totals_and_every_event_counts(make: Any) -> None:
    aggregate = RunAggregate("run-1")
    aggregate.count_health(10, ring_dropped=2, batches_dropped=0, at=make.at(0))
    aggregate.count_health(5, ring_dropped=7, batches_dropped=1, at=make.at(1))
    aggregate.apply(None, make.at(2))
    bus = aggregate.metrics(read_at=make.at(3)).bus
    assert (bus.health_batches, bus.health_signals, bus.ring_dropped, bus.batches_dropped) == (2, 15, 7, 1)
    assert bus.events == 1
    assert aggregate.last_heard_at == make.at(1)


def test_a_run_is_live_until_it_says_that_it_ended(make: Any) -> None:
    aggregate = RunAggregate("run-1")
    assert not aggregate.live
    aggregate.apply(make.packet(1), make.at(0))
    assert aggregate.live
    assert aggregate.training
    aggregate.apply(make.packet(2, phase=RunPhase.PAUSED), make.at(1))
    assert aggregate.live
    assert not aggregate.training
    aggregate.apply(make.packet(3, phase=RunPhase.FAILED), make.at(2))
    assert not aggregate.live

"""Every detector finds its fault, says nothing on a healthy series, and closes when the fault is over."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any

import pytest

from esper.contracts.decision import Anomaly, AnomalySeverity
from esper.contracts.errors import InvalidInputError
from esper.services.nissa.alarm import Alarm, AlarmRule
from esper.services.nissa.detectors import (
    DeadUnitsDetector,
    DropBurstDetector,
    GradientExplosionDetector,
    GradientVanishingDetector,
    LatencyShiftDetector,
    LossSpikeDetector,
    NonFiniteDetector,
    PlateauDetector,
    SilenceDetector,
)

At = Callable[[float], datetime]
WHO: dict[str, str] = {"run_id": "run-1", "subject": "figure"}
LATENCIES = [1.0 + 0.05 * math.sin(3 * step) for step in range(80)]


def feed(detector: Any, values: Iterable[float], at: At, start: float = 0.0) -> list[Anomaly]:
    found = [detector.observe(value, at(start + place)) for place, value in enumerate(values)]
    return [one for one in found if one is not None]


@pytest.mark.parametrize("kind", [NonFiniteDetector, LossSpikeDetector, PlateauDetector])
def test_a_healthy_loss_raises_nothing(kind: Any, make: Any, at: At) -> None:
    assert feed(kind(**WHO), make.healthy_loss, at) == []


@pytest.mark.parametrize("kind", [NonFiniteDetector, GradientExplosionDetector, GradientVanishingDetector])
def test_a_healthy_gradient_raises_nothing(kind: Any, make: Any, at: At) -> None:
    assert feed(kind(**WHO), make.healthy_norm, at) == []


def test_steady_latency_half_dead_layers_and_full_delivery_raise_nothing(at: At) -> None:
    assert feed(LatencyShiftDetector(**WHO), LATENCIES, at) == []
    assert feed(DeadUnitsDetector(**WHO), [0.5, 0.62, 0.55, 0.7] * 10, at) == []
    drops = DropBurstDetector(**WHO)
    assert [drops.observe(100, 0, 0, at(step)) for step in range(50)] == [None] * 50


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_critical_at_once_and_passes_after_three(bad: float, at: At) -> None:
    detector = NonFiniteDetector(**WHO)
    [opened] = feed(detector, [1.0, bad], at)
    assert (opened.detector, opened.severity, opened.resolved) == ("non_finite", AnomalySeverity.CRITICAL, False)
    assert opened.first_seen_at == at(1)
    [passed] = feed(detector, [1.0, 1.0, 1.0], at, 2)
    assert passed.resolved
    assert passed.anomaly_id == opened.anomaly_id


def test_a_share_of_activations_that_is_not_finite_is_found(at: At) -> None:
    detector = NonFiniteDetector(**WHO)
    assert detector.observe_share(0.0, at(0)) is None
    opened = detector.observe_share(0.01, at(1))
    assert opened is not None
    assert opened.evidence[0].value == 0.01


def test_a_spike_of_the_loss_is_found_in_one_epoch_and_passes(make: Any, at: At) -> None:
    detector = LossSpikeDetector(**WHO)
    opened, passed = feed(detector, [*make.healthy_loss, 2.4, 0.48], at)
    assert opened.first_seen_at == at(len(make.healthy_loss))
    assert {one.name: one.value for one in opened.evidence}["loss"] == 2.4
    assert passed.resolved


def test_a_spike_that_stays_becomes_the_new_level(make: Any, at: At) -> None:
    found = feed(LossSpikeDetector(**WHO), [*make.healthy_loss, *[2.0] * 30], at)
    assert not found[0].resolved
    assert found[-1].resolved


def test_a_gradient_ten_times_its_median_is_found(make: Any, at: At) -> None:
    opened, passed = feed(GradientExplosionDetector(**WHO), [*make.healthy_norm, 31.0, 0.6, 0.6], at)
    assert opened.detector == "gradient_explosion"
    assert {one.name: one.value for one in opened.evidence}["norm"] == 31.0
    assert passed.resolved


def test_a_gradient_that_fades_slowly_is_found_although_its_neighbours_fade_too(at: At) -> None:
    fading = [2.0 * 0.5**step for step in range(30)]
    [opened] = feed(GradientVanishingDetector(**WHO), fading, at)[:1]
    assert opened.detector == "gradient_vanishing"
    assert feed(GradientVanishingDetector(**WHO), [1.0] * 10 + [0.0] * 2, at) == []
    assert len(feed(GradientVanishingDetector(**WHO), [1.0] * 10 + [0.0] * 3, at)) == 1


def test_dead_units_need_five_batches_and_close_below_a_lower_share(at: At) -> None:
    detector = DeadUnitsDetector(**WHO)
    assert feed(detector, [0.97] * 4 + [0.5], at) == []
    [opened] = feed(detector, [0.97] * 5, at, 5)
    assert opened.subject == "figure"
    assert feed(detector, [0.9] * 9, at, 10) == []
    assert [one.resolved for one in feed(detector, [0.5] * 5, at, 20)] == [True]


def test_a_flat_loss_is_a_plateau_after_eight_epochs_noise_or_not(make: Any, at: At) -> None:
    flat = [0.477 + 0.01 * (step % 3) for step in range(10)]
    [opened] = feed(PlateauDetector(**WHO), [*make.healthy_loss, *flat], at)
    late = opened.first_seen_at - at(len(make.healthy_loss))
    assert 0 <= late.total_seconds() <= 9
    assert opened.severity is AnomalySeverity.INFO


def test_a_plateau_passes_when_the_loss_falls_again(make: Any, at: At) -> None:
    found = feed(PlateauDetector(**WHO), [*[1.0] * 12, 0.7], at)
    assert [one.resolved for one in found] == [False, True]


def test_a_slower_layer_is_found_after_five_batches(at: At) -> None:
    detector = LatencyShiftDetector(**WHO)
    assert feed(detector, [*LATENCIES, *[2.0] * 4, 1.0], at) == []
    [opened] = feed(detector, [2.0] * 5, at, 100)
    assert opened.evidence[0].value > 1.9
    assert [one.resolved for one in feed(detector, [1.0] * 5, at, 105)] == [True]


def test_a_speed_that_lasts_is_the_new_speed(at: At) -> None:
    found = feed(LatencyShiftDetector(**WHO), [*LATENCIES, *[2.0] * 100], at)
    assert found[-1].resolved


def test_silence_is_found_on_the_clock_and_ends_when_the_component_speaks(at: At) -> None:
    detector = SilenceDetector(**WHO, limit_s=30.0)
    assert detector.observe(at(1000)) is None, "never heard is not silent"
    for second in range(10):
        assert detector.hear(at(second)) is None
    assert detector.observe(at(38)) is None
    opened = detector.observe(at(40))
    assert opened is not None
    assert opened.severity is AnomalySeverity.CRITICAL
    passed = detector.hear(at(50))
    assert passed is not None
    assert passed.resolved


def test_long_pauses_are_learned_unless_they_were_silence(at: At) -> None:
    detector = SilenceDetector(**WHO, limit_s=30.0)
    detector.hear(at(0))
    detector.hear(at(20))
    assert detector.observe(at(115)) is None
    assert detector.observe(at(121)) is not None
    detector.hear(at(1000))
    assert detector.observe(at(1101)) is not None


def test_a_burst_of_drops_is_found_and_passes_after_twenty_clean_batches(at: At) -> None:
    detector = DropBurstDetector(**WHO)
    assert detector.observe(100, 5_000, 7, at(0)) is None, "what was lost before Nissa listened is not a burst"
    assert detector.observe(100, 5_000, 7, at(1)) is None
    opened = detector.observe(100, 5_050, 7, at(2))
    assert opened is not None
    found = [detector.observe(100, 5_050, 7, at(3 + step)) for step in range(20)]
    assert [place for place, one in enumerate(found) if one is not None and one.resolved] == [19]


def test_one_lost_batch_is_a_burst_and_a_new_process_counts_from_zero(at: At) -> None:
    detector = DropBurstDetector(**WHO)
    detector.observe(100, 0, 4, at(0))
    assert detector.observe(100, 0, 5, at(1)) is not None
    fresh = DropBurstDetector(**WHO)
    fresh.observe(100, 0, 4, at(0))
    assert fresh.observe(100, 0, 0, at(1)) is None


def test_a_lasting_anomaly_is_given_again_every_ten_seconds(at: At) -> None:
    alarm = Alarm(AlarmRule(detector="x", severity=AnomalySeverity.INFO), run_id="run-1", subject="s")
    given = [alarm.observe(True, (), at(second)) for second in range(21)]
    assert [place for place, one in enumerate(given) if one is not None] == [0, 10, 20]
    assert {one.anomaly_id for one in given if one is not None} == {given[0].anomaly_id if given[0] else ""}
    assert given[20] is not None
    assert (given[20].first_seen_at, given[20].last_seen_at) == (at(0), at(20))


def test_the_same_events_give_the_same_identity(make: Any, at: At) -> None:
    series = [*make.healthy_loss, 2.4]
    first, second = (feed(LossSpikeDetector(**WHO), series, at) for _ in range(2))
    assert first == second
    other = feed(LossSpikeDetector(run_id="run-2", subject="figure"), series, at)
    assert other[0].anomaly_id != first[0].anomaly_id


def test_a_rule_that_can_never_open_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="open_after must be >= 1, got 0"):
        AlarmRule(detector="x", severity=AnomalySeverity.INFO, open_after=0)

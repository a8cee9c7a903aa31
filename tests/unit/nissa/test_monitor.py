"""The detectors of a run together: what feeds which, silence, restarts, and any figure at all."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.contracts.run import RunPhase
from esper.services.nissa.detectors import (
    GradientExplosionDetector,
    GradientVanishingDetector,
    LatencyShiftDetector,
    LossSpikeDetector,
    PlateauDetector,
)
from esper.services.nissa.monitor import MAX_LAYERS, RunMonitor

SILENCE_S = 30.0
MOMENT = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture
def monitor() -> RunMonitor:
    return RunMonitor("run-1", silence_s=SILENCE_S)


def rows_of(count: int = 4, **columns: float) -> dict[str, Any]:
    rows: dict[str, Any] = {name: np.full(count, columns.get(name, 0.3)) for name in ("dead_share", "latency_ms")}
    rows["nonfinite_share"] = np.full(count, columns.get("nonfinite_share", 0.0))
    rows |= {"layer_id": np.zeros(count, np.uint32), "seed": np.full(count, int(columns.get("seed", -1)))}
    return rows | {"step": np.arange(count)}


def health(monitor: RunMonitor, at: Any, **columns: float) -> list[Any]:
    return monitor.observe_health(rows_of(**columns), layer_index={0: "hidden"}, dropped=(0, 0), at=at)


def test_a_healthy_run_from_start_to_end_raises_nothing(monitor: RunMonitor, make: Any, at: Any) -> None:
    found = []
    for sequence in range(1, len(make.healthy_loss) + 1):
        found += monitor.observe_packet(make.packet(sequence), at(sequence))
        found += health(monitor, at(sequence))
        found += monitor.observe_clock(at(sequence + 0.5))
    found += monitor.observe_packet(make.packet(25, phase=RunPhase.FINISHED), at(25))
    assert found == []


@pytest.mark.parametrize(
    ("change", "subject"),
    [({"train_loss": np.nan}, "train_loss"), ({"gradient_norm": np.inf}, "gradient_norm")],
)
def test_a_figure_of_a_packet_that_is_not_finite_names_itself(
    change: dict[str, float], subject: str, monitor: RunMonitor, make: Any, at: Any
) -> None:
    [opened] = monitor.observe_packet(make.packet(1, **change), at(1))
    assert (opened.detector, opened.subject) == ("non_finite", subject)
    assert monitor.open_anomalies == [opened]


def test_activations_that_are_not_finite_name_their_layer(monitor: RunMonitor, at: Any) -> None:
    [opened] = health(monitor, at(1), nonfinite_share=0.5)
    assert (opened.detector, opened.subject) == ("non_finite", "hidden")


def test_rows_of_seeds_and_of_layers_without_a_name_are_not_judged(monitor: RunMonitor, at: Any) -> None:
    assert health(monitor, at(1), nonfinite_share=1.0, seed=0) == []
    unnamed = rows_of(nonfinite_share=1.0)
    unnamed["layer_id"] += 9
    assert monitor.observe_health(unnamed, layer_index={}, dropped=(0, 0), at=at(2)) == []


def test_layers_beyond_the_bound_are_not_watched(monitor: RunMonitor, at: Any) -> None:
    index = {number: f"layer{number}" for number in range(MAX_LAYERS + 5)}
    rows = rows_of(MAX_LAYERS + 5, nonfinite_share=1.0)
    rows["layer_id"] = np.arange(MAX_LAYERS + 5)
    assert len(monitor.observe_health(rows, layer_index=index, dropped=(0, 0), at=at(1))) == MAX_LAYERS


def test_a_training_run_that_falls_silent_is_found_and_one_that_is_paused_is_not(
    monitor: RunMonitor, make: Any, at: Any
) -> None:
    monitor.observe_packet(make.packet(1), at(1))
    assert monitor.observe_clock(at(30)) == []
    monitor.observe_packet(make.packet(2, phase=RunPhase.PAUSED), at(2))
    assert monitor.observe_clock(at(1000)) == []
    monitor.observe_packet(make.packet(3), at(1000))
    [silent] = monitor.observe_clock(at(1032))
    assert (silent.detector, silent.subject) == ("silent_component", "training")
    [passed] = health(monitor, at(1040))
    assert passed.resolved


def test_a_policy_that_decided_before_and_stops_is_silent(monitor: RunMonitor, make: Any, at: Any) -> None:
    monitor.observe_packet(make.packet(1), at(1))
    monitor.observe_decision(make.decision(), at(2))
    assert [one.subject for one in monitor.observe_clock(at(100))] == ["training"]
    monitor.observe_packet(make.packet(2), at(100))
    health(monitor, at(129))
    assert monitor.observe_clock(at(129.5)) == []
    health(monitor, at(131))
    assert [one.subject for one in monitor.observe_clock(at(131))] == ["tamiyo"]
    [passed] = monitor.observe_decision(make.decision(), at(132))
    assert passed.resolved


def test_the_end_of_a_run_ends_its_anomalies(monitor: RunMonitor, make: Any, at: Any) -> None:
    health(monitor, at(1), nonfinite_share=1.0)
    [passed] = monitor.observe_packet(make.packet(1, phase=RunPhase.FAILED), at(2))
    assert passed.resolved
    assert monitor.open_anomalies == []
    assert health(monitor, at(3), nonfinite_share=1.0) == []


def test_an_anomaly_of_before_a_restart_goes_on_and_passes(monitor: RunMonitor, make: Any, at: Any) -> None:
    [opened] = health(monitor, at(1), nonfinite_share=1.0)
    again = RunMonitor("run-1", silence_s=SILENCE_S)
    again.resume([opened])
    again.rearm(at(500))
    assert again.open_anomalies == [opened]
    found = [one for second in range(501, 504) for one in health(again, at(second))]
    assert [(one.anomaly_id, one.resolved) for one in found] == [(opened.anomaly_id, True)]


@pytest.mark.parametrize(
    "kind",
    [
        LossSpikeDetector,
        GradientExplosionDetector,
        GradientVanishingDetector,
        PlateauDetector,
        LatencyShiftDetector,
    ],
)
@given(figures=st.lists(st.floats(), max_size=60))
def test_no_figure_breaks_a_detector_and_openings_and_closings_alternate(kind: Any, figures: list[float]) -> None:
    detector = kind(run_id="run-1", subject="figure")
    found = [detector.observe(value, MOMENT + timedelta(milliseconds=place)) for place, value in enumerate(figures)]
    states = [one.resolved for one in found if one is not None]
    assert states == [bool(place % 2) for place in range(len(states))]

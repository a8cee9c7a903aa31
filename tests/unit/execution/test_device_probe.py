"""The probe for accelerators, held against the native one on the CPU, and its way through a layer."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from esper.execution import device_probe
from esper.execution.device_probe import PendingFigures, Stopwatch
from esper.execution.health import probe_tensor
from esper.execution.layers import forward

GENERATOR = torch.Generator().manual_seed(0)
VALUES = {
    "all": torch.randn(30, 20, generator=GENERATOR),
    "sampled": torch.randn(64, 100, generator=GENERATOR) * 3 + 1,
    "uneven": torch.rand(5077, generator=GENERATOR),
    "relu": torch.randn(40, 40, generator=GENERATOR).relu(),
    "constant": torch.full((50,), 2.5),
    "bfloat16": torch.randn(300, generator=GENERATOR).bfloat16(),
    "one": torch.tensor([3.0]),
    "some_nan": torch.where(torch.arange(100) % 10 == 0, torch.nan, torch.arange(100.0)),
}


@pytest.mark.parametrize("name", VALUES)
def test_its_figures_are_the_native_probes(name: str) -> None:
    value = VALUES[name]
    ours, native = PendingFigures(value).take(), probe_tensor(value)
    assert ours is not None
    for figure in ("mean", "variance", "entropy", "dead_share", "nonfinite_share"):
        assert getattr(ours, figure) == pytest.approx(getattr(native, figure), rel=1e-4, abs=1e-6), figure


@pytest.mark.parametrize("value", [torch.full((8,), torch.nan), torch.zeros(0)])
def test_nothing_finite_gives_no_mean(value: Tensor) -> None:
    found = PendingFigures(value).take()
    assert found is not None
    assert math.isnan(found.mean)


def test_a_stopwatch_on_the_host_measures_at_once() -> None:
    watch = Stopwatch(torch.device("cpu"))
    watch.stop()
    elapsed_ms = watch.elapsed_ms()
    assert elapsed_ms is not None
    assert 0 <= elapsed_ms < 1000


def test_a_device_without_a_clock_measures_nothing() -> None:
    watch = Stopwatch(torch.device("meta"))
    watch.stop()
    assert watch.elapsed_ms() is None


class Late(PendingFigures):
    """Figures that arrive when they are told to."""

    arrived = False

    def take(self) -> Any:
        return super().take() if Late.arrived else None


@pytest.fixture
def deferred(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let layers take the accelerator's way on the CPU."""
    monkeypatch.setattr(forward, "can_probe", lambda _: False)
    monkeypatch.setattr(forward, "PendingFigures", Late)

    class Elsewhere:
        type = "elsewhere"

    monkeypatch.setattr(forward, "device_of", lambda _: Elsewhere())
    Late.arrived = False


def test_figures_from_a_device_reach_health_and_ring_when_they_have_arrived(make_pair: Any, deferred: None) -> None:
    pair = make_pair()
    pair.model(pair.x).sum().backward()
    layer, ring = pair.model.layer1, pair.model.oona_client.ring
    assert len(ring) == 0
    Late.arrived = True
    signal = layer.get_health_signal()
    assert signal.activation_entropy > 0
    assert signal.gradient_variance > 0
    assert len(ring) == 1
    assert ring.drain()["gradient_variance"][0] > 0


def test_figures_that_come_too_late_are_not_measured(make_pair: Any, deferred: None) -> None:
    pair = make_pair()
    pair.model(pair.x).sum().backward()
    signal = pair.model.layer1.get_health_signal()
    assert signal.count == 1
    assert signal.activation_entropy is None
    assert signal.gradient_variance is None


def test_indices_are_computed_once_per_size() -> None:
    PendingFigures(torch.zeros(4097))
    before = device_probe._sample_indices.cache_info().misses
    PendingFigures(torch.ones(4097))
    assert device_probe._sample_indices.cache_info().misses == before

"""What a layer measures, how often, and that it costs nothing when it does not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from esper.core.wrap import LayerTelemetry, wrap
from esper.execution.health import RollingHealth, RollingMean, can_probe, probe_tensor


def test_a_backward_pass_yields_the_health_signal(pair: Any) -> None:
    pair.backward()
    signal = pair.model.layer1.get_health_signal()
    assert signal.count == 1
    assert signal.gradient_variance > 0
    assert signal.activation_entropy > 0
    assert signal.latency_ms > 0
    assert signal.activation_variance > 0
    assert signal.dead_share == 0.0


def test_figures_are_those_of_the_layers_output(pair: Any) -> None:
    seen: list[torch.Tensor] = []
    pair.model.layer1.register_forward_hook(lambda *seen_now: seen.append(seen_now[-1]))
    out = pair.model(pair.x)
    seen[0].retain_grad()
    out.square().sum().backward()
    signal = pair.model.layer1.get_health_signal()
    assert signal.activation_mean == pytest.approx(seen[0].mean().item(), abs=1e-6)
    assert signal.activation_variance == pytest.approx(seen[0].var(unbiased=False).item(), rel=1e-4)
    assert signal.gradient_variance == pytest.approx(seen[0].grad.var(unbiased=False).item(), rel=1e-4)


def test_nothing_is_known_before_the_first_pass(pair: Any) -> None:
    signal = pair.model.layer1.get_health_signal()
    assert (signal.count, signal.gradient_variance, signal.activation_entropy, signal.latency_ms) == (
        0,
        None,
        None,
        None,
    )
    assert pair.model.layer1.get_layer_stats()["total_forwards"] == 0


def test_a_pass_without_gradients_leaves_the_gradient_unmeasured(pair: Any) -> None:
    with torch.no_grad():
        pair.model(pair.x)
    signal = pair.model.layer1.get_health_signal()
    assert signal.count == 1
    assert signal.gradient_variance is None


def test_every_nth_pass_is_measured_and_all_are_counted(make_pair: Any) -> None:
    pair = make_pair(telemetry=LayerTelemetry(interval_steps=4))
    for _ in range(9):
        pair.backward()
    assert pair.model.layer1.get_health_signal().count == 3
    assert pair.model.layer1.get_layer_stats()["total_forwards"] == 9


def test_signals_go_into_the_runs_ring_with_step_and_layer(make_pair: Any) -> None:
    pair = make_pair(telemetry=LayerTelemetry(interval_steps=1), run_id="run-7")
    pair.model.seed_states.step = 12
    pair.backward()
    client = pair.model.layer1.oona_client
    assert client is not None
    assert client.run_id == "run-7"
    assert not client.connected
    columns = client.ring.drain()
    names = {number: name for name, number in client.layers.items()}
    assert {names[number] for number in columns["layer_id"]} == {"conv", "norm", "layer1", "head"}
    assert set(columns["step"]) == {12}
    assert set(columns["seed"]) == {-1}
    assert (columns["gradient_variance"] > 0).all()
    assert (columns["latency_ms"] > 0).all()


def test_a_signal_without_its_gradient_is_sent_with_the_next(make_pair: Any) -> None:
    pair = make_pair(telemetry=LayerTelemetry(interval_steps=1))
    pair.model(pair.x)
    ring = pair.model.oona_client.ring
    assert len(ring) == 0
    pair.model(pair.x)
    assert len(ring) == 4


def test_without_telemetry_a_layer_has_nothing_to_do_once_its_site_is_known(make_pair: Any) -> None:
    pair = make_pair(telemetry=False)
    layer = pair.model.layer1
    pair.backward()
    assert layer._kasmina.is_plain
    assert not layer.telemetry_enabled
    assert layer.oona_client is None
    assert layer.site.input_shape == (128,)
    assert layer.get_health_signal().count == 0
    assert layer.get_layer_stats()["total_forwards"] is None


def test_telemetry_can_be_switched_off_and_on(pair: Any) -> None:
    layer = pair.model.layer1
    pair.backward()
    layer.set_telemetry(False)
    for _ in range(3):
        pair.backward()
    assert layer._kasmina.is_plain
    assert layer.get_health_signal().count == 1
    layer.set_telemetry(True)
    pair.backward()
    assert layer.get_health_signal().count == 2


def test_a_copy_writes_into_no_ring(make_pair: Any) -> None:
    pair = make_pair(telemetry=LayerTelemetry(interval_steps=1))
    pair.backward()
    twin = copy.deepcopy(pair.model)
    before = pair.model.oona_client.ring.pushed
    twin(pair.x).sum().backward()
    assert pair.model.oona_client.ring.pushed == before
    assert twin.layer1.oona_client is None
    assert twin.oona_client is None


def test_non_finite_activations_are_counted_not_averaged() -> None:
    model = wrap(nn.Sequential(nn.Linear(4, 4)), telemetry=LayerTelemetry(interval_steps=1))
    with torch.no_grad():
        model[0].bias[0] = torch.nan
    model(torch.randn(8, 4)).sum().backward()
    columns = model.oona_client.ring.drain()
    assert columns["nonfinite_share"].tolist() == [0.25]
    assert model[0].get_health_signal().activation_mean is not None


def test_a_rolling_mean_is_the_plain_mean_first_and_then_forgets() -> None:
    rolling = RollingMean()
    assert rolling.value is None
    for sample in (1.0, 2.0, 6.0):
        rolling.add(sample)
    assert rolling.value == pytest.approx(3.0)
    rolling.add(None)
    rolling.add(float("nan"))
    assert (rolling.count, rolling.value) == (3, pytest.approx(3.0))
    for _ in range(1000):
        rolling.add(10.0)
    assert rolling.value == pytest.approx(10.0, rel=1e-6)


def test_health_without_samples_says_so() -> None:
    assert RollingHealth().summary(errors=2).errors == 2
    assert RollingHealth().summary(errors=0).activation_mean is None


def test_a_probe_reads_channels_last_and_gappy_tensors() -> None:
    value = torch.randn(2, 3, 4, 4)
    for form in (value, value.to(memory_format=torch.channels_last), value.transpose(1, 3), value[:, ::2]):
        assert can_probe(form)
        assert probe_tensor(form).mean == pytest.approx(form.mean().item(), abs=1e-6)


@pytest.mark.parametrize(
    "value", [torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.complex64), torch.zeros(3, device="meta")]
)
def test_what_has_no_floats_to_read_is_not_probed(value: torch.Tensor) -> None:
    assert not can_probe(value)

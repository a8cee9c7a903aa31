"""Stage 2: an ordinary step yields health signals; Nissa aggregates what all components say."""

from __future__ import annotations

import torch
from torch import nn

import esper
from esper.client import EsperClient
from tests.acceptance.conftest import GrownRun, TwoLayers


def test_a_backward_pass_yields_a_health_signal_per_layer() -> None:
    wrapped, batch = esper.wrap(TwoLayers()), torch.randn(32, 64)
    loss = nn.CrossEntropyLoss()(wrapped(batch), batch[:, 0].gt(0).long())
    loss.backward()
    for layer in (wrapped.layer1, wrapped.layer2):
        signal = layer.get_health_signal()
        assert signal.gradient_variance > 0
        assert signal.activation_entropy > 0
        assert signal.latency_ms > 0


def test_nissa_gives_the_metrics_of_a_run(grown_run: GrownRun, client: EsperClient) -> None:
    nissa = client.nissa
    metrics = nissa.get_current_metrics(grown_run.report.run_id)
    assert metrics.morphogenetic.active_seeds_total >= 0
    assert metrics.training.loss > 0
    assert metrics.training.epoch == 30
    assert metrics.bus.health_signals > 0
    assert metrics.bus.events > 0
    assert {tier.tier for tier in metrics.kernels.tiers} == {"l1", "l2", "l3"}

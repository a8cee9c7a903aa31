"""G2's cost in its smallest form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bench import g2_counterfactual
from bench.g2_counterfactual import NUM_RIVALS, ratio, with_rivals
from esper.contracts.errors import InvalidStateError

X = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))
Y = torch.zeros(16).long()


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def test_rivals_stand_at_the_layers_in_turn_and_add_something() -> None:
    host = net()
    model, rivals = with_rivals(host, X)
    assert [tuple(ref) for ref in rivals[:3]] == [("0", 0), ("2", 0), ("0", 1)]
    assert len(set(rivals)) == NUM_RIVALS
    kernel = model.kasmina_layer("0").require_seed(0).kernel
    assert float(kernel(X, torch.randn(16, 8)).detach().abs().max()) > 0


def test_a_host_yields_a_ratio() -> None:
    figure = ratio("host", net(), X, Y, 0.0)
    assert figure.value is not None
    assert 0.05 < figure.value < 5


def test_ways_that_differ_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def evaluate(*_: object, max_rows: int | None) -> Tensor:
        return torch.zeros(9, 16) if max_rows else torch.ones(9, 16)

    monkeypatch.setattr(g2_counterfactual, "evaluate_configurations", evaluate)
    with pytest.raises(InvalidStateError, match="host: both ways must give the same losses"):
        ratio("host", net(), X, Y, 0.0)

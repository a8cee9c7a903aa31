"""Stage 1: wrapping a model changes nothing but what its layers can do."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import esper
from esper.contracts.errors import UnavailableError
from esper.contracts.lifecycle import SeedLifecycleState
from esper.core.wrap import SkippedLayersWarning
from esper.execution.layers import KasminaLayer
from esper.mesh.ports import free_port
from esper.mesh.settings import MeshSettings
from tests.acceptance.conftest import TwoLayers


def test_wrapped_layers_are_kasmina_layers_and_dormant() -> None:
    wrapped = esper.wrap(TwoLayers())
    assert isinstance(wrapped.layer1, KasminaLayer)
    assert wrapped.layer1.num_seeds == 4
    for layer in (wrapped.layer1, wrapped.layer2):
        assert all(s == SeedLifecycleState.DORMANT for s in layer.state_layout.lifecycle_states)
        assert layer.telemetry_enabled
        assert layer.oona_client is not None


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(8, 4), (3, 8)),
        (nn.Conv2d(3, 4, 3, padding=1), (2, 3, 8, 8)),
        (nn.LayerNorm(8), (3, 8)),
        (nn.BatchNorm1d(8), (3, 8)),
        (nn.BatchNorm2d(3), (2, 3, 8, 8)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_outputs_names_and_keys_stay_the_same_to_the_bit(layer: nn.Module, shape: tuple[int, ...]) -> None:
    net = nn.Sequential(layer)
    x = torch.randn(shape)
    before, keys = net(x), list(net.state_dict())
    wrapped = esper.wrap(net)
    assert torch.equal(before, wrapped(x))
    assert list(wrapped.state_dict()) == keys
    assert isinstance(net[0], KasminaLayer)


def test_attention_is_wrapped_too() -> None:
    class Attend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.attention(x, x, x)[0]
            return out

    net, x = Attend(), torch.randn(2, 5, 8)
    before = net(x)
    wrapped = esper.wrap(net)
    assert isinstance(wrapped.attention, KasminaLayer)
    assert torch.equal(before, wrapped(x))


def test_unsupported_layers_are_skipped_with_a_warning() -> None:
    with pytest.warns(SkippedLayersWarning, match="GRU"):
        wrapped = esper.wrap(nn.Sequential(nn.Linear(4, 4), nn.GRU(4, 4)))
    assert not isinstance(wrapped[1], KasminaLayer)


def test_wrapping_without_services_says_nothing_and_works() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrapped = esper.wrap(TwoLayers())
    assert not wrapped.oona_client.connected


def test_a_configured_service_that_cannot_be_reached_is_an_error_at_start(tmp_path: Path) -> None:
    settings = MeshSettings(state_dir=tmp_path, nats_url=f"nats://127.0.0.1:{free_port()}")
    with pytest.raises(UnavailableError, match=r"nats://127\.0\.0\.1"):
        esper.Mesh.connect(settings)

"""K1 in its smallest form."""

from __future__ import annotations

import pytest
import torch

from bench.hosts import HOSTS
from bench.k1_dormant import GOAL_OFF, Overhead, added_time, byte_figures, compile_figure, host_figures
from bench.report import Spread
from esper.execution.layers import KasminaLayer

MLP = HOSTS[0]


@pytest.mark.parametrize("mode", ["forward", "step"])
def test_a_host_yields_a_ratio_for_each_state(mode: str) -> None:
    figures = host_figures(MLP, mode, seconds=0.0)  # type: ignore[arg-type]
    assert [figure.goal is not None for figure in figures] == [True, True, False, False]
    for figure in figures:
        assert figure.value is not None
        assert 0.1 < figure.value < 10
    off = figures[0]
    assert off.goal == GOAL_OFF
    assert off.certain is not None
    assert off.certain.low <= off.value <= off.certain.high  # type: ignore[operator]


def test_hosts_have_the_shapes_they_are_named_for() -> None:
    for host, shape in zip(HOSTS, [(64, 10), (32, 10), (8, 1000), (8, 128, 256)], strict=True):
        model = host.make()
        assert model(host.batch()).shape == shape
        assert model.get_submodule(host.site) is not None
        assert not any(isinstance(module, KasminaLayer) for module in model.modules())
        for ours, again in zip(model.parameters(), host.make().parameters(), strict=True):
            assert torch.equal(ours, again)


def test_the_resnet_has_the_parameters_of_its_paper() -> None:
    (resnet,) = [host for host in HOSTS if host.name == "resnet18"]
    assert sum(parameter.numel() for parameter in resnet.make().parameters()) == 11_689_512


def test_wrapping_adds_no_graph() -> None:
    assert compile_figure(MLP).holds is True


def test_bytes_are_counted() -> None:
    native, python = byte_figures()
    assert native.value is not None
    assert python.value is not None
    assert native.value > 0
    assert 16 < python.value < 160, "a name more in each layer's dictionary than Python has room for takes it to 340"


def test_added_time_is_measured() -> None:
    figure = added_time("off", seconds=0.05)
    assert figure.unit == "us"
    assert figure.value is not None
    assert figure.value < 1e4


def test_an_interval_surrounds_its_ratio() -> None:
    found = Overhead(ratio=1.0, log_error=0.01, spread=Spread(0.9, 1.1))
    assert found.certain.low < 1.0 < found.certain.high

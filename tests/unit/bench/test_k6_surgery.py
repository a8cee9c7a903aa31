"""K6 in its smallest form."""

from __future__ import annotations

import pytest
import torch

from bench import k6_surgery
from bench.hosts import HOSTS, Host
from bench.k6_surgery import ACTS, bits_figure, surgery_figures


def test_every_act_is_timed() -> None:
    figures = surgery_figures(HOSTS[0], rounds=2)
    assert [figure.name for figure in figures] == ["mlp, a step", *(f"mlp, {act}" for act in ACTS)]
    assert all(figure.value is not None and figure.value > 0 for figure in figures)


@pytest.mark.parametrize("host", HOSTS, ids=lambda host: host.name)
def test_a_grown_model_comes_back_to_the_bit(host: Host) -> None:
    figure = bits_figure(host)
    assert figure.value == 0
    assert figure.holds is True


def test_one_bit_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.load

    def damaged(*args: object, **kwargs: object) -> dict[str, torch.Tensor]:
        state = real(*args, **kwargs)
        state["2.bias"] = state["2.bias"].clone()
        state["2.bias"].view(torch.int32)[0] ^= 1
        return state

    monkeypatch.setattr(k6_surgery.torch, "load", damaged)
    figure = bits_figure(HOSTS[0])
    assert figure.holds is False
    assert figure.value is not None
    assert figure.value >= 1

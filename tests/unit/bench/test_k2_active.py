"""K2 in its smallest form."""

from __future__ import annotations

import pytest
import torch

from bench.hosts import HOSTS, Host
from bench.k2_active import GOAL, active_figure, check_figure, grown_pair
from esper.contracts.errors import InvalidStateError

MLP = HOSTS[0]


@pytest.mark.parametrize("host", HOSTS, ids=lambda host: host.name)
def test_both_sides_give_the_same_bits_and_their_seeds_show(host: Host) -> None:
    ours, by_hand = grown_pair(host, 2)
    x = host.batch()
    with torch.no_grad():
        assert torch.equal(ours(x), by_hand(x))
        assert not torch.equal(ours(x), host.make().eval()(x))


@pytest.mark.parametrize("mode", ["forward", "step"])
def test_a_host_yields_a_ratio(mode: str) -> None:
    figure = active_figure(MLP, 1, mode, 0.0, is_compiled=False)  # type: ignore[arg-type]
    assert figure.goal == GOAL
    assert figure.value is not None
    assert 0.1 < figure.value < 10


def test_the_check_alone_is_measured() -> None:
    figure = check_figure(MLP, 0.0)
    assert figure.goal is None
    assert figure.value is not None
    assert 0 < figure.value < 10


def test_sides_that_differ_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "equal", lambda *_: False)
    with pytest.raises(InvalidStateError, match="mlp grown must give what the same maths by hand gives"):
        grown_pair(MLP, 1)

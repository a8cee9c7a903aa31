"""The sum of a layer's output and its seeds' shares: the same bits whoever adds, and nothing that is not finite."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from esper.execution import shares as shares_module
from esper.execution.seed import BlendMode, Seed
from esper.execution.shares import checked_sum


def seed_with(alpha: float, mode: BlendMode = BlendMode.ALPHA) -> Seed:
    seed = Seed(nn.Identity(), index=0, device=torch.device("cpu"), site=None)
    (seed.trial_alpha if mode is BlendMode.TRIAL else seed.alpha).fill_(alpha)
    seed.mode = mode
    return seed


def in_torch(h: Tensor, shares: Sequence[tuple[Seed, Tensor]]) -> Tensor:
    total = h
    for seed, delta in shares:
        total = total + seed.scaled(delta, h)
    return total


@pytest.fixture
def native_calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The calls of the native sum, which still happen."""
    calls: list[Any] = []

    def counted(*args: Any) -> bool:
        calls.append(args)
        return real(*args)

    real = shares_module.blend_checked
    monkeypatch.setattr(shares_module, "blend_checked", counted)
    return calls


@given(st.integers(1, 3000), st.lists(st.sampled_from(BlendMode), min_size=1, max_size=5), st.integers(0, 2**31))
def test_the_native_sum_has_the_bits_of_torchs(numel: int, modes: list[BlendMode], seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    h = torch.randn(numel, generator=random)
    shares = [
        (seed_with(float(torch.rand((), generator=random)), mode), torch.randn(numel, generator=random) * 1e3)
        for mode in modes
    ]
    found = checked_sum(h, shares)
    assert found is not None
    assert torch.equal(found, in_torch(h, shares))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("mode", list(BlendMode))
def test_one_value_that_is_not_finite_is_seen(bad: float, mode: BlendMode, native_calls: list[Any]) -> None:
    delta = torch.zeros(2000)
    delta[1999] = bad
    shares = [(seed_with(0.5), torch.ones(2000)), (seed_with(0.25, mode), delta)]
    assert checked_sum(torch.ones(2000), shares) is None
    assert native_calls


def test_a_share_of_zero_hides_nothing() -> None:
    assert checked_sum(torch.ones(4), [(seed_with(0.0, BlendMode.TRIAL), torch.full((4,), torch.nan))]) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda value: value.double(),
        lambda value: value.bfloat16(),
        lambda value: value.requires_grad_(),
        lambda value: value.contiguous(memory_format=torch.channels_last),
        lambda value: value.expand(2, 2, 4, 4),
    ],
    ids=["float64", "bfloat16", "gradients", "channels_last", "gaps"],
)
@pytest.mark.parametrize("which", ["h", "delta"])
def test_what_the_native_sum_cannot_read_is_torchs(change: Any, which: str, native_calls: list[Any]) -> None:
    h, delta = torch.randn(1, 2, 4, 4), torch.randn(1, 2, 4, 4)
    h, delta = (change(h), delta) if which == "h" else (h, change(delta))
    if delta.shape != h.shape:
        h, delta = (value.expand(2, 2, 4, 4) for value in (h, delta))
    shares = [(seed_with(0.5), delta)]
    found = checked_sum(h, shares)
    assert found is not None
    assert torch.equal(found, in_torch(h, shares))
    assert not native_calls


def test_an_alpha_of_another_type_is_torchs(native_calls: list[Any]) -> None:
    shares = [(seed_with(0.5).double(), torch.randn(8))]
    h = torch.randn(8)
    found = checked_sum(h, shares)
    assert found is not None
    assert torch.equal(found, in_torch(h, shares))
    assert not native_calls


def test_who_watches_torchs_operators_sees_the_sum(native_calls: list[Any]) -> None:
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    seen: list[Any] = []
    h, shares = torch.randn(8), [(seed_with(0.5), torch.randn(8))]
    with Watch():
        found = checked_sum(h, shares)
    assert torch.ops.aten.add.Tensor in seen
    assert not native_calls
    assert found is not None
    assert torch.equal(found, in_torch(h, shares))

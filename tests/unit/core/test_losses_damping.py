"""Which losses take a damped host: those that at most double where outputs double."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from esper.core.losses import grows_in_proportion

CLASSIFYING = [
    nn.CrossEntropyLoss(),
    nn.CrossEntropyLoss(label_smoothing=0.2, weight=torch.tensor([1.0, 3.0, 0.5])),
    nn.MultiMarginLoss(),
]


@pytest.mark.parametrize("loss_fn", CLASSIFYING)
@given(seed=st.integers(0, 10_000), scale=st.floats(0.01, 100.0))
@settings(max_examples=30, deadline=None)
def test_a_loss_of_classification_takes_damping_wherever_it_stands(loss_fn: Any, seed: int, scale: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    z, y = scale * torch.randn(8, 3, generator=draw), torch.randint(0, 3, (8,), generator=draw)
    if isinstance(loss_fn, nn.MultiMarginLoss):
        # A hinge has a margin of its own: twice the outputs cost at most twice the loss, for the margin is due once.
        assert loss_fn(2.0 * z, y) <= 2.0 * loss_fn(z, y) + 1e-6
    assert grows_in_proportion(loss_fn, z, y)


def test_a_squared_error_near_its_targets_takes_none() -> None:
    y = torch.randn(16, 2, generator=torch.Generator().manual_seed(0))
    assert not grows_in_proportion(nn.MSELoss(), y + 0.01, y)


@pytest.mark.parametrize("loss_fn", [nn.BCELoss(), nn.PoissonNLLLoss(log_input=False)])
def test_a_loss_of_some_outputs_alone_takes_none_and_raises_nothing(loss_fn: Any) -> None:
    z = torch.rand(16, generator=torch.Generator().manual_seed(0))
    for outputs in (z, 0.4 * z):  # of which twice is still a probability
        assert not grows_in_proportion(loss_fn, outputs, (z > 0.5).float())


@pytest.mark.parametrize("outputs", [{"logits": torch.zeros(2, 3)}, (torch.zeros(2, 3),), torch.zeros(2, 3).long()])
def test_outputs_that_cannot_be_scaled_take_none(outputs: Any) -> None:
    assert not grows_in_proportion(nn.CrossEntropyLoss(), outputs, torch.zeros(2).long())

"""FLOPs are torch's own sums, of one thread, with no hook left on anybody's modules."""

from __future__ import annotations

import threading

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules import module as all_modules
from torch.utils.flop_counter import FlopCounterMode

from esper.blueprints.flops import ThreadFlops, count_flops

NET = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
IMAGES = torch.randn(2, 3, 8, 8)


def learn() -> None:
    F.cross_entropy(NET(IMAGES), torch.tensor([0, 1])).backward()


def test_forward_and_backward_count_as_torch_counts_them() -> None:
    with FlopCounterMode(display=False) as theirs:
        learn()
    assert count_flops(learn) == theirs.get_total_flops() > 0


def test_attention_counts_on_the_cpu() -> None:
    q = torch.randn(2, 3, 7, 4)
    assert count_flops(lambda: F.scaled_dot_product_attention(q, q, q)) == 2 * (2 * 2 * 3 * 7 * 7 * 4)


def test_other_threads_are_neither_counted_nor_hooked() -> None:
    counter = ThreadFlops()
    with counter:
        assert not all_modules._global_forward_hooks
        assert not all_modules._global_forward_pre_hooks
        other = threading.Thread(target=learn)
        other.start()
        other.join()
    assert counter.total == 0


def test_shapes_without_values_cost_nothing() -> None:
    x = torch.empty(3, 5, device="meta")
    assert count_flops(lambda: x @ x.T) == 0

"""Training on control examples is noticed, counted exactly, and said once."""

from __future__ import annotations

import warnings

import pytest
import torch

from esper.core.overlap import ControlOverlapWarning, OverlapWatch


def examples(count: int, *, seed: int = 0, features: int = 20) -> torch.Tensor:
    return torch.randn(count, features, generator=torch.Generator().manual_seed(seed))


def test_every_control_example_that_is_trained_on_counts_once() -> None:
    control, others = examples(40), examples(400, seed=1)
    watch = OverlapWatch(control.split(16))
    for batch in torch.cat([others, control[5:12], control[30:31], control[5:12]]).split(32):
        watch.look(batch)
    with pytest.warns(ControlOverlapWarning, match=r"got 8 of 40 \(20\.0%\) that were trained on"):
        assert watch.end_epoch() == 8
    watch.look(control)
    assert watch.end_epoch() == 0, "it looks at one epoch"


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x,
        lambda x: (x * 16).round() / 16,
        lambda x: (x * 16).round().long(),
        lambda x: (x > 0).repeat(1, 4),
        lambda x: x.bfloat16(),
        lambda x: x.double(),
        lambda x: torch.complex(x, -x),
        lambda x: x.reshape(len(x), 2, 5, 2).transpose(1, 3),
    ],
    ids=["float", "sixteenths", "whole", "bool", "bfloat16", "double", "complex", "not_contiguous"],
)
def test_inputs_of_every_type_are_compared_to_the_bit(make) -> None:  # type: ignore[no-untyped-def]
    control, train = make(examples(200)), make(examples(2_000, seed=1))
    watch = OverlapWatch([control])
    watch.look(train)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert watch.end_epoch() == 0
    watch = OverlapWatch([control])
    watch.look(torch.cat([train, control[:3]]))
    with pytest.warns(ControlOverlapWarning):
        assert watch.end_epoch() == 3


def test_twins_in_the_control_split_count_each() -> None:
    control = examples(4).repeat(2, 1)
    watch = OverlapWatch([control])
    watch.look(control[1:2])
    with pytest.warns(ControlOverlapWarning, match="got 2 of 8 "):
        assert watch.end_epoch() == 2


def test_one_bit_makes_another_example() -> None:
    control = examples(8)
    near = control.clone()
    near[:, 3] = torch.nextafter(near[:, 3], torch.tensor(torch.inf))
    watch = OverlapWatch([control])
    watch.look(near)
    assert watch.end_epoch() == 0


def test_another_shape_or_type_is_another_example() -> None:
    control = torch.zeros(4, 6)
    watch = OverlapWatch([control])
    for other in (torch.zeros(4, 5), torch.zeros(4, 2, 3), control.double(), torch.zeros(0, 6), torch.tensor(0.0)):
        watch.look(other)
    assert watch.end_epoch() == 0


def test_looking_draws_nothing_and_keeps_no_graph() -> None:
    stream = torch.get_rng_state()
    control = examples(4).requires_grad_()
    watch = OverlapWatch([control])
    watch.look(control * 1.0)
    assert torch.equal(stream, torch.get_rng_state())
    assert not any(known.digests.requires_grad or known.seen.requires_grad for known in watch._known.values())
    with pytest.warns(ControlOverlapWarning):
        watch.end_epoch()


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x.to_sparse(),
        lambda x: torch.nested.nested_tensor(list(x)),
        lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
        lambda x: x.sum(),
    ],
    ids=["sparse", "nested", "quantised", "no_batch"],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_has_no_rows_of_values_is_not_looked_at_and_stops_nothing(make) -> None:  # type: ignore[no-untyped-def]
    plain, other = examples(8), make(examples(8))
    watch = OverlapWatch([plain] if other.ndim == 0 else [plain, other])
    watch.look(other)
    watch.look(plain[:1])
    assert watch.end_epoch() == 1

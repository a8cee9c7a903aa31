"""The control split is read without a trace, and per-example losses agree with the mean."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from esper.contracts.errors import CapacityExceededError, InvalidInputError
from esper.core.control import ControlSplit
from esper.core.losses import accuracy_of, per_example

CPU = torch.device("cpu")


def plain_loss(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(out, y)


def loader(count: int = 10) -> DataLoader[tuple[torch.Tensor, ...]]:
    x = torch.randn(count, 4)
    return DataLoader(TensorDataset(x, torch.arange(count) % 3), batch_size=4, shuffle=True)


@pytest.mark.parametrize(
    "loss_fn",
    [
        nn.CrossEntropyLoss(),
        F.cross_entropy,
        plain_loss,
        nn.CrossEntropyLoss(label_smoothing=0.1),
    ],
)
def test_per_example_losses_average_to_the_mean_loss(loss_fn) -> None:  # type: ignore[no-untyped-def]
    out, y = torch.randn(6, 3), torch.arange(6) % 3
    losses = per_example(loss_fn)(out, y)
    assert losses.shape == (6,)
    torch.testing.assert_close(losses.mean(), loss_fn(out, y))


def test_a_loss_over_many_outputs_gives_one_value_an_example() -> None:
    assert per_example(nn.MSELoss())(torch.randn(5, 2, 3), torch.randn(5, 2, 3)).shape == (5,)


def test_a_loss_that_hides_its_examples_is_refused() -> None:
    def total(out: torch.Tensor, y: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
        return (out - y).sum()

    with pytest.raises(InvalidInputError, match="loss_fn must give 5 losses for 5 examples"):
        per_example(total)(torch.randn(5), torch.randn(5))


def test_evaluation_leaves_flags_buffers_and_random_streams_alone() -> None:
    torch.manual_seed(0)
    split = ControlSplit(loader(), device=CPU)
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
    net[1].eval()
    before, stream = {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()
    figures = split.evaluate(net, per_example(nn.CrossEntropyLoss()))
    assert torch.equal(stream, torch.get_rng_state())
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert (net.training, net[1].training, net[2].training) == (True, False, True)
    assert len(figures.losses) == 10
    assert figures.accuracy is not None
    assert 0 <= figures.accuracy <= 1
    assert figures.standard_error > 0


def test_reading_the_loader_draws_nothing_from_the_run() -> None:
    torch.manual_seed(0)
    data = loader()
    stream = torch.get_rng_state()
    ControlSplit(data, device=CPU)
    assert torch.equal(stream, torch.get_rng_state())


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "hold at least one example"),
        ([torch.ones(3)], "yield pairs of tensors"),
        ([(torch.ones(3), torch.ones(2))], "yield as many targets as inputs"),
    ],
)
def test_a_loader_that_cannot_serve_is_refused(batches: list[object], message: str) -> None:
    with pytest.raises(InvalidInputError, match=f"control_loader must {message}"):
        ControlSplit(batches, device=CPU)


def test_accuracy_is_absent_where_targets_are_no_classes() -> None:
    assert accuracy_of(torch.randn(4, 2), torch.randn(4, 2)) is None
    assert accuracy_of(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([1, 1])) == 0.5


class _Counted(nn.Module):
    """A linear map that counts its passes, and fails after some."""

    def __init__(self, passes: int) -> None:
        super().__init__()
        self.map, self.left = nn.Linear(4, 3), passes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("a fault of the model")
        out: torch.Tensor = self.map(x)
        return out


@pytest.mark.parametrize(
    ("batch", "got"),
    [
        ((torch.ones(2, 5), torch.zeros(2).long()), r"inputs \(2, 5\) torch.float32, targets \(2,\) torch.int64"),
        ((torch.ones(2, 4).long(), torch.zeros(2).long()), r"inputs \(2, 4\) torch.int64"),
        ((torch.ones(2, 4), torch.zeros(2, 5)), r"targets \(2, 5\) torch.float32"),
    ],
    ids=["inputs", "type", "targets"],
)
def test_a_loader_of_other_shapes_is_refused_in_the_first_pass(batch: object, got: str) -> None:
    split = ControlSplit([(torch.ones(2, 4), torch.zeros(2).long()), batch], device=CPU)
    with pytest.raises(InvalidInputError, match=f"control_loader must yield batches that model and loss take, .*{got}"):
        split.evaluate(nn.Linear(4, 3), per_example(nn.CrossEntropyLoss()))


def test_a_fault_of_the_model_later_on_is_not_laid_to_the_loader() -> None:
    split = ControlSplit(loader(), device=CPU)
    net = _Counted(passes=len(split.batches))
    split.evaluate(net, per_example(nn.CrossEntropyLoss()))
    with pytest.raises(RuntimeError, match=r"^a fault of the model$"):
        split.evaluate(net, per_example(nn.CrossEntropyLoss()))


def test_memory_that_ran_out_is_not_laid_to_the_loader() -> None:
    def starved(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        raise MemoryError

    with pytest.raises(CapacityExceededError, match="memory must suffice"):
        ControlSplit(loader(), device=CPU).evaluate(nn.Linear(4, 3), starved)

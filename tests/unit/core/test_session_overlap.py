"""A session whose training loader holds control examples says so once, in words and in its report."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Subset

from esper.core.overlap import ControlOverlapWarning
from tests.unit.core.test_session import train


@pytest.fixture
def overlapping(task: Any) -> Any:
    """The task with 5 of its 128 control examples in its training loader as well."""
    leaked = Subset(task.control.dataset, [3, 40, 41, 90, 127])
    task.train = DataLoader(ConcatDataset([task.train.dataset, leaked]), batch_size=32)
    return task


def test_control_examples_that_are_trained_on_are_counted_and_told_once(overlapping: Any, open_session: Any) -> None:
    session = open_session()
    with pytest.warns(ControlOverlapWarning, match=r"got 5 of 128 \(3\.9%\)") as caught:
        train(session, overlapping, 1)
    assert [one.filename.endswith("test_session.py") for one in caught] == [True], "it points at the caller's loop"
    train(session, overlapping, 2)
    (note,) = session.report().notes
    assert note == "5 control examples were trained on in the first epoch: what growth was decided by is not held out"


def test_a_batch_handed_to_the_step_is_looked_at_too(overlapping: Any, open_session: Any) -> None:
    session = open_session()
    model, loss_fn = session._context.model, session._context.loss_fn
    inputs, targets = next(iter(overlapping.control))
    loss_fn(model(inputs + 1.0), targets).backward()
    session.step(torch.tensor(0.5), batch=(inputs, targets))
    with pytest.warns(ControlOverlapWarning, match="got 64 of 128"):
        session.end_epoch()


def test_without_overlap_nothing_is_said_and_no_stream_is_drawn_from(task: Any, open_session: Any) -> None:
    session = open_session()
    stream = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        session.step(_loss(session, task))
        session.end_epoch()
    assert torch.equal(stream, torch.get_rng_state())
    assert session.report().notes == ()


def _loss(session: Any, task: Any) -> torch.Tensor:
    inputs, targets = task.train.dataset.tensors
    loss: torch.Tensor = session._context.loss_fn(session._context.model(inputs), targets)
    loss.backward()
    return loss

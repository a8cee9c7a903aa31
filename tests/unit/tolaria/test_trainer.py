"""The trainer's epochs, scheduler and checkpoints: a run taken up again ends as one that never stopped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import esper
from esper.contracts.errors import InvalidInputError, NotFoundError
from esper.core.session import Session


class SilentMesh:
    """A mesh that takes every word and gives none."""

    def __init__(self) -> None:
        self.open = 0

    def open_link(self, run_id: str, model: Any) -> SilentMesh:
        self.open += 1
        return self

    def send(self, *_: Any, **__: Any) -> None:
        """Take a word."""

    def arrivals(self) -> Iterator[Any]:
        return iter(())

    def cache_tiers(self) -> tuple[()]:
        return ()

    def close(self, deadline_s: float = 5.0) -> None:
        self.open -= 1


def data(seed: int = 0) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(64, 6, generator=generator)
    return DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=16, shuffle=True)


class Rig:
    """A trainer as a fresh process makes it."""

    def __init__(self, directory: Path | None = None) -> None:
        torch.manual_seed(1)
        self.model = esper.wrap(nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 1, gamma=0.5)
        self.mesh = SilentMesh()
        config = esper.TrainerConfig(scheduler=self.scheduler, checkpoint_directory=directory, show_progress=False)
        self.trainer = esper.Trainer(self.model, self.optimizer, nn.CrossEntropyLoss(), mesh=self.mesh, config=config)

    def fit(self, epochs: int, **options: Any) -> esper.RunReport:
        return self.trainer.fit(data(), data(seed=1), epochs, **options)


def test_a_run_taken_up_again_ends_as_one_that_never_stopped(tmp_path: Path) -> None:
    saved: list[str] = []

    def save_second(record: Any, session: Session) -> None:
        if record.epoch == 2:
            saved.append(session.save_checkpoint())

    whole = Rig(tmp_path)
    report = whole.fit(5, on_epoch=save_second)
    again = Rig(tmp_path)
    resumed = again.fit(5, resume_from=saved[0])
    assert [record.epoch for record in resumed.history] == [3, 4, 5]
    assert again.scheduler.get_last_lr() == whole.scheduler.get_last_lr()
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True))
    assert resumed.history[-1].control_loss == report.history[-1].control_loss


def test_a_scheduled_checkpoint_holds_the_schedulers_new_state(tmp_path: Path) -> None:
    one = Rig(tmp_path)
    rates = []

    def see(_record: Any, session: Session) -> None:
        snapshot = session._memory._snapshot
        assert snapshot is not None
        rates.append(snapshot["tolaria"]["tracked"]["scheduler"]["_last_lr"][0])

    one.fit(3, on_epoch=see)
    assert rates == [0.05, 0.025, 0.0125]


def test_a_run_may_be_ended_from_outside(tmp_path: Path) -> None:
    one = Rig()

    def stop(_record: Any, session: Session) -> None:
        session._desk.stop_asked = True

    report = one.fit(9, on_epoch=stop)
    assert (len(report.history), report.phase) == (1, "stopped")
    assert one.mesh.open == 0


def test_ctrl_c_ends_the_run_and_reaches_the_caller() -> None:
    one = Rig()

    def interrupt(_record: Any, _session: Session) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        one.fit(3, on_epoch=interrupt)
    assert one.mesh.open == 0
    assert not one.model._forward_pre_hooks


def test_bad_calls_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="epochs must be at least 1, got 0"):
        Rig().fit(0)
    with pytest.raises(NotFoundError, match="checkpoint must exist"):
        Rig(tmp_path).fit(1, resume_from="c20260101120000000-0123abcd")

"""The trainer: epochs over a loader, with a session that lets the model grow."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch.optim import Optimizer

from esper.contracts.errors import InvalidInputError
from esper.core.budget import Budget
from esper.core.losses import LossFunction
from esper.core.morphable import MorphableModel
from esper.core.report import EpochRecord, RunReport
from esper.core.session import MeshPort, Session
from esper.core.settings import SessionConfig
from esper.recovery import CheckpointConfig, CheckpointManager


class Scheduler(Protocol):
    """A learning-rate scheduler, stepped once an epoch."""

    def step(self) -> None:
        """Move on by one epoch."""

    def state_dict(self) -> dict[str, Any]:
        """Give the state."""

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Take a state over."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainerConfig:
    """Settings of a trainer beyond its stable face."""

    session: SessionConfig = field(default_factory=SessionConfig)
    """Settings of the session."""
    scheduler: Scheduler | None = None
    """Learning-rate scheduler, stepped at the end of every epoch."""
    checkpoint_directory: Path | None = None
    """Where checkpoints go, every 30 minutes and on demand; ``None`` writes none."""
    show_progress: bool = True
    """Whether a progress bar is drawn on a terminal."""


class Trainer:
    """Trains a wrapped model and lets it grow.

    Raises:
        InvalidInputError: The model is not wrapped, or a setting breaks its rule.
    """

    def __init__(
        self,
        model: MorphableModel,
        optimizer: Optimizer,
        loss_fn: LossFunction,
        *,
        mesh: MeshPort | None = None,
        budget: Budget | None = None,
        seed: int = 0,
        config: TrainerConfig | None = None,
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        self._loss_fn = loss_fn
        self._mesh = mesh
        self._budget = budget
        self._seed = seed
        self._config = config or TrainerConfig()
        self.checkpoint_manager = (
            None
            if self._config.checkpoint_directory is None
            else CheckpointManager(CheckpointConfig(directory=self._config.checkpoint_directory))
        )

    def fit(
        self,
        train_loader: Iterable[Any],
        control_loader: Iterable[Any],
        epochs: int,
        *,
        resume_from: str | None = None,
        on_epoch: Callable[[EpochRecord, Session], None] | None = None,
    ) -> RunReport:
        """Train until ``epochs`` epochs are completed, or an operator ends the run; gives the run's report.

        ``resume_from`` names a checkpoint to go on from; ``on_epoch`` is called with every epoch's figures. Ctrl-C ends
        the run as stopped and reaches the caller.

        Raises:
            InvalidInputError: ``epochs`` is below 1, or a loader cannot serve.
            InvalidStateError: The loss stays bad after every roll-back allowed.
        """
        if epochs < 1:
            raise InvalidInputError.of("epochs", "be at least 1", epochs)
        session = Session(
            self._model,
            self._optimizer,
            loss_fn=self._loss_fn,
            control_loader=control_loader,
            mesh=self._mesh,
            budget=self._budget,
            seed=self._seed,
            config=dataclasses.replace(
                self._config.session, planned_epochs=epochs, checkpoints=self.checkpoint_manager
            ),
        )
        with session, self._progress() as progress:
            if self._config.scheduler is not None:
                session.track("scheduler", self._config.scheduler)
            if resume_from is not None:
                session.load_checkpoint(resume_from)
            task = progress.add_task("training", total=epochs, completed=session.epoch_count)
            while session.epoch_count < epochs and not session.should_stop:
                self._train_epoch(session, train_loader)
                if self._config.scheduler is not None:
                    self._config.scheduler.step()  # before the epoch ends: its checkpoint must hold the new state
                record = session.end_epoch()
                progress.update(task, completed=record.epoch, description=_describe(record, session))
                if on_epoch is not None:
                    on_epoch(record, session)
            session.finish()
        return session.report()

    def _train_epoch(self, session: Session, train_loader: Iterable[Any]) -> None:
        self._model.train()
        device = next(self._model.parameters()).device
        for inputs, targets in train_loader:
            if session.should_stop:
                return
            x, y = inputs.to(device), targets.to(device)
            loss: torch.Tensor = self._loss_fn(self._model(x), y)
            loss.backward()  # type: ignore[no-untyped-call]
            session.step(loss, batch=(x, y))

    def _progress(self) -> Progress:
        console = Console(stderr=True)
        return Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not (self._config.show_progress and console.is_terminal),
        )


def _describe(record: EpochRecord, session: Session) -> str:
    live = sum(item.outcome is None for item in session.orchestrator.adaptations.values())
    kept = sum(
        item.outcome is not None and item.outcome.name == "KEPT" for item in session.orchestrator.adaptations.values()
    )
    return f"epoch {record.epoch}  control loss {record.control_loss:.4f}  seeds: {live} trying, {kept} kept"

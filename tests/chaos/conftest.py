"""A local mesh with handles to hurt it, and a training loop that measures how long it was held up."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import nn

import esper
from esper.cli import digits
from esper.contracts.lifecycle import SeedLifecycleState
from esper.core.adaptation import Adaptation
from esper.core.morphable import MorphableModel
from esper.core.report import EpochRecord
from esper.mesh.process_state import ProcessRecord, read_state, write_state
from esper.mesh.settings import SERVICES

EVERYTHING = ("nats", *SERVICES)
TICK_S = 0.05
GROWN = frozenset({SeedLifecycleState.ACTIVE, SeedLifecycleState.EVALUATING, SeedLifecycleState.FOSSILIZED})


class TwoLayers(nn.Module):
    """The network that the tests train."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.Linear(64, 16)
        self.layer2 = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.layer2(torch.relu(self.layer1(x)))
        return logits


def until(reached: Callable[[], bool], what: str, *, deadline_s: float = 90.0) -> None:
    """Return once a condition of other processes holds; they set no event, so look again and again."""
    looked = threading.Event()
    end_s = time.monotonic() + deadline_s
    while not reached():
        assert time.monotonic() < end_s, f"not within {deadline_s:g} s: {what}"
        looked.wait(TICK_S)


class Victims:
    """The processes of a local mesh, found through its state file and hurt by pid."""

    def __init__(self, state_dir: Path) -> None:
        self.state_dir = state_dir

    def record(self, name: str) -> ProcessRecord:
        found = read_state(self.state_dir).find(name)
        assert found is not None, f"{name} was never started"
        return found

    def tree(self, name: str) -> list[psutil.Process]:
        """The process of a service with all its children: NATS behind its keeper, workers behind the compiler."""
        process = self.record(name).process()
        return [] if process is None else [process, *process.children(recursive=True)]

    def kill(self, *names: str) -> list[ProcessRecord]:
        """SIGKILL whole services at one moment; give the records of those that died."""
        records = [self.record(name) for name in names]
        for process in [process for name in names for process in self.tree(name)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        until(lambda: not any(record.running for record in records), f"{names} end")
        return records

    def kill_for_good(self) -> None:
        """SIGKILL everything, and let nobody start it again."""
        state = read_state(self.state_dir)
        write_state(self.state_dir, replace(state, stopping=True))
        self.kill(*(record.name for record in state.running))

    @contextlib.contextmanager
    def frozen(self, *names: str) -> Iterator[None]:
        """Stop the services where they stand: connections stay open, nobody answers."""
        processes = [process for name in names for process in self.tree(name)]
        for process in processes:
            process.suspend()
        try:
            until(lambda: all(_is(process, psutil.STATUS_STOPPED) for process in processes), f"{names} stand still")
            yield
        finally:
            for process in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.resume()

    def await_return(self, *died: ProcessRecord) -> None:
        """Return once the supervisor has started others in their place."""
        for old in died:
            until(lambda old=old: self._replaced(old), f"{old.name} is started again")  # type: ignore[misc]

    def _replaced(self, old: ProcessRecord) -> bool:
        now = self.record(old.name)
        return now.pid != old.pid and now.running


def _is(process: psutil.Process, status: str) -> bool:
    try:
        return bool(process.status() == status)
    except psutil.NoSuchProcess:
        return True


@dataclass
class TrainingLoop:
    """Anybody's loop over digits: what it runs into and how long each call held it up are kept."""

    session: esper.Session
    model: MorphableModel
    seed: int = 0
    step_s: list[float] = field(default_factory=list)
    epoch_end_s: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._batches = digits.load_digits().train_loader(self.seed)
        self._criterion = nn.CrossEntropyLoss()

    def epochs(self, count: int) -> list[EpochRecord]:
        return [self.epoch() for _ in range(count)]

    def epochs_for(self, seconds: float) -> None:
        """Train whole epochs for at least so long."""
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s:
            self.epoch()

    def epoch(self) -> EpochRecord:
        self.model.train()
        for inputs, targets in self._batches:
            began_s = time.monotonic()
            loss = self._criterion(self.model(inputs), targets)
            loss.backward()
            self.session.step(loss, batch=(inputs, targets))
            self.step_s.append(time.monotonic() - began_s)
        began_s = time.monotonic()
        record = self.session.end_epoch()
        self.epoch_end_s.append(time.monotonic() - began_s)
        return record

    def grown_since(self, epoch: int) -> list[Adaptation]:
        """Adaptations begun after an epoch whose kernel came and took root."""
        begun = [item for item in self.session.orchestrator.adaptations.values() if item.begun_epoch > epoch]
        return [item for item in begun if item.state in GROWN or item.isolated_steps > 0]

    def train_until_grown(self, *, since: int, deadline_s: float = 90.0) -> None:
        """Train on until something grows that was begun after an epoch; an epoch here and there leaves the mesh air."""
        air = threading.Event()
        end_s = time.monotonic() + deadline_s
        while not self.grown_since(since):
            known = {key: item.reason for key, item in self.session.orchestrator.adaptations.items()}
            assert time.monotonic() < end_s, f"nothing grew within {deadline_s:g} s since epoch {since}: {known}"
            self.epoch()
            air.wait(0.1)


@contextlib.contextmanager
def training(mesh: Any, *, seed: int = 0, **config: Any) -> Iterator[TrainingLoop]:
    """Open a session over a fresh network on digits."""
    torch.manual_seed(seed)
    model = esper.wrap(TwoLayers())
    with esper.Session(
        model,
        digits.make_optimizer(model),
        loss_fn=nn.CrossEntropyLoss(),
        control_loader=digits.load_digits().control_loader(),
        mesh=mesh,
        budget=esper.Budget(added_params=50.0),
        seed=seed,
        config=esper.SessionConfig(**config),
    ) as session:
        yield TrainingLoop(session, model, seed)


@pytest.fixture(scope="session")
def state_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the mesh of this folder's tests keeps its state."""
    return tmp_path_factory.mktemp("chaos")


@pytest.fixture(scope="session")
def mesh(state_dir: Path) -> Iterator[esper.Mesh]:
    """NATS and the six services as processes on loopback; its services come back, however they are hurt."""
    with esper.Mesh.local(state_dir) as running:
        yield running


@pytest.fixture(scope="session")
def victims(mesh: esper.Mesh, state_dir: Path) -> Victims:
    """What can be killed and frozen."""
    assert mesh.settings is not None
    return Victims(state_dir)

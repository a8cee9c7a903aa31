"""One local mesh for all stages, with real processes, and one run that grew on it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

import esper
from esper.cli import digits
from esper.client import EsperClient
from esper.core.morphable import MorphableModel
from esper.core.report import RunReport


class TwoLayers(nn.Module):
    """The network that mission.md speaks of: two layers with names."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.Linear(64, 16)
        self.layer2 = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer2(torch.relu(self.layer1(x)))


@dataclass(frozen=True)
class GrownRun:
    """A run on digits that has ended."""

    model: MorphableModel
    report: RunReport
    host_accuracy: float
    grown_accuracy: float


@pytest.fixture(scope="session")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[esper.Mesh]:
    """NATS and the six services as processes on loopback; ended with the tests."""
    with esper.Mesh.local(tmp_path_factory.mktemp("mesh")) as running:
        yield running


@pytest.fixture(scope="session")
def client(mesh: esper.Mesh) -> EsperClient:
    """A client of the mesh's services."""
    return mesh.client()


@pytest.fixture(scope="session")
def grown_run(mesh: esper.Mesh) -> GrownRun:
    """A run that grew on real data through the mesh."""
    return grow_on_digits(mesh)


def grow_on_digits(mesh: Any, *, epochs: int = 30, seed: int = 0, wait_s: float = 10.0) -> GrownRun:
    """Train the two layers on digits; waits for each epoch's decision, so that equal seeds give equal runs."""
    splits = digits.load_digits()
    torch.manual_seed(seed)
    model = esper.wrap(TwoLayers())
    torch.manual_seed(seed)
    host = TwoLayers()
    trainer = esper.Trainer(
        model,
        digits.make_optimizer(model),
        nn.CrossEntropyLoss(),
        mesh=mesh,
        budget=esper.Budget(added_params=2.0),
        seed=seed,
        config=esper.TrainerConfig(show_progress=False, session=esper.SessionConfig(decision_wait_s=wait_s)),
    )
    report = trainer.fit(splits.train_loader(seed), splits.control_loader(), epochs)
    digits.train_plain(host, splits, epochs=epochs, seed=seed)
    return GrownRun(
        model=model,
        report=report,
        host_accuracy=digits.accuracy(host, splits.sealed),
        grown_accuracy=digits.accuracy(model, splits.sealed),
    )


def fresh_net(**settings: Any) -> tuple[MorphableModel, torch.Tensor]:
    """Give a freshly wrapped network that has seen one batch, and that batch."""
    torch.manual_seed(0)
    wrapped = esper.wrap(TwoLayers(), **settings)
    batch = torch.randn(32, 64)
    wrapped(batch)
    return wrapped, batch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the stages in one worker, so that they share one mesh and one run."""
    for item in items:
        if "acceptance" in item.path.parts:
            item.add_marker(pytest.mark.xdist_group("acceptance"))

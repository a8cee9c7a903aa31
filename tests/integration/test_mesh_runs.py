"""Several runs over one mesh, and the default mesh of a session: everything ends with its owner."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import esper
from esper.contracts.errors import InvalidStateError
from esper.contracts.run import RunPhase
from esper.core.wrap import LayerTelemetry


def data(seed: int = 0) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(64, 6, generator=generator)
    return DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=32)


def session_of(model: Any, mesh: Any = None) -> esper.Session:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return esper.Session(model, optimizer, loss_fn=nn.CrossEntropyLoss(), control_loader=data(seed=1), mesh=mesh)


def train(session: esper.Session, model: Any) -> None:
    for x, y in data():
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        session.step(loss, batch=(x, y))
    session.end_epoch()


@pytest.fixture
def model() -> Any:
    telemetry = LayerTelemetry(interval_steps=1)
    return esper.wrap(nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)), telemetry=telemetry)


def test_a_model_runs_twice_over_one_mesh_and_not_twice_at_once(model: Any) -> None:
    runs = []
    with esper.Mesh.embedded() as mesh:
        for _ in range(2):
            with session_of(model, mesh) as session:
                runs.append(session.run_id)
                assert model.oona_client.run_id == session.run_id
                with pytest.raises(InvalidStateError, match="must be in one run at a time"):
                    session_of(model, mesh)
                train(session, model)
            assert model.oona_client.stats().signals_published > 0
        with mesh.client() as client:
            for run_id in runs:
                *_, last = client.tolaria.watch_run(run_id)
                assert last.phase is RunPhase.FINISHED
    assert not model._forward_pre_hooks
    with pytest.raises(InvalidStateError, match="mesh must be open, got a closed one"):
        session_of(model, mesh)


def esper_threads_since(before: set[threading.Thread]) -> set[str]:
    """Names of the project's threads begun since: another test's mesh may live beside."""
    names = {thread.name for thread in set(threading.enumerate()) - before}
    return {name for name in names if name.startswith("esper")}


def esper_threads_left(before: set[threading.Thread]) -> set[str]:
    """Names of those that do not end: a compile under way, which no thread can be kept from, is let run out."""
    for thread in set(threading.enumerate()) - before:
        if thread.name.startswith("esper-compile"):
            thread.join(20)
    return esper_threads_since(before)


def test_a_session_without_a_mesh_ends_its_own(model: Any) -> None:
    before = set(threading.enumerate())
    with session_of(model) as session:
        train(session, model)
        assert "esper-mesh" in esper_threads_since(before)
    assert not esper_threads_left(before)


def test_a_session_that_cannot_start_ends_the_mesh_it_began(model: Any) -> None:
    stray = nn.Parameter(torch.zeros(1))
    before = set(threading.enumerate())
    with pytest.raises(esper.EsperError, match="hold the model's parameters"):
        esper.Session(
            model,
            torch.optim.SGD([*model.parameters(), stray], lr=0.1),
            loss_fn=nn.CrossEntropyLoss(),
            control_loader=data(seed=1),
        )
    assert not esper_threads_left(before)

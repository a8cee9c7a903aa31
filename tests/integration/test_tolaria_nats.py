"""A training run under an operator's hand: a session in a thread, a real NATS, Tolaria behind a real gRPC socket."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import esper
from esper.blueprints.registry import default_registry
from esper.client import EsperClient
from esper.contracts.decision import ControlAction
from esper.contracts.errors import InvalidStateError, NotFoundError
from esper.contracts.lifecycle import SeedLifecycleState as State
from esper.contracts.run import RunPhase
from esper.core.link import BusLink, fresh_client
from esper.mesh import MeshServer
from esper.mesh.loop_thread import LoopThread
from esper.mesh.settings import MeshSettings
from esper.recovery import CheckpointManager
from esper.services.tolaria.server import TolariaNode, TolariaNodeConfig
from esper.telemetry import NatsBus, NatsServer, NatsServerConfig


class NoKernels:
    """A kernel source of a mesh without a library."""

    async def fetch(self, artifact_id: str, *, announced: bool = False) -> Any:
        raise NotFoundError(f"there is no kernel {artifact_id}")

    def at_hand(self, artifact_id: str) -> None:
        return None

    def answer_to(self, spec: Any) -> None:
        return None

    def refuse(self, job_id: str) -> None:
        return None

    def stats(self) -> tuple[()]:
        return ()


class NatsMesh:
    """A line over NATS."""

    def __init__(self, url: str) -> None:
        self._url = url

    def open_link(self, run_id: str, model: Any) -> BusLink:
        client = fresh_client(model, run_id)
        client.connect(lambda: NatsBus.connect(self._url))
        return BusLink(client, NoKernels())


_STEPS_PER_EPOCH = 64
"""Steps of under a millisecond: every epoch tells the mesh how it went, and hundreds of them a second are no run's."""


class Run:
    """A session that trains in a thread until it is stopped."""

    def __init__(self, url: str, directory: Path) -> None:
        torch.manual_seed(0)
        self.model = esper.wrap(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)))
        x = torch.randn(64, 6)
        self.batch = (x, (x[:, 0] * x[:, 1] > 0).long())
        self.run_id = f"run-{uuid.uuid4().hex[:8]}"
        self.store = CheckpointManager(directory)
        self.session = esper.Session(
            self.model,
            torch.optim.SGD(self.model.parameters(), lr=0.05),
            loss_fn=nn.CrossEntropyLoss(),
            control_loader=[(x + 1.0, self.batch[1])],
            mesh=NatsMesh(url),
            config=esper.SessionConfig(
                run_id=self.run_id, checkpoints=self.store, growth=esper.GrowthConfig(incubation_epochs=10_000)
            ),
        )
        self._training = ThreadPoolExecutor(1, thread_name_prefix="test-training")
        self.ended = self._training.submit(self._main)

    def _main(self) -> None:
        with self.session as session:
            while not session.should_stop:
                for _ in range(_STEPS_PER_EPOCH):
                    loss = nn.functional.cross_entropy(self.model(self.batch[0]), self.batch[1])
                    loss.backward()
                    session.step(loss, batch=self.batch)
                session.end_epoch()


@pytest.fixture
def nats_url(tmp_path: Path) -> Iterator[str]:
    with NatsServer(NatsServerConfig(store_dir=tmp_path / "nats")) as server:
        yield server.url


@pytest.fixture
def client(nats_url: str, tmp_path: Path) -> Iterator[EsperClient]:
    loop = LoopThread("test-tolaria")
    stack = ExitStack()

    async def start() -> tuple[Any, Any, MeshServer]:
        bus = await NatsBus.connect(nats_url)
        await bus.ensure_streams()
        node = await TolariaNode.open(TolariaNodeConfig(database_url=f"sqlite:///{tmp_path / 't.db'}"), bus=bus)
        server = MeshServer()
        node.add_to(server)
        await server.start()
        return bus, node, server

    bus, node, server = loop.run(start(), 20)
    with stack:
        stack.callback(loop.close)
        for closing in (bus.close, node.close, server.drain):
            stack.callback(lambda work=closing: loop.run(work(), 20))
        yield stack.enter_context(EsperClient(MeshSettings(tolaria_address=server.address)))


@pytest.fixture
def run(nats_url: str, client: EsperClient, tmp_path: Path) -> Iterator[Run]:
    one = Run(nats_url, tmp_path / "checkpoints")
    yield one
    one.session._desk.stop_asked = True
    one.ended.result(20)


def eventually(condition: Callable[[], bool]) -> None:
    deadline_s, tick = time.monotonic() + 15.0, threading.Event()
    while not condition():
        assert time.monotonic() < deadline_s, "the condition did not come about in time"
        tick.wait(0.02)


def known(client: EsperClient, run: Run) -> bool:
    return any(info.state.run_id == run.run_id for info in client.tolaria.list_runs())


def test_a_run_is_held_and_let_go(client: EsperClient, run: Run) -> None:
    eventually(lambda: known(client, run))
    assert client.tolaria.control(run.run_id, ControlAction.PAUSE, actor="ada").accepted
    eventually(lambda: client.tolaria.get_run(run.run_id)[0].state.phase is RunPhase.PAUSED)
    step = run.session.step_count
    assert not threading.Event().wait(0.2)
    assert run.session.step_count == step
    assert client.tolaria.control(run.run_id, ControlAction.RESUME).accepted
    eventually(lambda: run.session.step_count > step)


def test_a_checkpoint_is_written_while_the_run_goes_on(client: EsperClient, run: Run) -> None:
    eventually(lambda: known(client, run))
    answer = client.tolaria.control(run.run_id, ControlAction.CHECKPOINT)
    assert answer.accepted, answer.detail
    assert run.store.latest() == answer.checkpoint_id
    back = client.tolaria.control(run.run_id, ControlAction.ROLLBACK, checkpoint_id=answer.checkpoint_id)
    assert back.accepted, back.detail


def test_a_seed_is_germinated_and_culled_by_hand(client: EsperClient, run: Run) -> None:
    eventually(lambda: known(client, run))
    blueprint = default_registry().create_blueprint("bottleneck_adapter")
    place = {"layer": "0", "seed_index": 2}
    answer = client.tolaria.control(run.run_id, ControlAction.GERMINATE, blueprint=blueprint, **place)
    assert answer.accepted, answer.detail
    assert run.model.kasmina_layers["0"].state_layout.state(2) is State.ACTIVE
    eventually(lambda: client.tolaria.list_seeds(run.run_id, "0")[0].seeds[2].state is State.ACTIVE)
    refused = client.tolaria.control(run.run_id, ControlAction.GERMINATE, blueprint=blueprint, **place)
    assert (refused.accepted, refused.error_reason) == (False, "INVALID_STATE")
    assert "dormant: seed 2 is ACTIVE" in refused.detail
    assert client.tolaria.control(run.run_id, ControlAction.CULL, **place).accepted
    eventually(lambda: client.tolaria.get_run(run.run_id)[1][0].report is not None)


def test_a_stopped_run_ends_and_takes_no_more_commands(client: EsperClient, run: Run) -> None:
    eventually(lambda: known(client, run))
    assert client.tolaria.control(run.run_id, ControlAction.STOP).accepted
    run.ended.result(20)
    assert run.session.report().phase == "stopped"
    eventually(lambda: client.tolaria.get_run(run.run_id)[0].finished_at is not None)
    with pytest.raises(InvalidStateError, match=f"run {run.run_id} must be under way, got STOPPED"):
        client.tolaria.control(run.run_id, ControlAction.PAUSE)


def test_a_watcher_sees_a_run_to_its_end(client: EsperClient, run: Run) -> None:
    eventually(lambda: known(client, run))
    phases = []
    for news in client.tolaria.watch_run(run.run_id):
        phases.append(news.phase)
        if len(phases) == 3:
            assert client.tolaria.control(run.run_id, ControlAction.STOP).accepted
    assert phases[-1] is RunPhase.STOPPED

"""A run that trains while somebody else decides: what the adaptation latency is measured on.

The deciding side does what Tamiyo does, in Tamiyo's order: it publishes the decision on the durable stream, then asks
Tezzeret for the kernel. Everything after that is the mesh's own work, between real processes.
"""

from __future__ import annotations

import time
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import Final, Self

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import esper
from esper.client import AsyncEsperClient
from esper.contracts.blueprint import Blueprint
from esper.contracts.decision import AdaptationDecision, AdaptationType, CurveState
from esper.contracts.errors import DeadlineExceededError, InvalidStateError
from esper.contracts.kernel import CompileSpec
from esper.contracts.lifecycle import SeedLifecycleState
from esper.contracts.wire import serialize
from esper.execution.layers import KasminaLayer
from esper.execution.state import SeedTransition
from esper.mesh.loop_thread import LoopThread
from esper.mesh.settings import MeshSettings
from esper.services.compose import connect_bus
from esper.telemetry.bus import CONTENT_TYPE_HEADER, Bus
from esper.telemetry.consumer import content_type
from esper.telemetry.subjects import Kind, build_subject
from esper.v1 import decision_pb2

WIDTH: Final = 64
NUM_LAYERS: Final = 8
SEEDS_PER_LAYER: Final = 64
NUM_PLACES: Final = NUM_LAYERS * SEEDS_PER_LAYER
"""Adaptations that one run has room for: each takes a seed of its own."""

_DEADLINE_S: Final = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Latency:
    """How long one adaptation took, in milliseconds."""

    to_plan_ms: float
    """From publishing the decision to the run's accepting it."""
    to_active_ms: float
    """From publishing the decision to the seed's being ACTIVE."""


class DecidingSide:
    """Publishes decisions and asks for kernels on a loop of its own."""

    def __init__(self, settings: MeshSettings) -> None:
        self._loop = LoopThread("bench-decides")
        self._client = AsyncEsperClient(settings)
        self._bus: Bus = self._loop.run(connect_bus(settings), _DEADLINE_S)

    def send(self, decision: AdaptationDecision, spec: CompileSpec) -> Future[None]:
        """Publish a decision and ask for its kernel; returns at once, the future is done when the compiler answered."""
        return self._loop.submit(self._send(decision, spec))

    def round_trip_ms(self, run_id: str) -> float:
        """Give the time of one durable publish, until the stream has acknowledged it."""
        decision = _decision("a" + "0" * 32, run_id, actionable=False)
        start_ns = time.perf_counter_ns()
        self._loop.run(self._publish(decision, msg_id=f"bench-{start_ns}"), _DEADLINE_S)
        return (time.perf_counter_ns() - start_ns) / 1e6

    def close(self) -> None:
        """Let go of bus and channels."""
        self._loop.run(self._bus.close(), _DEADLINE_S)
        self._loop.run(self._client.close(), _DEADLINE_S)
        self._loop.close()

    async def _send(self, decision: AdaptationDecision, spec: CompileSpec) -> None:
        await self._publish(decision, msg_id=decision.adaptation_id)
        await self._client.tezzeret.compile(
            spec, wait=False, run_id=decision.run_id, adaptation_id=decision.adaptation_id
        )

    async def _publish(self, decision: AdaptationDecision, *, msg_id: str) -> None:
        headers = {CONTENT_TYPE_HEADER: content_type(decision_pb2.AdaptationDecision)}
        subject = build_subject(decision.run_id, Kind.DECISION)
        await self._bus.publish(subject, serialize(decision), headers=headers, msg_id=msg_id, durable=True)


class AdaptationRun:
    """A small network that trains step by step; each adaptation takes the next free seed. A context manager."""

    def __init__(self, mesh: esper.Mesh, settings: MeshSettings) -> None:
        torch.manual_seed(0)
        host = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(NUM_LAYERS)))
        self._batch = (torch.randn(32, WIDTH), torch.randn(32, WIDTH))
        self._model = esper.wrap(host, seeds_per_layer=SEEDS_PER_LAYER)
        optimizer = torch.optim.SGD(self._model.parameters(), lr=1e-4)
        control = DataLoader(TensorDataset(*self._batch), batch_size=32)
        self._loss_fn = nn.MSELoss()
        self._session = esper.Session(self._model, optimizer, loss_fn=self._loss_fn, control_loader=control, mesh=mesh)
        self._mesh = mesh
        self._bystander = _bystander()
        self._side = DecidingSide(settings)
        self._forget = self._model.seed_states.subscribe(self._note)
        self._seen_ns: dict[SeedLifecycleState, int] = {}
        self._next_place = 0
        self.step_ms = min(self._time_step() for _ in range(20))

    def adapt(self, blueprint: Blueprint, random_seed: int) -> Latency:
        """Decide for a seed, train until it is ACTIVE, wait for the compiler's answer, take the seed away again.

        Raises:
            InvalidStateError: Every place is used, or the adaptation failed.
            DeadlineExceededError: The seed did not become ACTIVE within a minute.
        """
        layer, seed_index = self._take_place()
        site = self._model.kasmina_layers[layer].site
        assert site is not None
        adaptation_id = f"a{self._next_place:032x}"
        decision = _decision(
            adaptation_id, self._session.run_id, layer=layer, seed_index=seed_index, blueprint=blueprint, site=site
        )
        self._seen_ns.clear()
        start_ns = time.perf_counter_ns()
        asked = self._side.send(decision, CompileSpec(ir=blueprint.ir, site=site, random_seed=random_seed))
        self._train_until_active(adaptation_id, start_ns)
        seen = self._seen_ns
        asked.result(_DEADLINE_S)  # no work for this adaptation is left over for the next one's time
        self._session.orchestrator.remove_seed(layer, seed_index, "its latency is measured")
        return Latency(
            to_plan_ms=(seen[SeedLifecycleState.LOADING] - start_ns) / 1e6,
            to_active_ms=(seen[SeedLifecycleState.ACTIVE] - start_ns) / 1e6,
        )

    def germination_ms(self) -> float:
        """Give the time of bringing the kernel used last, already in memory, to ACTIVE: the part nobody can spare."""
        artifact_id = list(self._session.orchestrator.adaptations.values())[-1].artifact_id
        kernel = self._mesh.fetch_kernel(artifact_id)
        start_ns = time.perf_counter_ns()
        self._bystander.attach_kernel(0, kernel)
        took_ms = (time.perf_counter_ns() - start_ns) / 1e6
        for state in (SeedLifecycleState.CULLED, SeedLifecycleState.EMBARGOED, SeedLifecycleState.DORMANT):
            self._bystander.state_layout.transition(0, state)
        return took_ms

    def train_for(self, seconds: float) -> None:
        """Train on, as a run does between decisions, while the mesh does what the last one left it to do."""
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            self._step()

    def round_trip_ms(self) -> float:
        """Give the time of one durable publish on the run's stream, while the run stands still."""
        return self._side.round_trip_ms(self._session.run_id)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._forget()
        self._side.close()
        self._session.close()

    def _train_until_active(self, adaptation_id: str, start_ns: int) -> None:
        while SeedLifecycleState.ACTIVE not in self._seen_ns:
            self._step()
            adaptation = self._session.orchestrator.adaptations.get(adaptation_id)
            if adaptation is not None and not adaptation.open:
                raise InvalidStateError(f"adaptation must become active, it ended: {adaptation.reason}")
            if time.perf_counter_ns() - start_ns > _DEADLINE_S * 1e9:
                raise DeadlineExceededError(f"seed must be active within {_DEADLINE_S:g} s, it is not")

    def _step(self) -> None:
        inputs, targets = self._batch
        loss = self._loss_fn(self._model(inputs), targets)
        loss.backward()
        self._session.step(loss, batch=self._batch)

    def _time_step(self) -> float:
        start_ns = time.perf_counter_ns()
        self._step()
        return (time.perf_counter_ns() - start_ns) / 1e6

    def _take_place(self) -> tuple[str, int]:
        """Give the next seed, layer after layer, so that no layer is asked twice in a row."""
        if self._next_place >= NUM_PLACES:
            raise InvalidStateError(f"a run has room for {NUM_PLACES} adaptations, and all were used")
        seed_index, layer = divmod(self._next_place, NUM_LAYERS)
        self._next_place += 1
        return str(layer), seed_index

    def _note(self, transition: SeedTransition) -> None:
        self._seen_ns.setdefault(transition.to_state, time.perf_counter_ns())


def _bystander() -> KasminaLayer:
    """Give a layer like the run's, of no run."""
    model = esper.wrap(nn.Sequential(nn.Linear(WIDTH, WIDTH)), telemetry=False)
    model(torch.zeros(2, WIDTH))
    return model.kasmina_layers["0"]


def _decision(adaptation_id: str, run_id: str, *, actionable: bool = True, **fields: object) -> AdaptationDecision:
    blueprint = fields.get("blueprint")
    given = {
        "adaptation_id": adaptation_id,
        "run_id": run_id,
        "state_sequence": 1,
        "epoch": 0,
        "adaptation_type": AdaptationType.ADD_SEED if actionable else AdaptationType.OPTIMIZE_PARAMETERS,
        "blueprint_id": blueprint.id if isinstance(blueprint, Blueprint) else "",
        "confidence": 1.0,
        "urgency": 1.0,
        "curve_state": CurveState.PLATEAU,
        "actionable": actionable,
        "created_at": datetime.now(UTC),
    }
    return AdaptationDecision(**(given | fields))  # type: ignore[arg-type]

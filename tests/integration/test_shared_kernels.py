"""Runs share kernels: through a real mesh, what one run had compiled another has near before it asks for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime

import pytest
import torch
from torch import nn

import esper
from esper.blueprints import default_registry
from esper.contracts.blueprint import Site, SiteKind
from esper.contracts.decision import AdaptationDecision
from esper.contracts.kernel import ENDED_PHASES, CompileJob, JobPhase
from esper.contracts.lifecycle import SeedLifecycleState
from esper.contracts.run import CacheTierStatus, LayerStatus, RunPhase, SeedStatus, SystemStatePacket
from esper.core.link import KernelArrival, RunLink
from esper.services.tamiyo.forecast import KernelForecaster
from esper.services.tamiyo.server import TamiyoNode
from esper.telemetry.subjects import Kind

SITE = Site(kind=SiteKind.LINEAR, input_shape=(6,), output_shape=(4,))
LOSSES = (2.0, 1.2, 0.8, 0.6, 0.5, 0.45, 0.43, 0.42, 0.417, 0.416, 0.4155, 0.4153)
WAIT_S = 120.0


def packet(run_id: str, sequence: int, random_seed: int) -> SystemStatePacket:
    """Give a packet of a run whose losses flatten; before the first epoch it has none."""
    loss = LOSSES[min(sequence - 2, len(LOSSES) - 1)] if sequence > 1 else None
    seeds = tuple(SeedStatus(seed_index=index, state=SeedLifecycleState.DORMANT) for index in range(4))
    return SystemStatePacket(
        run_id=run_id,
        sequence=sequence,
        phase=RunPhase.TRAINING if sequence > 1 else RunPhase.STARTED,
        epoch=sequence - 1,
        step=32 * (sequence - 1),
        train_loss=loss,
        control_loss=loss,
        control_loss_se=0.02,
        planned_epochs=40,
        layers=(LayerStatus(layer="0", site=SITE, seeds=seeds),),
        random_seed=random_seed,
        created_at=datetime.now(UTC),
    )


class Run:
    """One run's line to the mesh, and what came in on it."""

    def __init__(self, mesh: esper.Mesh, run_id: str, random_seed: int) -> None:
        model = esper.wrap(nn.Sequential(nn.Linear(6, 4)), telemetry=False)
        model(torch.zeros(2, 6))
        self.link: RunLink = mesh.open_link(run_id, model)
        self.decisions: list[AdaptationDecision] = []
        self.kernels: list[KernelArrival] = []
        self.sequence = 0
        self._run_id, self._random_seed = run_id, random_seed

    def say(self) -> None:
        """Send the next packet."""
        self.sequence += 1
        self.link.send(Kind.STATE, packet(self._run_id, self.sequence, self._random_seed))

    def until(self, done: Callable[[], bool], *, pause_s: float = 0.01) -> None:
        """Take in what comes until something holds, or fail."""
        deadline_s, tick = time.monotonic() + WAIT_S, threading.Event()
        while not done():
            for item in self.link.arrivals():
                self.decisions += [item] if isinstance(item, AdaptationDecision) else []
                self.kernels += [item] if isinstance(item, KernelArrival) else []
            assert time.monotonic() < deadline_s, "what a test waits for must come in time"
            tick.wait(pause_s)

    def grow(self) -> None:
        """Say what leads to growth, and wait for the decisions and all their kernels."""
        while not any(one.actionable for one in self.decisions):
            answered = len(self.decisions)
            self.say()
            self.until(lambda before=answered: len(self.decisions) > before)  # type: ignore[misc]
        size = next(one.race_size for one in self.decisions if one.actionable)
        # A kernel that is near may be here before the race's next decision is.
        self.until(lambda: len(self.kernels) >= sum(one.actionable for one in self.decisions) >= size)


def tier(mesh: esper.Mesh, name: str) -> CacheTierStatus:
    return next(status for status in mesh.kernel_source.stats() if status.tier == name)


def jobs(mesh: esper.Mesh) -> list[CompileJob]:
    with mesh.client() as client:
        return list(client.tezzeret.list_jobs())


def foretell(mesh: esper.Mesh) -> None:
    """Have an embedded mesh make forecasts, as any other does by default."""
    (node,) = (one for one in mesh._backend._nodes if isinstance(one, TamiyoNode))  # type: ignore[attr-defined]
    assert node._loop is not None
    tamiyo, compiler = node.tamiyo, mesh._backend.stub("tezzeret")
    node._loop._forecaster = KernelForecaster(tamiyo.policy.posterior, tamiyo.candidates, compiler)


@pytest.mark.timeout(300)
def test_an_embedded_mesh_shares_kernels_between_runs_and_makes_none_that_nobody_wants() -> None:
    with esper.Mesh.embedded() as mesh:
        runs = [Run(mesh, f"run-{seed}", random_seed=seed) for seed in range(3)]
        for run in runs:
            run.grow()
        asked = [one.ready.artifact_id for run in runs for one in run.kernels]
        designs = {
            one.blueprint_id for run in runs for one in run.decisions if one.actionable and one.blueprint is not None
        }
        assert len(set(asked)) == len(designs) < len(asked), "one kernel for each blueprint at the site, whoever asks"
        assert {job.artifact_id for job in jobs(mesh)} == set(asked)
        assert (tier(mesh, "l1").hits, tier(mesh, "l3").hits) == (len(asked) - len(designs), len(designs))


@pytest.mark.timeout(300)
def test_a_second_run_of_another_seed_finds_kernels_near_before_it_asks() -> None:
    with esper.Mesh.embedded() as mesh:
        foretell(mesh)
        first = Run(mesh, "first", random_seed=1)
        first.grow()
        fitting = {one.id for one in default_registry().for_site(SITE)}

        def all_are_foreseen() -> bool:
            first.say()
            return fitting <= {job.blueprint_id for job in jobs(mesh) if job.phase is JobPhase.SUCCEEDED}

        first.until(all_are_foreseen, pause_s=0.5)
        first.until(lambda: all(job.phase in ENDED_PHASES for job in jobs(mesh)))
        made = [job for job in jobs(mesh) if job.phase is JobPhase.SUCCEEDED]
        wanted = {arrival.ready.artifact_id for arrival in first.kernels}
        assert wanted < {job.artifact_id for job in made}, "more was made ready than the first run asked for"
        assert tier(mesh, "l3").hits == len(wanted)
        templates = {default_registry().create_blueprint(name).id for name in default_registry().names()}
        near = {job.artifact_id for job in made if job.blueprint_id in templates}

        def all_are_near() -> bool:
            first.say()
            return tier(mesh, "l3").warmed >= len(near - wanted) > 0

        first.until(all_are_near, pause_s=0.5)
        told = first.sequence
        first.until(lambda: max(one.state_sequence for one in first.decisions) >= told)
        first.until(lambda: len(first.kernels) >= sum(one.actionable for one in first.decisions))
        l1 = tier(mesh, "l1").hits
        second = Run(mesh, "second", random_seed=2)
        second.grow()
        asked = [arrival.ready.artifact_id for arrival in second.kernels]
        found = sum(artifact_id in near | wanted for artifact_id in asked)
        assert found > 0
        assert tier(mesh, "l1").hits - l1 >= found, "Karn's designs may have been brought near as well"
        designs = {one.adaptation_id: one.blueprint_id for one in second.decisions}
        elsewhere = {designs[one.ready.adaptation_id] for one in second.kernels if one.ready.artifact_id not in near}
        assert not elsewhere & templates, "of the library's blueprints none had to be compiled for the second run"

"""The arms that grow under Esper: the host, grown by a mesh or by chance, and the grown topology from scratch."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Final

import torch
from torch import nn

import esper
from bench.growth_hosts import BLUEPRINT_KINDS, Cell, Settings, make_net, num_parameters
from bench.growth_tasks import Batches, load
from bench.growth_training import Outcome, Point, Trained, Tried, make_optimizer, outcome_of
from esper.blueprints.build import to_module
from esper.blueprints.flops import ThreadFlops
from esper.contracts.decision import AdaptationDecision
from esper.contracts.lifecycle import SeedLifecycleState
from esper.core.growth import GrowthConfig
from esper.core.link import Arrival, RunLink
from esper.core.morphable import MorphableModel
from esper.core.pacing import tail_factor
from esper.core.report import EpochRecord, RunReport
from esper.core.session import MeshPort
from esper.execution.grown import GrownSeed

OpenMesh = Callable[[], AbstractContextManager[MeshPort]]
"""Opens a mesh to which nothing is known of earlier runs."""

DECISION_WAIT_S: Final = 60.0
"""Longest wait for an epoch's decision; runs with equal seeds see the same decisions however busy the machine is."""


SEEDS_PER_LAYER: Final = 8
"""As many as race at once: in hosts of two layers all rivals may want the same one."""


class ListeningMesh:
    """A mesh whose decisions are written down: a report says what became of them, not how sure they were."""

    def __init__(self, mesh: MeshPort) -> None:
        self._mesh = mesh
        self.decisions: dict[str, AdaptationDecision] = {}

    def open_link(self, run_id: str, model: MorphableModel) -> RunLink:
        """Give the run's line, which writes down the decisions that arrive."""
        link = self._mesh.open_link(run_id, model)
        arrivals = link.arrivals

        def heard() -> Iterator[Arrival]:
            for item in arrivals():
                if isinstance(item, AdaptationDecision):
                    self.decisions[item.adaptation_id] = item
                yield item

        link.arrivals = heard  # type: ignore[method-assign]
        return link


def grow_arm(open_mesh: OpenMesh, cell: Cell, *, seed: int, wait_s: float = DECISION_WAIT_S) -> Outcome:
    """Grow the cell's host twice, each time through a new mesh: once with FLOPs counted, once for the wall time.

    What is not the forward and backward pass of a training step is growth's own work: seeds that learn alone, looks at
    the control split, counterfactuals. Compiling kernels is in the wall time and not in the FLOPs. ``wait_s`` 0 suits a
    mesh that answers at once.
    """
    with open_mesh() as mesh:
        counted = grow_once(mesh, cell, seed=seed, wait_s=wait_s, counts=True)
    with open_mesh() as mesh:
        timed = grow_once(mesh, cell, seed=seed, wait_s=wait_s, counts=False)
    curve = tuple(
        replace(point, seconds=other.seconds) for point, other in zip(counted.curve, timed.curve, strict=True)
    )
    return replace(counted, curve=curve, seconds=timed.seconds, is_repeated=_came_to(counted) == _came_to(timed))


def _came_to(outcome: Outcome) -> tuple[object, ...]:
    """Give what must be equal in two runs of one seed."""
    ways = [(point.accuracy, point.loss) for point in outcome.curve]
    tried = [(item.blueprint, item.layer, item.outcome, item.contribution) for item in outcome.tried]
    return outcome.accuracy, outcome.loss, outcome.parameters, ways, tried


def grow_once(
    mesh: MeshPort, cell: Cell, *, seed: int, wait_s: float = DECISION_WAIT_S, counts: bool = False
) -> Outcome:
    """Grow the cell's host through a mesh, whatever that knows already; FLOPs are 0 unless they are counted."""
    task, settings, listening = load(cell.task), cell.settings, ListeningMesh(mesh)
    steps, own = _Counter(counts), _Counter(counts)
    began_s = time.perf_counter()
    model = esper.wrap(make_net(cell, cell.host, seed), seeds_per_layer=SEEDS_PER_LAYER, exclude=_unwrapped(cell))
    # The policy's draws depend on the run's name, so equal seeds need equal names.
    name = f"bench-growth-{cell.name.replace('/', '-')}-{seed}"
    batches = Batches(task.train, batch_size=settings.batch_size, seed=seed, passes_per_epoch=task.passes_per_epoch)
    curve: list[Point] = []

    def point(record: EpochRecord) -> Point:
        return Point(
            epoch=record.epoch,
            flops=steps.total + own.total,
            seconds=time.perf_counter() - began_s,
            accuracy=record.control_accuracy,
            loss=record.control_loss,
        )

    torch.manual_seed(seed)
    optimizer = make_optimizer(model, settings)
    with own.counting():
        session = esper.Session(
            model,
            optimizer,
            loss_fn=nn.CrossEntropyLoss(),
            control_loader=[(task.control.inputs, task.control.targets)],
            mesh=listening,
            budget=esper.Budget(added_params=cell.max_parameters - num_parameters(model)),
            seed=seed,
            config=esper.SessionConfig(
                run_id=name, decision_wait_s=wait_s, planned_epochs=settings.epochs, growth=_growth(cell)
            ),
        )
    with session:
        while session.epoch_count < settings.epochs:
            _let_rates_fall(optimizer, settings, epoch=session.epoch_count)
            _grow_epoch(model, session, batches, steps=steps, own=own)
            with own.counting():
                record = session.end_epoch()
            curve.append(point(record))
        with own.counting():
            session.finish()
        curve[-1] = replace(curve[-1], flops=steps.total + own.total, seconds=time.perf_counter() - began_s)
    outcome = outcome_of(task, Trained(model, tuple(curve), curve[-1]), rate=settings.learning_rate, tail=settings.tail)
    tried = tuple(_tried(session.report(), listening))
    topology = tuple(base64.b64encode(seed.to_bytes()).decode() for seed in kept_seeds(model))
    return replace(outcome, own_flops=own.total, tried=tried, topology=topology)


def _growth(cell: Cell) -> GrowthConfig:
    """Give how the cell's host grows: by Esper's own settings, but no rate falls twice."""
    growth = GrowthConfig(allowed_blueprints=BLUEPRINT_KINDS[cell.kinds])
    return replace(growth, graft_tail=0.0) if cell.settings.tail else growth


def _let_rates_fall(optimizer: torch.optim.Optimizer, settings: Settings, *, epoch: int) -> None:
    """Let every rate, as it stands, fall as a static network's does; what growth has made of it stays in it."""
    before, now = (tail_factor(max(0, at) / settings.epochs, settings.tail) for at in (epoch - 1, epoch))
    for group in optimizer.param_groups:
        group["lr"] *= now / before


class _Counter:
    """Counts FLOPs over several stretches, or nothing."""

    def __init__(self, counts: bool) -> None:
        self._counts = counts
        self.total = 0

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what is done within."""
        if not self._counts:
            yield
            return
        with ThreadFlops() as counter:
            yield
        self.total += counter.total


def _grow_epoch(
    model: MorphableModel, session: esper.Session, batches: Batches, *, steps: _Counter, own: _Counter
) -> None:
    model.train()
    for inputs, targets in batches:
        with steps.counting():
            loss = nn.functional.cross_entropy(model(inputs), targets)
            loss.backward()  # type: ignore[no-untyped-call]
        with own.counting():
            session.step(loss, batch=(inputs, targets))


def _unwrapped(cell: Cell) -> list[str] | None:
    """Name what cannot hold seeds, so that wrapping has nothing to warn of."""
    model = make_net(cell, cell.host, 0)
    return [name for name, module in model.named_modules() if isinstance(module, nn.Embedding)] or None


def _tried(report: RunReport, listening: ListeningMesh) -> Iterator[Tried]:
    for item in report.adaptations:
        low, high = (None, None) if item.interval is None else item.interval
        yield Tried(
            blueprint=item.blueprint or item.adaptation_type,
            layer=item.layer,
            outcome=item.outcome,
            group=listening.decisions[item.id].group,
            confidence=listening.decisions[item.id].confidence,
            contribution=item.contribution,
            low=low,
            high=high,
            price=item.price,
            parameters=item.parameters,
            begun_epoch=item.begun_epoch,
            adaptation_type=item.adaptation_type,
        )


def kept_seeds(model: MorphableModel) -> list[GrownSeed]:
    """Give the fossils of a model as plain data."""
    return [seed for seed in model.grown_structure() if seed.state is SeedLifecycleState.FOSSILIZED]


# ------------------------------------------------------------------ the grown topology from scratch


def topology_from(encoded: Iterable[str]) -> list[GrownSeed]:
    """Read the seeds of an outcome."""
    return [GrownSeed.from_bytes(base64.b64decode(seed)) for seed in encoded]


def rebuild(cell: Cell, topology: Iterable[GrownSeed], *, seed: int, as_born: bool) -> nn.Module:
    """Give the grown topology as plain torch modules, with no trained weight in it.

    The host's weights are those that every arm of the seed starts from. The kept seeds' are drawn anew: as seeds are
    born (the last map is zero, so the network starts as the host alone), or as torch initialises the modules they are
    made of; parameters that stand in no module of torch's (gates, scales) have no rule there and start as born.
    """
    structure = list(topology)
    model = esper.wrap(make_net(cell, cell.host, seed), seeds_per_layer=SEEDS_PER_LAYER, exclude=_unwrapped(cell))
    with torch.no_grad():
        model.eval()(load(cell.task).train.inputs[:1])  # layers learn their shapes from a pass
    model.rebuild(structure)
    for number, grown in enumerate(structure):
        born = to_module(grown.blueprint_ir(), grown.site, seed=(seed + 1) * 1000 + number)
        if not as_born:
            _initialise(born, seed * 1000 + number)
        live = model.kasmina_layer(grown.layer).find_seed(grown.seed_index)
        assert live is not None
        live.kernel.load_state_dict(born.state_dict())
    return esper.export(model).train()


def _initialise(module: nn.Module, seed: int) -> None:
    """Draw the weights of every torch module within anew, by its own rule."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for part in module.modules():
            reset = getattr(part, "reset_parameters", None)
            if callable(reset):
                reset()

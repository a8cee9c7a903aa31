"""G5: what growing costs, by phase: FLOPs and time, and how long single steps are held up.

    symbol   meaning                                                                       unit
    c_p      what a phase costs: as `esper.Session` counts and times it                    FLOPs, s
    s        what the training steps cost without growth's part in them                    FLOPs, s
    t_i      processor time of step i in the training thread, growth's part included      s
    m        median t_i of the steps in which nothing grew: the reference, in the same run s

Shares are c_p / (s + sum of all c). FLOPs come from one run and times from another of the same seed, which grows alike:
counting takes time itself. Phases as `measures.md` names them: *probe* is the batch that a seed's weights are fitted to
as it is born, with taking decisions and kernels up; there is no *screen* in a run (experiment 0009).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import esper
from bench.growth_grown import DECISION_WAIT_S, SEEDS_PER_LAYER, OpenMesh
from bench.growth_hosts import Cell, make_cell, make_net, num_parameters
from bench.growth_tasks import Batches, TaskName, load
from bench.growth_training import make_optimizer
from bench.paired import percentile, spread
from bench.report import Figure, Goal, Result, Spread, at_most
from esper.blueprints.flops import ThreadFlops
from esper.contracts.errors import InvalidStateError
from esper.contracts.run import GrowthCost, GrowthPhase
from esper.core.report import RunReport
from esper.core.session import MeshPort

OWN_GOAL: Final = at_most(0.3)
"""Share of a run's FLOPs that growth may take for itself."""
HELD_GOAL: Final = at_most(2.0)
"""Median steps that a step may take in which growth does something."""
PHASES: Final = {
    "probe": GrowthPhase.BIRTH,
    "isolation": GrowthPhase.ISOLATION,
    "race": GrowthPhase.RACE,
    "evaluation": GrowthPhase.EVALUATION,
    "looks at the control split": GrowthPhase.CONTROL,
}
"""Phases that cost anything, as tables call them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One training step."""

    cpu_s: float
    """Processor time in the training thread."""
    wall_s: float
    """Wall time."""
    growth_s: float
    """Of that, growth's own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Grown:
    """One run."""

    steps: tuple[Step, ...]
    """Its steps, first to last."""
    step_flops: int
    """FLOPs of the steps' forward and backward passes; 0 where they were not counted."""
    costs: tuple[GrowthCost, ...]
    """What growth cost."""
    report: RunReport
    """What was tried."""


def measure(*, quick: bool) -> Result:
    """Grow perceptrons on digits and mnist1d, three seeds each, or one seed on digits."""
    torch.set_num_threads(1)
    tasks: Sequence[TaskName] = ("digits",) if quick else ("digits", "mnist1d")
    num_seeds = 1 if quick else 3
    figures: list[Figure] = []
    for task in tasks:
        cell = make_cell(task, "mlp")
        pairs = [grow_pair(esper.Mesh.embedded, cell, seed=seed) for seed in range(num_seeds)]
        figures += share_figures(cell.name, pairs) + held_figures(cell.name, [timed for _, timed in pairs])
    notes = (
        f"{num_seeds} seeds a task, perceptrons; settings and splits as in `growth`. Spreads of shares are over seeds.",
        "Steps: processor time of the training thread over the median step of the same run in which nothing grew.",
        "A multiply-add counts 2; matrix products, convolutions and attention are counted. Compiling is in no phase: "
        "the mesh does it beside the training thread.",
    )
    return Result(name="g5_cost", figures=tuple(figures), notes=notes)


def grow_pair(open_mesh: OpenMesh, cell: Cell, *, seed: int) -> tuple[Grown, Grown]:
    """Grow a seed with FLOPs counted, and again for the time, each through a new mesh.

    Raises:
        InvalidStateError: The two did not come to the same.
    """
    with open_mesh() as mesh:
        counted = grow(mesh, cell, seed=seed, counts_flops=True)
    with open_mesh() as mesh:
        timed = grow(mesh, cell, seed=seed, counts_flops=False)
    one, other = (_came_to(run.report) for run in (counted, timed))
    if one != other:
        raise InvalidStateError(f"{cell.name}: both runs of seed {seed} must come to the same, got {one} and {other}")
    return counted, timed


def grow(mesh: MeshPort, cell: Cell, *, seed: int, counts_flops: bool, wait_s: float = DECISION_WAIT_S) -> Grown:
    """Grow the cell's host, step by step under the clock."""
    task, settings = load(cell.task), cell.settings
    model = esper.wrap(make_net(cell, cell.host, seed), seeds_per_layer=SEEDS_PER_LAYER)
    batches = Batches(task.train, batch_size=settings.batch_size, seed=seed, passes_per_epoch=task.passes_per_epoch)
    torch.manual_seed(seed)
    session = esper.Session(
        model,
        make_optimizer(model, settings),
        loss_fn=nn.CrossEntropyLoss(),
        control_loader=[(task.control.inputs, task.control.targets)],
        mesh=mesh,
        budget=esper.Budget(added_params=cell.max_parameters - num_parameters(model)),
        seed=seed,
        config=esper.SessionConfig(
            run_id=f"bench-g5-{cell.name.replace('/', '-')}-{seed}",
            decision_wait_s=wait_s,
            planned_epochs=settings.epochs,
            counts_flops=counts_flops,
        ),
    )
    steps: list[Step] = []
    step_flops = 0

    def train(inputs: torch.Tensor, targets: torch.Tensor) -> None:
        nonlocal step_flops
        loss, flops = _passes(model, inputs, targets, counts=counts_flops)
        step_flops += flops
        session.step(loss, batch=(inputs, targets))

    with session:
        while session.epoch_count < settings.epochs:
            model.train()
            for inputs, targets in batches:
                steps.append(_timed(session, lambda x=inputs, y=targets: train(x, y)))  # type: ignore[misc]
            session.end_epoch()
        report = session.report()
        return Grown(steps=tuple(steps), step_flops=step_flops, costs=session.growth_costs, report=report)


def share_figures(name: str, pairs: Sequence[tuple[Grown, Grown]]) -> list[Figure]:
    """Give the share of each phase in the FLOPs and in the time of whole runs, means over the seeds."""
    flops = [_shares({cost.phase: float(cost.flops or 0) for cost in run.costs}, run.step_flops) for run, _ in pairs]
    times = [_shares({cost.phase: cost.seconds for cost in run.costs}, _plain_s(run)) for _, run in pairs]
    figures: list[Figure] = []
    for what, found, goal in (("FLOPs", flops, OWN_GOAL), ("time", times, None)):
        for phase, key in PHASES.items():
            figures.append(_mean(f"{name}: {what}, {phase}", [shares[key] for shares in found]))
        figures.insert(-len(PHASES) + 1, _mean(f"{name}: {what}, screen", [0.0] * len(found)))
        whole = [sum(shares.values()) for shares in found]
        figures.append(_mean(f"{name}: {what}, growth's own in all", whole, goal))
    return figures


def held_figures(name: str, runs: Sequence[Grown]) -> list[Figure]:
    """Give how long steps take in which growth does something, over the median step in which it does nothing.

    Raises:
        InvalidStateError: A run has no step of one of both kinds.
    """
    ratios: list[float] = []
    for run in runs:
        plain, held = ([step.cpu_s for step in run.steps if (step.growth_s > 0) is grows] for grows in (False, True))
        if not plain or not held:
            raise InvalidStateError(f"{name}: a run must have steps with growth and without, got {len(held)} with")
        middle = statistics.median(plain)
        ratios += [step / middle for step in held]
    shares = [sum(step.growth_s > 0 for step in run.steps) / len(run.steps) for run in runs]
    worst, median = max(ratios), statistics.median(ratios)
    return [
        Figure(name=f"{name}: a step held by growth, median", value=median, unit="steps", spread=spread(ratios)),
        Figure(name=f"{name}: a step held by growth, p99", value=percentile(ratios, 99), unit="steps", goal=HELD_GOAL),
        Figure(name=f"{name}: a step held by growth, longest", value=worst, unit="steps", goal=HELD_GOAL),
        _mean(f"{name}: steps held by growth", shares),
    ]


def _passes(model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor, *, counts: bool) -> tuple[torch.Tensor, int]:
    """Run a step's forward and backward pass; gives the loss, and the FLOPs where they are counted."""

    def run() -> torch.Tensor:
        loss = cross_entropy(model(inputs), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    if not counts:
        return run(), 0
    with ThreadFlops() as counter:
        loss = run()
    return loss, counter.total


def _timed(session: esper.Session, step: Callable[[], object]) -> Step:
    before_s = _own_s(session)
    wall_s, cpu_ns = time.perf_counter(), time.thread_time_ns()
    step()
    cpu_s, wall_s = (time.thread_time_ns() - cpu_ns) / 1e9, time.perf_counter() - wall_s
    return Step(cpu_s=cpu_s, wall_s=wall_s, growth_s=_own_s(session) - before_s)


def _own_s(session: esper.Session) -> float:
    return sum(cost.seconds for cost in session.growth_costs)


def _plain_s(run: Grown) -> float:
    """Give the wall time of the steps without growth's part in them."""
    return sum(step.wall_s - step.growth_s for step in run.steps)


def _shares(costs: dict[GrowthPhase, float], steps: float) -> dict[GrowthPhase, float]:
    whole = steps + sum(costs.values())
    return {phase: cost / whole for phase, cost in costs.items()}


def _mean(name: str, values: Sequence[float], goal: Goal | None = None) -> Figure:
    around = Spread(min(values), max(values))
    return Figure(name=name, value=statistics.fmean(values), unit="share", goal=goal, spread=around)


def _came_to(report: RunReport) -> list[tuple[str, str, str, float | None]]:
    return [(item.layer, item.blueprint, item.outcome, item.contribution) for item in report.adaptations]

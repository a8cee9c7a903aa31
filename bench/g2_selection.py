"""G2: does what a race measures tell which candidate is worth growing? Every candidate is trained out to see.

    symbol   meaning                                                                              unit
    c        a template at a layer, or between two, that fits the budget of parameters by itself
    e_c      what a race sees of c: control loss without it minus with it, after learning alone   nats
    g_c      true gain: sealed loss of the host alone minus that of the host in which c learns    nats
             with everything else from the first race on, both trained to the end
    share    (g of the candidate that a predictor puts first - mean g) / (greatest g - mean g)

A share of 0 is what chance finds in the mean, 1 what one finds who knows every end beforehand. The rank correlation is
Spearman's, over all candidates. Parameters and FLOPs of a candidate stand beside the race as predictors that cost
nothing. Rates, epochs and splits are those of ``growth``; weights and batches are equal for all candidates of a seed.
All candidates of a seed learn alone behind one host, for as long as a race lasts, and none leaves early.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.functional import cross_entropy

import esper
from bench.growth_hosts import Cell, make_cell, make_net, num_parameters
from bench.growth_tasks import Batches, TaskName, load
from bench.growth_training import evaluate, make_optimizer
from bench.report import Figure, Result, Spread
from esper.blueprints import default_registry
from esper.blueprints.cost import cost
from esper.blueprints.ir import reads_input
from esper.contracts.blueprint import BlueprintCost, BlueprintIR
from esper.contracts.errors import InvalidInputError
from esper.contracts.lifecycle import SeedLifecycleState
from esper.core.flops import forward_flops
from esper.core.growth import GrowthConfig
from esper.core.incubator import Incubator, affordable_way
from esper.core.smoothing import EpochMean
from esper.execution.birth import fit_to_site, seen_at_site
from esper.execution.counterfactual import evaluate_configurations
from esper.execution.overrides import SeedRef
from esper.services.tamiyo.config import TamiyoConfig

WARM_EPOCHS: Final = TamiyoConfig().first_race_epochs
"""Epochs before the first race."""
PREDICTORS: Final = ("race", "parameters", "FLOPs")
_GROWTH: Final = GrowthConfig()

_Row = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A template at a place."""

    layer: str
    """Layer it stands at."""
    source: str
    """Layer whose input it reads; empty for its own."""
    name: str
    """Template."""
    ir: BlueprintIR
    """Its graph."""
    cost: BlueprintCost
    """What it costs there."""

    def __str__(self) -> str:
        return f"{self.name} at {self.layer}" + (f" from {self.source}" if self.source else "")


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """What came of every candidate under one seed."""

    effects: tuple[float, ...]
    """e_c, in nats."""
    gains: tuple[float, ...]
    """g_c, in nats."""


def measure(*, quick: bool) -> Result:
    """Train out every candidate of perceptrons on digits and mnist1d, eight seeds each; quick: two, on digits."""
    torch.set_num_threads(1)
    tasks: Sequence[TaskName] = ("digits",) if quick else ("digits", "mnist1d")
    num_seeds = 2 if quick else 8
    figures: list[Figure] = []
    notes: list[str] = []
    for task in tasks:
        cell = make_cell(task, "mlp")
        candidates = candidates_of(cell)
        runs = []
        for seed in range(num_seeds):
            runs.append(select(cell, candidates, seed=seed))
            print(f"{cell.name}: seed {seed} of {num_seeds} done", file=sys.stderr, flush=True)
        figures += figures_of(cell.name, candidates, runs)
        notes.append(best_of(cell.name, candidates, runs))
    notes.append(
        f"{num_seeds} seeds; spreads are least and greatest of a seed. The sealed loss decides on no candidate."
    )
    return Result(name="g2_selection", figures=tuple(figures), notes=tuple(notes))


def candidates_of(cell: Cell) -> list[Candidate]:
    """Give every template at every place of the cell's host where it is legal and fits the budget by itself."""
    model = _host(cell, seed=0, seeds_per_layer=1)
    room = cell.max_parameters - num_parameters(model)
    registry = default_registry()
    found: list[Candidate] = []
    for name, layer in model.kasmina_layers.items():
        assert layer.site is not None
        places = [("", layer.site), *((skip.source, skip.site) for skip in layer.skip_sites())]
        for source, site in places:
            for one in registry.for_site(site):
                price = cost(one.ir, site)
                if price.parameters <= room and (not source or reads_input(one.ir)):
                    found.append(Candidate(layer=name, source=source, name=one.name, ir=one.ir, cost=price))
    return found


def select(cell: Cell, candidates: Sequence[Candidate], *, seed: int) -> Selection:
    """Measure effects and true gains of every candidate under one seed.

    Raises:
        InvalidInputError: There is nothing to choose between.
    """
    if len(candidates) < 2:
        raise InvalidInputError.of("candidates", "hold at least two", len(candidates))
    alone = trained_out(cell, None, seed=seed)
    gains = tuple(alone - trained_out(cell, one, seed=seed) for one in candidates)
    return Selection(effects=effects_of(cell, candidates, seed=seed), gains=gains)


def trained_out(cell: Cell, candidate: Candidate | None, *, seed: int) -> float:
    """Give the sealed loss of the host at its end, with a candidate blended in whole when races begin, or without."""
    task = load(cell.task)
    model, optimizer, batches = _begun(cell, seed=seed, seeds_per_layer=1)
    if candidate is not None:
        inputs, _ = next(iter(_new_batches(cell, seed=seed)))
        ref = _born(model, candidate, 0, inputs, seed=seed)
        layer = model.kasmina_layer(ref.layer)
        for state in (SeedLifecycleState.EVALUATING, SeedLifecycleState.FOSSILIZED):
            layer.transition(ref.seed_index, state)
        optimizer.add_param_group({"params": layer.seed_parameters(ref.seed_index)})
    for _ in range(WARM_EPOCHS, cell.settings.epochs):
        for _ in _steps(model, optimizer, batches):
            pass
    _, loss = evaluate(model, task.sealed)
    return loss


def effects_of(cell: Cell, candidates: Sequence[Candidate], *, seed: int) -> tuple[float, ...]:
    """Let every candidate learn alone behind one host for as long as a race lasts; gives what each brings then."""
    control = load(cell.task).control
    model, optimizer, batches = _begun(cell, seed=seed, seeds_per_layer=len(candidates))
    host_flops = forward_flops(model, control.inputs[:1])
    inputs, _ = next(iter(_new_batches(cell, seed=seed)))
    refs = [_born(model, one, place, inputs, seed=seed) for place, one in enumerate(candidates)]
    incubators = [
        Incubator(
            model,
            cross_entropy,
            layer=ref.layer,
            seed_index=ref.seed_index,
            learning_rate=_GROWTH.incubation_learning_rate,
            way=affordable_way(_GROWTH, kernel_flops=one.cost.flops, host_flops=host_flops),
        )
        for ref, one in zip(refs, candidates, strict=True)
    ]
    mean = EpochMean(model)
    for _ in range(_GROWTH.incubation_epochs):
        mean.restart()
        for batch in _steps(model, optimizer, batches):
            for incubator in incubators:
                incubator.step(batch)
            mean.note()
    with mean.applied():
        losses = evaluate_configurations(
            model,
            [(control.inputs, control.targets)],
            lambda outputs, targets: cross_entropy(outputs, targets, reduction="none"),
            [{}, *({ref: 1.0} for ref in refs)],
        )
    return tuple((losses[0] - losses[1:]).mean(1).tolist())


def figures_of(name: str, candidates: Sequence[Candidate], runs: Sequence[Selection]) -> list[Figure]:
    """Give rank correlation and share of each predictor, means over the seeds."""
    figures: list[Figure] = []
    for predictor in PREDICTORS:
        pairs = [(_predicted(predictor, candidates, run), np.array(run.gains)) for run in runs]
        ranks = [rank_correlation(told, true) for told, true in pairs]
        shares = [share_recovered(told, true) for told, true in pairs]
        figures.append(_mean(f"{name}: {predictor}, rank correlation with the true gain", ranks, "correlation"))
        figures.append(_mean(f"{name}: {predictor}, of what the best brings above the mean", shares, "share"))
    return figures


def best_of(name: str, candidates: Sequence[Candidate], runs: Sequence[Selection]) -> str:
    """Say in words which candidates brought the most, and how often the race put each first."""
    gains = np.array([run.gains for run in runs]).mean(0)
    effects = [int(np.argmax(run.effects)) for run in runs]
    order = np.argsort(-gains)[:3]
    best = "; ".join(f"{candidates[place]} {gains[place]:+.3f}, first {effects.count(place)} times" for place in order)
    return f"{name}: {len(candidates)} candidates, mean gain {gains.mean():+.3f} nats. Those of most gain: {best}."


def rank_correlation(told: _Row, true: _Row) -> float:
    """Give Spearman's correlation; equal values share the mean of their ranks. 0 where one of both tells nothing."""
    ranks = [(row[:, None] > row).sum(1) + 0.5 * (row[:, None] == row).sum(1) for row in (told, true)]
    if any(np.ptp(row) == 0 for row in ranks):
        return 0.0
    return float(np.corrcoef(*ranks)[0, 1])


def share_recovered(told: _Row, true: _Row) -> float:
    """Give the share of what the best brings above the mean that the predictor's first brings; 0 if all are equal."""
    spread = true.max() - true.mean()
    return 0.0 if spread == 0 else float((true[np.argmax(told)] - true.mean()) / spread)


def _predicted(predictor: str, candidates: Sequence[Candidate], run: Selection) -> _Row:
    rows: Mapping[str, Sequence[float]] = {
        "race": run.effects,
        "parameters": [one.cost.parameters for one in candidates],
        "FLOPs": [one.cost.flops for one in candidates],
    }
    return np.array(rows[predictor], dtype=np.float64)


def _mean(name: str, values: Sequence[float], unit: str) -> Figure:
    return Figure(name=name, value=statistics.fmean(values), unit=unit, spread=Spread(min(values), max(values)))


def _host(cell: Cell, *, seed: int, seeds_per_layer: int) -> Any:
    """Give the cell's host, wrapped, its layers' shapes known."""
    model = esper.wrap(make_net(cell, cell.host, seed), seeds_per_layer=seeds_per_layer, telemetry=False)
    with torch.no_grad():
        model.eval()(load(cell.task).train.inputs[:2])
    return model.train()


def _new_batches(cell: Cell, *, seed: int) -> Batches:
    task = load(cell.task)
    return Batches(task.train, batch_size=cell.settings.batch_size, seed=seed, passes_per_epoch=task.passes_per_epoch)


def _begun(cell: Cell, *, seed: int, seeds_per_layer: int) -> tuple[Any, torch.optim.Optimizer, Batches]:
    """Give the host as it stands when the first race begins, its optimizer, and the batches that follow."""
    model, batches = _host(cell, seed=seed, seeds_per_layer=seeds_per_layer), _new_batches(cell, seed=seed)
    optimizer = make_optimizer(model, cell.settings)
    torch.manual_seed(seed)
    for _ in range(WARM_EPOCHS):
        for _ in _steps(model, optimizer, batches):
            pass
    return model, optimizer, batches


def _steps(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Batches) -> Iterator[Any]:
    """Train for an epoch; gives every batch after its step."""
    model.train()
    for inputs, targets in batches:
        optimizer.zero_grad()
        cross_entropy(model(inputs), targets).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        yield inputs, targets


def _born(model: Any, candidate: Candidate, place: int, inputs: torch.Tensor, *, seed: int) -> SeedRef:
    """Let a candidate be born, its weights fitted to a batch."""
    layer, ref = model.kasmina_layer(candidate.layer), SeedRef(candidate.layer, place)
    layer.germinate(place, candidate.ir, random_seed=seed, source=candidate.source)
    seen = seen_at_site(model, ref, lambda: model(inputs))
    if seen is not None:
        fit_to_site(layer.require_seed(place), *seen, random_seed=seed)
    return ref

"""C1: what a validated, packaged and signed kernel costs over scripting and saving its module alone.

The reference is what anybody would call: ``torch.jit.script`` and ``torch.jit.save`` of the very module that the worker
builds, timed in this process beside each compile. The worker leaves the module's own graph out of scripting, which
takes less than the call as it is; what a compile is over that is a figure beside it. Compiles run where they do in
use, in the pool's sandboxed worker process; it and this process have compiled the same operators before: warm.
"""

from __future__ import annotations

import io
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Final

import torch
from torch import nn

from bench.compile_plane import CompilePlane
from bench.loops import Loop
from bench.paired import PairedTimes, percentile, spread, time_pair
from bench.report import Figure, Goal, Result, Spread, at_most
from esper.blueprints import to_module
from esper.blueprints.plan import is_legal
from esper.blueprints.registry import default_registry
from esper.contracts.blueprint import Blueprint, Site, SiteKind
from esper.contracts.kernel import CompileSpec
from esper.services.tezzeret.approval import approve
from esper.services.tezzeret.compiler import script_of
from esper.services.tezzeret.config import CompilerConfig, WorkerLimits
from esper.services.tezzeret.worker_process import WorkerProcess

SITES: Final = (
    Site(kind=SiteKind.LINEAR, input_shape=(64,), output_shape=(64,)),
    Site(kind=SiteKind.CONV2D, input_shape=(16, 16, 16), output_shape=(16, 16, 16)),
    Site(kind=SiteKind.ATTENTION, input_shape=(16, 64), output_shape=(16, 64)),
)
"""One site of each family: vectors, grids, sequences."""

RATIO_GOAL: Final = at_most(4.0)
MEDIAN_GOAL_S: Final = at_most(0.15)
TAIL_GOAL: Final = at_most(4.0)
CACHED_GOAL: Final = at_most(0.05)
ONE_COMPILE: Final = Goal(sign="==", limit=1)
NUM_CLIENTS: Final = 20
"""Clients that ask for one kernel at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One compile."""

    blueprint: Blueprint
    """What is compiled."""
    site: Site
    """Where it is to stand."""

    @property
    def name(self) -> str:
        """What a table calls it."""
        return f"{self.blueprint.name} at {self.site.kind.name.lower()}"

    def spec(self, random_seed: int = 0) -> CompileSpec:
        """Give what a worker is asked; another kernel for every seed."""
        return CompileSpec(ir=self.blueprint.ir, site=self.site, random_seed=random_seed)


def cases(sites: Sequence[Site] = SITES) -> Iterator[Case]:
    """Give every template at every site for which it is meant and at which it is legal."""
    registry = default_registry()
    for name in registry.names():
        blueprint = registry.create_blueprint(name)
        kinds = blueprint.metadata.site_kinds
        for site in sites:
            if (not kinds or site.kind in kinds) and is_legal(blueprint.ir, site):
                yield Case(blueprint=blueprint, site=site)


def measure(*, quick: bool) -> Result:
    """Measure every template at up to three sites, warm; cold workers; and requests to the service."""
    torch.set_num_threads(1)
    chosen = list(cases())
    rounds, num_requests, starts = (2, 15, 1) if quick else (15, 100, 5)
    with tempfile.TemporaryDirectory(prefix="esper-bench-") as directory, Loop() as loop:
        plane = loop.wait(CompilePlane(Path(directory)).__aenter__())
        try:
            times = {case.name: time_case(loop, plane, case, rounds) for case in chosen}
            saved = {case.name: time_scripting(case, rounds) for case in chosen}
            figures = [*all_figures(times), lean_figure(times, saved)]
            figures += cached_figures(loop, plane, list(islice(cycle(chosen), num_requests)), times)
            figures += herd_figures(loop, plane, chosen[0], num_herds=3 if quick else 10)
        finally:
            loop.wait(plane.__aexit__())
        figures += cold_figures(loop, Path(directory), chosen[0], starts)
    figures += [case_figure(name, found) for name, found in times.items()]
    return Result(name="c1_compile", figures=tuple(figures), notes=_NOTES)


def time_case(loop: Loop, plane: CompilePlane, case: Case, rounds: int) -> PairedTimes:
    """Time the warm worker's compile against scripting and saving alone."""
    module = to_module(case.blueprint.ir, case.site, seed=0)
    spec = case.spec()

    def compile_whole() -> object:
        return approve(loop.wait(plane.pool.compile(spec)), spec, plane.key, processes=plane.pool.processes)

    return time_pair(compile_whole, lambda: _script_and_save(module), seconds=0.0, min_rounds=rounds, warmup=1)


def time_scripting(case: Case, rounds: int) -> PairedTimes:
    """Time scripting and saving as anybody calls it against the same without the module's graph."""
    plain, lean = (to_module(case.blueprint.ir, case.site, seed=0) for _ in range(2))

    def lean_script_and_save() -> None:
        torch.jit.save(script_of(lean), io.BytesIO())

    return time_pair(lambda: _script_and_save(plain), lean_script_and_save, seconds=0.0, min_rounds=rounds, warmup=1)


def _script_and_save(module: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(module), io.BytesIO())


def lean_figure(times: Mapping[str, PairedTimes], saved: Mapping[str, PairedTimes]) -> Figure:
    """Give the ratio of a compile to scripting and saving without the module's graph: both ratios multiplied."""
    ratios = [found.ratio * saved[name].ratio for name, found in times.items()]
    return Figure(
        name="compile, warm, over script and save without the module's graph",
        value=statistics.median(ratios),
        unit="ratio",
        spread=spread(ratios),
    )


def all_figures(times: Mapping[str, PairedTimes]) -> list[Figure]:
    """Give what holds over all templates: the ratio to script and save, the median and the tail."""
    ours_s = [took_ns / 1e9 for found in times.values() for took_ns in found.ours_ns]
    ratios = [found.ratio for found in times.values()]
    median_s = median_of_cases_s(times)
    tail = percentile(ours_s, 99) / median_s
    return [
        Figure(
            name="compile, warm, over script and save",
            value=statistics.median(ratios),
            unit="ratio",
            goal=RATIO_GOAL,
            spread=spread(ratios),
        ),
        Figure(name="compile, warm, p50", value=median_s, unit="s", goal=MEDIAN_GOAL_S, spread=spread(ours_s)),
        Figure(name="compile, warm, p99 over p50", value=tail, unit="ratio", goal=TAIL_GOAL),
    ]


def median_of_cases_s(times: Mapping[str, PairedTimes]) -> float:
    """Give the median over templates and sites of the median compile, in seconds."""
    return statistics.median(statistics.median(found.ours_ns) for found in times.values()) / 1e9


def cached_figures(
    loop: Loop, plane: CompilePlane, chosen: Sequence[Case], times: Mapping[str, PairedTimes]
) -> list[Figure]:
    """Give the time of a request for a kernel that is there, over the compile; each is asked for anew first."""
    before = plane.num_compiled
    fresh_s: list[float] = []
    cached_s: list[float] = []
    for number, case in enumerate(chosen, start=1):
        spec = case.spec(random_seed=number)
        fresh_s.append(loop.wait(plane.request(spec)))
        cached_s.append(loop.wait(plane.request(spec)))
    compiled = plane.num_compiled - before
    over = statistics.median(cached_s) / median_of_cases_s(times)
    return [
        Figure(name="cached request, over a compile", value=over, unit="ratio", goal=CACHED_GOAL),
        Figure(name="cached request", value=statistics.median(cached_s), unit="s", spread=spread(cached_s)),
        Figure(
            name="new request, kernel in the library",
            value=statistics.median(fresh_s),
            unit="s",
            spread=spread(fresh_s),
        ),
        Figure(
            name="compiles a kernel, asked for twice", value=compiled / len(chosen), unit="compiles", goal=ONE_COMPILE
        ),
    ]


def herd_figures(loop: Loop, plane: CompilePlane, case: Case, num_herds: int) -> list[Figure]:
    """Give how often a new kernel is compiled that many clients ask for at once, at worst."""
    compiles: list[int] = []
    took_s: list[float] = []
    for number in range(num_herds):
        before = plane.num_compiled
        took_s.append(loop.wait(plane.request_at_once(case.spec(random_seed=1_000_000 + number), NUM_CLIENTS)))
        compiles.append(plane.num_compiled - before)
    who = f"{NUM_CLIENTS} clients, one new kernel"
    return [
        Figure(name=f"{who}, compiles", value=max(compiles), unit="compiles", goal=ONE_COMPILE),
        Figure(name=f"{who}, until all have it", value=statistics.median(took_s), unit="s", spread=_range(took_s)),
    ]


def cold_figures(loop: Loop, scratch_dir: Path, case: Case, starts: int) -> list[Figure]:
    """Give the start of a worker process, sandbox and imports included, and its first compile."""
    start_s: list[float] = []
    first_s: list[float] = []
    for _ in range(starts):
        worker = WorkerProcess(WorkerLimits(), CompilerConfig(), scratch_dir)
        try:
            begun = time.perf_counter()
            loop.wait(worker.start())
            ready = time.perf_counter()
            loop.wait(worker.run(case.spec(), lambda _: None))
            first_s.append(time.perf_counter() - ready)
            start_s.append(ready - begun)
        finally:
            loop.wait(worker.end())
    return [
        Figure(name="worker, from start to ready", value=statistics.median(start_s), unit="s", spread=_range(start_s)),
        Figure(name="worker, first compile", value=statistics.median(first_s), unit="s", spread=_range(first_s)),
    ]


def case_figure(name: str, found: PairedTimes) -> Figure:
    """Give the ratio of one template at one site."""
    return Figure(name=f"{name}, over script and save", value=found.ratio, unit="ratio", spread=found.spread)


def _range(values: Sequence[float]) -> Spread:
    return Spread(min(values), max(values))


_NOTES: Final = (
    "One thread. A compile goes to the worker process and back: it builds the module, scripts, saves and loads it, "
    "runs every check of the validator, a second process included, packages; then it is proven again and signed. The "
    "reference is torch.jit.script and torch.jit.save of the same module alone.",
    "Over script and save, p50: medians over templates and sites of the median of each. p99: over all compiles; a "
    f"worker is replaced after {WorkerLimits().jobs_per_worker} jobs, and the job that waits for the new one counts.",
    "Requests go over gRPC to a service with one worker, a library and a NATS of its own, databases on disk; a new one "
    "ends when its kernel is in the library. Start of a worker and the clients at once: least and greatest in the "
    "place of a spread; the start ends after sandbox, imports and the first compiles that a worker does for nobody.",
)

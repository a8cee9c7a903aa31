"""C1: what a validated, packaged kernel costs over scripting and saving its module alone, template by template.

The reference is the least that a TorchScript kernel can cost: ``torch.jit.script`` and ``torch.jit.save`` of the very
module that the worker builds, timed beside each compile. Both run in a process that has compiled the same operators
before: warm, as a worker is.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from bench.paired import PairedTimes, percentile, spread, time_pair
from bench.report import Figure, Result, Spread, at_most
from esper.blueprints import to_module
from esper.blueprints.plan import is_legal
from esper.blueprints.registry import default_registry
from esper.contracts.blueprint import Blueprint, Site, SiteKind
from esper.execution.keys import SigningKey
from esper.services.tezzeret.worker import TezzeretWorker

SITES: Final = (
    Site(kind=SiteKind.LINEAR, input_shape=(64,), output_shape=(64,)),
    Site(kind=SiteKind.CONV2D, input_shape=(16, 16, 16), output_shape=(16, 16, 16)),
    Site(kind=SiteKind.ATTENTION, input_shape=(16, 64), output_shape=(16, 64)),
)
"""One site of each family: vectors, grids, sequences."""

GOAL_S: Final = at_most(5.0)
AIM_S: Final = at_most(0.15)
_COLD: Final = "from bench.c1_compile import print_cold_s; print_cold_s()"


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
    """Measure every template at up to three sites, warm; one compile in a cold process."""
    torch.set_num_threads(1)
    chosen = list(cases())
    rounds = 3 if quick else 20
    times = {case.name: time_case(case, rounds) for case in chosen}
    figures = [*all_figures(times), *(case_figure(name, found) for name, found in times.items())]
    figures.append(cold_figure(2 if quick else 5))
    return Result(name="c1_compile", figures=tuple(figures), notes=_NOTES)


def time_case(case: Case, rounds: int) -> PairedTimes:
    """Time the worker's compile against scripting and saving alone."""
    worker = TezzeretWorker(signer=SigningKey.generate())
    module = to_module(case.blueprint.ir, case.site, seed=0)

    def compile_whole() -> object:
        return worker.compile_blueprint(case.blueprint, site=case.site)

    def script_and_save() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.jit.save(torch.jit.script(module), io.BytesIO())

    return time_pair(compile_whole, script_and_save, seconds=0.0, min_rounds=rounds, warmup=1)


def all_figures(times: dict[str, PairedTimes]) -> list[Figure]:
    """Give what holds over all templates: percentiles in seconds, and the ratio to the floor."""
    ours_s = [took_ns / 1e9 for found in times.values() for took_ns in found.ours_ns]
    ratios = [ratio for found in times.values() for ratio in found.ratios]
    return [
        Figure(name="compile, warm, p50", value=percentile(ours_s, 50), unit="s", goal=AIM_S, spread=spread(ours_s)),
        Figure(name="compile, warm, p99", value=percentile(ours_s, 99), unit="s", goal=GOAL_S),
        Figure(
            name="compile, warm, over script and save",
            value=percentile(ratios, 50),
            unit="ratio",
            spread=spread(ratios),
        ),
    ]


def case_figure(name: str, found: PairedTimes) -> Figure:
    """Give the ratio of one template at one site."""
    return Figure(name=f"{name}, over script and save", value=found.ratio, unit="ratio", spread=found.spread)


def cold_figure(starts: int) -> Figure:
    """Give the time of the first compile of a new process, its imports not counted."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    took_s: list[float] = []
    for _ in range(starts):
        answer = subprocess.run(
            [sys.executable, "-c", _COLD], env=environment, capture_output=True, text=True, check=True
        )
        took_s.append(float(answer.stdout))
    return Figure(
        name="compile, first of a process",
        value=percentile(took_s, 50),
        unit="s",
        goal=GOAL_S,
        spread=Spread(min(took_s), max(took_s)),
    )


def print_cold_s() -> None:
    """Print the seconds that the first compile of this process takes."""
    torch.set_num_threads(1)
    case = next(cases())
    start = time.perf_counter()
    TezzeretWorker().compile_blueprint(case.blueprint, site=case.site)
    print(time.perf_counter() - start)


_NOTES: Final = (
    "One thread. A compile builds the module, scripts, saves and loads it, runs every check of the validator, "
    "packages and signs; the reference is torch.jit.script and torch.jit.save of the same module alone, the floor.",
    "p50, p99: over all templates and sites together. First of a process: least and greatest in the place of a spread.",
)

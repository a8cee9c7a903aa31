"""C2: from a decision, as it is published, to the seed's being ACTIVE at a step boundary, through a real local mesh.

    cold              the kernel does not exist: it is compiled, validated, signed, stored, announced, fetched, verified
    in L1             an equal kernel was used before: it is announced and taken from memory
    in L1, in a row   the same, each adaptation the moment the last one has ended

References, measured in turn with every adaptation: compiling the same blueprint in this process (cold), and one durable
publish of a decision, until the stream acknowledges it (in L1).
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

import esper
from bench.adaptation_run import WIDTH, AdaptationRun, Latency
from bench.paired import percentile, spread
from bench.report import Figure, Goal, Result, at_most
from esper.blueprints.registry import default_registry
from esper.contracts.blueprint import Site, SiteKind
from esper.contracts.errors import InvalidStateError
from esper.execution.keys import SigningKey
from esper.services.tezzeret.worker import TezzeretWorker

GOAL_COLD_MS: Final = at_most(500.0)
GOAL_L1_MS: Final = at_most(50.0)
TEMPLATES: Final = ("bottleneck_adapter", "lora", "gated_mlp", "widen")
"""Templates that take turns in cold adaptations; the first is the one kept in L1."""

BETWEEN_S: Final = 0.25
"""How long the run trains between adaptations, in seconds: at once, the next one shares the machine with the last
one's reports, which six services take in."""

_SITE: Final = Site(kind=SiteKind.LINEAR, input_shape=(WIDTH,), output_shape=(WIDTH,))


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One adaptation beside its reference."""

    latency: Latency
    """The adaptation."""
    reference_ms: float
    """The reference, in milliseconds."""
    germination_ms: float
    """Bringing the same kernel from memory to ACTIVE, and nothing else, in milliseconds."""


def measure(*, quick: bool) -> Result:
    """Measure on a local mesh that is started for it: 200 cold adaptations, 200 and 100 in L1; or 15, 30, 15."""
    torch.set_num_threads(1)
    num_cold, num_warm, num_in_a_row = (15, 30, 15) if quick else (200, 200, 100)
    with tempfile.TemporaryDirectory(prefix="esper-bench-") as directory, esper.Mesh.local(directory) as mesh:
        if mesh.settings is None:
            raise InvalidStateError("a local mesh must say where it is")
        with AdaptationRun(mesh, mesh.settings) as run:
            warm_up(run)
            cold = [time_cold(run, number) for number in range(num_cold)]
            bring_near(run)
            before = _l1_misses(mesh)
            warm = [time_in_l1(run, BETWEEN_S) for _ in range(num_warm)]
            in_a_row = [time_in_l1(run, 0.0) for _ in range(num_in_a_row)]
            missed = _l1_misses(mesh) - before
            step_ms = run.step_ms
    figures = [*latency_figures("cold", cold, GOAL_COLD_MS, "compiling alone")]
    figures += latency_figures("in L1", warm, GOAL_L1_MS, "one durable publish")
    figures += latency_figures("in L1, in a row", in_a_row, None, "one durable publish")
    figures.append(
        Figure(name="in L1, lookups that missed", value=missed, unit="lookups", goal=Goal(sign="==", limit=0))
    )
    figures.append(Figure(name="training step", value=step_ms, unit="ms"))
    return Result(name="c2_adaptation", figures=tuple(figures), notes=_NOTES)


def warm_up(run: AdaptationRun) -> None:
    """Let every process do each kind of work once."""
    for number in range(len(TEMPLATES)):
        time_cold(run, -1 - number)


def bring_near(run: AdaptationRun) -> None:
    """Leave the kernel of ``time_in_l1`` in memory, as an earlier adaptation does.

    Only after the cold ones: a run that has a kernel of a blueprint near waits for no compiler, whatever seed of
    weights the compiler is asked for.
    """
    run.adapt(default_registry().create_blueprint(TEMPLATES[0]), 0)


def time_cold(run: AdaptationRun, number: int) -> Trial:
    """Adapt with a kernel that does not exist: weights of a new seed make it another one."""
    blueprint = default_registry().create_blueprint(TEMPLATES[number % len(TEMPLATES)])
    latency = run.adapt(blueprint, 1_000_000 + number)
    worker = TezzeretWorker(signer=SigningKey.generate())
    start_ns = time.perf_counter_ns()
    worker.compile_blueprint(blueprint, site=_SITE, random_seed=1_000_000 + number)
    reference_ms = (time.perf_counter_ns() - start_ns) / 1e6
    return Trial(latency=latency, reference_ms=reference_ms, germination_ms=run.germination_ms())


def time_in_l1(run: AdaptationRun, between_s: float) -> Trial:
    """Adapt with the kernel that ``bring_near`` left in memory, after training for some seconds."""
    run.train_for(between_s)
    latency = run.adapt(default_registry().create_blueprint(TEMPLATES[0]), 0)
    return Trial(latency=latency, reference_ms=run.round_trip_ms(), germination_ms=run.germination_ms())


def latency_figures(name: str, trials: Sequence[Trial], goal: Goal | None, reference: str) -> list[Figure]:
    """Give percentiles of one kind of adaptation, its first part, and the ratio to its reference."""
    whole = [trial.latency.to_active_ms for trial in trials]
    first = [trial.latency.to_plan_ms for trial in trials]
    germination = [trial.germination_ms for trial in trials]
    ratios = [trial.latency.to_active_ms / trial.reference_ms for trial in trials]
    return [
        Figure(name=f"{name}, p50", value=percentile(whole, 50), unit="ms", goal=goal, spread=spread(whole)),
        Figure(name=f"{name}, p99", value=percentile(whole, 99), unit="ms", goal=goal),
        Figure(name=f"{name}, to the plan, p50", value=percentile(first, 50), unit="ms", spread=spread(first)),
        Figure(
            name=f"{name}, germination alone, p50",
            value=percentile(germination, 50),
            unit="ms",
            spread=spread(germination),
        ),
        Figure(name=f"{name}, over {reference}", value=percentile(ratios, 50), unit="ratio", spread=spread(ratios)),
    ]


def _l1_misses(mesh: esper.Mesh) -> int:
    return sum(tier.misses for tier in mesh.kernel_source.stats() if tier.tier == "l1")


_NOTES: Final = (
    "A local mesh: NATS and six services as processes of this machine, which the training loop shares; eight layers of "
    "64 features, batches of 32. The clock starts just before the decision is published and stops at the transition.",
    "Goals are mission.md's, held against the median and against the 99th percentile; 'to the plan' ends where the run "
    "has accepted the decision; 'germination alone' is the training thread's own part, the floor of a kernel in L1.",
    "In L1 the run trains for 0.25 s between adaptations; 'in a row' one follows the other at once, and shares the "
    "machine with what the services make of the last one's reports.",
    "The deciding side is a thread of the training process, where Tamiyo is a process of its own: it competes with the "
    "training loop for the interpreter.",
)

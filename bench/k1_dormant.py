"""K1: what a wrapped model costs while nothing grows in it, over the same model before wrapping.

Two copies of each host take turns: the one is wrapped while the other is plain, then the other way round. What their
places in memory do to them therefore cancels in the geometric mean of the two medians.

A layer with telemetry measures its first forward pass and then one in 128 passes of the model. Both kinds of pass are
timed by themselves, the measured one with an interval of 1, and the figure is their mean over 128 passes.
"""

from __future__ import annotations

import math
import statistics
import time
import tracemalloc
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Final, Literal

import torch
from torch import Tensor, nn

import esper
from bench.hosts import HOSTS, Host
from bench.paired import Call, PairedTimes, calls_lasting, spread, time_pair
from bench.report import Figure, Goal, Result, Spread, at_most
from esper.core.wrap import LayerTelemetry, SkippedLayersWarning
from esper.execution._native import StateLayout
from esper.execution.layers import DEFAULT_TELEMETRY_INTERVAL_STEPS

Pass = Literal["forward", "step"]
State = Literal["plain", "off", "on, between samples", "on, every pass measured"]

GOAL_OFF: Final = at_most(1.005)
GOAL_ON: Final = at_most(1.01)
_SAMPLE_S: Final = 0.0001
_TURN_S: Final = 0.25
_MIN_ROUNDS: Final = 4
_MIN_CYCLES: Final = 2
_TELEMETRY: Final[Mapping[State, bool | LayerTelemetry]] = {
    "off": False,
    "on, between samples": True,
    "on, every pass measured": LayerTelemetry(interval_steps=1),
}
_NUM_LAYERS: Final = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Overhead:
    """A ratio of wrapped over plain, and how well it is known."""

    ratio: float
    """Geometric mean of the medians of the two ways round."""
    log_error: float
    """Half of the 99 % interval of its logarithm."""
    spread: Spread
    """5 % to 95 % of the single ratios."""

    @property
    def certain(self) -> Spread:
        """99 % interval of the ratio."""
        return Spread(self.ratio * math.exp(-self.log_error), self.ratio * math.exp(self.log_error))


def measure(*, quick: bool) -> Result:
    """Measure every host; forward alone, and forward, backward and optimizer step."""
    torch.set_num_threads(1)
    seconds = 2.5 if quick else 25.0
    figures = [figure for host in HOSTS for mode in ("forward", "step") for figure in host_figures(host, mode, seconds)]
    figures += [added_time(state, seconds / 2) for state in ("off", "on, between samples")]
    figures += [compile_figure(host) for host in HOSTS]
    figures += byte_figures()
    return Result(name="k1_dormant", figures=tuple(figures), notes=_NOTES)


def host_figures(host: Host, mode: Pass, seconds: float) -> list[Figure]:
    """Give the ratios of one host: two plain copies, telemetry off, telemetry on."""
    with _mode(mode):
        noise = measure_overhead(host, mode, "plain", seconds / 3)
        off = measure_overhead(host, mode, "off", seconds, GOAL_OFF)
        between = measure_overhead(host, mode, "on, between samples", seconds, GOAL_ON)
        measured = measure_overhead(host, mode, "on, every pass measured", seconds / 3)
    share = 1 / DEFAULT_TELEMETRY_INTERVAL_STEPS
    on = Overhead(
        ratio=(1 - share) * between.ratio + share * measured.ratio,
        log_error=math.hypot((1 - share) * between.log_error, share * measured.log_error),
        spread=between.spread,
    )
    name = f"{host.name} {mode}"
    return [
        _figure(f"{name}, telemetry off", off, GOAL_OFF),
        _figure(f"{name}, telemetry on", on, GOAL_ON),
        _figure(f"{name}, a measured pass", measured, None),
        _figure(f"{name}, two plain copies (noise)", noise, None),
    ]


def measure_overhead(host: Host, mode: Pass, state: State, seconds: float, decide: Goal | None = None) -> Overhead:
    """Time one state of the wrapped host against the plain one, until the goal is decided or the time is up."""
    copies = (host.make(), host.make())
    batch = host.batch()
    found: list[list[PairedTimes]] = [[], []]
    calls = calls_lasting(training_call(copies[0], batch, mode), _SAMPLE_S, time.thread_time_ns)
    deadline = time.perf_counter() + seconds
    while True:
        for turn in (0, 1):
            found[turn].append(_time_turn(copies[turn], copies[1 - turn], batch, mode, state, calls))
        pooled = _pool(found)
        decided = decide is not None and decide.holds_for(pooled.certain.low) == decide.holds_for(pooled.certain.high)
        # Fewer than eight rounds each way say nothing with 99 %; neighbours in time are alike, so ask for more to stop.
        cycles = len(found[0])
        if (cycles >= _MIN_CYCLES and time.perf_counter() > deadline) or (decided and cycles > 2 * _MIN_CYCLES):
            return pooled


def added_time(state: State, seconds: float) -> Figure:
    """Give what wrapping adds to a pass through two layers that have next to nothing to do: the floor of the ratios."""
    plain, subject = _two_tiny_layers(), _two_tiny_layers()
    wrapped, batch = _wrap(subject, _TELEMETRY[state]), torch.zeros(1, 4)
    with _mode("forward"):
        calls = [training_call(model, batch, "forward") for model in (wrapped, plain)]
        times = time_pair(*calls, seconds=seconds, calls=20, clock=time.thread_time_ns)
    added_us = [(ours - reference) / 1e3 for ours, reference in zip(times.ours_ns, times.reference_ns, strict=True)]
    name = f"two tiny layers, time added to a pass, telemetry {state}"
    return Figure(name=name, value=statistics.median(added_us), unit="us", spread=spread(added_us))


def compile_figure(host: Host) -> Figure:
    """Give how many more graphs and recompiles the wrapped host has than the plain one under ``torch.compile``."""
    plain, wrapped = _graphs(host.make(), host), _graphs(_wrap(host.make(), True), host)
    goal = Goal(sign="==", limit=0)
    return Figure(name=f"{host.name}, graphs more when compiled", value=wrapped - plain, unit="graphs", goal=goal)


def byte_figures() -> list[Figure]:
    """Give what a dormant seed takes up, in the native layout and in Python."""
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(_NUM_LAYERS)))
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    wrapped = esper.wrap(model, telemetry=False)
    python_bytes = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    per_seed = python_bytes / wrapped.seed_states.num_seeds
    return [
        Figure(name="bytes per seed, native layout", value=StateLayout.bytes_per_seed, unit="bytes"),
        Figure(name="bytes per seed, Python objects", value=per_seed, unit="bytes"),
    ]


def _time_turn(
    subject: nn.Module, reference: nn.Module, batch: Tensor, mode: Pass, state: State, calls: int
) -> PairedTimes:
    """Time one way round: ``subject`` wrapped, ``reference`` plain."""
    measured = subject if state == "plain" else _wrap(subject, _TELEMETRY[state])
    times = time_pair(
        training_call(measured, batch, mode),
        training_call(reference, batch, mode),
        seconds=_TURN_S,
        calls=calls,
        min_rounds=_MIN_ROUNDS,
        clock=time.thread_time_ns,
    )
    if isinstance(measured, esper.MorphableModel):
        esper.unwrap(measured)
    return times


def _two_tiny_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


def _wrap(model: nn.Module, telemetry: bool | LayerTelemetry) -> esper.MorphableModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SkippedLayersWarning)
        return esper.wrap(model, telemetry=telemetry)


def training_call(model: nn.Module, batch: Tensor, mode: Pass) -> Call:
    """Give one pass as a call: forward alone in evaluation mode, or forward, backward and optimizer step."""
    if mode == "forward":
        return partial(model.eval(), batch)
    model.train()
    # Plain SGD is the cheapest optimizer, so the strictest; the rate is so small that weights stay what they are.
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-7)

    def step() -> None:
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()

    return step


def _mode(mode: Pass) -> torch.set_grad_enabled:
    return torch.set_grad_enabled(mode == "step")


def _pool(found: list[list[PairedTimes]]) -> Overhead:
    """Join the two ways round."""
    ways = [sum(times[1:], start=times[0]) for times in found]
    errors = [max(math.log(way.certain.high / way.ratio), math.log(way.ratio / way.certain.low)) for way in ways]
    return Overhead(
        ratio=math.sqrt(ways[0].ratio * ways[1].ratio),
        log_error=math.hypot(*errors) / 2,
        spread=spread([ratio for way in ways for ratio in way.ratios]),
    )


def _figure(name: str, found: Overhead, goal: Goal | None) -> Figure:
    return Figure(
        name=name,
        value=found.ratio,
        unit="ratio",
        goal=goal,
        spread=found.spread,
        certain=found.certain if goal else None,
    )


def _graphs(model: nn.Module, host: Host) -> int:
    """Give the graphs that three training steps and three evaluations compile; a graph break is an error."""
    torch.compiler.reset()
    counted = 0

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        nonlocal counted
        counted += 1
        return graph.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    batch = host.batch()
    for training in (True, False):
        model.train(training)
        for _ in range(3):
            compiled(batch)
    torch.compiler.reset()
    return counted


_NOTES: Final = (
    "The floor of a ratio is the time added to a pass (one frame of the wrapper; layers run their parent's forward) "
    "over the host's pass: 1 us is 0.5 % of a pass of 200 us and 0.01 % of one of 10 ms.",
    "Processor time of the training thread, which does all the work: a busy machine doubles wall times at random, and "
    "half a per cent is asked for.",
    "One thread, 4 seeds a layer; forward in evaluation mode without gradients, step with plain SGD.",
    "'holds' compares the 99 % interval of the median with the goal; 'unsure' where the goal lies inside it.",
    "Spread: 5 % to 95 % of the single rounds; two plain copies against each other show what is noise alone.",
    "Telemetry on: mean over 128 passes, of which one is measured; the ring holds 65,536 signals of 56 bytes a model.",
)

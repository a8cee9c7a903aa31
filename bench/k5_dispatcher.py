"""K5: what forking and joining costs against a thread pool, and whether the proof finds every planted race."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from bench.dispatcher_programs import missed_defects, tight_programs
from bench.paired import PairedTimes, spread, time_pair
from bench.report import Figure, Result, at_least, at_most
from esper.execution._native import StreamDispatcher, cuda_available, probe
from esper.execution.dispatch import run_side_by_side

Probed = tuple[int, int, str]
"""Address, number of values and type of a tensor, as the native probe takes it."""

NUM_STREAMS: Final = 2
_CHEAPER: Final = at_most(1.0)
_CALLS: Final = 4


def measure(*, quick: bool) -> Result:
    """Measure fork and join with 1, 4 and 8 seeds, native and Python, and run the mutation set."""
    seconds = 0.5 if quick else 5.0
    figures = [figure for num_seeds in (1, 4, 8) for figure in cost_figures(num_seeds, seconds)]
    figures += device_figures(seconds)
    figures += mutation_figures(2 if quick else 4)
    return Result(name="k5_dispatcher", figures=tuple(figures), notes=(*_NOTES, *device_notes()))


def cost_figures(num_seeds: int, seconds: float) -> list[Figure]:
    """Give the ratios for tasks of one value each, and of a whole tensor, native and Python, and the time a seed."""
    tiny, whole = torch.ones(1), torch.ones(1 << 18)
    with StreamDispatcher("cpu", NUM_STREAMS) as ours, ThreadPoolExecutor(NUM_STREAMS) as pool:
        native = {
            name: time_pair(
                partial(ours.probe_all, [_probed(values)] * num_seeds),
                partial(_probe_in_pool, pool, [_probed(values)] * num_seeds),
                seconds=seconds,
                calls=_CALLS,
            )
            for name, values in (("one value", tiny), ("a tensor", whole))
        }
        calls = [_python_task] * num_seeds
        python = time_pair(
            partial(ours.dispatch, calls), partial(_call_in_pool, pool, calls), seconds=seconds, calls=_CALLS
        )
    seeds = f"{num_seeds} seed{'s' if num_seeds > 1 else ''}"
    each_us = [took_ns / num_seeds / 1e3 for took_ns in native["one value"].ours_ns]
    ratios = [_ratio(f"{seeds}, native probe of {name}, over the pool", times) for name, times in native.items()]
    return [
        *ratios,
        _ratio(f"{seeds}, Python calls, over the pool", python),
        Figure(
            name=f"{seeds}, fork and join a seed", value=statistics.median(each_us), unit="us", spread=spread(each_us)
        ),
    ]


def mutation_figures(most_streams: int) -> list[Figure]:
    """Give what was planted, the share that was found, and the reports on the code as it is."""
    programs = tight_programs(most_streams)
    outcomes = [missed_defects(program) for program in programs]
    planted, missed = sum(count for count, _ in outcomes), sum(len(names) for _, names in outcomes)
    false_reports = sum(len(program.run().violations()) for program in programs)
    return [
        Figure(name="defects planted", value=planted, unit="defects"),
        Figure(name="defects found", value=1 - missed / planted, unit="share", goal=at_least(1.0)),
        Figure(name="reports on the code as it is", value=false_reports, unit="reports", goal=at_most(0)),
    ]


def device_figures(seconds: float) -> list[Figure]:
    """Give the ratios of four seeds on a CUDA device: over streams by hand, and over one after the other; else none."""
    if not cuda_available():
        return []
    device = torch.device("cuda", torch.cuda.current_device())
    x, weights = torch.randn(64, 512, device=device), torch.randn(4, 512, 512, device=device)
    pieces = [partial(torch.matmul, x, weight) for weight in weights]
    streams: list[Any] = [torch.cuda.Stream(device) for _ in pieces]  # type: ignore[no-untyped-call]
    ours = partial(_synchronized, partial(run_side_by_side, pieces, (x,)))
    by_hand = time_pair(
        ours, partial(_synchronized, partial(_on_streams_by_hand, pieces, x, streams)), seconds=seconds, calls=_CALLS
    )
    in_order = time_pair(
        ours, partial(_synchronized, lambda: [piece() for piece in pieces]), seconds=seconds, calls=_CALLS
    )
    return [
        _ratio("4 seeds on a device, over torch.cuda.Stream by hand", by_hand),
        Figure(
            name="4 seeds on a device, over one after the other",
            value=in_order.ratio,
            unit="ratio",
            spread=in_order.spread,
        ),
    ]


def device_notes() -> tuple[str, ...]:
    """Say what was not measured, and why."""
    if cuda_available():
        return ()
    return ("No CUDA device here: cost over torch.cuda.Stream by hand and overlap reached were not measured.",)


def _synchronized(call: Callable[[], object]) -> None:
    call()
    torch.cuda.synchronize()


def _on_streams_by_hand(pieces: Sequence[Callable[[], Tensor]], x: Tensor, streams: Sequence[Any]) -> list[Tensor]:
    """Do what the dispatcher does, as an expert would write it with torch alone."""
    ambient: Any = torch.cuda.current_stream()
    results = []
    for piece, stream in zip(pieces, streams, strict=True):
        stream.wait_stream(ambient)
        x.record_stream(stream)
        with torch.cuda.stream(stream):
            results.append(piece())
    for result, stream in zip(results, streams, strict=True):
        ambient.wait_stream(stream)
        result.record_stream(ambient)
    return results


def _probed(values: Tensor) -> Probed:
    return values.data_ptr(), values.numel(), "float32"


def _probe_in_pool(pool: ThreadPoolExecutor, tensors: Sequence[Probed]) -> list[tuple[float, ...]]:
    return [future.result() for future in [pool.submit(probe, *tensor) for tensor in tensors]]


def _python_task() -> int:
    return 1


def _call_in_pool(pool: ThreadPoolExecutor, calls: Sequence[Callable[[], int]]) -> list[int]:
    return [future.result() for future in [pool.submit(call) for call in calls]]


def _ratio(name: str, times: PairedTimes) -> Figure:
    return Figure(name=name, value=times.ratio, unit="ratio", goal=_CHEAPER, spread=times.spread, certain=times.certain)


_NOTES: Final = (
    f"The pool is a ThreadPoolExecutor with {NUM_STREAMS} workers, our CPU backend has {NUM_STREAMS} streams; both "
    "live through the measure and run the same calls: the native probe of one value, of 2^18 values, and a Python "
    "function that returns a constant.",
    "Python calls run in order on the calling thread in our dispatcher (the GIL lets no two run at once); results and "
    "exceptions are given for each, as the pool's futures do.",
    "A defect is one record, wait or record_stream that does not happen; every one of these programs needs every one.",
)

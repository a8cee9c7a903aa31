"""K3: the native kernel cache from Python against the caches that people use today: time, hit ratio, byte bound."""

from __future__ import annotations

import statistics
import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle, starmap
from typing import Final

import numpy as np

from bench.cache_peers import PEERS, Cache, cachebox_bytes, lru_function, native, native_function, theine_tlfu
from bench.cache_traces import (
    CAPACITY,
    drifting_trace,
    key_of,
    lru_hits,
    optimal_hits,
    s3_fifo_hits,
    scanned_trace,
    sieve_hits,
    zipf_trace,
)
from bench.k3_training import training_figures
from bench.paired import PairedTimes, spread, time_pair
from bench.report import Figure, Result, at_least, at_most
from esper.execution._native import KernelCache, cuda_built

Many = Callable[[Sequence[str]], None]

_AS_FAST: Final = at_most(1.0)
_NUM_FRESH: Final = 64 * CAPACITY
_BURST: Final = 256
_NUM_REQUESTS: Final = 500_000
_NEAR_OPTIMUM: Final = 0.92
_TRACES: Final = (
    ("zipf", zipf_trace, _NEAR_OPTIMUM),
    ("zipf with scans", scanned_trace, _NEAR_OPTIMUM),
    ("drifting zipf", drifting_trace, None),
)


def measure(*, quick: bool) -> Result:
    """Measure times against every peer, hit ratios on three traces and on real training runs, and the byte bound.

    Raises:
        UnavailableError: A peer is not installed.
    """
    seconds = 1.0 if quick else 10.0
    figures = [figure for make in PEERS for figure in peer_figures(make, seconds)]
    figures.append(insert_figure(native(CAPACITY), cachebox_bytes(CAPACITY), seconds))
    figures += function_figures(seconds)
    figures += floor_figures(seconds)
    for name, trace, limit in _TRACES:
        figures += hit_ratio_figures(name, trace(_NUM_REQUESTS), near_optimum=limit)
    figures += training_figures(num_runs=1 if quick else 4, epochs=24 if quick else 30)
    figures.append(byte_bound_figure(20_000 if quick else 200_000))
    return Result(name="k3_cache", figures=tuple(figures), notes=_NOTES)


def peer_figures(make: Callable[[int], Cache], seconds: float) -> list[Figure]:
    """Give the ratios against one peer: hits, misses, inserts, and hits from two threads where it allows them."""
    ours, peer = native(CAPACITY), make(CAPACITY)
    held, unknown = _keys(0, CAPACITY // 2), _keys(10 * CAPACITY, CAPACITY // 2)
    for cache in (ours, peer):
        cache.put_all(held)
    pairs = {
        "hit": time_pair(partial(ours.get_all, held), partial(peer.get_all, held), seconds=seconds),
        "miss": time_pair(partial(ours.get_all, unknown), partial(peer.get_all, unknown), seconds=seconds),
    }
    if peer.thread_safe:
        both = [partial(_from_two_threads, cache.get_all, held * 20) for cache in (ours, peer)]
        pairs["hit, two threads"] = time_pair(*both, seconds=seconds)
    ratios = [_ratio(f"{what}, over {peer.name}", times) for what, times in pairs.items()]
    return [*ratios, insert_figure(ours, peer, seconds)]


def insert_figure(ours: Cache, peer: Cache, seconds: float) -> Figure:
    """Give the ratio of inserts into a full cache."""
    times = time_pair(_inserting(ours.put_all), _inserting(peer.put_all), seconds=seconds)
    return _ratio(f"insert, evicting, over {peer.name}", times)


def function_figures(seconds: float) -> list[Figure]:
    """Give the ratios of a cached function against ``functools.lru_cache``."""
    ours, theirs = native_function(CAPACITY), lru_function(CAPACITY)
    held = _keys(0, CAPACITY // 2)
    for call in (ours, theirs):
        call(held)
    hits = time_pair(partial(ours, held), partial(theirs, held), seconds=seconds)
    misses = time_pair(_inserting(ours), _inserting(theirs), seconds=seconds)
    return [
        _ratio("cached call that hits, over functools.lru_cache", hits),
        _ratio("cached call that loads and evicts, over functools.lru_cache", misses),
    ]


def floor_figures(seconds: float) -> list[Figure]:
    """Give a hit in nanoseconds, and over an empty native call through pybind11's dispatcher."""
    ours, held = native(CAPACITY), _keys(0, CAPACITY // 2)
    ours.put_all(held)
    nothing = [()] * len(held)

    def cross() -> None:
        deque(starmap(cuda_built, nothing), maxlen=0)

    times = time_pair(partial(ours.get_all, held), cross, seconds=seconds)
    ns_each = [took_ns / len(held) for took_ns in times.ours_ns]
    return [
        Figure(name="hit", value=statistics.median(ns_each), unit="ns", spread=spread(ns_each)),
        Figure(name="hit, over an empty native call", value=times.ratio, unit="ratio", spread=times.spread),
    ]


def hit_ratio_figures(
    name: str, trace: Sequence[str], capacity: int = CAPACITY, *, near_optimum: float | None = None
) -> list[Figure]:
    """Give the hit ratio on a trace beside that of other rules; ``near_optimum`` is the goal over the best possible."""
    ours, tlfu = (_hit_ratio(make(capacity), trace) for make in (native, theine_tlfu))
    rules = {"LRU": lru_hits, "SIEVE": sieve_hits, "S3-FIFO": s3_fifo_hits, "Belady's optimum": optimal_hits}
    others = {rule: count(trace, capacity) / len(trace) for rule, count in rules.items()}
    others["theine (W-TinyLFU)"] = tlfu
    best_goal = None if near_optimum is None else at_least(near_optimum)
    over_best, no_less = ours / others["Belady's optimum"], at_least(1.0)
    return [
        Figure(name=f"hits on {name}", value=ours, unit="share"),
        *(Figure(name=f"hits on {name}, {rule}", value=share, unit="share") for rule, share in others.items()),
        Figure(name=f"hits on {name}, over LRU's", value=ours / others["LRU"], unit="ratio", goal=no_less),
        Figure(name=f"hits on {name}, over theine's", value=ours / tlfu, unit="ratio", goal=no_less),
        Figure(name=f"hits on {name}, over the optimum's", value=over_best, unit="ratio", goal=best_goal),
    ]


def byte_bound_figure(num_puts: int) -> Figure:
    """Give the fullest that the cache ever was, over its bound; looked at after every one of many random puts."""
    random = np.random.default_rng(0)
    capacity_bytes = 8 * 2**20
    cache = KernelCache(capacity_bytes, max_entries=10_000)
    sizes = np.exp(random.uniform(np.log(1e3), np.log(1e6), size=num_puts)).astype(int).tolist()
    places = random.integers(0, 5_000, size=num_puts).tolist()
    fullest = 0
    for place, size_bytes in zip(places, sizes, strict=True):
        key = key_of(place)
        cache.put(key, size_bytes, size_bytes, pinned=place % 997 == 0)
        if place % 3 == 0:
            cache.unpin(key)
        fullest = max(fullest, cache.stats()["bytes"])
    return Figure(name="fullest, over the byte bound", value=fullest / capacity_bytes, unit="ratio", goal=at_most(1.0))


def _inserting(put_all: Many) -> Callable[[], None]:
    """Give a call that stores keys which the cache no longer holds."""
    fresh = _keys(100 * CAPACITY, _NUM_FRESH)
    bursts = cycle([fresh[start : start + _BURST] for start in range(0, _NUM_FRESH, _BURST)])
    return lambda: put_all(next(bursts))


def _from_two_threads(get_all: Many, keys: Sequence[str]) -> None:
    threads = [threading.Thread(target=get_all, args=(keys,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _hit_ratio(cache: Cache, trace: Sequence[str]) -> float:
    return sum(map(cache.request, trace)) / len(trace)


def _keys(first: int, count: int) -> list[str]:
    return [key_of(number) for number in range(first, first + count)]


def _ratio(name: str, times: PairedTimes) -> Figure:
    return Figure(name=name, value=times.ratio, unit="ratio", goal=_AS_FAST, spread=times.spread, certain=times.certain)


_NOTES: Final = (
    f"{CAPACITY:,} entries; keys are ids of 33 characters; every cache is called in a loop that runs in C.",
    "The empty native call goes through pybind11's dispatcher, which the cache's methods go around. Ours hashes the "
    "key's bytes each time, where caches built on Python's hash use the one that a str object keeps: what ours holds "
    "is then the same in every process.",
    "Training runs ask for each kernel once and keep it as a module: the optimum's share is all that any cache without "
    "foresight can reach. More would need kernels brought in before they are decided on.",
    "500,000 requests, Zipf(1.0) over 10,000 keys; scans are 2,000 keys never asked for again, after every 10,000 "
    "requests; the drifting trace takes the 300 most wanted keys away after every 50,000. Every miss "
    "is stored. Belady's optimum knows the future; nothing can be above it.",
)

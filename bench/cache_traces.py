"""Requests to a cache, and what the best known policies make of them: the references of hit ratios.

trace     a sequence of keys, all of one size
LRU       the least recently used key goes
SIEVE     the first key that was not asked for since a hand last passed it goes (Zhang et al., NSDI 2024)
S3-FIFO   newcomers that are not asked for again pass through a small queue (Yang et al., SOSP 2023)
optimum   Belady's rule, which knows the future: the key that is asked for last goes, be it the newcomer itself
"""

from __future__ import annotations

import heapq
from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import Final

import numpy as np

NUM_KEYS: Final = 10_000
"""Different keys of the Zipf traces."""
CAPACITY: Final = NUM_KEYS // 10
"""Keys that a cache may hold."""
_SCAN_EVERY: Final = 10_000
_SCAN_LENGTH: Final = 2_000
_DRIFT_EVERY: Final = 50_000
_DRIFT_BY: Final = 300
_NEVER: Final = 1 << 60


def zipf_trace(num_requests: int, *, seed: int = 0) -> list[str]:
    """Give requests for ``NUM_KEYS`` keys, the r-th most wanted in proportion to 1 / r."""
    return [key_of(rank) for rank in _zipf_ranks(num_requests, seed)]


def drifting_trace(num_requests: int, *, seed: int = 0) -> list[str]:
    """Give a Zipf trace whose 300 most wanted keys become the least wanted after every 50,000 requests."""
    ranks = enumerate(_zipf_ranks(num_requests, seed))
    return [key_of((rank + place // _DRIFT_EVERY * _DRIFT_BY) % NUM_KEYS) for place, rank in ranks]


def scanned_trace(num_requests: int, *, seed: int = 0) -> list[str]:
    """Give the Zipf trace with scans in it: 2,000 keys that are asked for once, after every 10,000 requests."""
    trace: list[str] = []
    fresh = NUM_KEYS
    for number, key in enumerate(zipf_trace(num_requests, seed=seed), start=1):
        trace.append(key)
        if number % _SCAN_EVERY == 0:
            trace += [key_of(fresh + place) for place in range(_SCAN_LENGTH)]
            fresh += _SCAN_LENGTH
    return trace


def key_of(number: int) -> str:
    """Give a key that looks like a kernel's id: ``k`` and 32 hex digits."""
    return f"k{(number * 0x9E3779B97F4A7C15) % 2**128:032x}"


def lru_hits(trace: Sequence[str], capacity: int) -> int:
    """Give the requests that a cache with the LRU rule answers."""
    held: OrderedDict[str, None] = OrderedDict()
    hits = 0
    for key in trace:
        if key in held:
            hits += 1
            held.move_to_end(key)
        else:
            held[key] = None
            if len(held) > capacity:
                held.popitem(last=False)
    return hits


def sieve_hits(trace: Sequence[str], capacity: int) -> int:
    """Give the requests that a cache with the SIEVE rule answers."""
    order: OrderedDict[str, bool] = OrderedDict()  # oldest first; whether asked for since the hand last passed
    passed: OrderedDict[str, bool] = OrderedDict()  # what the hand has passed in this round, oldest first
    hits = 0
    for key in trace:
        if key in order or key in passed:
            (order if key in order else passed)[key] = True
            hits += 1
            continue
        if len(order) + len(passed) >= capacity:
            _sieve_evict(order, passed)
        order[key] = False
    return hits


def s3_fifo_hits(trace: Sequence[str], capacity: int) -> int:
    """Give the requests that a cache with the S3-FIFO rule answers: a tenth for newcomers, counts up to 3."""
    small: deque[str] = deque()
    main: deque[str] = deque()
    counts: dict[str, int] = {}
    ghosts: OrderedDict[str, None] = OrderedDict()
    hits = 0
    for key in trace:
        if key in counts:
            counts[key] = min(3, counts[key] + 1)
            hits += 1
            continue
        while len(counts) >= capacity:
            _s3_fifo_step(small, main, counts, ghosts, capacity)
        counts[key] = 0
        (main if key in ghosts else small).append(key)
        ghosts.pop(key, None)
    return hits


def optimal_hits(trace: Sequence[str], capacity: int) -> int:
    """Give the most requests that any cache of this capacity can answer (Belady 1966, with bypass)."""
    next_uses = _next_uses(trace)
    held: dict[str, int] = {}
    latest: list[tuple[int, str]] = []  # (-next use, key); entries that are out of date stay until they surface
    hits = 0
    for place, key in enumerate(trace):
        hits += key in held
        held[key] = next_uses[place]
        heapq.heappush(latest, (-next_uses[place], key))
        while len(held) > capacity:
            use, candidate = heapq.heappop(latest)
            if held.get(candidate) == -use:
                del held[candidate]
    return hits


def _zipf_ranks(num_requests: int, seed: int) -> list[int]:
    shares = 1 / np.arange(1, NUM_KEYS + 1)
    drawn = np.random.default_rng(seed).choice(NUM_KEYS, size=num_requests, p=shares / shares.sum())
    return [int(rank) for rank in drawn]


def _sieve_evict(order: OrderedDict[str, bool], passed: OrderedDict[str, bool]) -> None:
    """Move the hand from old to new until it meets a key that was not asked for; at the newest it starts over."""
    while True:
        if not order:
            order.update(passed)
            passed.clear()
        key, asked = order.popitem(last=False)
        if not asked:
            return
        passed[key] = False


def _s3_fifo_step(
    small: deque[str], main: deque[str], counts: dict[str, int], ghosts: OrderedDict[str, None], capacity: int
) -> None:
    """Look at the oldest key of a queue: it leaves, or stays on in the main queue."""
    from_small = not main or len(small) > max(1, capacity // 10)
    key = (small if from_small else main).popleft()
    if counts[key] > 0:
        counts[key] = 0 if from_small else counts[key] - 1
        main.append(key)
        return
    del counts[key]
    if from_small:
        ghosts[key] = None
        if len(ghosts) > capacity:
            ghosts.popitem(last=False)


def _next_uses(trace: Sequence[str]) -> list[int]:
    """Give, for every request, the place of the next one for the same key."""
    upcoming: dict[str, int] = {}
    uses = [_NEVER] * len(trace)
    for place in range(len(trace) - 1, -1, -1):
        uses[place] = upcoming.get(trace[place], _NEVER)
        upcoming[trace[place]] = place
    return uses

"""Requests to a cache, and what the best known policies make of them: the references of hit ratios.

trace     a sequence of keys, all of one size
LRU       the least recently used key goes
optimum   Belady's rule, which knows the future: the key that is asked for last goes, be it the newcomer itself
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

import numpy as np

NUM_KEYS: Final = 10_000
"""Different keys of the Zipf traces."""
CAPACITY: Final = NUM_KEYS // 10
"""Keys that a cache may hold."""
_SCAN_EVERY: Final = 10_000
_SCAN_LENGTH: Final = 2_000
_NEVER: Final = 1 << 60


def zipf_trace(num_requests: int, *, seed: int = 0) -> list[str]:
    """Give requests for ``NUM_KEYS`` keys, the r-th most wanted in proportion to 1 / r."""
    shares = 1 / np.arange(1, NUM_KEYS + 1)
    drawn = np.random.default_rng(seed).choice(NUM_KEYS, size=num_requests, p=shares / shares.sum())
    return [key_of(int(number)) for number in drawn]


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


def _next_uses(trace: Sequence[str]) -> list[int]:
    """Give, for every request, the place of the next one for the same key."""
    upcoming: dict[str, int] = {}
    uses = [_NEVER] * len(trace)
    for place in range(len(trace) - 1, -1, -1):
        uses[place] = upcoming.get(trace[place], _NEVER)
        upcoming[trace[place]] = place
    return uses

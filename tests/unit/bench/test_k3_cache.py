"""K3 in its smallest form: the references are right, and every figure comes out."""

from __future__ import annotations

import itertools
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import k3_cache
from bench.cache_peers import cachebox_lru, native
from bench.cache_traces import (
    NUM_KEYS,
    drifting_trace,
    key_of,
    lru_hits,
    optimal_hits,
    s3_fifo_hits,
    scanned_trace,
    sieve_hits,
    zipf_trace,
)
from esper.contracts.errors import UnavailableError

traces = st.lists(st.sampled_from("abcde"), max_size=9)


def best_by_trying(trace: list[str], capacity: int) -> int:
    """Give the optimum by trying every content that a cache may go on with after each request."""
    reached = {frozenset[str](): 0}
    for key in trace:
        following: dict[frozenset[str], int] = {}
        for held, hits in reached.items():
            known = sorted(held | {key})
            for size in range(min(capacity, len(known)) + 1):
                for kept in map(frozenset, itertools.combinations(known, size)):
                    following[kept] = max(following.get(kept, 0), hits + (key in held))
        reached = following
    return max(reached.values())


@settings(max_examples=60)
@given(trace=traces, capacity=st.integers(1, 3))
def test_the_optimum_is_the_best_of_all_ways(trace: list[str], capacity: int) -> None:
    assert optimal_hits(trace, capacity) == best_by_trying(trace, capacity)


@given(trace=traces, capacity=st.integers(1, 3))
def test_no_rule_is_above_the_optimum(trace: list[str], capacity: int) -> None:
    for rule in (lru_hits, sieve_hits, s3_fifo_hits):
        assert rule(trace, capacity) <= optimal_hits(trace, capacity)


def test_sieve_spares_what_was_asked_for_again() -> None:
    assert sieve_hits(list("aabcada"), 2) == 3
    assert lru_hits(list("aabcda"), 2) == 1
    assert sieve_hits(list("aabcda"), 2) == 2


def test_s3_fifo_lets_a_scan_pass() -> None:
    wanted = [f"w{i}" for i in range(50)]
    scan = [f"s{i}" for i in range(200)]
    trace = [*wanted, *wanted, *scan, *wanted]
    assert lru_hits(trace, 100) == 50
    assert s3_fifo_hits(trace, 100) == 100


def test_the_drifting_trace_changes_its_favourites() -> None:
    drifting = drifting_trace(60_000)
    assert drifting[:50_000].count(key_of(0)) > 100 * drifting[50_000:].count(key_of(0))
    assert drifting[50_000:].count(key_of(300)) > 500


def test_lru_drops_what_was_not_used_for_longest() -> None:
    assert lru_hits(list("abacab"), 2) == 2


def test_traces_are_as_described() -> None:
    zipf = zipf_trace(20_000)
    assert zipf == zipf_trace(20_000)
    assert zipf.count(key_of(0)) > zipf.count(key_of(9)) > zipf.count(key_of(999))
    scanned = scanned_trace(20_000)
    assert len(scanned) == 20_000 + 2 * 2_000
    assert scanned.count(key_of(NUM_KEYS)) == 1


def test_the_byte_bound_is_watched() -> None:
    figure = k3_cache.byte_bound_figure(3_000)
    assert figure.holds is True
    assert figure.value is not None
    assert figure.value > 0.5


def test_native_cache_keeps_what_it_is_asked_for() -> None:
    cache = native(4)
    assert not cache.request("k1")
    assert cache.request("k1")


@pytest.mark.parametrize("name", ["cachebox", "theine", "cachetools"])
def test_each_peer_is_measured(name: str) -> None:
    pytest.importorskip(name)
    make = next(make for make in k3_cache.PEERS if make.__name__.startswith(name))
    names = [figure.name for figure in k3_cache.peer_figures(make, seconds=0.0)]
    assert names[:2] == [f"hit, over {name}", f"miss, over {name}"]
    assert names[-1] == f"insert, evicting, over {name}"


def test_functions_and_floor_are_measured() -> None:
    for figure in k3_cache.function_figures(seconds=0.0) + k3_cache.floor_figures(seconds=0.0):
        assert figure.value is not None
        assert figure.value > 0


def test_hit_ratios_lie_below_the_optimum() -> None:
    pytest.importorskip("theine")
    figures = k3_cache.hit_ratio_figures("zipf", zipf_trace(5_000), capacity=500, near_optimum=0.5)
    shares = {figure.name: figure.value for figure in figures if figure.unit == "share"}
    best = shares["hits on zipf, Belady's optimum"]
    assert best is not None
    assert len(shares) == 6
    assert all(share is not None and 0 < share <= best for share in shares.values())
    assert [figure.name for figure in figures if figure.goal is not None] == [
        "hits on zipf, over LRU's",
        "hits on zipf, over theine's",
        "hits on zipf, over the optimum's",
    ]


def test_a_missing_peer_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cachebox", None)
    with pytest.raises(UnavailableError, match=r"needs cachebox: pip install 'esper\[bench\]'"):
        cachebox_lru(4)

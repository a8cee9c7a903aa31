"""KernelCache across the language border: objects, threads, callbacks, the collector."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper.contracts.errors import (
    CapacityExceededError,
    InvalidInputError,
    InvalidStateError,
    NotFoundError,
)
from esper.execution._native import KernelCache


class Kernel:
    """Something that can be weakly referenced."""


def _until(condition: Any, deadline_s: float = 10.0) -> None:
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, "the condition did not come true in time"


def test_it_gives_back_the_same_object() -> None:
    cache, kernel = KernelCache(100), Kernel()
    assert cache.put("a", kernel, 10)
    assert cache.get("a") is kernel
    assert cache.get(b"a") is kernel
    assert cache.get("b") is None
    assert "a" in cache
    assert len(cache) == 1


def test_what_leaves_is_let_go() -> None:
    cache = KernelCache(10)
    kernel = Kernel()
    alive = weakref.ref(kernel)
    cache.put("a", kernel, 10)
    del kernel
    gc.collect()
    assert alive() is not None
    cache.put("b", Kernel(), 10)
    assert alive() is None
    last = weakref.ref(cache.get("b"))
    del cache
    assert last() is None


def test_a_refused_value_is_let_go() -> None:
    cache, kernel = KernelCache(10), Kernel()
    alive = weakref.ref(kernel)
    cache.put("pinned", Kernel(), 10, pinned=True)
    assert cache.put("a", kernel, 5) is False
    with pytest.raises(CapacityExceededError, match="max_item_bytes = 10, got 11"):
        cache.put("a", kernel, 11)
    del kernel
    assert alive() is None


def test_both_bounds_hold() -> None:
    cache = KernelCache(100, max_entries=3)
    for i in range(50):
        cache.put(str(i), i, 1 + i % 60)
        stats = cache.stats()
        assert stats["bytes"] <= 100
        assert stats["entries"] <= 3


def test_pins_hold_against_pressure_erase_and_clear() -> None:
    cache = KernelCache(30)
    cache.put("kept", "kernel", 10)
    assert cache.pin("kept")
    for i in range(100):
        cache.put(str(i), i, 10)
    cache.clear()
    assert cache.get("kept") == "kernel"
    with pytest.raises(InvalidStateError, match="must not be pinned when it is erased, got 1 pins"):
        cache.erase("kept")
    assert cache.unpin("kept")
    assert not cache.unpin("kept")
    assert cache.erase("kept")
    assert not cache.erase("kept")
    assert not cache.pin("kept")


def test_on_evict_is_told_what_left_and_why() -> None:
    told: list[tuple[bytes, Any, str]] = []
    cache = KernelCache(20, on_evict=lambda *what: told.append(what))
    cache.put("a", 1, 10)
    cache.put("a", 2, 10)
    cache.put("b", 3, 20)
    cache.erase("b")
    cache.put("c", 4, 1)
    cache.clear()
    assert told == [
        (b"a", 1, "replaced"),
        (b"a", 2, "evicted"),
        (b"b", 3, "erased"),
        (b"c", 4, "cleared"),
    ]


def test_on_evict_may_use_the_cache() -> None:
    cache = KernelCache(10, on_evict=lambda *what: cache.put("log", what[0], 1))
    cache.put("a", 1, 10)
    cache.put("b", 2, 9)
    assert cache.get("log") == b"a"


def test_a_failing_on_evict_breaks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[BaseException | None] = []
    monkeypatch.setattr("sys.unraisablehook", lambda event: seen.append(event.exc_value))

    def fail(key: bytes, value: object, reason: str) -> None:
        raise RuntimeError("callback")

    cache = KernelCache(10, on_evict=fail)
    cache.put("a", 1, 10)
    assert cache.put("b", 2, 10)
    assert [str(error) for error in seen] == ["callback"]


def test_entries_expire() -> None:
    reasons: list[str] = []
    cache = KernelCache(100, ttl_s=1e-6, on_evict=lambda *what: reasons.append(what[2]))
    cache.put("a", 1, 10)
    cache.put("long", 2, 10, ttl_s=1000)
    _until(lambda: cache.get("a") is None)
    assert cache.get("long") == 2
    assert reasons == ["expired"]
    assert cache.stats()["expirations"] == 1


def test_negative_entries_answer_for_a_while() -> None:
    cache = KernelCache(100)
    cache.put_negative("x", 1000)
    assert cache.is_negative("x")
    assert cache.get("x") is None
    with pytest.raises(NotFoundError, match="noted as absent, got 'x'"):
        cache.get_or_load("x", lambda: (1, 1))
    cache.put_negative("y", 1e-6)
    _until(lambda: not cache.is_negative("y"))
    cache.put("x", 1, 1)
    assert not cache.is_negative("x")
    with pytest.raises(InvalidStateError, match="got a stored key"):
        cache.put_negative("x", 1)
    stats = cache.stats()
    assert (stats["negative_hits"], stats["misses"]) == (2, 0)


def test_a_load_happens_once_for_all_threads() -> None:
    cache, calls, started, finish = KernelCache(100), [], threading.Event(), threading.Event()

    def load() -> tuple[Kernel, int]:
        calls.append(threading.get_ident())
        started.set()
        assert finish.wait(30)
        return Kernel(), 10

    results: list[Kernel] = []
    threads = [threading.Thread(target=lambda: results.append(cache.get_or_load("a", load))) for _ in range(6)]
    for thread in threads:
        thread.start()
    assert started.wait(30)
    _until(lambda: cache.stats()["load_waits"] == 5)
    finish.set()
    for thread in threads:
        thread.join(timeout=30)
    assert len(calls) == 1
    assert len(results) == 6
    assert all(result is results[0] for result in results)
    assert cache.get("a") is results[0]
    assert cache.stats()["loads"] == 1


def test_a_failed_load_reaches_every_waiter_and_is_not_remembered() -> None:
    cache, started, finish = KernelCache(100), threading.Event(), threading.Event()
    error = LookupError("no such kernel")

    def fail() -> tuple[Kernel, int]:
        started.set()
        assert finish.wait(30)
        raise error

    caught: list[BaseException] = []

    def ask() -> None:
        try:
            cache.get_or_load("a", fail)
        except LookupError as found:
            caught.append(found)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert started.wait(30)
    _until(lambda: cache.stats()["load_waits"] == 3)
    finish.set()
    for thread in threads:
        thread.join(timeout=30)
    assert caught == [error] * 4
    assert cache.get_or_load("a", lambda: ("now", 1)) == "now"
    assert cache.stats()["load_failures"] == 1


@pytest.mark.parametrize("result", [5, ("value",), ("value", "size"), ("value", 0), (None, 1)])
def test_a_loader_that_breaks_its_contract_is_named(result: Any) -> None:
    with pytest.raises(InvalidInputError, match=r"(loader|size_bytes|value) must"):
        KernelCache(100).get_or_load("a", lambda: result)


def test_a_loaded_value_that_does_not_fit_is_handed_out() -> None:
    cache = KernelCache(10)
    assert cache.get_or_load("a", lambda: ("large", 11)) == "large"
    assert "a" not in cache
    assert cache.stats()["rejected"] == 1


def test_a_loader_cannot_wait_for_itself() -> None:
    cache = KernelCache(10)
    with pytest.raises(InvalidStateError, match="own loader, got 'a'"):
        cache.get_or_load("a", lambda: (cache.get_or_load("a", lambda: (1, 1)), 1))
    assert cache.get_or_load("a", lambda: (cache.get_or_load("b", lambda: (2, 1)), 1)) == 2


def test_warm_loads_what_is_neither_held_nor_absent() -> None:
    cache, asked = KernelCache(100), []
    cache.put("held", "before", 10)
    cache.put_negative("gone", 1000)

    def load(key: str) -> tuple[str, int]:
        asked.append(key)
        return f"kernel {key}", 200 if key == "large" else 10

    assert cache.warm(["held", "a", "gone", "b", "large", "a"], load) == 3
    assert asked == ["a", "b", "large"]
    assert cache.get("a") == "kernel a"
    assert cache.get("held") == "before"
    assert cache.stats()["loads"] == 3


def test_warm_ends_at_the_first_error_and_keeps_what_it_has() -> None:
    cache = KernelCache(100)

    def load(key: str) -> tuple[str, int]:
        if key == "b":
            raise LookupError("no such kernel")
        return key, 1

    with pytest.raises(LookupError, match="no such kernel"):
        cache.warm(iter(["a", "b", "c"]), load)
    assert [key in cache for key in "abc"] == [True, False, False]
    with pytest.raises(TypeError, match="key must be str or bytes, got int"):
        cache.warm([5], load)  # type: ignore[type-var]


@pytest.mark.parametrize("key", ["", "a", "k" * 33, "k" * 41, "ключ", "schlüssel", "k\0ernel"])
def test_a_key_is_its_utf8_bytes(key: str) -> None:
    cache = KernelCache(100)
    cache.put(key, "kernel", 1)
    assert cache.get(key.encode()) == "kernel"
    assert cache.get(key + "x") is None


def test_arguments_come_by_name_too() -> None:
    cache = KernelCache(100)
    assert cache.put("a", value=1, size_bytes=10, ttl_s=None, pinned=True)
    assert cache.stats()["pinned_entries"] == 1
    assert cache.get_or_load(key="b", loader=lambda: (2, 1)) == 2
    with pytest.raises(TypeError, match="put"):
        cache.put("a")  # type: ignore[call-arg]


def test_shards_split_the_bounds_and_hold_all_keys() -> None:
    cache = KernelCache(8000, max_entries=800, num_shards=8)
    assert cache.num_shards == 8
    assert cache.max_item_bytes == 1000
    for i in range(400):
        cache.put(f"k{i}", i, 10)
    assert [cache.get(f"k{i}") for i in range(400)] == list(range(400))
    for i in range(400, 4000):
        cache.put(f"k{i}", i, 10)
    assert cache.stats()["entries"] == 800


def test_threads_share_a_cache_and_the_books_balance() -> None:
    cache, gone = KernelCache(3000, max_entries=50, num_shards=2, on_evict=lambda *what: gone.append(what[0])), []
    num_threads, num_rounds = 4, 3000

    def work(offset: int) -> None:
        for i in range(num_rounds):
            key = f"k{(i * 7 + offset) % 97}"
            if cache.get(key) is None:
                cache.put(key, key, 1 + i % 100)
            if i % 11 == 0 and cache.pin(key):
                cache.unpin(key)

    threads = [threading.Thread(target=work, args=(offset,)) for offset in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    stats = cache.stats()
    assert stats["hits"] + stats["misses"] == num_threads * num_rounds
    assert stats["inserts"] + stats["replaced"] == len(gone) + stats["entries"]
    assert stats["bytes"] <= 3000
    assert stats["entries"] <= 50


def test_cycles_through_the_cache_are_collected() -> None:
    class Owner:
        def __init__(self) -> None:
            self.cache = KernelCache(10, on_evict=self.told)
            self.cache.put("self", self, 1)
            self.cache.put("pinned", self, 1, pinned=True)

        def told(self, key: bytes, value: object, reason: str) -> None: ...

    owner = weakref.ref(Owner())
    gc.collect()
    assert owner() is None


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: KernelCache(0), InvalidInputError, "capacity_bytes must be at least 1, got 0"),
        (lambda: KernelCache(10, max_entries=0), InvalidInputError, "max_entries must be at least 1, got 0"),
        (lambda: KernelCache(10, num_shards=11), InvalidInputError, "num_shards must be at most"),
        (lambda: KernelCache(10, ttl_s=-1), InvalidInputError, "ttl_s must be above 0 .* got -1"),
        (lambda: KernelCache(10).put("a", None, 1), InvalidInputError, "value must be an object, got None"),
        (lambda: KernelCache(10).put("a", 1, 0), InvalidInputError, "size_bytes must be at least 1, got 0"),
        (lambda: KernelCache(10).get(5), TypeError, "key must be str or bytes, got int"),  # type: ignore[arg-type]
    ],
)
def test_bad_input_is_named(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


OPERATIONS = st.tuples(
    st.sampled_from(["get", "put", "pin", "unpin", "erase", "clear"]),
    st.sampled_from("abcdefgh"),
    st.integers(1, 60),
)


@settings(max_examples=60)
@given(st.lists(OPERATIONS, max_size=80), st.sampled_from([1, 2]))
def test_random_use_keeps_the_bounds_and_the_books(operations: list[tuple[str, str, int]], num_shards: int) -> None:
    cache = KernelCache(120, max_entries=6, num_shards=num_shards)
    pins: dict[str, int] = {}
    latest: dict[str, object] = {}
    for name, key, size in operations:
        if name == "put":
            value = object()
            if cache.put(key, value, size):
                latest[key] = value
        elif name == "get":
            found = cache.get(key)
            assert found is None or found is latest[key]
        elif name == "pin":
            pins[key] = pins.get(key, 0) + cache.pin(key)
        elif name == "unpin":
            assert cache.unpin(key) == (pins.get(key, 0) > 0)
            pins[key] = max(0, pins.get(key, 0) - 1)
        elif name == "erase" and not pins.get(key):
            cache.erase(key)
        elif name == "clear":
            cache.clear()
        stats = cache.stats()
        assert stats["bytes"] <= 120
        assert stats["entries"] <= 6
        assert stats["pinned_entries"] == sum(count > 0 for count in pins.values())
        assert all(key in cache for key, count in pins.items() if count)

"""The caches that people use from Python today, behind what a timing needs of each: its fastest calls."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from itertools import repeat
from typing import Any, Final

from esper.contracts.errors import UnavailableError
from esper.execution._native import KernelCache

ITEM_BYTES: Final = 4096
"""Size that every entry is given."""


_VALUE: Final = object()


@dataclass(frozen=True, kw_only=True, slots=True)
class Cache:
    """One cache of a given capacity; calls that take many keys loop in C, so that no loop hides the difference."""

    name: str
    """What a table calls it."""
    get_all: Callable[[Sequence[str]], None]
    """Looks keys up, by the fastest call there is for it."""
    put_all: Callable[[Sequence[str]], None]
    """Stores keys, one by one."""
    request: Callable[[str], bool]
    """Looks one key up, stores it where it is not there; says whether it was."""
    thread_safe: bool = True
    """Whether threads may share it without a lock of their own."""


def native(capacity: int) -> Cache:
    """Give the kernel cache, bounded by bytes and count."""
    cache = KernelCache(capacity * ITEM_BYTES, max_entries=capacity)

    def request(key: str) -> bool:
        if cache.get(key) is not None:
            return True
        cache.put(key, _VALUE, ITEM_BYTES)
        return False

    return Cache(
        name="KernelCache",
        get_all=lambda keys: _drain(map(cache.get, keys)),
        put_all=lambda keys: _drain(map(cache.put, keys, repeat(_VALUE), repeat(ITEM_BYTES))),
        request=request,
    )


def cachebox_lru(capacity: int) -> Cache:
    """Give cachebox's LRU cache, written in Rust."""
    cache = _peer("cachebox").LRUCache(capacity)
    return Cache(
        name="cachebox",
        get_all=lambda keys: _drain(map(cache.get, keys)),
        put_all=lambda keys: _drain(map(cache.insert, keys, repeat(_VALUE))),
        request=_requester(cache.get, cache.insert),
    )


def cachebox_bytes(capacity: int) -> Cache:
    """Give cachebox's LRU cache bounded by bytes, which it learns from a function in Python."""
    cache = _peer("cachebox").LRUCache(capacity * ITEM_BYTES, getsizeof=lambda _key, _value: ITEM_BYTES)
    return Cache(
        name="cachebox bounded by bytes",
        get_all=lambda keys: _drain(map(cache.get, keys)),
        put_all=lambda keys: _drain(map(cache.insert, keys, repeat(_VALUE))),
        request=_requester(cache.get, cache.insert),
    )


def theine_tlfu(capacity: int) -> Cache:
    """Give theine's cache, W-TinyLFU with its policy in Rust."""
    cache = _peer("theine").Cache(capacity)

    def get(key: str) -> object:
        return cache.get(key)[0]

    return Cache(
        name="theine",
        get_all=lambda keys: _drain(map(cache.get, keys)),
        put_all=lambda keys: _drain(map(cache.set, keys, repeat(_VALUE))),
        request=_requester(get, cache.set),
    )


def cachetools_lru(capacity: int) -> Cache:
    """Give cachetools' LRU cache, in Python."""
    cache = _peer("cachetools").LRUCache(capacity)
    return Cache(
        name="cachetools",
        get_all=lambda keys: _drain(map(cache.get, keys)),
        put_all=lambda keys: _drain(map(cache.__setitem__, keys, repeat(_VALUE))),
        request=_requester(cache.get, cache.__setitem__),
        thread_safe=False,
    )


PEERS: Final[Sequence[Callable[[int], Cache]]] = (cachebox_lru, theine_tlfu, cachetools_lru)
"""The peers that have lookups and stores of their own."""


def lru_function(capacity: int) -> Callable[[Sequence[str]], None]:
    """Give calls of a function behind ``functools.lru_cache``, written in C."""
    cached = lru_cache(maxsize=capacity)(_load)
    return lambda keys: _drain(map(cached, keys))


def native_function(capacity: int) -> Callable[[Sequence[str]], None]:
    """Give the same with the kernel cache in the place of ``lru_cache``."""
    cache = KernelCache(capacity * ITEM_BYTES, max_entries=capacity)
    return lambda keys: _drain(map(cache.get_or_load, keys, repeat(_load)))


def _load(key: str = "") -> tuple[object, int]:
    del key
    return _VALUE, ITEM_BYTES


def _drain(answers: Iterable[object]) -> None:
    """Run through answers without keeping them."""
    deque(answers, maxlen=0)


def _requester(get: Callable[[str], object], put: Callable[[str, object], object]) -> Callable[[str], bool]:
    def request(key: str) -> bool:
        if get(key) is not None:
            return True
        put(key, _VALUE)
        return False

    return request


def _peer(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise UnavailableError(f"measure k3_cache needs {name}: pip install 'esper[bench]'") from error

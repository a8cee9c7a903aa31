"""The three tiers as one: promotion, proof on the way, one fetch for many, and trouble that only costs time."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from esper.blueprints.ir import canonical_bytes
from esper.contracts.blueprint import BlueprintCost, BlueprintIR, IRNode, Site, SiteKind
from esper.contracts.errors import (
    CorruptDataError,
    EsperError,
    InternalError,
    InvalidInputError,
    NotFoundError,
    SignatureError,
    StorageFullError,
    UnavailableError,
)
from esper.contracts.kernel import CompileSpec, CompileTarget, DeviceKind, ValidationCheck
from esper.contracts.run import CacheTierStatus, TierBreaker
from esper.contracts.wire import from_wire, to_wire
from esper.execution._native import KernelCache
from esper.execution.answers import content_key, job_id_of
from esper.execution.artifact import KernelContent, VerifiedKernel, artifact_bytes, pack, verify
from esper.execution.keys import SigningKey
from esper.execution.tier_directory import DirectoryTier
from esper.execution.tier_memory import HeldKernel
from esper.execution.tier_port import BreakerState
from esper.execution.tiers import TierConfig, TieredKernelSource

KEY = SigningKey.generate()
RING = KEY.ring()
IR = BlueprintIR(nodes=(IRNode(name="map", op="linear", inputs=("h",)),), output="map")


SITE = Site(kind=SiteKind.LINEAR, input_shape=(3,), output_shape=(2,))
TOOLS = {"recipe": "2"}


def spec(number: int = 0) -> CompileSpec:
    """Give the request that the kernel of a number answers."""
    return CompileSpec(ir=IR, site=SITE, random_seed=number)


def kernel_bytes(number: int = 0, key: SigningKey = KEY, floats: int = 4) -> tuple[str, bytes]:
    """Give the id and bytes of a signed kernel; another number, another kernel."""
    content = KernelContent(
        content_key=content_key(spec(number), TOOLS),
        site=SITE,
        target=CompileTarget.EAGER,
        device=DeviceKind.CPU,
        ir=canonical_bytes(IR),
        weights={"w": torch.full((floats,), float(number))},
        binary=b"",
        cost=BlueprintCost(parameters=4, flops=8, activation_bytes=8),
        checks=(ValidationCheck(name="shapes", passed=True),),
        compilation_time=timedelta(milliseconds=1),
        toolchain=TOOLS,
    )
    data = artifact_bytes(pack(content, key))
    return verify(data, key.ring()).artifact_id, data


class Shelf:
    """A tier in memory that can be told to fail, damage or wait; counts what it is asked."""

    def __init__(self) -> None:
        self.entries: dict[str, bytes] = {}
        self.reads = 0
        self.failure: EsperError | None = None
        self.gate: asyncio.Event | None = None
        self.asked = asyncio.Event()
        self.closed = False

    @property
    def bytes_held(self) -> int | None:
        return sum(map(len, self.entries.values()))

    async def read(self, artifact_id: str) -> bytes:
        self.reads += 1
        found = self.entries.get(artifact_id)
        self.asked.set()
        if self.gate is not None:
            await self.gate.wait()
        if self.failure is not None:
            raise self.failure
        if found is None:
            raise NotFoundError(f"no {artifact_id}")
        return found

    async def write(self, artifact_id: str, data: bytes) -> None:
        if self.failure is not None:
            raise self.failure
        self.entries[artifact_id] = data

    async def erase(self, artifact_id: str) -> None:
        self.entries.pop(artifact_id, None)

    async def close(self) -> None:
        self.closed = True


class Tiers:
    """A source over two shelves."""

    def __init__(self, **config: float) -> None:
        self.l1 = KernelCache(64 << 20)
        self.l2, self.l3 = Shelf(), Shelf()
        self.source = TieredKernelSource(self.l1, self.l2, self.l3, RING, TierConfig(**config))  # type: ignore[arg-type]

    def status(self, tier: str) -> CacheTierStatus:
        return next(status for status in self.source.stats() if status.tier == tier)


@pytest.fixture
async def tiers() -> AsyncIterator[Tiers]:
    made = Tiers()
    yield made
    await made.source.close()


ID, DATA = kernel_bytes()


async def test_a_kernel_of_the_library_is_promoted_to_every_tier(tiers: Tiers) -> None:
    tiers.l3.entries[ID] = DATA
    assert (await tiers.source.fetch(ID)).artifact_id == ID
    assert tiers.l2.entries[ID] == DATA
    cached = tiers.source.cached(ID)
    assert cached is not None
    assert cached.manifest == (await tiers.source.fetch(ID)).manifest
    assert (tiers.l2.reads, tiers.l3.reads) == (1, 1)
    assert (tiers.status("l3").hits, tiers.status("l2").misses, tiers.status("l1").hits) == (1, 1, 2)


async def test_the_second_tier_spares_the_library(tiers: Tiers) -> None:
    tiers.l2.entries[ID] = DATA
    await tiers.source.fetch(ID)
    assert tiers.l3.reads == 0
    assert tiers.status("l1").bytes_held == len(DATA)


async def test_callers_that_ask_at_once_share_one_fetch(tiers: Tiers) -> None:
    tiers.l3.entries[ID] = DATA
    tiers.l3.gate = asyncio.Event()
    asking = [asyncio.create_task(tiers.source.fetch(ID)) for _ in range(20)]
    await tiers.l3.asked.wait()
    tiers.l3.gate.set()
    kernels = await asyncio.gather(*asking)
    assert tiers.l3.reads == 1
    assert {kernel.artifact_id for kernel in kernels} == {ID}
    assert len({kernel.weights["w"].data_ptr() for kernel in kernels}) == 20


async def test_a_caller_that_leaves_does_not_end_the_fetch_of_others(tiers: Tiers) -> None:
    tiers.l3.entries[ID] = DATA
    tiers.l3.gate = asyncio.Event()
    leaver, stayer = (asyncio.create_task(tiers.source.fetch(ID)) for _ in range(2))
    await tiers.l3.asked.wait()
    leaver.cancel()
    tiers.l3.gate.set()
    assert (await stayer).artifact_id == ID
    with pytest.raises(asyncio.CancelledError):
        await leaver


async def test_missing_everywhere_is_not_found_and_not_asked_again_at_once(tiers: Tiers) -> None:
    for _ in range(3):
        with pytest.raises(NotFoundError, match=f"no cache tier has kernel {ID}"):
            await tiers.source.fetch(ID)
    assert (tiers.l2.reads, tiers.l3.reads) == (1, 1)


async def test_a_kernel_announced_after_a_miss_is_found(tiers: Tiers) -> None:
    with pytest.raises(NotFoundError):
        await tiers.source.fetch(ID)
    tiers.l3.entries[ID] = DATA
    with pytest.raises(NotFoundError):
        await tiers.source.fetch(ID)
    assert (await tiers.source.fetch(ID, announced=True)).artifact_id == ID
    assert (await tiers.source.fetch(ID)).artifact_id == ID


async def test_an_announcement_ends_what_was_noted_as_missing_even_if_its_own_fetch_fails(tiers: Tiers) -> None:
    with pytest.raises(NotFoundError):
        await tiers.source.fetch(ID)
    tiers.l3.failure, tiers.l3.entries = UnavailableError("gone"), {ID: DATA}
    with pytest.raises(UnavailableError):
        await tiers.source.fetch(ID, announced=True)
    tiers.l3.failure = None
    assert (await tiers.source.fetch(ID)).artifact_id == ID


async def test_an_announced_fetch_does_not_settle_for_one_that_looked_before(tiers: Tiers) -> None:
    tiers.l3.gate = asyncio.Event()
    early = asyncio.create_task(tiers.source.fetch(ID))
    await tiers.l3.asked.wait()
    told = [asyncio.create_task(tiers.source.fetch(ID, announced=True)) for _ in range(3)]
    async with asyncio.timeout(5):
        while len(tiers.source._flights[ID]._callbacks) < 5:  # noqa: ASYNC110 - until all three wait for the early one
            await asyncio.sleep(0.001)
    tiers.l3.entries[ID] = DATA
    tiers.l3.gate.set()
    with pytest.raises(NotFoundError):
        await early
    assert {kernel.artifact_id for kernel in await asyncio.gather(*told)} == {ID}
    assert tiers.l3.reads == 2


async def test_a_kernel_removed_as_corrupt_rebuilt_and_announced_is_found(tiers: Tiers) -> None:
    tiers.l3.failure = CorruptDataError("a piece is damaged; it was removed")
    with pytest.raises(CorruptDataError):
        await tiers.source.fetch(ID)
    tiers.l3.failure = None
    with pytest.raises(NotFoundError):
        await tiers.source.fetch(ID)
    tiers.l3.entries[ID] = DATA
    assert (await tiers.source.fetch(ID, announced=True)).artifact_id == ID


async def test_all_slower_tiers_away_is_unavailable(tiers: Tiers) -> None:
    tiers.l2.failure = tiers.l3.failure = UnavailableError("gone")
    with pytest.raises(UnavailableError, match="cache tier l3 failed: gone"):
        await tiers.source.fetch(ID)
    assert not tiers.l1.is_negative(ID)


async def test_the_library_alone_says_that_a_kernel_is_missing(tiers: Tiers) -> None:
    tiers.l3.failure = UnavailableError("gone")
    with pytest.raises(UnavailableError):
        await tiers.source.fetch(ID)
    tiers.l2.failure, tiers.l3.failure = UnavailableError("gone"), None
    with pytest.raises(NotFoundError):
        await tiers.source.fetch(ID)


async def test_a_second_tier_that_is_away_costs_nothing_but_time(tiers: Tiers) -> None:
    tiers.l2.failure = InternalError("garbage")
    tiers.l3.entries[ID] = DATA
    assert (await tiers.source.fetch(ID)).artifact_id == ID
    assert tiers.status("l2").errors == 2


@pytest.mark.parametrize("damage", [b"", b"garbage", DATA[:-1], DATA[:100] + b"\x01" + DATA[101:]])
async def test_a_damaged_entry_is_dropped_counted_and_fetched_anew(tiers: Tiers, damage: bytes) -> None:
    tiers.l2.entries[ID] = damage
    tiers.l3.entries[ID] = DATA
    assert (await tiers.source.fetch(ID)).artifact_id == ID
    assert tiers.status("l2").corrupt == 1
    assert tiers.l2.entries[ID] == DATA


async def test_a_damaged_entry_that_no_tier_can_replace_is_not_found(tiers: Tiers) -> None:
    tiers.l2.entries[ID] = b"garbage"
    with pytest.raises(NotFoundError):
        await tiers.source.fetch(ID)
    assert ID not in tiers.l2.entries


async def test_a_kernel_signed_by_a_stranger_is_never_given(tiers: Tiers) -> None:
    stranger_id, stranger = kernel_bytes(key=SigningKey.generate())
    tiers.l3.entries[stranger_id] = stranger
    with pytest.raises(SignatureError, match="trusted one"):
        await tiers.source.fetch(stranger_id)
    assert tiers.status("l3").corrupt == 2
    assert tiers.source.cached(stranger_id) is None
    assert stranger_id not in tiers.l2.entries


async def test_a_kernel_under_a_false_id_is_refused(tiers: Tiers) -> None:
    other_id, _ = kernel_bytes(1)
    tiers.l3.entries[other_id] = DATA
    with pytest.raises(CorruptDataError, match=f"artefact must be {other_id}, got {ID}"):
        await tiers.source.fetch(other_id)


async def test_a_broken_tier_is_held_off_and_tried_again() -> None:
    tiers = Tiers(failures_to_open=2, open_s=0.05)
    tiers.l3.failure = UnavailableError("gone")
    for _ in range(5):
        with pytest.raises(UnavailableError):
            await tiers.source.fetch(ID)
    assert tiers.l3.reads == 2
    assert tiers.source.breakers() == {"l2": BreakerState.CLOSED, "l3": BreakerState.OPEN}
    assert tiers.status("l3").errors == 5
    tiers.l3.failure, tiers.l3.entries = None, {ID: DATA}
    async with asyncio.timeout(5):
        while tiers.source.breakers()["l3"] is BreakerState.OPEN:  # noqa: ASYNC110 - nothing signals passing time
            await asyncio.sleep(0.005)
    assert (await tiers.source.fetch(ID)).artifact_id == ID
    assert tiers.source.breakers()["l3"] is BreakerState.CLOSED


async def test_each_tier_says_its_time_and_its_breaker(tiers: Tiers) -> None:
    assert [(one.lookup_s, one.breaker) for one in tiers.source.stats()] == [
        (0.0, None),
        (0.0, TierBreaker.CLOSED),
        (0.0, TierBreaker.CLOSED),
    ]
    tiers.l3.entries[ID], tiers.l3.gate = DATA, asyncio.Event()
    fetching = asyncio.create_task(tiers.source.fetch(ID))
    await tiers.l3.asked.wait()
    begun_s = time.perf_counter()
    await asyncio.to_thread(lambda: None)  # the library takes its time
    waited_s = time.perf_counter() - begun_s
    tiers.l3.gate.set()
    await fetching
    assert tiers.status("l3").lookup_s >= waited_s
    assert min(one.lookup_s for one in tiers.source.stats()) > 0


async def test_what_a_tier_did_not_answer_counts_no_time_and_its_breaker_goes_with_the_counts() -> None:
    tiers = Tiers(failures_to_open=1)
    tiers.l3.failure = UnavailableError("gone")
    with pytest.raises(UnavailableError):
        await tiers.source.fetch(ID)
    assert (tiers.status("l3").lookup_s, tiers.status("l3").breaker) == (0.0, TierBreaker.OPEN)
    assert from_wire(to_wire(tiers.status("l3")), CacheTierStatus) == tiers.status("l3")


async def test_a_tier_that_hangs_is_given_up_in_time() -> None:
    tiers = Tiers(l2_timeout_s=0.05)
    tiers.l2.gate = asyncio.Event()
    tiers.l3.entries[ID] = DATA
    async with asyncio.timeout(2):
        assert (await tiers.source.fetch(ID)).artifact_id == ID
    assert tiers.status("l2").errors == 1


async def test_a_full_second_tier_stays_readable(tiers: Tiers) -> None:
    tiers.l2.failure = StorageFullError("no room")
    assert (await tiers.source.put(DATA)).artifact_id == ID
    assert tiers.status("l2").errors == 1
    assert tiers.source.breakers()["l2"] is BreakerState.CLOSED


async def test_write_through_verifies_first(tiers: Tiers) -> None:
    with pytest.raises(CorruptDataError):
        await tiers.source.put(DATA[:-1])
    assert tiers.l2.entries == {}
    await tiers.source.put(DATA)
    assert tiers.l2.entries == {ID: DATA}
    assert tiers.source.cached(ID) is not None


async def test_a_kernel_larger_than_the_first_tier_is_given_all_the_same() -> None:
    tiers = Tiers()
    tiers.source = TieredKernelSource(KernelCache(64), tiers.l2, tiers.l3, RING)
    tiers.l3.entries[ID] = DATA
    assert (await tiers.source.fetch(ID)).artifact_id == ID
    assert tiers.source.cached(ID) is None


async def test_warming_brings_what_it_can(tiers: Tiers) -> None:
    made = dict(kernel_bytes(number) for number in range(6))
    tiers.l3.entries = made
    missing = "k" + "0" * 32
    assert set(await tiers.source.warm([*made, missing, "../evil", *made])) == set(made)
    assert all(tiers.source.cached(artifact_id) for artifact_id in made)


async def test_what_is_warmed_is_no_lookup_of_anybodys(tiers: Tiers) -> None:
    tiers.l3.entries[ID] = DATA
    await tiers.source.warm([ID, "k" + "0" * 32])
    l1, l2, l3 = tiers.source.stats()
    assert (l3.warmed, l3.hits, l3.misses, l3.lookup_s) == (1, 0, 0, 0.0)
    assert (l2.misses, l1.hits, l1.misses) == (0, 0, 0)
    assert (await tiers.source.fetch(ID)).artifact_id == ID
    assert (tiers.status("l1").hits, tiers.l3.reads) == (1, 2)


async def test_a_kernel_that_is_asked_for_while_it_is_warmed_counts_as_asked_for(tiers: Tiers) -> None:
    tiers.l3.entries[ID] = DATA
    tiers.l3.gate = asyncio.Event()
    warming = asyncio.create_task(tiers.source.warm([ID]))
    await tiers.l3.asked.wait()
    asking = asyncio.create_task(tiers.source.fetch(ID))
    async with asyncio.timeout(5):
        while not tiers.source._wanted:  # noqa: ASYNC110 - the source sets no event
            await asyncio.sleep(0)
    tiers.l3.gate.set()
    assert (await asking).artifact_id == ID
    assert await warming == (ID,)
    assert (tiers.status("l3").hits, tiers.status("l3").warmed, tiers.l3.reads) == (1, 0, 1)
    await tiers.source.warm(["k" + "0" * 32])
    assert tiers.source._wanted == set()


async def test_what_the_compiler_announced_or_had_foreseen_answers_its_request(tiers: Tiers) -> None:
    tiers.l3.entries = dict(kernel_bytes(number) for number in range(3))
    first, second, third = tiers.l3.entries
    await tiers.source.fetch(third)
    assert tiers.source.answer_to(spec(2)) is None, "a kernel that somebody asked for by its id was named by nobody"
    await tiers.source.fetch(first, announced=True)
    await tiers.source.warm([second])
    assert [tiers.source.answer_to(spec(number)) for number in range(3)] == [first, second, None]
    await tiers.source.fetch(third, announced=True)
    assert tiers.source.answer_to(spec(2)) == third
    assert tiers.status("l1").hits == 1, "what is announced counts as found near where it is near"


async def test_what_does_not_verify_answers_nothing(tiers: Tiers) -> None:
    tiers.l3.entries[ID] = DATA[:-1]
    with pytest.raises(CorruptDataError):
        await tiers.source.fetch(ID, announced=True)
    assert tiers.source.answer_to(spec()) is None


async def test_what_the_compiler_takes_back_answers_nothing_and_stays_a_kernel(tiers: Tiers) -> None:
    tiers.l3.entries[ID] = DATA
    await tiers.source.fetch(ID, announced=True)
    tiers.source.refuse(job_id_of(content_key(spec(), TOOLS)))
    assert tiers.source.answer_to(spec()) is None
    assert (await tiers.source.fetch(ID)).artifact_id == ID


async def test_a_loop_is_held_up_by_small_kernels_alone(tiers: Tiers, monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = kernel_bytes(1), kernel_bytes(2, floats=200_000)
    taken_in: dict[str, bool] = {}
    take, loops_thread = HeldKernel.take, threading.get_ident()

    def note(held: HeldKernel) -> VerifiedKernel:
        taken_in[held.manifest.artifact_id] = threading.get_ident() == loops_thread
        return take(held)

    monkeypatch.setattr(HeldKernel, "take", note)
    for artifact_id, data in (small, large):
        await tiers.source.put(data)
        found = await tiers.source.near(artifact_id)
        assert found is not None
        assert found.artifact_id == artifact_id
    assert taken_in == {small[0]: True, large[0]: False}
    assert await tiers.source.near(ID) is None
    assert (tiers.status("l1").hits, tiers.status("l1").misses) == (2, 1)


async def test_only_small_kernels_of_the_first_tier_are_at_hand(tiers: Tiers) -> None:
    small, large = kernel_bytes(1), kernel_bytes(2, floats=200_000)
    tiers.l3.entries[small[0]] = small[1]
    assert tiers.source.at_hand(small[0]) is None
    for artifact_id, data in (small, large):
        await tiers.source.put(data)
        assert artifact_id in tiers.l1
    found = tiers.source.at_hand(small[0])
    assert found is not None
    assert found.artifact_id == small[0]
    assert tiers.source.at_hand(large[0]) is None
    assert (tiers.status("l1").hits, tiers.status("l1").misses) == (1, 0), "what is fetched instead is counted by that"
    changed = replace(tiers.l1.get(small[0]), ir=b"changed in memory")
    tiers.l1.put(small[0], changed, changed.size_bytes)
    assert tiers.source.at_hand(small[0]) is None
    assert (small[0] in tiers.l1, tiers.status("l1").corrupt) == (False, 1)


async def test_what_the_library_withdraws_is_gone_from_here_and_asked_for_anew(tiers: Tiers) -> None:
    artifact_id, data = kernel_bytes()
    tiers.l3.entries[artifact_id] = data
    kernel = await tiers.source.fetch(artifact_id, announced=True)
    del tiers.l3.entries[artifact_id]
    await tiers.source.withdraw(artifact_id, "swept from the library")
    assert tiers.source.cached(artifact_id) is None
    assert artifact_id not in tiers.l2.entries
    assert tiers.source.answer_to(spec()) is None
    assert kernel.weights, "what was taken of it goes on as it is"
    with pytest.raises(NotFoundError, match=f"no cache tier has kernel {artifact_id}"):
        await tiers.source.fetch(artifact_id)
    tiers.l3.entries[artifact_id] = data
    with pytest.raises(NotFoundError, match=f"no cache tier has kernel {artifact_id}"):
        await tiers.source.fetch(artifact_id)
    assert (await tiers.source.fetch(artifact_id, announced=True)).artifact_id == artifact_id
    await tiers.source.withdraw(artifact_id, "twice is as once")
    await tiers.source.withdraw(artifact_id, "twice is as once")
    with pytest.raises(InvalidInputError, match="artifact_id"):
        await tiers.source.withdraw("../etc", "no kernel")


async def test_nothing_is_kept_of_a_fetch_whose_kernel_is_withdrawn_meanwhile(tiers: Tiers) -> None:
    artifact_id, data = kernel_bytes()
    tiers.l3.entries[artifact_id] = data
    tiers.l3.gate = asyncio.Event()
    fetch = asyncio.create_task(tiers.source.fetch(artifact_id))
    warm = asyncio.create_task(tiers.source.warm([artifact_id]))
    await tiers.l3.asked.wait()
    await tiers.source.withdraw(artifact_id, "its blueprint is retired")
    tiers.l3.gate.set()
    assert (await fetch).artifact_id == artifact_id, "who asked before gets it"
    await warm
    assert tiers.source.cached(artifact_id) is None
    assert artifact_id not in tiers.l2.entries
    assert tiers.source.answer_to(spec()) is None
    await tiers.source.fetch(artifact_id)
    assert tiers.source.cached(artifact_id) is not None, "the mark is of that one fetch"


async def test_warming_ends_at_its_bytes() -> None:
    kernels = [kernel_bytes(number) for number in range(6)]
    tiers = Tiers(warm_concurrency=1, warm_bytes=2 * len(kernels[0][1]) - 1)
    tiers.l3.entries |= dict(kernels)
    assert await tiers.source.warm([artifact_id for artifact_id, _ in kernels]) == (kernels[0][0], kernels[1][0])
    await tiers.source.close()


async def test_a_name_of_ones_own(tiers: Tiers) -> None:
    tiers.l3.entries[ID] = DATA
    with pytest.raises(NotFoundError, match="no kernel is named kernel_123"):
        await tiers.source.fetch("kernel_123")
    tiers.source.name("kernel_123", ID)
    assert (await tiers.source.fetch("kernel_123")).artifact_id == ID
    assert tiers.source.cached("kernel_123") is not None
    with pytest.raises(InvalidInputError, match="name must match"):
        tiers.source.name(ID, ID)


@pytest.mark.parametrize("bad", ["../../etc/passwd", "K" + "0" * 32, "a/b", ""])
async def test_ids_are_checked_before_any_tier_is_asked(tiers: Tiers, bad: str) -> None:
    with pytest.raises(InvalidInputError, match="artifact_id must match"):
        await tiers.source.fetch(bad)
    assert (tiers.l2.reads, tiers.l3.reads) == (0, 0)


async def test_closing_ends_fetches_and_tiers() -> None:
    tiers = Tiers()
    tiers.l3.gate = asyncio.Event()
    asking = asyncio.create_task(tiers.source.fetch(ID))
    await tiers.l3.asked.wait()
    await tiers.source.close()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert tiers.l2.closed
    assert tiers.l3.closed


async def test_without_slower_tiers_only_the_first_one_counts(tmp_path: Path) -> None:
    alone = TieredKernelSource(KernelCache(1 << 20), DirectoryTier(tmp_path), None, RING)
    await alone.put(DATA)
    assert (await alone.fetch(ID)).artifact_id == ID
    assert [status.tier for status in alone.stats()] == ["l1", "l2"]
    with pytest.raises(NotFoundError):
        await alone.fetch("k" + "0" * 32)


@pytest.mark.parametrize(
    ("bad", "message"),
    [({"open_s": 0}, "open_s must be > 0 seconds, got 0"), ({"warm_concurrency": 0}, "warm_concurrency must be >= 1")],
)
def test_bad_bounds_are_refused(bad: dict[str, float], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        TierConfig(**bad)  # type: ignore[arg-type]

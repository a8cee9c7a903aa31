"""What does not verify is dropped where it may be, counted and fetched anew; in no tier is it ever handed out."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from esper.contracts.errors import CorruptDataError, SignatureError
from esper.contracts.run import CacheTierStatus
from esper.execution._native import KernelCache
from esper.execution.artifact import VerifiedKernel, verify
from esper.execution.keys import SigningKey
from esper.execution.tier_directory import DirectoryTier
from esper.execution.tier_memory import HeldKernel
from esper.execution.tiers import TieredKernelSource
from tests.damaged_kernels import KEY, damaged, kernel_bytes

ID, DATA = kernel_bytes()
TRUE = verify(DATA, KEY.ring())


def is_true(kernel: VerifiedKernel) -> bool:
    same = (kernel.manifest, kernel.ir, kernel.binary) == (TRUE.manifest, TRUE.ir, TRUE.binary)
    return same and torch.equal(kernel.weights["w"], TRUE.weights["w"])


class Tiers:
    """A source over two directories, the second of which stands for the library."""

    def __init__(self, root: Path) -> None:
        self.l1 = KernelCache(1 << 20)
        self.l2, self.l3 = DirectoryTier(root / "l2"), DirectoryTier(root / "l3")
        self.source = TieredKernelSource(self.l1, self.l2, self.l3, KEY.ring())

    async def put(self, tier: DirectoryTier, data: bytes) -> None:
        await tier.write(ID, data)

    def status(self, tier: str) -> CacheTierStatus:
        return next(status for status in self.source.stats() if status.tier == tier)


@pytest.fixture
def tiers(tmp_path: Path) -> Tiers:
    return Tiers(tmp_path)


def held_by(cache: KernelCache) -> HeldKernel:
    held = cache.get(ID)
    assert isinstance(held, HeldKernel)
    return held


def change_in_memory(data: bytes, offset: int, bit: int) -> None:
    """Change one bit of a bytes object in place, as failing memory does."""
    begin = id(data) + bytes.__basicsize__ - 1
    cell = ctypes.c_uint8.from_address(begin + offset)
    cell.value ^= 1 << bit


async def test_one_bit_changed_anywhere_in_the_second_tier_costs_one_fetch_from_the_library(tiers: Tiers) -> None:
    await tiers.put(tiers.l3, DATA)
    cases = list(damaged(DATA))
    for number, (name, data) in enumerate(cases, start=1):
        await tiers.put(tiers.l2, data)
        tiers.l1.clear()
        assert is_true(await tiers.source.fetch(ID)), name
        assert (tiers.status("l2").corrupt, tiers.status("l3").hits) == (number, number), name
        assert await tiers.l2.read(ID) == DATA, name
    assert tiers.status("l2").hits == 0


async def test_one_bit_changed_anywhere_in_the_library_is_never_handed_out(tiers: Tiers) -> None:
    for number, (name, data) in enumerate(damaged(DATA), start=1):
        await tiers.put(tiers.l3, data)
        with pytest.raises(CorruptDataError):
            await tiers.source.fetch(ID)
        assert tiers.status("l3").corrupt == 2 * number, name
    assert (tiers.source.cached(ID), tiers.l2.bytes_held) == (None, 0)
    await tiers.put(tiers.l3, DATA)
    assert is_true(await tiers.source.fetch(ID))


def signed_by_a_stranger() -> tuple[str, bytes]:
    return kernel_bytes(key=SigningKey.generate())


async def test_a_whole_entry_signed_by_a_stranger_is_dropped_from_the_second_tier(tiers: Tiers) -> None:
    stranger_id, stranger = signed_by_a_stranger()
    assert stranger_id == ID
    await tiers.put(tiers.l2, stranger)
    await tiers.put(tiers.l3, DATA)
    assert is_true(await tiers.source.fetch(ID))
    assert tiers.status("l2").corrupt == 1
    assert await tiers.l2.read(ID) == DATA


async def test_a_whole_kernel_of_the_library_signed_by_a_stranger_can_be_rebuilt(tiers: Tiers) -> None:
    _, stranger = signed_by_a_stranger()
    await tiers.put(tiers.l3, stranger)
    with pytest.raises(SignatureError, match="trusted one"):
        await tiers.source.fetch(ID)
    assert (tiers.status("l3").corrupt, tiers.l2.bytes_held, tiers.l1.is_negative(ID)) == (2, 0, False)
    await tiers.put(tiers.l3, DATA)
    assert is_true(await tiers.source.fetch(ID))


async def test_what_a_caller_does_to_its_kernel_reaches_nobody_else(tiers: Tiers) -> None:
    await tiers.put(tiers.l3, DATA)
    kernels: Iterable[VerifiedKernel | None] = (
        await tiers.source.fetch(ID),
        await tiers.source.fetch(ID),
        tiers.source.cached(ID),
        await tiers.source.put(DATA),
    )
    for kernel in kernels:
        assert kernel is not None
        assert is_true(kernel)
        kernel.weights["w"].zero_()
        kernel.ir.nodes[0].attributes["out"] = 7  # type: ignore[index]
    assert is_true(await tiers.source.fetch(ID))


@pytest.mark.parametrize("part", ["ir", "weights", "binary"])
async def test_an_entry_of_the_first_tier_that_changed_in_memory_is_fetched_anew(tiers: Tiers, part: str) -> None:
    await tiers.put(tiers.l3, DATA)
    await tiers.source.fetch(ID)
    value = getattr(held_by(tiers.l1), part)
    change_in_memory(value, len(value) // 2, 3)
    assert is_true(await tiers.source.fetch(ID))
    assert (tiers.status("l1").corrupt, tiers.status("l2").hits) == (1, 1)
    change_in_memory(getattr(held_by(tiers.l1), part), 0, 0)
    assert tiers.source.cached(ID) is None
    assert tiers.status("l1").corrupt == 2
    assert ID not in tiers.l1

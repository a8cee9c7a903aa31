"""The second tier as a directory: whole entries or none, bounded, and never outside its root."""

from __future__ import annotations

import asyncio
import os
import resource
from pathlib import Path

import pytest

from esper.contracts.errors import (
    CapacityExceededError,
    CorruptDataError,
    InvalidInputError,
    NotFoundError,
    StorageFullError,
    UnavailableError,
)
from esper.execution.tier_directory import DirectoryTier


def artifact_id(number: int) -> str:
    return f"k{number:032x}"


def files(root: Path) -> list[str]:
    return sorted(path.name for path in root.rglob("*") if path.is_file())


@pytest.fixture
def tier(tmp_path: Path) -> DirectoryTier:
    return DirectoryTier(tmp_path / "cache")


async def test_what_was_written_is_read(tier: DirectoryTier) -> None:
    await tier.write(artifact_id(1), b"first")
    await tier.write(artifact_id(1), b"second one")
    assert await tier.read(artifact_id(1)) == b"second one"
    assert tier.bytes_held == 10
    await tier.erase(artifact_id(1))
    await tier.erase(artifact_id(1))
    assert tier.bytes_held == 0
    with pytest.raises(NotFoundError, match=f"has no {artifact_id(1)}"):
        await tier.read(artifact_id(1))


async def test_another_process_sees_it(tier: DirectoryTier, tmp_path: Path) -> None:
    await tier.write(artifact_id(1), b"shared")
    other = DirectoryTier(tmp_path / "cache")
    assert other.bytes_held == 6
    assert await other.read(artifact_id(1)) == b"shared"


@pytest.mark.parametrize("bad", ["../../../tmp/evil", "k" + "0" * 31 + "/", "", "kernel_123"])
async def test_an_id_never_becomes_another_path(tier: DirectoryTier, tmp_path: Path, bad: str) -> None:
    for call in (tier.read(bad), tier.write(bad, b"x"), tier.erase(bad)):
        with pytest.raises(InvalidInputError, match="artifact_id must match"):
            await call
    assert files(tmp_path) == []


async def test_a_link_in_the_place_of_an_entry_is_not_followed(tier: DirectoryTier, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    path = tier.path_of(artifact_id(1))
    path.parent.mkdir()
    path.symlink_to(secret)
    with pytest.raises(UnavailableError, match="cannot be read"):
        await tier.read(artifact_id(1))


async def test_a_pipe_in_the_place_of_an_entry_is_damage(tier: DirectoryTier) -> None:
    path = tier.path_of(artifact_id(1))
    path.parent.mkdir()
    os.mkfifo(path)
    with pytest.raises(CorruptDataError, match="must be a file"):
        await tier.read(artifact_id(1))


async def test_the_oldest_entries_make_room(tmp_path: Path) -> None:
    tier = DirectoryTier(tmp_path, max_bytes=1000)
    for number in range(4):
        await tier.write(artifact_id(number), bytes(250))
        os.utime(tier.path_of(artifact_id(number)), (number, number))
    await tier.read(artifact_id(0))
    await tier.write(artifact_id(4), bytes(250))
    assert files(tmp_path) == [f"{artifact_id(number)}.kernel" for number in (0, 3, 4)]
    assert tier.bytes_held == 750


async def test_an_entry_larger_than_the_bound_is_refused(tmp_path: Path) -> None:
    tier = DirectoryTier(tmp_path, max_bytes=10)
    with pytest.raises(CapacityExceededError, match="must be at most 10 bytes, got 11 bytes"):
        await tier.write(artifact_id(1), bytes(11))
    with pytest.raises(InvalidInputError, match="max_bytes must be > 0 bytes, got 0"):
        DirectoryTier(tmp_path, max_bytes=0)


async def test_a_full_disk_keeps_the_old_entry_and_leaves_nothing_half_written(
    tier: DirectoryTier, tmp_path: Path
) -> None:
    """The kernel itself refuses to write beyond the limit, as on a disk with no room."""
    await tier.write(artifact_id(1), b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(StorageFullError, match="must have room for 100000 bytes"):
            await tier.write(artifact_id(1), bytes(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert await tier.read(artifact_id(1)) == b"old"
    assert files(tmp_path) == [f"{artifact_id(1)}.kernel"]
    assert tier.bytes_held == 3


async def test_what_dead_writers_left_is_removed_and_what_live_ones_write_is_not(tmp_path: Path) -> None:
    shelf = tmp_path / "00"
    shelf.mkdir()
    dead, live = shelf / ".dead.tmp", shelf / ".live.tmp"
    dead.write_bytes(b"half")
    live.write_bytes(b"half")
    os.utime(dead, (0, 0))
    DirectoryTier(tmp_path)
    assert files(tmp_path) == [".live.tmp"]


async def test_writers_at_once_leave_whole_entries(tier: DirectoryTier) -> None:
    wanted = {bytes([number]) * 10_000 for number in range(8)}
    await asyncio.gather(*(tier.write(artifact_id(1), data) for data in wanted))
    assert await tier.read(artifact_id(1)) in wanted
    assert tier.bytes_held == 10_000


async def test_a_root_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UnavailableError, match=r"cache directory .* cannot be used"):
        DirectoryTier(tmp_path / "file")

"""Checkpoints come back bit for bit, are stored once, and are never read half-written or edited."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, tzinfo
from pathlib import Path

import pytest
import torch

from esper.contracts.errors import CorruptDataError, InvalidInputError, NotFoundError, StorageFullError
from esper.recovery import CheckpointConfig, CheckpointManager, ComponentState, ComponentType, checkpoints


def components(epoch: int = 3) -> dict[ComponentType, ComponentState]:
    model = {"weights": {"w": torch.arange(6.0).reshape(2, 3), "half": torch.ones(2, dtype=torch.bfloat16)}}
    return {
        ComponentType.TOLARIA: ComponentState(component=ComponentType.TOLARIA, state_data={"epoch": epoch}),
        ComponentType.KASMINA: ComponentState(component=ComponentType.KASMINA, state_data=model),
    }


@pytest.fixture
def manager(tmp_path: Path) -> CheckpointManager:
    return CheckpointManager(tmp_path / "checkpoints")


async def test_a_checkpoint_comes_back_bit_for_bit(manager: CheckpointManager) -> None:
    restored = await manager.restore_checkpoint(await manager.create_checkpoint(components()))
    assert restored.components[ComponentType.TOLARIA].state_data["epoch"] == 3
    weights = restored.components[ComponentType.KASMINA].state_data["weights"]
    assert torch.equal(weights["w"], torch.arange(6.0).reshape(2, 3))
    assert weights["half"].dtype == torch.bfloat16


async def test_an_unchanged_component_is_stored_once(manager: CheckpointManager) -> None:
    await manager.create_checkpoint(components(1))
    await manager.create_checkpoint(components(2))
    assert len(manager.list_checkpoints()) == 2
    assert len(list((manager.config.directory / "blobs").iterdir())) == 2


async def test_old_checkpoints_go_with_their_parts(tmp_path: Path) -> None:
    manager = CheckpointManager(CheckpointConfig(directory=tmp_path, keep=2))
    for value in range(4):
        await manager.create_checkpoint({ComponentType.KASMINA: {"w": torch.full((2,), float(value))}})
    assert len(manager.list_checkpoints()) == 2
    assert len(list((tmp_path / "blobs").iterdir())) == 2


@pytest.mark.parametrize("target", ["manifest", "blob"])
async def test_any_edit_is_found(manager: CheckpointManager, target: str) -> None:
    checkpoint_id = await manager.create_checkpoint(components())
    directory = manager.config.directory
    path = directory / f"{checkpoint_id}.json" if target == "manifest" else max(directory.glob("blobs/*"), key=_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptDataError, match="must"):
        await manager.restore_checkpoint(checkpoint_id)


async def test_latest_passes_over_a_corrupt_one(manager: CheckpointManager) -> None:
    good = await manager.create_checkpoint(components(1))
    bad = await manager.create_checkpoint(components(2))
    (manager.config.directory / f"{bad}.json").write_text("{")
    assert manager.latest() == good


async def test_a_missing_blob_is_corrupt(manager: CheckpointManager) -> None:
    checkpoint_id = await manager.create_checkpoint(components())
    for blob in (manager.config.directory / "blobs").iterdir():
        blob.unlink()
    with pytest.raises(CorruptDataError, match="must be present, got no blob"):
        await manager.restore_checkpoint(checkpoint_id)


async def test_a_manifest_that_names_a_path_is_refused(manager: CheckpointManager) -> None:
    checkpoint_id = await manager.create_checkpoint(components())
    path = manager.config.directory / f"{checkpoint_id}.json"
    document = json.loads(path.read_text())
    document["body"]["components"]["tolaria"]["sha256"] = "../../etc/passwd"
    path.write_text(json.dumps(document))
    with pytest.raises(CorruptDataError, match="match its digest"):
        await manager.restore_checkpoint(checkpoint_id)


@contextmanager
def largest_file(size_bytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


async def test_a_full_device_is_named_and_leaves_nothing_behind(manager: CheckpointManager) -> None:
    kept = await manager.create_checkpoint(components(1))
    before = sorted(manager.config.directory.rglob("*"))
    big = {ComponentType.KASMINA: {"w": torch.zeros(100_000)}}
    with largest_file(10_000), pytest.raises(StorageFullError, match="must have room for"):
        await manager.create_checkpoint(big)
    assert sorted(manager.config.directory.rglob("*")) == before
    assert manager.latest() == kept


@pytest.mark.parametrize("checkpoint_id", ["../x", "", "c1", "c20260101120000000-0123abcG"])
async def test_a_malformed_id_is_refused(manager: CheckpointManager, checkpoint_id: str) -> None:
    with pytest.raises(InvalidInputError, match="checkpoint_id must look like"):
        await manager.restore_checkpoint(checkpoint_id)


async def test_an_unknown_id_is_not_found(manager: CheckpointManager) -> None:
    with pytest.raises(NotFoundError, match="checkpoint must exist"):
        await manager.restore_checkpoint("c20260101120000000-0123abcd")


async def test_nothing_to_write_is_refused(manager: CheckpointManager) -> None:
    with pytest.raises(InvalidInputError, match="components must hold at least one component"):
        await manager.create_checkpoint({})


@pytest.mark.parametrize(
    ("setting", "message"),
    [({"keep": 0}, "keep must be at least 1"), ({"interval": timedelta(0)}, "interval must be > 0")],
)
def test_bad_settings_are_refused(tmp_path: Path, setting: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        CheckpointConfig(directory=tmp_path, **setting)  # type: ignore[arg-type]


async def test_a_clock_that_is_set_back_does_not_make_the_newest_the_oldest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = CheckpointManager(CheckpointConfig(directory=tmp_path, keep=2))
    for epoch in range(3):
        await manager.create_checkpoint(components(epoch))

    class Earlier(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:
            return datetime(2020, 1, 1, tzinfo=tz)

    monkeypatch.setattr(checkpoints, "datetime", Earlier)
    newest = await manager.create_checkpoint(components(9))
    assert manager.latest() == newest
    restored = await manager.restore_checkpoint(newest)
    assert restored.components[ComponentType.TOLARIA].state_data["epoch"] == 9


def _size(path: Path) -> int:
    return path.stat().st_size

"""Damaged SQLite files are moved out of the way whole; what is no such file is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from esper.contracts.errors import CorruptDataError, UnavailableError
from esper.mesh.wire_store import open_or_set_aside, set_aside


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_goes_with_its_companions_under_the_first_free_name(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    for number in (1, 2):
        for name in ("a.db", "a.db-wal", "a.db-shm"):
            (tmp_path / name).write_text(f"{name} {number}")
        assert set_aside(path) == tmp_path / f"a.db.corrupt-{number}"
    found = {one.name: one.read_text() for one in tmp_path.iterdir()}
    names = ("a.db.corrupt-{}", "a.db.corrupt-{}-wal", "a.db.corrupt-{}-shm")
    assert sorted(found) == sorted(name.format(number) for name in names for number in (1, 2))
    assert found["a.db.corrupt-2-wal"] == "a.db-wal 2"


@pytest.mark.parametrize("url", ["sqlite://", "postgresql://somebody@nowhere/esper"])
async def test_damage_without_a_file_is_raised(url: str) -> None:
    async def opener(given: str) -> str:
        raise CorruptDataError(f"store {given} is damaged")

    with pytest.raises(CorruptDataError, match="is damaged"):
        await open_or_set_aside(url, opener)


async def test_a_file_that_only_cannot_be_reached_stays(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    path.write_text("busy")

    async def opener(given: str) -> str:
        raise UnavailableError(f"store {given} cannot be used")

    with pytest.raises(UnavailableError, match="cannot be used"):
        await open_or_set_aside(f"sqlite:///{path}", opener)
    assert names_in(tmp_path) == ["a.db"]


async def test_what_is_damaged_for_good_is_raised_the_second_time(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    path.write_text("damaged")
    opened: list[str] = []

    async def opener(given: str) -> str:
        opened.append(given)
        raise CorruptDataError(f"store {given} is damaged")

    with pytest.raises(CorruptDataError, match="is damaged"):
        await open_or_set_aside(f"sqlite:///{path}", opener)
    assert len(opened) == 2
    assert (tmp_path / "a.db.corrupt-1").read_text() == "damaged"

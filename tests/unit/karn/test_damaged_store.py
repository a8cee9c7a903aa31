"""A damaged store keeps nobody waiting: it is set aside, said, kept, and Karn begins from the prior."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from esper.blueprints import default_registry
from esper.contracts.blueprint import SiteKind
from esper.contracts.errors import InvalidStateError
from esper.contracts.run import FieldReport
from esper.services.karn.server import KarnNode, KarnNodeConfig

Make = Callable[..., FieldReport]
LORA = default_registry().create_blueprint("lora")
PAGE_BYTES = 4096
NUM_REPORTS = 60


async def opened(path: Path) -> KarnNode:
    return await KarnNode.open(KarnNodeConfig(database_url=f"sqlite:///{path}"))


def num_learned(node: KarnNode) -> int:
    return sum(len(one.rewards) for one in node.karn.elites(SiteKind.LINEAR))


@pytest.fixture
async def store(tmp_path: Path, make_report: Make) -> Path:
    """A store of several pages in every table."""
    path = tmp_path / "karn.db"
    node = await opened(path)
    for place in range(NUM_REPORTS):
        await node.karn.learn(make_report(f"r{place}", LORA.id, 0.2))
    assert num_learned(node) == NUM_REPORTS
    await node.close()
    return path


def root_page(path: Path, name: str) -> int:
    with sqlite3.connect(path) as connection:
        (page,) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = ?", (name,)).fetchone()
    connection.close()
    return int(page)


def page_of(path: Path, data: bytes, number: int, content: bytes) -> bytes:
    start = (number - 1) * PAGE_BYTES
    return data[:start] + content + data[start + len(content) :]


def damage_of(path: Path, damage: Callable[[Path, bytes], bytes]) -> bytes:
    """Damage a file, and give what it is then."""
    damaged = damage(path, path.read_bytes())
    path.write_bytes(damaged)
    return damaged


def kept_of(path: Path, number: int) -> bytes:
    return path.with_name(f"{path.name}.corrupt-{number}").read_bytes()


def no_database(path: Path, data: bytes) -> bytes:
    return b"not a database" * 500


def no_header(path: Path, data: bytes) -> bytes:
    return page_of(path, data, 1, bytes(range(100)))


def no_schema(path: Path, data: bytes) -> bytes:
    return data[:100] + b"\xa5" * (PAGE_BYTES - 100) + data[PAGE_BYTES:]


def cut_off(path: Path, data: bytes) -> bytes:
    return data[: len(data) // PAGE_BYTES // 2 * PAGE_BYTES]


def reports_gone(path: Path, data: bytes) -> bytes:
    return page_of(path, data, root_page(path, "karn_reports"), b"\xa5" * PAGE_BYTES)


def order_gone(path: Path, data: bytes) -> bytes:
    return page_of(path, data, root_page(path, "ix_karn_reports_order"), b"\xa5" * PAGE_BYTES)


def designs_zeroed(path: Path, data: bytes) -> bytes:
    return page_of(path, data, root_page(path, "karn_designs"), bytes(PAGE_BYTES))


def last_page_gone(path: Path, data: bytes) -> bytes:
    return page_of(path, data, len(data) // PAGE_BYTES, b"\xa5" * PAGE_BYTES)


def name_garbled(path: Path, data: bytes) -> bytes:
    return data.replace(b"r17", b"\xff17")


def schema_garbled(path: Path, data: bytes) -> bytes:
    data = data.replace(b"CREATE TABLE karn_reports", b"CREATE TABLX karn_reports")
    return data.replace(b"tablekarn_reports", b"tablekarn_r\xa4ports")


DAMAGES = [
    *(no_database, no_header, no_schema, cut_off, reports_gone, order_gone, designs_zeroed, last_page_gone),
    *(name_garbled, schema_garbled),
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda one: one.__name__)
async def test_a_damaged_store_is_set_aside_and_the_prior_speaks(
    store: Path, damage: Callable[[Path, bytes], bytes], make_report: Make, caplog: pytest.LogCaptureFixture
) -> None:
    damaged = damage_of(store, damage)
    node = await opened(store)
    assert num_learned(node) == 0
    assert kept_of(store, 1) == damaged
    assert "store_corrupt" in [record.message for record in caplog.records]
    assert await node.karn.learn(make_report("r1", LORA.id, 0.2))
    await node.close()
    node = await opened(store)
    assert num_learned(node) == 1
    await node.close()
    assert not store.with_name("karn.db.corrupt-2").exists()


async def test_a_second_damage_keeps_the_first_file_and_a_mended_one_is_taken_back(store: Path) -> None:
    whole = damage_of(store, lambda _, data: data)
    damages = [damage_of(store, lambda _, data: data[::-1])]
    await (await opened(store)).close()
    damages.append(damage_of(store, lambda *_: b"damage" * 500))
    await (await opened(store)).close()
    assert [kept_of(store, number) for number in (1, 2)] == damages
    damage_of(store, lambda *_: whole)
    node = await opened(store)
    assert num_learned(node) == NUM_REPORTS
    await node.close()


async def test_what_is_no_damage_is_left_in_its_place(store: Path) -> None:
    with sqlite3.connect(store) as connection:
        connection.execute("UPDATE karn_schema SET version = 7")
    connection.close()
    with pytest.raises(InvalidStateError, match="Karn's tables must have version 1, got 7"):
        await opened(store)
    assert [path.name for path in store.parent.iterdir() if "corrupt" in path.name] == []

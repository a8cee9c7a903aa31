"""The newest reports count and no others, and Karn is the same before a restart and after it."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from esper.blueprints import default_registry
from esper.contracts.blueprint import Site, SiteKind
from esper.contracts.errors import InvalidInputError
from esper.contracts.run import FieldReport
from esper.services.karn import service as service_module
from esper.services.karn.proposer import Constraints, Proposal
from esper.services.karn.server import KarnNode, KarnNodeConfig
from esper.services.karn.service import Karn
from esper.services.karn.store import open_store
from tests.unit.karn.conftest import CONV
from tests.unit.karn.karn_mesh import designs_of_another

Make = Callable[..., FieldReport]
Seen = tuple[dict[str, dict[str, float]], list[Proposal]]
NAMES = ("lora", "glu", "widen")


def identity(name: str) -> str:
    return default_registry().create_blueprint(name).id


async def opened(path: Path, max_lessons: int) -> Karn:
    karn = Karn(await open_store(f"sqlite:///{path}"), max_lessons=max_lessons)
    await karn.start()
    return karn


def rewards_of(karn: Karn, kind: SiteKind = SiteKind.LINEAR) -> dict[str, dict[str, float]]:
    """Give the rewards of every design of the archive that has some."""
    return {one.blueprint.id: one.rewards for one in karn._memory.archive.entries(kind) if one.rewards}


async def seen_of(karn: Karn, site: Site) -> Seen:
    """Give what the outside sees of a memory: rewards, and what is proposed."""
    return rewards_of(karn), await karn.propose(site, 4, Constraints(), 1)


async def test_the_newest_reports_count_as_if_no_other_had_come(
    tmp_path: Path, linear_site: Site, make_report: Make
) -> None:
    reports = [make_report(f"r{9 - place}", identity(NAMES[place % 3]), 0.1 * place) for place in range(7)]
    karn, young = await opened(tmp_path / "all.db", 3), await opened(tmp_path / "newest.db", 3)
    for report in reports:
        assert await karn.learn(report)
    for report in reports[-3:]:
        assert await young.learn(report)
    seen = await seen_of(karn, linear_site)
    assert sorted(name for rewards in seen[0].values() for name in rewards) == ["r3", "r4", "r5"]
    assert seen == await seen_of(young, linear_site)
    assert karn._memory.surrogate(SiteKind.LINEAR).num_samples == 3
    assert not await karn.learn(reports[0]), "a forgotten report counts once all the same"
    assert await karn.store.num_reports() == 7
    for one in (karn, young):
        await one.store.database.close()


async def test_a_restart_learns_the_same_reports(
    tmp_path: Path, linear_site: Site, make_report: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_module, "_BATCH", 2)
    first = await opened(tmp_path / "karn.db", 4)
    for place in range(9):
        site = CONV if place % 3 == 0 else linear_site
        await first.learn(make_report(f"r{place * 7 % 10}", identity(NAMES[place % 3]), 0.1 * place, site=site))
    for place in range(5):
        await first.learn(make_report(f"n{place}", identity("lora"), None))
    expected = (await seen_of(first, linear_site), rewards_of(first, SiteKind.CONV2D))
    assert all(expected), "both kinds of site have lessons that count"
    assert sum(len(rewards) for each in (expected[0][0], expected[1]) for rewards in each.values()) == 4
    await first.store.database.close()
    second = await opened(tmp_path / "karn.db", 4)
    assert (await seen_of(second, linear_site), rewards_of(second, SiteKind.CONV2D)) == expected
    await second.store.database.close()


async def test_a_design_goes_with_its_last_report(tmp_path: Path, linear_site: Site, make_report: Make) -> None:
    (design,) = await designs_of_another(linear_site, 1)
    karn = await opened(tmp_path / "karn.db", 2)
    await karn.store.add_designs([design])
    await karn.learn(make_report("r1", design.id, 0.2))
    assert design.id in rewards_of(karn)
    for name in ("r2", "r3"):
        await karn.learn(make_report(name, identity("lora"), 0.1))
    assert karn._memory.archive.entry(SiteKind.LINEAR, design.id) is None
    await karn.store.database.close()


async def test_reports_count_in_the_order_of_their_coming_when_a_clock_is_set_back(
    tmp_path: Path, make_report: Make
) -> None:
    path, lora = tmp_path / "karn.db", identity("lora")
    karn = await opened(path, 2)
    await karn.learn(make_report("r1", lora, 0.1))
    await karn.store.database.close()
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE karn_reports SET received_us = 4000000000000000")  # in the year 2096
    connection.close()
    karn = await opened(path, 2)
    for name in ("r3", "r2"):
        await karn.learn(make_report(name, lora, 0.1))
    assert list(rewards_of(karn)[lora]) == ["r2", "r3"]
    await karn.store.database.close()
    karn = await opened(path, 2)
    assert list(rewards_of(karn)[lora]) == ["r2", "r3"]
    await karn.store.database.close()


async def test_a_bound_below_one_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="max_lessons must be >= 1, got 0"):
        await KarnNode.open(KarnNodeConfig(max_lessons=0))


async def test_the_node_passes_its_bound_on(mesh: Any, make_report: Make) -> None:
    await mesh.open(max_lessons=1)
    for name in ("r1", "r2"):
        await mesh.node.karn.learn(make_report(name, identity("lora"), 0.1))
    assert list(rewards_of(mesh.node.karn)[identity("lora")]) == ["r2"]

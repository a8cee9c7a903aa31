"""Reports of designs that nobody here knew: learned once the design comes by."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from esper.blueprints import default_registry
from esper.contracts.blueprint import Blueprint, Site, SiteKind
from esper.contracts.errors import UnavailableError
from esper.contracts.run import FieldReport
from esper.services.karn.proposer import Constraints
from esper.services.karn.service import Karn
from esper.services.karn.store import open_store
from tests.unit.karn.karn_mesh import Mesh, designs_of_another, request_for

Make = Callable[..., FieldReport]


@pytest.fixture
async def foreign(linear_site: Site) -> Blueprint:
    """A design that somebody else made."""
    return (await designs_of_another(linear_site, 1))[0]


def learned(mesh: Mesh, design: Blueprint) -> list[str]:
    """Give the reports that Karn learned of a design."""
    entry = mesh.node.karn._memory.archive.entry(SiteKind.LINEAR, design.id)
    return [] if entry is None else list(entry.rewards)


async def test_a_start_looks_up_what_was_not_known(
    mesh: Mesh, tmp_path: Path, foreign: Blueprint, make_report: Make
) -> None:
    url = f"sqlite:///{tmp_path}/karn.db"
    await mesh.open(url)
    for name in ("r1", "r2"):
        assert await mesh.node.karn.learn(make_report(name, foreign.id, 0.2))
    assert learned(mesh, foreign) == []
    mesh.library.hold(foreign)
    mesh.library.asked.clear()
    await mesh.open(url)
    assert learned(mesh, foreign) == ["r1", "r2"]
    assert mesh.library.asked == [foreign.id]
    mesh.library.held.clear()
    await mesh.open(url)
    assert learned(mesh, foreign) == ["r1", "r2"], "it is kept here by now"


async def test_a_report_brings_its_design_for_those_that_wait(
    mesh: Mesh, foreign: Blueprint, make_report: Make
) -> None:
    await mesh.open(max_lessons=2)
    await mesh.node.karn.learn(make_report("r1", foreign.id, 0.2))
    mesh.library.hold(foreign)
    assert await mesh.node.karn.learn(make_report("r2", foreign.id, 0.2))
    assert learned(mesh, foreign) == ["r1", "r2"]


async def test_one_that_waited_too_long_does_not_count(mesh: Mesh, foreign: Blueprint, make_report: Make) -> None:
    await mesh.open(max_lessons=2)
    lora = default_registry().create_blueprint("lora")
    await mesh.node.karn.learn(make_report("r1", foreign.id, 0.2))
    for name in ("r2", "r3"):
        await mesh.node.karn.learn(make_report(name, lora.id, 0.2))
    mesh.library.hold(foreign)
    assert await mesh.node.karn.learn(make_report("r4", foreign.id, 0.2))
    assert (learned(mesh, lora), learned(mesh, foreign)) == (["r3"], ["r4"])


async def test_a_proposal_brings_its_design(linear_site: Site, foreign: Blueprint, make_report: Make) -> None:
    karn = Karn(await open_store("sqlite://"))
    await karn.learn(make_report("r1", foreign.id, 0.2))
    (proposal,) = await karn.propose(linear_site, 1, Constraints(), 7)
    assert proposal.blueprint.id == foreign.id, "equal requests give equal proposals"
    assert foreign.id in [one.blueprint.id for one in karn.elites(SiteKind.LINEAR) if one.rewards]
    await karn.store.database.close()


async def test_a_library_that_is_away_at_the_start_is_asked_later_and_once(
    mesh: Mesh,
    tmp_path: Path,
    linear_site: Site,
    foreign: Blueprint,
    make_report: Make,
    caplog: pytest.LogCaptureFixture,
) -> None:
    url, unknown = f"sqlite:///{tmp_path}/karn.db", "f" * 64
    await mesh.open(url)
    await mesh.node.karn.learn(make_report("r1", foreign.id, 0.2))
    await mesh.node.karn.learn(make_report("r2", unknown, 0.2))
    mesh.library.is_away = True
    with caplog.at_level(logging.WARNING):
        stub = await mesh.open(url)
    assert "design_not_looked_up" in [record.message for record in caplog.records]
    with pytest.raises(UnavailableError, match="the library is away"):
        await mesh.node.karn.learn(make_report("r3", "e" * 64, 0.2))
    assert await mesh.node.karn.store.num_reports() == 2
    mesh.library.is_away = False
    mesh.library.hold(foreign)
    mesh.library.asked.clear()
    for _ in range(2):
        await stub.ProposeBlueprints(request_for(linear_site, count=1))
    assert learned(mesh, foreign) == ["r1"]
    assert sorted(mesh.library.asked) == sorted([foreign.id, unknown])

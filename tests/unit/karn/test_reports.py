"""Field reports in any order, twice, from other versions: one set of them makes one Karn."""

from __future__ import annotations

import itertools
import sqlite3
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from esper.blueprints import default_registry
from esper.contracts.blueprint import Blueprint, Site, SiteKind
from esper.contracts.errors import InvalidInputError
from esper.contracts.run import Contribution, FieldReport
from esper.contracts.wire import parse, serialize, to_wire
from esper.services.karn.design import view
from esper.services.karn.memory import sample_of
from esper.services.karn.proposer import Constraints
from esper.services.karn.service import Karn
from esper.services.karn.store import open_store
from esper.v1 import telemetry_pb2

WIDE = Site(kind=SiteKind.LINEAR, input_shape=(8,), output_shape=(512,))
Make = Callable[..., FieldReport]


def template(name: str) -> Blueprint:
    return default_registry().create_blueprint(name)


async def told(reports: list[FieldReport]) -> Karn:
    karn = Karn(await open_store("sqlite://"))
    await karn.start()
    for report in reports:
        await karn.learn(report)
    return karn


async def test_reports_in_any_order_make_one_archive_and_the_same_proposals(
    linear_site: Site, make_report: Make
) -> None:
    lora, glu = template("lora"), template("glu")
    assert view(lora.ir, linear_site).cell != view(lora.ir, WIDE).cell, "so the order could tell"
    reports = [
        make_report("r1", lora.id, 0.2, site=WIDE),
        make_report("r2", lora.id, 0.1),
        make_report("r3", glu.id, -0.1),
        make_report("r4", glu.id, 0.3, site=WIDE),
    ]
    seen = []
    for order in itertools.islice(itertools.permutations([*reports, reports[0]]), 0, None, 17):
        karn = await told(list(order))
        cells = {one.blueprint.id: (one.cell, one.mean_reward) for one in karn.elites(SiteKind.LINEAR)}
        seen.append((cells, await karn.propose(linear_site, 4, Constraints(), 1)))
        await karn.store.database.close()
    assert len(seen) > 5
    assert all(one == seen[0] for one in seen)
    assert seen[0][0][lora.id] == (view(lora.ir, WIDE).cell, pytest.approx(0.15))


@pytest.mark.parametrize(("level", "quantile"), [(0.95, 1.95996), (1 - 0.05 / 3, 2.39398), (0.5, 0.67449)])
def test_an_interval_is_read_by_its_own_coverage(make_report: Make, level: float, quantile: float) -> None:
    lora = template("lora")
    measured = Contribution(estimate=0.1, low=0.1 - 0.03, high=0.1 + 0.03, confidence_level=level, num_examples=400)
    found = sample_of(make_report("r1", lora.id, None, contribution=measured), lora)
    assert found is not None
    assert found[1].variance == pytest.approx((0.03 / quantile) ** 2, rel=1e-4)


async def test_a_report_of_an_older_and_of_a_newer_version_teach_what_they_say(make_report: Make) -> None:
    lora = template("lora")
    message = to_wire(make_report("r1", lora.id, 0.2, source="body", race_id="a2"))
    assert isinstance(message, telemetry_pb2.FieldReport)
    message.ClearField("source")
    message.ClearField("race_id")
    older = parse(message.SerializeToString(), FieldReport)
    unknown_field = b"\xf2\x3e\x05later"  # field 1006, length 5
    newer = parse(serialize(make_report("r2", lora.id, 0.4)) + unknown_field, FieldReport)
    karn = await told([older, newer])
    (entry,) = [one for one in karn.elites(SiteKind.LINEAR) if one.blueprint.id == lora.id]
    assert entry.rewards == {"r1": pytest.approx(0.2), "r2": pytest.approx(0.4)}
    assert (older.source, older.race_id, older.group) == ("", "", older.adaptation_id)
    await karn.store.database.close()


async def test_a_kept_report_that_today_would_be_refused_teaches_nothing_and_is_said(
    tmp_path: Path, make_report: Make, caplog: pytest.LogCaptureFixture
) -> None:
    path, lora = tmp_path / "karn.db", template("lora")
    first = Karn(await open_store(f"sqlite:///{path}"))
    await first.learn(make_report("r1", lora.id, 0.2))
    await first.learn(make_report("r2", lora.id, 0.1))
    await first.store.database.close()
    measured = Contribution(estimate=0.2, low=0.1, high=0.3, confidence_level=0.0, num_examples=400)
    payload = serialize(make_report("r1", lora.id, None, contribution=measured))
    with sqlite3.connect(path) as connection:
        connection.execute(
            "UPDATE karn_reports SET payload = ?, crc32 = ? WHERE report_id = 'r1'", (payload, zlib.crc32(payload))
        )
    connection.close()
    second = Karn(await open_store(f"sqlite:///{path}"))
    await second.start()
    (entry,) = [one for one in second.elites(SiteKind.LINEAR) if one.blueprint.id == lora.id]
    assert entry.rewards == {"r2": pytest.approx(0.1)}
    assert "stored_report_refused" in [record.message for record in caplog.records]
    assert await second.store.num_reports() == 2
    await second.store.database.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adaptation_id": ""}, r"report\.adaptation_id must be 1 to 128 characters"),
        (
            {"contribution": Contribution(estimate=0, low=0, high=0, confidence_level=1.0, num_examples=9)},
            r"confidence_level must be within \[0\.5, 1\), got 1\.0",
        ),
        (
            {"contribution": Contribution(estimate=float("nan"), low=0, high=0, num_examples=9)},
            r"report\.contribution\.estimate must be finite",
        ),
    ],
)
async def test_figures_that_are_none_are_refused_and_not_kept(
    karn: Karn, make_report: Make, change: dict[str, object], message: str
) -> None:
    with pytest.raises(InvalidInputError, match=message):
        await karn.learn(replace(make_report("r1", template("lora").id, 0.1), **change))
    assert await karn.store.num_reports() == 0

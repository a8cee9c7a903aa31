"""Field reports from an older and from a newer version, twice and in any order: Tamiyo learns what they say."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from esper.contracts.blueprint import Site, SiteKind
from esper.contracts.run import FieldReport
from esper.contracts.wire import parse, serialize, to_wire
from esper.services.tamiyo.candidates import CandidateSource
from esper.services.tamiyo.policy import Policy
from esper.services.tamiyo.posterior import Features
from esper.services.tamiyo.service import Tamiyo
from esper.services.tamiyo.store import open_store
from esper.v1 import telemetry_pb2

LINEAR = Site(kind=SiteKind.LINEAR, input_shape=(64,), output_shape=(16,))
Make = Callable[..., FieldReport]


async def told(reports: list[FieldReport]) -> Tamiyo:
    tamiyo = Tamiyo(await open_store("sqlite://"), Policy(), CandidateSource(None))
    await tamiyo.start()
    for report in reports:
        await tamiyo.learn(report)
    return tamiyo


def stripped(report: FieldReport, *fields: str) -> FieldReport:
    """Give a report as a version wrote it that had no such fields."""
    message: Any = to_wire(report)
    assert isinstance(message, telemetry_pb2.FieldReport)
    for name in fields:
        message.ClearField(name)
    return parse(message.SerializeToString(), FieldReport)


async def test_a_report_without_later_fields_and_one_with_unknown_ones_are_learned(make_report: Make) -> None:
    older = stripped(make_report("r1", reward=0.05, site=LINEAR, source="body", race_id="a7"), "source", "race_id")
    unknown_field = b"\xf2\x3e\x05later"  # field 1006, length 5
    newer = parse(serialize(make_report("r2", reward=0.07, site=LINEAR)) + unknown_field, FieldReport)
    tamiyo = await told([older, newer, older])
    assert tamiyo.policy.posterior.num_observations == 2
    assert await tamiyo.store.num_reports() == 2
    assert (older.source, older.group) == ("", older.adaptation_id)
    await tamiyo.store.database.close()


async def test_a_set_of_reports_makes_one_posterior_in_whatever_order_it_comes(make_report: Make) -> None:
    reports = [
        make_report(
            f"r{place}", adaptation_id=f"a{place}", reward=reward, site=LINEAR, blueprint_id=str(place % 2) * 64
        )
        for place, reward in enumerate((0.05, -0.02, 0.11))
    ]
    asked = [Features(site_kind=SiteKind.LINEAR, blueprint_id="0" * 64)]
    drawn = []
    for order in itertools.permutations([*reports, reports[1]]):
        tamiyo = await told(list(order))
        drawn.append(tamiyo.policy.posterior.draw(asked, np.random.default_rng(1), count=3).draws.tobytes())
        await tamiyo.store.database.close()
    assert len(set(drawn)) == 1


@pytest.mark.parametrize("level", [0.0, 1.0])
async def test_an_interval_of_no_coverage_is_refused_and_not_kept(make_report: Make, level: float) -> None:
    report = make_report("r1", reward=0.05, site=LINEAR)
    message: Any = to_wire(report)
    message.contribution.confidence_level = level
    tamiyo = await told([])
    with pytest.raises(ValueError, match=r"confidence_level must be within \[0\.5, 1\)"):
        await tamiyo.learn(parse(message.SerializeToString(), FieldReport))
    assert await tamiyo.store.num_reports() == 0
    await tamiyo.store.database.close()

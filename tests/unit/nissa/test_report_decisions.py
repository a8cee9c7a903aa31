"""A run's report says of every decision why it was taken, of those not acted on too."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from esper.contracts.decision import AdaptationType, CurveState, Evidence
from esper.contracts.wire import serialize
from esper.services.nissa.report_markdown import to_markdown
from esper.services.nissa.service import Nissa
from esper.services.nissa.store import NewEvent, NissaStore


@pytest.fixture
async def nissa() -> AsyncIterator[Nissa]:
    store = await NissaStore.open("sqlite://")
    yield Nissa(store)
    await store.database.close()


async def take(nissa: Nissa, make: Any, *decisions: Any) -> dict[str, Any]:
    for number, decision in enumerate(decisions):
        event = NewEvent(
            run_id="run-1", key=f"k{number}", kind="decision", recorded_at=make.at(number), payload=serialize(decision)
        )
        assert await nissa.take(event)
    return await nissa.get_run_report("run-1")


def quiet_of(make: Any, **changes: Any) -> Any:
    values: dict[str, Any] = {
        "adaptation_id": "a" + "2" * 32,
        "state_sequence": 5,
        "epoch": 5,
        "adaptation_type": AdaptationType.OPTIMIZE_PARAMETERS,
        "layer": "",
        "seed_index": None,
        "curve_state": CurveState.IMPROVING,
        "actionable": False,
        "confidence": 0.25,
        "urgency": 0.0,
        "explanation": "The curve is improving | there is nothing to do.",
        "evidence": (Evidence(name="cusum", value=0.123456789, detail="missing improvement"),),
    }
    return make.decision(**(values | changes))


async def test_a_decision_not_acted_on_is_told_with_its_words_and_figures(nissa: Nissa, make: Any) -> None:
    report = await take(nissa, make, make.decision(), quiet_of(make))
    assert (report["decisions"]["made"], report["decisions"]["actionable"]) == (2, 1)
    (quiet,) = report["decisions"]["not_acted_on"]
    assert quiet["explanation"] == "The curve is improving | there is nothing to do."
    assert quiet["evidence"] == [{"name": "cusum", "value": 0.123456789, "detail": "missing improvement"}]
    assert [one["adaptation_id"] for one in report["adaptations"]] == [make.adaptation_id]
    row = (
        "| 5 | optimize_parameters |  | 0.25 | 0 | improving | "
        "The curve is improving \\| there is nothing to do. | cusum = 0.123457 |"
    )
    assert row in to_markdown(report)


async def test_what_was_believed_of_a_candidate_stands_beside_its_evidence(nissa: Nissa, make: Any) -> None:
    report = await take(nissa, make, make.decision(expected_reward=0.0421, exploration_bonus=0.0075))
    document = to_markdown(report)
    assert "| expected_reward | 0.0421 | what the candidate is expected to bring beyond its price" in document
    assert "| exploration_bonus | 0.0075 | drawn above that" in document
    assert "1 decisions, 1 of them to be acted on." in document
    assert "Not acted on" not in document


async def test_a_figure_nobody_gave_has_no_row(nissa: Nissa, make: Any) -> None:
    assert "expected_reward" not in to_markdown(await take(nissa, make, make.decision()))

"""The report of a run holds together whatever happened in it: as JSON, as Markdown, as a picture."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from esper.core.report import AdaptationSummary, EpochRecord, RunReport


def summary(**changes: Any) -> AdaptationSummary:
    values: dict[str, Any] = {
        "id": "a1",
        "layer": "body.0",
        "seed_index": 0,
        "adaptation_type": "add_seed",
        "blueprint": "lora",
        "state": "fossilized",
        "outcome": "kept",
        "contribution": 0.05,
        "interval": (0.02, 0.08),
        "price": 0.01,
        "parameters": 1_200,
        "steps": 40,
        "begun_epoch": 2,
        "graft_steps": 20,
        "trace_id": "",
        "reason": "kept",
    }
    return AdaptationSummary(**(values | changes))


def epoch(number: int, control_loss: float = 0.5) -> EpochRecord:
    return EpochRecord(
        epoch=number,
        step=10 * number,
        train_loss=0.4,
        control_loss=control_loss,
        control_accuracy=None,
        parameters=100,
        seconds=1.0,
    )


def report(*adaptations: AdaptationSummary, history: tuple[EpochRecord, ...] = ()) -> RunReport:
    return RunReport(
        run_id="r", phase="finished", host_params=100, final_params=1_300, adaptations=adaptations, history=history
    )


def test_figures_that_are_not_finite_still_give_json() -> None:
    lost = summary(contribution=math.nan, interval=(-math.inf, math.inf))

    def refuse(word: str) -> Any:
        raise AssertionError(f"{word} is no JSON")

    found = json.loads(report(lost, history=(epoch(1, math.nan),)).to_json(), parse_constant=refuse)
    assert found["history"][0]["control_loss"] == "nan"
    assert found["adaptations"][0]["interval"] == ["-inf", "inf"]
    assert found["adaptations"][0]["price"] == 0.01


def test_an_errors_own_words_stay_in_their_cell() -> None:
    text = report(summary(outcome="failed", reason="no kernel: a | b\nc", source="body.x|y")).to_markdown()
    (row,) = [line for line in text.splitlines() if line.startswith("| 2 |")]
    assert row.endswith("| no kernel: a \\| b c |")
    assert "body.0 from body.x\\|y" in row
    assert row.replace("\\|", "").count("|") == 9


def test_what_was_kept_is_told_with_its_figures_and_marked_in_the_picture(tmp_path: Path) -> None:
    culled = summary(id="a2", outcome="culled", contribution=None, interval=None)
    tuned = summary(id="a3", adaptation_type="optimize_parameters", blueprint="", layer="")
    one = report(summary(), culled, tuned, history=(epoch(1),))
    text = one.to_markdown()
    assert [item.id for item in one.kept] == ["a1"], "settings that stay changed are no seed that was kept"
    assert "1 of 3 adaptations kept" in text
    assert "| +0.0500 (+0.0200 to +0.0800) | 0.0100 | 1,200 | kept |" in text
    assert "| not measured |" in text
    assert one.plot(tmp_path / "run.png").stat().st_size > 1_000
    assert "None was tried." in report().to_markdown()

"""What the compile of a kernel gave up is told with the outcome of the seed that it became."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import esper
from esper.contracts.errors import CorruptDataError
from esper.contracts.kernel import CompileFallback, CompileTarget
from esper.contracts.run import AdaptationOutcome, FieldReport
from esper.contracts.wire import parse, serialize
from esper.core.adaptation import Adaptation
from esper.telemetry.subjects import Kind

GIVEN_UP = (
    CompileFallback(target=CompileTarget.TORCHSCRIPT, reason="compiled_equality: 0.2 > 1e-05"),
    CompileFallback(target=CompileTarget.EXPORTED_PROGRAM, reason="RuntimeError: not supported"),
)


@pytest.fixture
def grown(task: Any, line: Any, open_session: Any, decide: Any, kernel_for: Any) -> Any:
    """A run whose seed has just germinated from a kernel that fell back; gives session and adaptation."""
    session = open_session(growth=esper.GrowthConfig(incubation_epochs=9))
    decision = decide(session._context.model)
    line.incoming += [decision, kernel_for(decision, fallbacks=GIVEN_UP)]
    session.step(torch.tensor(0.5))
    return session, session.orchestrator.adaptations[decision.adaptation_id]


def test_a_report_names_the_targets_that_were_given_up(line: Any, grown: Any) -> None:
    session, adaptation = grown
    assert adaptation.artifact_id
    session.finish()
    (report,) = line.values(Kind.FIELD_REPORT)
    assert report.artifact_id == adaptation.artifact_id
    assert parse(serialize(report), FieldReport).fallbacks == GIVEN_UP


def test_a_second_look_at_a_kept_seed_names_no_kernel_and_so_no_fall_backs(grown: Any) -> None:
    _, adaptation = grown
    adaptation.outcome = AdaptationOutcome.KEPT
    again = adaptation.recheck_report("r", 1, None, None, "measured again")
    assert (again.artifact_id, again.fallbacks) == ("", ())


def test_they_are_remembered_in_a_checkpoint_and_older_ones_lack_them(grown: Any) -> None:
    _, adaptation = grown
    plain = json.loads(json.dumps(adaptation.to_plain()))
    assert Adaptation.from_plain(plain, 0.0).fallbacks == GIVEN_UP
    older = {name: value for name, value in plain.items() if name != "fallbacks"}
    assert Adaptation.from_plain(older, 0.0).fallbacks == ()
    with pytest.raises(CorruptDataError, match=r"adaptation\.fallbacks must be list, got str"):
        Adaptation.from_plain(plain | {"fallbacks": "none"}, 0.0)

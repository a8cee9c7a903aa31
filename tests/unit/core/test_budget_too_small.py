"""A budget too small for any candidate: the policy says so after every epoch, the run once, and trains as if alone."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

import esper
from esper.blueprints import cost, default_registry
from esper.contracts.decision import BUDGET_TOO_SMALL, AdaptationDecision
from esper.contracts.run import SystemStatePacket
from esper.services.tamiyo.candidates import Candidate
from esper.services.tamiyo.config import TamiyoConfig
from esper.services.tamiyo.policy import Policy
from esper.telemetry.subjects import Kind
from tests.unit.core.conftest import KeptLine, OneLineMesh, Task
from tests.unit.core.test_session import train


@dataclass
class DecidedLine(KeptLine):
    """A line with the real policy at its end: every packet is decided on at once."""

    policy: Policy = field(default_factory=lambda: Policy(TamiyoConfig(first_race_epochs=2, race_size=1)))
    decided: list[AdaptationDecision] = field(default_factory=list)

    def send(self, kind: Kind, value: object, *, layer: str | None = None, msg_id: str | None = None) -> None:
        super().send(kind, value, layer=layer, msg_id=msg_id)
        if isinstance(value, SystemStatePacket):
            made = self.policy.analyze(value, candidates(value))
            self.decided += made
            self.incoming += made


def candidates(packet: SystemStatePacket) -> list[Candidate]:
    return [
        Candidate(layer=one.layer, site=one.site, blueprint=blueprint, cost=cost(blueprint.ir, one.site))
        for one in packet.layers
        if one.site is not None
        for blueprint in default_registry().for_site(one.site)
    ]


def trained(task: Task, budget: esper.Budget | None) -> tuple[DecidedLine, esper.RunReport, dict[str, Any]]:
    line, model = DecidedLine(), esper.wrap(task.host())
    if budget is None:
        line.policy.config = TamiyoConfig(first_race_epochs=1000)
    torch.manual_seed(5)
    with esper.Session(
        model,
        torch.optim.AdamW(model.parameters(), lr=1e-2),
        loss_fn=torch.nn.CrossEntropyLoss(),
        control_loader=task.control,
        mesh=OneLineMesh(line),
        budget=budget,
        config=esper.SessionConfig(run_id="r"),
    ) as session:
        train(session, task, 10)
        return line, session.report(), model.state_dict()


def test_it_is_said_once_and_the_host_trains_as_if_alone(task: Task, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        line, report, grown = trained(task, esper.Budget(added_params=1))
    saying = [one for one in line.decided if any(it.name == BUDGET_TOO_SMALL for it in one.evidence)]
    assert len(saying) > 2
    assert not any(one.actionable for one in line.decided)
    assert [one.message for one in caplog.records] == ["budget_too_small"]
    (note,) = report.notes
    smallest = min(one.cost.parameters for one in candidates(line.values(Kind.STATE)[0]))
    assert note.startswith("the budget is too small to grow from epoch ")
    assert note.endswith(f"on: {smallest} parameters of the smallest candidate; 1 parameters and inf FLOPs are left")
    assert f"- {note}" in report.to_markdown()
    _, _, alone = trained(task, None)
    assert all(torch.equal(value, alone[name]) for name, value in grown.items())


def test_a_budget_with_room_is_not_said_to_be_too_small(task: Task, caplog: pytest.LogCaptureFixture) -> None:
    line, report, _ = trained(task, esper.Budget(added_params=10_000))
    assert any(one.actionable for one in line.decided)
    assert report.notes == ()
    assert "budget_too_small" not in caplog.text

"""A kept seed that no longer pays goes by a decision: session and policy together, over the wire's forms alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import esper
from esper.contracts.decision import AdaptationDecision, AdaptationType
from esper.contracts.lifecycle import SeedLifecycleState as State
from esper.contracts.run import FieldReport, SystemStatePacket
from esper.contracts.wire import parse, serialize
from esper.services.tamiyo.policy import Policy
from esper.telemetry.subjects import Kind
from tests.decisions import add_seed
from tests.integration.test_fossil_goes import epoch, keep, spoil
from tests.unit.core.conftest import KeptLine, OneLineMesh


class DecidingLine(KeptLine):
    """A line at whose other end a policy learns from reports and answers packets, with no services between."""

    def __init__(self) -> None:
        super().__init__()
        self.policy = Policy()
        self.removals: list[AdaptationDecision] = []

    def send(self, kind: Kind, value: object, *, layer: str | None = None, msg_id: str | None = None) -> None:
        super().send(kind, value)
        if kind is Kind.FIELD_REPORT:
            self.policy.learn(parse(serialize(value), FieldReport))  # type: ignore[arg-type]
        if kind is Kind.STATE:
            packet = parse(serialize(value), SystemStatePacket)  # type: ignore[arg-type]
            found = [parse(serialize(one), AdaptationDecision) for one in self.policy.analyze(packet, [])]
            self.incoming += found
            self.removals += [one for one in found if one.adaptation_type is AdaptationType.REMOVE_SEED]


def test_it_goes_by_the_first_decision_after_it_was_measured() -> None:
    torch.manual_seed(3)
    x = torch.randn(768, 6)
    y = (x[:, :3].abs().sum(1) > x[:, 3:].abs().sum(1)).long()
    model: Any = esper.wrap(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2)))
    line = DecidingLine()
    with esper.Session(
        model,
        torch.optim.SGD(model.parameters(), lr=1e-3),
        loss_fn=nn.CrossEntropyLoss(),
        control_loader=DataLoader(TensorDataset(x[512:], y[512:]), batch_size=256),
        mesh=OneLineMesh(line),
        config=esper.SessionConfig(run_id="r", growth=esper.GrowthConfig(recheck_epochs=2)),
    ) as session:
        model(x[:64])
        kept = keep(session, add_seed(model, "0", "gated_mlp"))
        spoil(model)
        layout = model.kasmina_layers["0"].state_layout
        epoch(session, model, x, y)
        assert (layout.state(0), line.removals) == (State.FOSSILIZED, []), "nobody has measured it yet"
        epoch(session, model, x, y)
        assert [(one.layer, one.seed_index, one.actionable) for one in line.removals] == [("0", 0, True)]
        assert "less than its price" in line.removals[0].explanation
        assert layout.state(0) in (State.CULLED, State.EMBARGOED)
        assert kept.reason == line.removals[0].explanation
        epoch(session, model, x, y)
        assert model.kasmina_layers["0"].find_seed(0) is None
        assert session._context.ledger.status().added_parameters == 0
        assert len(line.removals) == 1, "it is asked for once"

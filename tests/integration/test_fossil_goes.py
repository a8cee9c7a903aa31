"""A kept seed that no longer pays is measured again, told, and removed by a decision, over a whole mesh."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import esper
from esper.contracts.decision import AdaptationDecision, AdaptationType
from esper.contracts.lifecycle import SeedLifecycleState as State
from esper.contracts.run import Contribution, GateCheck
from esper.core.adaptation import Adaptation
from tests.decisions import add_seed

PASSED = GateCheck(name="test", passed=True, detail="by test")


def epoch(session: esper.Session, model: Any, x: torch.Tensor, y: torch.Tensor) -> None:
    for start in range(0, 512, 64):
        batch = x[start : start + 64], y[start : start + 64]
        loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
        loss.backward()
        session.step(loss, batch=batch)
    session.end_epoch()


def keep(session: esper.Session, asked: AdaptationDecision) -> Adaptation:
    """Have the seed of a decision stand as a fossil, however little it brings."""
    orchestrator = session.orchestrator
    assert all(check.passed for check in orchestrator.decide(asked))
    orchestrator.germinate_in_place(asked.adaptation_id)
    kept = orchestrator.adaptations[asked.adaptation_id]
    orchestrator._graft(kept, PASSED)
    kept.contribution = Contribution(estimate=0.1, low=0.05, high=0.15, num_examples=256)
    orchestrator._fossilize(kept, PASSED)
    return kept


def spoil(model: Any) -> None:
    """Have the first layer's seed do harm."""
    stream = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in model.kasmina_layers["0"].seed_parameters(0):
            value.copy_(torch.randn(value.shape, generator=stream))


def test_a_fossil_that_does_harm_is_removed_within_two_packets() -> None:
    torch.manual_seed(3)
    x = torch.randn(768, 6)
    y = (x[:, :3].abs().sum(1) > x[:, 3:].abs().sum(1)).long()
    model: Any = esper.wrap(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2)))
    layout = model.kasmina_layers["0"].state_layout
    with (
        esper.Mesh.embedded() as mesh,
        esper.Session(
            model,
            torch.optim.SGD(model.parameters(), lr=1e-3),
            loss_fn=nn.CrossEntropyLoss(),
            control_loader=DataLoader(TensorDataset(x[512:], y[512:]), batch_size=256),
            mesh=mesh,
            config=esper.SessionConfig(decision_wait_s=120.0, growth=esper.GrowthConfig(recheck_epochs=2)),
        ) as session,
    ):
        model(x[:64])
        kept = keep(session, add_seed(model, "0", "gated_mlp", run_id=session.run_id))
        spoil(model)
        epoch(session, model, x, y)
        assert layout.state(0) is State.FOSSILIZED, "it was kept an epoch ago, and nobody has measured it since"
        for _ in range(2):
            epoch(session, model, x, y)
        removals = [
            one
            for one in session.orchestrator.adaptations.values()
            if one.decision.adaptation_type is AdaptationType.REMOVE_SEED
        ]
        assert [(one.layer, one.seed_index) for one in removals] == [("0", 0)]
        assert "less than its price" in removals[0].decision.explanation
        assert kept.reason == removals[0].decision.explanation
        assert layout.state(0) is not State.FOSSILIZED

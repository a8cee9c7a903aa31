"""Equal seed, data and versions give equal runs, to the bit, whatever the services' own time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import esper
from esper.contracts.decision import AdaptationDecision
from esper.services.karn.server import KarnNode
from esper.services.mesh import EmbeddedBackend

EPOCHS, SEED = 14, 5


class DeafKarnBackend(EmbeddedBackend):
    """A mesh in which Karn reads no reports off the bus, as if it were busy elsewhere all the time."""

    async def open(self) -> None:
        await super().open()
        (karn,) = (node for node in self._nodes if isinstance(node, KarnNode))
        assert karn._loop is not None
        await karn._loop.close()


@dataclass
class Run:
    """What came of one run; weights are all parameters and buffers, not the ids of the kernels they came in."""

    decisions: list[AdaptationDecision]
    losses: list[float]
    weights: dict[str, torch.Tensor]
    outcomes: list[tuple[Any, ...]]


def listened(mesh: esper.Mesh, heard: list[AdaptationDecision]) -> Any:
    """Give a mesh that writes its decisions down."""

    class Listening:
        def open_link(self, run_id: str, model: Any) -> Any:
            link = mesh.open_link(run_id, model)
            inner = link.arrivals

            def arrivals() -> Iterator[Any]:
                for item in inner():
                    if isinstance(item, AdaptationDecision):
                        heard.append(item)
                    yield item

            link.arrivals = arrivals  # type: ignore[method-assign]
            return link

    return Listening()


def grow(mesh: esper.Mesh) -> Run:
    torch.manual_seed(SEED)
    x = torch.randn(1280, 6)
    y = (x[:, :3].abs().sum(1) > x[:, 3:].abs().sum(1)).long()
    model: Any = esper.wrap(
        nn.Sequential(nn.Linear(6, 3), nn.ReLU(), nn.Dropout(0.1), nn.Linear(3, 2)), seeds_per_layer=2
    )
    heard: list[AdaptationDecision] = []
    session = esper.Session(
        model,
        torch.optim.AdamW(model.parameters(), lr=2e-2),
        loss_fn=nn.CrossEntropyLoss(),
        control_loader=DataLoader(TensorDataset(x[1024:], y[1024:]), batch_size=256),
        mesh=listened(mesh, heard),
        budget=esper.Budget(added_params=200),
        seed=SEED,
        config=esper.SessionConfig(
            run_id="equal-runs",
            planned_epochs=40,
            decision_wait_s=120.0,
            growth=esper.GrowthConfig(incubation_epochs=2, graft_epochs=1),
        ),
    )
    with session:
        for _ in range(EPOCHS):
            for start in range(0, 1024, 64):
                batch = x[start : start + 64], y[start : start + 64]
                loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
                loss.backward()
                session.step(loss, batch=batch)
            session.end_epoch()
        report = session.report()
    return Run(
        decisions=heard,
        losses=[one.control_loss for one in report.history],
        weights={name: value.clone() for name, value in model.state_dict().items() if value.is_floating_point()},
        outcomes=[(one.id, one.outcome, one.contribution, one.price) for one in report.adaptations],
    )


def told(decision: AdaptationDecision) -> tuple[Any, ...]:
    """Give a decision without moments: that of its packet, and that at which its blueprint came into the library."""
    return tuple(getattr(decision, name) for name in decision.__slots__ if name not in ("created_at", "blueprint"))


def test_a_run_repeats_to_the_bit_however_late_karn_hears_of_reports() -> None:
    with esper.Mesh.embedded() as mesh:
        first = grow(mesh)
        replayed = list(mesh.client().tamiyo.replay_run("equal-runs"))
    with esper.Mesh(DeafKarnBackend()) as mesh:
        second = grow(mesh)
    races = {one.group: one.epoch for one in first.decisions if one.actionable and one.blueprint is not None}
    assert len(races) > 1, "Karn is asked again after reports"
    taken_again = [one for packet in replayed for one in packet.replayed]
    assert [one for one in taken_again if one.actionable] == [one for one in first.decisions if one.actionable]
    assert [packet.differences for packet in replayed] == [()] * len(replayed), "to the bit"
    assert max(packet.num_lessons for packet in replayed) > 0
    assert [told(one) for one in second.decisions] == [told(one) for one in first.decisions]
    assert second.outcomes == first.outcomes
    assert second.losses == first.losses
    assert second.weights.keys() == first.weights.keys()
    assert all(torch.equal(value, first.weights[name]) for name, value in second.weights.items())

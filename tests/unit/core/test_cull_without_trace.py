"""A seed that goes before its graft leaves nothing: model, optimizer and random streams as if it had never been.

Two runs of equal seeds are compared to the bit at the end of every epoch, one of which is asked to grow; the host draws
from every stream there is (dropout, order of examples, noise of NumPy and Python) and has statistics of its own.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import esper
from esper.contracts.kernel import KernelReady
from esper.contracts.lifecycle import SeedLifecycleState as State
from esper.contracts.run import AdaptationOutcome
from esper.core.link import KernelArrival
from esper.core.randomness import capture_random_state
from esper.telemetry.subjects import Kind
from tests.nested_states import differences

EPOCHS, ASKED = 5, 1
"""Epochs in all; after which the run is asked to grow."""

OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2),
    "sgd": lambda model: torch.optim.SGD(
        [
            {"params": model[0].parameters(), "lr": 0.02},  # type: ignore[index]
            {"params": [p for part in model[1:] for p in part.parameters()], "weight_decay": 0.01},  # type: ignore[index]
        ],
        lr=0.05,
        momentum=0.9,
    ),
}


def host() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.2), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2)
    )


class Run:
    """One run; ``ask`` is called after the first epoch, ``end`` after the second."""

    def __init__(
        self, open_session: Any, task: Any, optimizer: str, growth: esper.GrowthConfig, **settings: Any
    ) -> None:
        self.model: Any = esper.wrap(host())
        self.optimizer = OPTIMIZERS[optimizer](self.model)
        self.session: esper.Session = open_session(self.model, self.optimizer, growth=growth, **settings)
        self.loader = DataLoader(TensorDataset(*task.train.dataset.tensors), batch_size=32, shuffle=True)
        torch.manual_seed(11)
        np.random.seed(12)  # noqa: NPY002 - the legacy stream is what users draw from
        random.seed(13)
        self.seen: list[Any] = []

    def train(self, ask: Callable[[Run], None] | None = None, end: Callable[[Run], None] | None = None) -> list[Any]:
        criterion = self.session._context.loss_fn
        for epoch in range(EPOCHS):
            for x, y in self.loader:
                noise = 0.01 * float(np.random.normal()) + 0.01 * random.random()  # noqa: NPY002
                criterion(self.model(x + noise), y).backward()
                self.session.step(torch.tensor(0.5))
            self.session.end_epoch()
            if epoch + 1 == ASKED and ask is not None:
                ask(self)
            if epoch + 1 == ASKED + 1 and end is not None:
                end(self)
            self.seen.append(self.everything())
        return self.seen

    def everything(self) -> dict[str, Any]:
        """Give copies of what a user can see; seeds that learn alone stand apart."""
        names = {id(value): name for name, value in self.model.named_parameters()}
        state = self.optimizer.state
        return {
            "model": {key: value.clone() for key, value in self.model.state_dict().items() if "seeds." not in key},
            "keys": [key for key in self.model.state_dict() if "seeds." not in key],
            "state": {
                names[id(key)]: {
                    name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in held.items()
                }
                for key, held in state.items()
            },
            "groups": [
                {**group, "params": [names[id(value)] for value in group["params"]]}
                for group in self.optimizer.param_groups
            ],
            "random": capture_random_state(),
            "modes": {name: module.training for name, module in self.model.named_modules() if "seeds" not in name},
            "frozen": {name: p.requires_grad for name, p in self.model.named_parameters() if "seeds." not in name},
        }


class Way:
    """How a seed goes: what the run is asked, and what ends it."""

    def __init__(self, line: Any, decide: Any, kernel_for: Any) -> None:
        self.line, self.decide, self.kernel_for = line, decide, kernel_for

    def asked(self, run: Run, *places: tuple[str, str], kernels: bool = True, **changes: Any) -> list[Any]:
        race = {"race_size": len(places), "race_id": "a" + "f" * 32} if len(places) > 1 else {}
        decisions = [self.decide(run.model, layer, template, **race, **changes) for layer, template in places]
        for decision in decisions:
            self.line.incoming.append(decision)
            if kernels:
                self.line.incoming.append(self.kernel_for(decision))
        return decisions


@pytest.fixture
def way(line: Any, decide: Any, kernel_for: Any) -> Way:
    return Way(line, decide, kernel_for)


def by_hand(way: Way, run: Run) -> None:
    way.asked(run, ("0", "bottleneck_adapter"))


def skip_by_hand(way: Way, run: Run) -> None:
    (place,) = [one for one in run.model.kasmina_layers["4"].skip_sites() if one.source == "0"]
    way.asked(run, ("4", "widen"), source="0", site=place.site)


def race(way: Way, run: Run) -> None:
    way.asked(run, ("0", "bottleneck_adapter"), ("4", "gated_mlp"), ("6", "lora"))


def never_compiled(way: Way, run: Run) -> None:
    (decision,) = way.asked(run, ("4", "gated_mlp"), kernels=False)
    ready = KernelReady(
        adaptation_id=decision.adaptation_id, run_id="r", job_id="j", blueprint_id="", site=decision.site, error="no"
    )
    way.line.incoming.append(KernelArrival(ready=ready, error="no"))


def harmful(way: Way, run: Run) -> None:
    way.asked(run, ("4", "gated_mlp"))


def refused(way: Way, run: Run) -> None:
    way.asked(run, ("4", "gated_mlp"))


def spoil(run: Run) -> None:
    """Give the seed that learns weights that do harm wherever it is measured."""
    stream = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in run.model.kasmina_layers["4"].seed_parameters(0):
            value.normal_(0.0, 3.0, generator=stream)


def remove_all(run: Run) -> None:
    for adaptation in run.session.orchestrator.ongoing():
        run.session.orchestrator.remove_seed(adaptation.layer, adaptation.seed_index, "changed my mind")


LEARNS: dict[str, Any] = {"incubation_epochs": 9, "embargo_epochs": 1}
CASES: dict[str, tuple[Any, Any, dict[str, Any], Any]] = {
    "removed_while_it_learns": (by_hand, remove_all, LEARNS, None),
    "a_skip_seed": (skip_by_hand, remove_all, LEARNS, None),
    "a_whole_race": (race, remove_all, LEARNS, None),
    "learns_locally": (by_hand, remove_all, LEARNS | {"incubation_way": "local"}, None),
    "learns_on_a_trial": (by_hand, remove_all, LEARNS | {"incubation_way": "trial"}, None),
    "never_compiled": (never_compiled, None, LEARNS, None),
    "harmful_when_measured": (harmful, spoil, LEARNS | {"incubation_epochs": 2}, None),
    "over_budget": (refused, None, LEARNS, esper.Budget(added_params=3)),
}
"""By name: what the run is asked, what else is done to it, its settings of growth, its budget."""
ALONE: dict[str, list[Any]] = {}
"""What a run that is asked nothing comes to, by optimizer."""


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("case", CASES)
def test_it_is_as_if_it_had_never_been(
    open_session: Any, task: Any, line: Any, way: Way, case: str, optimizer: str
) -> None:
    ask, end, settings, budget = CASES[case]
    growth = esper.GrowthConfig(**settings)
    if optimizer not in ALONE:
        ALONE[optimizer] = Run(open_session, task, optimizer, growth).train()
        line.sent.clear()
    grown = Run(open_session, task, optimizer, growth, budget=budget)
    seen = grown.train(lambda run: ask(way, run), end)
    assert not grown.session.orchestrator.ongoing()
    outcomes = {report.outcome for report in line.values(Kind.FIELD_REPORT)}
    assert outcomes <= {AdaptationOutcome.CULLED, AdaptationOutcome.FAILED}
    assert outcomes or case == "over_budget"
    assert all(report.graft_steps == 0 for report in line.values(Kind.FIELD_REPORT))
    states = {layer.state_layout.state(0) for layer in grown.model.kasmina_layers.values()}
    assert states == {State.DORMANT}, "the embargo is over"
    assert grown.session._context.ledger.status().added_parameters == 0
    assert list(grown.model.state_dict()) == seen[-1]["keys"]
    for epoch, (one, other) in enumerate(zip(ALONE[optimizer], seen, strict=True), start=1):
        assert differences(one, other) == [], f"epoch {epoch}"
    assert any(line.values(Kind.SEED)) or case == "over_budget"


def test_the_comparison_sees_one_draw(open_session: Any, task: Any) -> None:
    growth = esper.GrowthConfig(**LEARNS)
    alone = Run(open_session, task, "adamw", growth).train()
    other = Run(open_session, task, "adamw", growth).train(lambda _: random.seed(14))
    found = [differences(one, two) for one, two in zip(alone, other, strict=True)]
    assert all(found), "from the draw on nothing is alike"

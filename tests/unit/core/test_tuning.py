"""Changes of the optimizer's settings: made between epochs, kept only where the control loss is shown to fall."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import esper
from esper.contracts.decision import AdaptationType, CurveState, ParameterChange

GROWTH = esper.GrowthConfig(settle_epochs=1)


class Rig:
    """A run whose rate is changed."""

    def __init__(self, task: Any, open_session: Any, decide: Any, line: Any, *, rate: float) -> None:
        self.task, self.line, self._decide = task, line, decide
        torch.manual_seed(1)
        self.model = esper.wrap(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2)))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=rate)
        self.session = open_session(self.model, self.optimizer, control=task.control, growth=GROWTH)

    @property
    def rate(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    @property
    def shown(self) -> Any:
        (one,) = self.session.report().adaptations
        return one

    def ask(self, factor: float, state: CurveState = CurveState.OVERFITTING) -> None:
        change = ParameterChange(learning_rate_factor=factor)
        self.line.incoming.append(
            self._decide(
                self.model,
                adaptation_type=AdaptationType.OPTIMIZE_PARAMETERS,
                curve_state=state,
                parameter_change=change,
                layer="",
                site=None,
                seed_index=None,
                blueprint=None,
                blueprint_id="",
            )
        )

    def epoch(self) -> None:
        for x, y in self.task.train:
            self.optimizer.zero_grad()
            loss = nn.functional.cross_entropy(self.model(x), y)
            loss.backward()
            self.optimizer.step()
            self.session.step(loss)
        self.session.end_epoch()


@pytest.fixture
def rig(task: Any, open_session: Any, decide: Any, line: Any) -> Any:
    return lambda rate: Rig(task, open_session, decide, line, rate=rate)


def test_a_change_waits_for_the_end_of_its_epoch(rig: Any) -> None:
    one = rig(0.5)
    one.ask(0.5)
    seen = []
    step = one.session.step
    one.session.step = lambda loss: (step(loss), seen.append(one.rate))
    one.epoch()
    assert set(seen) == {0.5}
    assert one.rate == 0.25


def test_a_run_that_is_unstable_is_calmed_at_once(rig: Any) -> None:
    one = rig(0.5)
    one.ask(0.5, CurveState.UNSTABLE)
    seen = []
    step = one.session.step
    one.session.step = lambda loss: (step(loss), seen.append(one.rate))
    one.epoch()
    assert seen[-1] == 0.25


def test_a_change_that_helps_beyond_doubt_is_kept(rig: Any) -> None:
    one = rig(1e-4)  # hardly learns
    one.ask(5000.0)
    for _ in range(2):
        one.epoch()
    assert one.shown.outcome == "kept", one.shown.reason
    assert one.rate == pytest.approx(0.5)


def test_a_change_that_is_not_shown_to_help_is_undone(rig: Any) -> None:
    one = rig(0.0)  # nothing moves, whatever its factor
    one.ask(0.5)
    for _ in range(2):
        one.epoch()
    assert one.shown.outcome == "culled"
    assert one.shown.reason.startswith("undone: control loss fell by +0.00000")


def test_a_smaller_rate_is_not_kept_for_making_the_last_step_quieter(rig: Any) -> None:
    """Measured at the last step's weights this rate's fall looks like a gain; at the mean of an epoch it is none."""
    one = rig(1.0)
    for _ in range(6):
        one.epoch()
    one.ask(0.02)
    for _ in range(2):
        one.epoch()
    assert one.shown.outcome == "culled", one.shown.reason
    assert one.rate == 1.0


def test_a_run_that_ends_before_a_change_was_judged_undoes_it(rig: Any) -> None:
    one = rig(0.5)
    one.ask(0.5)
    one.epoch()
    assert one.rate == 0.25
    one.session.finish()
    assert one.shown.outcome == "culled"
    assert "the run ended before it was judged" in one.shown.reason
    assert one.rate == 0.5

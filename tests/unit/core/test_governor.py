"""The governor stops what does harm and lets one wild batch pass."""

from __future__ import annotations

import pytest

from esper.contracts.errors import InvalidInputError
from esper.core.blending import BlendSchedule
from esper.core.governor import Governor, GovernorConfig, Verdict


def settled() -> Governor:
    governor = Governor()
    for step in range(40):
        assert governor.judge(1.0 + 0.01 * (step % 5)) is Verdict.FINE
    return governor


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), float("-inf")])
def test_a_loss_that_is_not_finite_is_stopped_at_once(loss: float) -> None:
    assert Governor().judge(loss) is Verdict.NON_FINITE


def test_a_lasting_jump_is_a_spike_and_a_single_one_is_not() -> None:
    governor = settled()
    assert [governor.judge(9.0), governor.judge(1.0)] == [Verdict.FINE, Verdict.FINE]
    assert [governor.judge(9.0) for _ in range(3)] == [Verdict.FINE, Verdict.FINE, Verdict.SPIKE]


def test_a_slow_rise_is_no_spike() -> None:
    governor = settled()
    assert {governor.judge(1.0 + 0.05 * step) for step in range(100)} == {Verdict.FINE}


def test_after_forgetting_it_needs_a_history_again() -> None:
    governor = settled()
    governor.forget()
    assert {governor.judge(9.0) for _ in range(5)} == {Verdict.FINE}


@pytest.mark.parametrize(
    ("setting", "message"),
    [({"window": 3}, "window must be at least 16 steps, got 3"), ({"spike_factor": 1.0}, "spike_factor must be > 1")],
)
def test_bad_settings_are_refused(setting: dict[str, float], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        GovernorConfig(**setting)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["linear", "cosine", "sigmoid"])
def test_a_ramp_runs_from_start_to_end_without_turning_back(kind: str) -> None:
    ramp = BlendSchedule(kind=kind, end=0.9, num_steps=10)  # type: ignore[arg-type]
    alphas = [ramp.alpha_at(step) for step in range(12)]
    assert alphas[0] == 0.0
    assert alphas[10] == alphas[11] == 0.9
    assert alphas == sorted(alphas)
    assert ramp.alpha_at(5) == pytest.approx(0.45)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"kind": "cubic", "end": 1.0, "num_steps": 1}, r"blend\.kind must be one of linear, cosine, sigmoid"),
        ({"end": 1.5, "num_steps": 1}, r"blend\.end must lie in \[0, 1\], got 1\.5"),
        ({"end": 1.0, "num_steps": 0}, r"blend\.num_steps must be at least 1 step, got 0"),
    ],
)
def test_a_ramp_that_makes_no_sense_is_refused(setting: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        BlendSchedule(**setting)  # type: ignore[arg-type]

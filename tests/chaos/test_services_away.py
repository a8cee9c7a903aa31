"""The training outlives its services: killed or frozen, one or all, it goes on at its speed and grows again after."""

from __future__ import annotations

import pytest

import esper
from tests.chaos.conftest import EVERYTHING, TrainingLoop, Victims, training

pytestmark = [pytest.mark.chaos, pytest.mark.slow, pytest.mark.timeout(400)]

MOST_S = 2.0
"""Longest that one call of the session may take while services are away."""
WITHOUT_S = 6.0
"""Seconds trained while they are away: longer than any call to them waits, and enough to want to grow in vain."""

CASES = [
    pytest.param(("tamiyo",), id="tamiyo"),
    pytest.param(("tezzeret",), id="tezzeret"),
    pytest.param(("nats",), id="nats"),
    pytest.param(("urza",), id="urza"),
    pytest.param(EVERYTHING, id="all"),
]


def assert_never_held_up(loop: TrainingLoop) -> None:
    assert max(loop.step_s) < MOST_S
    assert max(loop.epoch_end_s) < MOST_S


def assert_learned(loop: TrainingLoop) -> None:
    first, last = loop.session.report().history[0], loop.session.report().history[-1]
    assert last.control_loss < 0.5 * first.control_loss


@pytest.mark.parametrize("names", CASES)
def test_training_outlives_killed_services_and_grows_again(
    mesh: esper.Mesh, victims: Victims, names: tuple[str, ...]
) -> None:
    with training(mesh) as loop:
        loop.epochs(1)
        died = victims.kill(*names)
        loop.epochs_for(WITHOUT_S)
        victims.await_return(*died)
        loop.train_until_grown(since=loop.session.epoch_count)
    assert loop.session.report().phase == "finished"
    assert_never_held_up(loop)
    assert_learned(loop)


def test_training_outlives_a_service_that_dies_again_and_again(mesh: esper.Mesh, victims: Victims) -> None:
    with training(mesh) as loop:
        loop.epochs(1)
        for _ in range(3):
            died = victims.kill("tamiyo")
            loop.epochs(2)
            victims.await_return(*died)
        loop.train_until_grown(since=loop.session.epoch_count)
    assert loop.session.report().phase == "finished"
    assert_never_held_up(loop)


@pytest.mark.parametrize("names", CASES)
def test_training_outlives_frozen_services_and_grows_again(
    mesh: esper.Mesh, victims: Victims, names: tuple[str, ...]
) -> None:
    with training(mesh) as loop:
        loop.epochs(1)
        with victims.frozen(*names):
            loop.epochs_for(WITHOUT_S)
            stood_still = loop.session.epoch_count
        loop.train_until_grown(since=stood_still)
    assert loop.session.report().phase == "finished"
    assert_never_held_up(loop)
    assert_learned(loop)

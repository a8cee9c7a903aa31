"""What a run says for good arrives for good: no durable event is lost or taken twice when the bus dies under it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import pytest

import esper
from esper.client import EsperClient
from esper.contracts.run import SeedEvent
from esper.execution.state import SeedTransition
from tests.chaos.conftest import Victims, training, until

pytestmark = [pytest.mark.chaos, pytest.mark.slow, pytest.mark.timeout(400)]


def test_events_survive_the_death_of_the_bus_once_each(mesh: esper.Mesh, victims: Victims) -> None:
    taken: list[SeedTransition] = []
    with training(mesh) as loop:
        unsubscribe = loop.model.seed_states.subscribe(taken.append)
        loop.train_until_grown(since=-1)
        died = victims.kill("nats")
        loop.epochs(6)  # seeds move on meanwhile, and nobody hears of it
        moved_in_silence = len(taken)
        victims.await_return(*died)
        loop.train_until_grown(since=loop.session.epoch_count)
        loop.epochs(3)
        loop.session.finish()
        unsubscribe()
    report, client = loop.session.report(), mesh.client()
    until(lambda: client.tolaria.get_run(report.run_id)[0].finished_at is not None, "Tolaria hears of the run's end")
    # What Tolaria had in hand when the bus died comes to it again, once its time to acknowledge is over.
    until(lambda: len(_events(client, report.run_id)) >= len(taken), "Tolaria hears of every step")
    _, told = client.tolaria.get_run(report.run_id)
    ended = {item.adaptation_id: item.report.outcome.name.lower() for item in told if item.report is not None}
    assert ended == {item.id: item.outcome for item in report.adaptations}
    assert moved_in_silence > 0
    assert _counted(_events(client, report.run_id)) == _counted(taken)
    assert max(_counted(taken).values()) == 1


def _events(client: EsperClient, run_id: str) -> list[SeedEvent]:
    return [event for item in client.tolaria.get_run(run_id)[1] for event in item.events]


def _counted(steps: Iterable[SeedEvent | SeedTransition]) -> Counter[tuple[str, int, str, str, int]]:
    return Counter((s.layer, s.seed_index, s.from_state.name, s.to_state.name, s.step) for s in steps)

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from esper.contracts.errors import InvalidInputError, InvalidStateError
from esper.telemetry.bus import Bus
from esper.telemetry.client import OonaClient
from esper.telemetry.consumer import replay_run
from esper.telemetry.memory_bus import MemoryBroker, MemoryBus
from esper.v1.telemetry_pb2 import SeedEvent


@pytest.fixture
def broker() -> MemoryBroker:
    return MemoryBroker()


@pytest.fixture
def connect(broker: MemoryBroker) -> Callable[[], Any]:
    async def open_bus() -> Bus:
        return MemoryBus(broker)

    return open_bus


async def test_what_was_emitted_before_a_bus_existed_goes_out_once_connected(
    connect: Any, broker: MemoryBroker
) -> None:
    client = OonaClient("run-1")
    client.emit("seed", SeedEvent(step=1), layer="block.0")
    assert client.stats().buffered_events == 1
    client.connect(connect)
    client.emit("seed", SeedEvent(step=2), layer="block.0")
    client.close()
    replayed = [received async for received in replay_run(MemoryBus(broker), "run-1")]
    assert [received.subject.layer for received in replayed] == ["block.0", "block.0"]
    assert client.stats().published == {"seed": 2}


def test_a_client_names_its_run_by_itself_until_a_session_does() -> None:
    client = OonaClient()
    assert client.run_id.startswith("run-")
    client.assume_run("session-7")
    assert client.run_id == "session-7"
    client.emit("state", SeedEvent())
    client.assume_run("session-7")
    with pytest.raises(InvalidStateError, match="must keep the run it has spoken for, session-7, got other"):
        client.assume_run("other")
    with pytest.raises(InvalidInputError, match="run_id must match"):
        client.assume_run("Not A Run")


def test_a_layer_keeps_its_number() -> None:
    client = OonaClient("run-1")
    assert [client.register_layer(name) for name in ("a", "b.c", "a")] == [0, 1, 0]
    assert client.layers == {"a": 0, "b.c": 1}


def test_a_copy_of_a_model_shares_its_client() -> None:
    client = OonaClient("run-1")
    assert copy.deepcopy({"oona_client": client})["oona_client"] is client
    assert copy.copy(client) is client


def test_it_connects_once(connect: Any) -> None:
    client = OonaClient("run-1")
    client.connect(connect)
    assert client.connected
    with pytest.raises(InvalidStateError, match="the Oona client of run run-1 is connected already"):
        client.connect(connect)
    client.close()
    client.close()


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="kind must be one of"):
        OonaClient("run-1").emit("gossip", SeedEvent())

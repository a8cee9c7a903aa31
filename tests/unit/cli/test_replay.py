"""``esper runs replay``: exit code 0 where all is as it was, 1 with the first difference in words where it is not."""

from __future__ import annotations

import json
from typing import Any

import pytest

from esper.cli import connection
from esper.client.transport import AsyncStubTransport, Transport
from esper.contracts.errors import InvalidStateError
from esper.mesh import InProcessChannel
from esper.v1 import decision_pb2, replay_pb2
from esper.v1 import tamiyo_service_pb2 as pb
from esper.v1.tamiyo_service_pb2_grpc import (
    TamiyoServiceServicer,
    TamiyoServiceStub,
    add_TamiyoServiceServicer_to_server,
)


class Replays(TamiyoServiceServicer):
    """A run of three packets; those from the second on differ where the settings of now are asked for."""

    async def ReplayRun(self, request: Any, context: Any) -> Any:
        if request.run_id != "run-1":
            raise InvalidStateError(f"run {request.run_id} must be replayable, got packet 1, which was recorded before")
        for sequence in (1, 2, 3):
            decision = decision_pb2.AdaptationDecision(adaptation_id=f"a{sequence}", actionable=sequence == 2)
            packet = replay_pb2.ReplayedPacket(
                sequence=sequence, epoch=10 + sequence, recorded=[decision], replayed=[decision]
            )
            if request.present_settings and sequence > 1:
                packet.differences.add(
                    field="decisions[0].actionable", recorded="[b]True", replayed=f"False {sequence}"
                )
            if request.present_settings and sequence == 1:
                packet.changes.add(field="confidence_threshold", recorded="0.7", replayed="0.99")
            yield pb.ReplayRunResponse(packet=packet)


@pytest.fixture(autouse=True)
def service(monkeypatch: pytest.MonkeyPatch) -> None:
    channel = InProcessChannel()
    channel.add_servicer(add_TamiyoServiceServicer_to_server, Replays())

    class Calls(AsyncStubTransport):
        def stub(self, service: str) -> Any:
            assert service == "tamiyo"
            return TamiyoServiceStub(channel)  # type: ignore[no-untyped-call]

    monkeypatch.setattr(connection, "ChannelTransport", lambda _settings: Transport(Calls()))


def test_a_run_that_replays_is_one_line_and_exit_code_0(esper: Any) -> None:
    assert esper("runs", "replay", "run-1") == (
        0,
        "run run-1: 3 packets, 3 decisions, 1 acted on: all as they were, to the bit\n",
        "",
    )


def test_the_first_difference_is_told_in_words_with_exit_code_1(esper: Any) -> None:
    code, out, err = esper("runs", "replay", "run-1", "--present-settings")
    assert (code, err) == (1, "")
    assert out.splitlines() == [
        "run run-1: 3 packets, 3 decisions, 1 acted on: those on 2 packets differ",
        "confidence_threshold was 0.7, is 0.99 (setting or version)",
        "first on packet 2, epoch 12:",
        "  decisions[0].actionable was [b]True, is False 2",
    ]


def test_programs_get_json_and_the_same_exit_codes(esper: Any) -> None:
    code, out, _ = esper("runs", "replay", "run-1", "--json")
    assert (code, json.loads(out)["first_difference"]) == (0, None)
    code, out, _ = esper("runs", "replay", "run-1", "--json", "--present-settings")
    assert code == 1
    assert json.loads(out) == {
        "run": "run-1",
        "packets": 3,
        "decisions": 3,
        "acted_on": 1,
        "differing_packets": 2,
        "changes": [{"field": "confidence_threshold", "recorded": "0.7", "replayed": "0.99"}],
        "first_difference": {
            "sequence": 2,
            "epoch": 12,
            "differences": [{"field": "decisions[0].actionable", "recorded": "[b]True", "replayed": "False 2"}],
        },
    }


def test_a_run_that_cannot_be_replayed_is_one_line_and_exit_code_1(esper: Any) -> None:
    code, out, err = esper("runs", "replay", "run-0")
    assert (code, out) == (1, "")
    assert err.startswith("esper: INVALID_STATE: run run-0 must be replayable, got packet 1")

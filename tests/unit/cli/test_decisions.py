"""``esper runs decisions`` and ``esper runs explain``: why a run grew, or did not, from the command line."""

from __future__ import annotations

import json
from typing import Any

import pytest

from esper.cli import connection
from esper.client.transport import AsyncStubTransport, Transport
from esper.contracts.errors import NotFoundError
from esper.mesh import InProcessChannel
from esper.v1 import decision_pb2
from esper.v1 import tamiyo_service_pb2 as pb
from esper.v1.tamiyo_service_pb2_grpc import (
    TamiyoServiceServicer,
    TamiyoServiceStub,
    add_TamiyoServiceServicer_to_server,
)


class Decisions(TamiyoServiceServicer):
    """Two decisions on two pages, one of them acted on."""

    async def ListDecisions(self, request: Any, context: Any) -> Any:
        assert request.run_id == "run-1"
        number = int(request.page_token or 0)
        decision = decision_pb2.AdaptationDecision(
            adaptation_id=f"a{number:032x}",
            epoch=9 - number,
            adaptation_type=[decision_pb2.ADAPTATION_TYPE_ADD_SEED, decision_pb2.ADAPTATION_TYPE_OPTIMIZE_PARAMETERS][
                number
            ],
            layer="" if number else "hidden",
            confidence=0.81234,
            urgency=0.7,
            actionable=not number,
            explanation="[bold]Plateau for 3 epochs[/bold]" if not number else "The curve is improving.",
        )
        return pb.ListDecisionsResponse(decisions=[decision], next_page_token="" if number else "1")

    async def Explain(self, request: Any, context: Any) -> Any:
        if request.adaptation_id != "a1":
            raise NotFoundError(f"adaptation_id must name a decision of this policy, got {request.adaptation_id}")
        lines = ["a1, run run-1, epoch 9: add_seed, acted on", "[red]raced against 2:[/red]"]
        decision = decision_pb2.AdaptationDecision(adaptation_id="a1", confidence=0.8)
        return pb.ExplainResponse(decision=decision, lines=lines)


@pytest.fixture(autouse=True)
def service(monkeypatch: pytest.MonkeyPatch) -> None:
    channel = InProcessChannel()
    channel.add_servicer(add_TamiyoServiceServicer_to_server, Decisions())

    class Calls(AsyncStubTransport):
        def stub(self, service: str) -> Any:
            assert service == "tamiyo"
            return TamiyoServiceStub(channel)  # type: ignore[no-untyped-call]

    monkeypatch.setattr(connection, "ChannelTransport", lambda _settings: Transport(Calls()))


def test_every_decision_of_every_page_is_listed_with_its_reason(esper: Any) -> None:
    code, out, _ = esper("runs", "decisions", "run-1", "--json")
    assert code == 0
    first, second = json.loads(out)
    assert first == {
        "adaptation": f"a{0:032x}",
        "epoch": 9,
        "type": "add_seed",
        "layer": "hidden",
        "confidence": 0.812,
        "urgency": 0.7,
        "acted_on": True,
        "why": "[bold]Plateau for 3 epochs[/bold]",
    }
    assert (second["epoch"], second["type"], second["acted_on"]) == (8, "optimize_parameters", False)


def test_only_what_was_acted_on_is_listed_on_request(esper: Any) -> None:
    assert [row["epoch"] for row in json.loads(esper("runs", "decisions", "run-1", "--acted-on", "--json")[1])] == [9]


def test_people_get_a_table_in_which_foreign_text_is_text(esper: Any) -> None:
    code, out, _ = esper("runs", "decisions", "run-1")
    assert code == 0
    assert "Plateau" in out
    assert "[bold]" in out


def test_a_decision_is_explained_in_lines_or_as_json(esper: Any) -> None:
    assert esper("runs", "explain", "a1")[:2] == (
        0,
        "a1, run run-1, epoch 9: add_seed, acted on\n[red]raced against 2:[/red]\n",
    )
    shown = json.loads(esper("runs", "explain", "a1", "--json")[1])
    assert shown["decision"]["confidence"] == 0.8
    assert len(shown["lines"]) == 2


def test_a_decision_of_somebody_else_is_one_line_and_exit_code_1(esper: Any) -> None:
    code, out, err = esper("runs", "explain", "a9")
    assert (code, out) == (1, "")
    assert err == "esper: NOT_FOUND: adaptation_id must name a decision of this policy, got a9\n"

"""Field reports over REST, over real sockets, on both databases: counted once, by the rules of those over gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from esper.contracts.blueprint import BlueprintCost, Site, SiteKind
from esper.contracts.errors import InvalidInputError
from esper.contracts.kernel import CompileFallback, CompileTarget
from esper.contracts.run import AdaptationOutcome, Contribution, FieldReport
from esper.contracts.wire import parse, to_message
from esper.execution.keys import SigningKey
from esper.services.urza.models import FieldReportRow
from esper.services.urza.rest_reports import FieldReportBody
from esper.services.urza.rules import BlueprintDraft
from esper.services.urza.server import UrzaConfig, UrzaService
from esper.testing.urza_samples import graph, kernel_bytes
from esper.v1 import telemetry_pb2, urza_service_pb2

KEY = SigningKey.generate()
TOKEN = "a-token-of-some-length"
PATH = "/v1/field-reports"
MOMENT = "2026-01-02T03:04:05Z"
LEAST = {
    "report_id": "r-1",
    "adaptation_id": "a-1",
    "run_id": "run-1",
    "layer": "fc1",
    "seed_index": 0,
    "outcome": "KEPT",
    "created_at": MOMENT,
}
"""A report with nothing but what it must have."""
MEASURED = {"estimate": 0.5, "low": 0.25, "high": 0.75, "num_examples": 64}


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "postgres":
        return str(request.getfixturevalue("url"))
    return f"sqlite:///{tmp_path}/urza.db"


@pytest.fixture
async def service(database_url: str) -> AsyncIterator[UrzaService]:
    config = UrzaConfig(database_url=database_url, seed_templates=False, rest=True, rest_port=0, rest_write_token=TOKEN)
    async with UrzaService(config, key_ring=KEY.ring()) as service:
        yield service


@pytest.fixture
async def rest(service: UrzaService) -> AsyncIterator[httpx.AsyncClient]:
    assert service.rest_url is not None
    writer = {"authorization": f"Bearer {TOKEN}"}
    async with httpx.AsyncClient(base_url=service.rest_url, timeout=60, headers=writer) as client:
        yield client


async def statistics(rest: httpx.AsyncClient, blueprint_id: str) -> Any:
    answer = await rest.get(f"/v1/blueprints/{blueprint_id}")
    assert answer.status_code == 200, answer.text
    return answer.json()["blueprint"]["statistics"]


async def test_a_report_is_counted_once_whatever_the_face(service: UrzaService, rest: httpx.AsyncClient) -> None:
    blueprint, _ = await service.store.blueprints.create(BlueprintDraft(name="b", ir=graph(0)))
    kernel, _ = await service.store.kernels.put(kernel_bytes(KEY))
    named = {"blueprint_id": blueprint.id, "artifact_id": kernel.artifact_id, "contribution": MEASURED}
    answers = await asyncio.gather(*(rest.post(PATH, json=LEAST | named) for _ in range(8)))
    assert sorted((answer.status_code, answer.json()["recorded"]) for answer in answers) == [
        *[(200, False)] * 7,
        (201, True),
    ]
    wanted = {"trials": 1, "kept": 1, "mean_contribution": 0.5, "mean_latency_ms": None}
    assert await statistics(rest, blueprint.id) == wanted
    of_kernel = (await rest.get(f"/v1/kernels/{kernel.artifact_id}/statistics")).json()["statistics"]
    assert of_kernel == wanted

    same = to_message(FieldReportBody(**LEAST | named).to_domain(), telemetry_pb2.FieldReport)
    said = await service.servicer.RecordFieldReport(urza_service_pb2.RecordFieldReportRequest(report=same), None)
    assert not said.recorded
    culled = {"report_id": "r-2", "outcome": "CULLED", "contribution": MEASURED | {"estimate": -0.5}}
    assert (await rest.post(PATH, json=LEAST | named | culled)).status_code == 201
    assert await statistics(rest, blueprint.id) == wanted | {"trials": 2, "mean_contribution": 0.0}


async def test_every_field_arrives_as_it_was_said(service: UrzaService, rest: httpx.AsyncClient) -> None:
    body = LEAST | {
        "site": {"kind": "LINEAR", "input_shape": [8], "output_shape": [6]},
        "outcome": "ROLLED_BACK",
        "contribution": MEASURED | {"confidence_level": 0.9},
        "cost": {"parameters": 1, "flops": 2, "activation_bytes": 3},
        "price": 0.01,
        "isolated_steps": 4,
        "graft_steps": 5,
        "begun_epoch": 6,
        "run_progress": 0.5,
        "decision_confidence": 0.75,
        "reason": "it did not help",
        "adaptation_type": "recheck",
        "source": "fc0",
        "race_id": "race-1",
        "fallbacks": [{"target": "AOT_INDUCTOR", "reason": "no compiler"}],
    }
    assert (await rest.post(PATH, json=body)).json() == {"recorded": True}
    async with service.store.reports._database.session() as session:
        row = await session.get(FieldReportRow, "r-1")
    assert row is not None
    kept = parse(row.report, FieldReport)
    assert kept == FieldReport(
        report_id="r-1",
        adaptation_id="a-1",
        run_id="run-1",
        layer="fc1",
        seed_index=0,
        site=Site(kind=SiteKind.LINEAR, input_shape=(8,), output_shape=(6,)),
        outcome=AdaptationOutcome.ROLLED_BACK,
        contribution=Contribution(estimate=0.5, low=0.25, high=0.75, confidence_level=0.9, num_examples=64),
        cost=BlueprintCost(parameters=1, flops=2, activation_bytes=3),
        price=0.01,
        isolated_steps=4,
        graft_steps=5,
        begun_epoch=6,
        run_progress=0.5,
        decision_confidence=0.75,
        reason="it did not help",
        created_at=kept.created_at,
        adaptation_type="recheck",
        source="fc0",
        race_id="race-1",
        fallbacks=(CompileFallback(target=CompileTarget.AOT_INDUCTOR, reason="no compiler"),),
    )
    assert kept.created_at.isoformat() == "2026-01-02T03:04:05+00:00"


@pytest.mark.parametrize(
    ("change", "parameter", "says"),
    [
        ({"report_id": "../r"}, "report.report_id", "got '../r'"),
        ({"report_id": ""}, "report.report_id", "got ''"),
        ({"blueprint_id": "lora"}, "report.blueprint_id", "got 'lora'"),
        ({"contribution": MEASURED | {"high": "1e999"}}, "contribution.high", "valid number"),
        ({"seed_index": -1}, None, "FieldReport.seed_index must fit its wire type"),
        ({"seed_index": True}, "seed_index", "valid integer"),
        ({"outcome": "WON"}, "outcome", "'KEPT', 'CULLED', 'FAILED' or 'ROLLED_BACK'"),
        ({"created_at": "2026-01-02T03:04:05"}, "created_at", "timezone"),
        ({"site": {"kind": "LINEAR", "input_shape": [0], "output_shape": [1]}}, "site.input_shape", "each > 0"),
        ({"reason": "x" * 65536}, "report", "at most 65536 bytes"),
        ({"latency_ms": 1.0}, "latency_ms", "not permitted"),
    ],
)
async def test_a_report_that_breaks_a_rule_is_refused_by_name(
    service: UrzaService, rest: httpx.AsyncClient, change: dict[str, Any], parameter: str | None, says: str
) -> None:
    answer = await rest.post(PATH, json=LEAST | change)
    problem = answer.json()
    assert (answer.status_code, problem["reason"]) == (400, InvalidInputError.reason), answer.text
    assert says in problem["detail"]
    assert parameter is None or problem["parameter"] == parameter
    async with service.store.reports._database.session() as session:
        assert await session.get(FieldReportRow, change.get("report_id", "r-1")) is None


async def test_figures_that_are_none_and_bodies_without_bound_are_refused(rest: httpx.AsyncClient) -> None:
    endless = b'{"report_id": "r-1", "adaptation_id": "a", "run_id": "r", "layer": "l", "seed_index": 0, '
    endless += b'"outcome": "KEPT", "created_at": "2026-01-02T03:04:05Z", '
    endless += b'"contribution": {"estimate": Infinity, "low": 0, "high": 1, "num_examples": 1}}'
    json = {"content-type": "application/json"}
    answer = await rest.post(PATH, content=endless, headers=json)
    assert (answer.status_code, answer.json()["parameter"]) == (400, "report.contribution.estimate")
    large = await rest.post(PATH, content=b" " * (256 * 1024 + 1), headers=json)
    assert (large.status_code, large.json()["reason"]) == (413, "CAPACITY_EXCEEDED")


async def test_nobody_without_the_token_reports(service: UrzaService) -> None:
    assert service.rest_url is not None
    async with httpx.AsyncClient(base_url=service.rest_url, timeout=60) as nobody:
        answer = await nobody.post(PATH, json=LEAST)
    assert (answer.status_code, answer.json()["parameter"]) == (403, "authorization")


def test_the_body_has_every_field_of_a_report() -> None:
    assert list(FieldReportBody.model_fields) == list(FieldReport.__dataclass_fields__)

"""Karn with its store, its library and the bus: once only, over restarts, and as others see it."""

from __future__ import annotations

import sqlite3
from dataclasses import replace

import pytest

from esper.blueprints import default_registry
from esper.contracts.blueprint import Blueprint, BlueprintState, SiteKind
from esper.contracts.errors import InvalidInputError, InvalidStateError
from esper.contracts.run import AdaptationOutcome, Contribution
from esper.contracts.wire import from_wire, to_wire
from esper.services.karn.proposer import Constraints
from esper.services.karn.report_loop import ReportLoopConfig
from esper.services.karn.service import Karn
from esper.services.karn.store import open_store
from esper.v1 import karn_service_pb2
from tests.unit.karn.karn_mesh import designs_of_another, request_for


async def test_proposals_are_in_the_library_with_their_ancestors(mesh, linear_site):
    stub = await mesh.open()
    answer = await stub.ProposeBlueprints(request_for(linear_site))
    assert len(answer.proposals) == 3
    for proposal in answer.proposals:
        stored = from_wire(mesh.library.held[proposal.blueprint.id], Blueprint)
        assert stored.state is BlueprintState.VALIDATED
        assert stored.lineage.operator in ("mutation", "crossover", "simplification")
        assert all(parent in mesh.library.held for parent in stored.lineage.parent_ids)
        assert not proposal.HasField("expected_reward")
        assert proposal.cost.parameters > 0


async def test_a_graph_stored_under_another_name_is_given_as_it_is_stored(mesh, linear_site):
    stub = await mesh.open()
    first = (await stub.ProposeBlueprints(request_for(linear_site))).proposals[0].blueprint
    mesh.library.held[first.id].name = "by-hand"
    again = (await stub.ProposeBlueprints(request_for(linear_site))).proposals[0].blueprint
    assert (again.id, again.name) == (first.id, "by-hand")


async def test_equal_requests_give_equal_proposals_until_a_report_comes(mesh, linear_site, make_report):
    stub = await mesh.open()
    first, second = [await stub.ProposeBlueprints(request_for(linear_site)) for _ in range(2)]
    assert first == second
    best = first.proposals[-1].blueprint.id
    for place in range(6):
        report = make_report(f"r{place}", best, 0.3)
        answer = await stub.SubmitFieldReport(
            karn_service_pb2.KarnServiceSubmitFieldReportRequest(report=to_wire(report))
        )
        assert answer.learned
    third = await stub.ProposeBlueprints(request_for(linear_site))
    assert third != first
    assert third.proposals[0].HasField("expected_reward")


async def test_what_did_harm_is_not_proposed_again_to_anybody(mesh, linear_site, make_report):
    stub = await mesh.open()
    proposed = []
    for seed in range(6):
        answer = await stub.ProposeBlueprints(request_for(linear_site, 4, seed))
        proposed += [one.blueprint.id for one in answer.proposals]
        for one in answer.proposals:
            report = make_report(f"{seed}-{one.blueprint.id}", one.blueprint.id, -0.05)
            await mesh.node.karn.learn(report)
    assert len(proposed) == 24
    assert len(set(proposed)) == 24


async def test_reports_from_the_bus_are_learned_once(mesh, linear_site, make_report):
    stub = await mesh.open()
    design = (await stub.ProposeBlueprints(request_for(linear_site))).proposals[0].blueprint.id
    for _ in range(2):
        await mesh.send(make_report("r1", design, 0.1))
    broken = make_report("r2", design, 0.1)
    await mesh.send(replace(broken, contribution=Contribution(estimate=0, low=1, high=0, num_examples=1)))
    assert "low <= high" in (await mesh.dead()).headers["Esper-Dead-Reason"]
    assert await mesh.node.karn.store.num_reports() == 1
    cells = (await stub.ListArchive(karn_service_pb2.ListArchiveRequest(site_kind=int(SiteKind.LINEAR)))).cells
    reported = [cell for cell in cells if cell.reports]
    assert [(cell.blueprint.id, cell.reports) for cell in reported] == [(design, 1)]
    assert reported[0].mean_reward == pytest.approx(0.1)
    assert not next(cell for cell in cells if not cell.reports).HasField("mean_reward")


async def test_a_design_that_somebody_else_made_is_looked_up(mesh, linear_site, make_report):
    (foreign,) = await designs_of_another(linear_site, 1)
    await mesh.open()
    mesh.library.hold(foreign)
    assert await mesh.node.karn.learn(make_report("r1", foreign.id, 0.2))
    assert foreign.id in [one.blueprint.id for one in mesh.node.karn.elites(SiteKind.LINEAR)]


async def test_a_report_of_an_unknown_design_is_kept_and_teaches_nothing(mesh, make_report):
    await mesh.open()
    assert await mesh.node.karn.learn(make_report("r1", "f" * 64, 0.2))
    assert not await mesh.node.karn.learn(make_report("r1", "f" * 64, 0.2))
    assert all(not one.rewards for one in mesh.node.karn.elites(SiteKind.LINEAR))


async def test_bounds_that_nothing_can_keep_are_a_failed_precondition(mesh, linear_site):
    stub = await mesh.open()
    with pytest.raises(InvalidStateError, match="no design keeps the constraints"):
        await stub.ProposeBlueprints(request_for(linear_site, max_parameters=0, allowed_ops=["linear"]))


@pytest.mark.parametrize(
    ("method", "request_", "message"),
    [
        ("ProposeBlueprints", karn_service_pb2.ProposeBlueprintsRequest(), "site must be set, got 'nothing'"),
        ("SubmitFieldReport", karn_service_pb2.KarnServiceSubmitFieldReportRequest(), "report must be set"),
        ("ListArchive", karn_service_pb2.ListArchiveRequest(), "site_kind must be one of LINEAR"),
    ],
)
async def test_bad_requests_are_refused_with_the_field(mesh, method, request_, message):
    stub = await mesh.open()
    with pytest.raises(InvalidInputError, match=message):
        await getattr(stub, method)(request_)


async def test_an_unknown_operator_is_refused(mesh, linear_site):
    stub = await mesh.open()
    with pytest.raises(InvalidInputError, match=r"constraints\.allowed_ops must be among"):
        await stub.ProposeBlueprints(request_for(linear_site, allowed_ops=["magic"]))


async def test_a_request_says_what_kinds_may_be_proposed(mesh, linear_site):
    stub = await mesh.open()
    free = await stub.ProposeBlueprints(request_for(linear_site, count=4))
    bound = await stub.ProposeBlueprints(request_for(linear_site, count=4, allowed_blueprints="dense"))

    def kinds(answer):
        return [any("conv" in node.op for node in one.blueprint.ir.nodes) for one in answer.proposals]

    assert any(kinds(free))
    assert kinds(bound) == [False] * 4
    with pytest.raises(InvalidInputError, match=r"constraints\.allowed_blueprints must have .* got its end"):
        await stub.ProposeBlueprints(request_for(linear_site, allowed_blueprints="!"))


async def test_a_restart_changes_no_proposal(tmp_path, linear_site, make_report):
    url = f"sqlite:///{tmp_path}/karn.db"
    first = Karn(await open_store(url))
    await first.start()
    design = (await first.propose(linear_site, 2, Constraints(), 1))[0].blueprint
    await first.learn(make_report("r1", design.id, 0.2))
    expected = await first.propose(linear_site, 3, Constraints(), 2)
    await first.store.database.close()
    second = Karn(await open_store(url))
    await second.start()
    assert await second.propose(linear_site, 3, Constraints(), 2) == expected
    assert not await second.learn(make_report("r1", design.id, 0.2))
    await second.store.database.close()


async def test_a_damaged_row_is_left_out_kept_and_said(tmp_path, make_report, caplog):
    path = tmp_path / "karn.db"
    lora = default_registry().create_blueprint("lora")
    first = Karn(await open_store(f"sqlite:///{path}"))
    await first.learn(make_report("r1", lora.id, 0.2))
    await first.store.database.close()
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE karn_reports SET crc32 = 1")
    connection.close()
    second = Karn(await open_store(f"sqlite:///{path}"))
    await second.start()
    assert second.store.num_unreadable == 1
    assert await second.store.num_reports() == 1
    assert "stored_row_unreadable" in [record.message for record in caplog.records]
    await second.store.database.close()


async def test_tables_of_another_version_are_refused(tmp_path):
    path = tmp_path / "karn.db"
    await (await open_store(f"sqlite:///{path}")).database.close()
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE karn_schema SET version = 7")
    connection.close()
    with pytest.raises(InvalidStateError, match="Karn's tables must have version 1, got 7"):
        await open_store(f"sqlite:///{path}")


async def test_only_measured_trials_and_rollbacks_teach(karn, make_report):
    lora = default_registry().create_blueprint("lora")
    await karn.learn(make_report("r1", lora.id, None, outcome=AdaptationOutcome.FAILED))
    await karn.learn(make_report("r2", lora.id, 0.1, adaptation_type="optimize_parameters"))
    await karn.learn(make_report("r3", lora.id, 0.1, site=None))
    entry = next(one for one in karn.elites(SiteKind.LINEAR) if one.blueprint.id == lora.id)
    assert entry.rewards == {}
    await karn.learn(make_report("r4", lora.id, None, outcome=AdaptationOutcome.ROLLED_BACK))
    assert entry.rewards == {"r4": -0.05}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"report_id": ""}, r"report\.report_id must be 1 to 128 characters"),
        ({"price": -1.0}, r"report\.price must be finite and within"),
        ({"run_id": "Run"}, "run_id must match"),
    ],
)
async def test_reports_that_break_a_rule_are_refused(karn, make_report, change, message):
    with pytest.raises(InvalidInputError, match=message):
        await karn.learn(replace(make_report("r1", "f" * 64, 0.1), **change))
    assert await karn.store.num_reports() == 0


def test_settings_that_break_their_rule_are_refused():
    with pytest.raises(InvalidInputError, match="retry_delay_s must be >= 0 seconds, got -1"):
        ReportLoopConfig(retry_delay_s=-1)
    with pytest.raises(InvalidInputError, match="max_deliver must be >= 1, got 0"):
        ReportLoopConfig(max_deliver=0)

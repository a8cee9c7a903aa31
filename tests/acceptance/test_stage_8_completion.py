"""Stage 8: a run that grew ends with seeds kept, success measured, and everybody told."""

from __future__ import annotations

from esper.client import EsperClient
from esper.contracts.metrics import SystemHealth
from tests.acceptance.conftest import GrownRun


def test_layers_tell_of_their_success(grown_run: GrownRun) -> None:
    stats = [layer.get_layer_stats() for layer in grown_run.model.kasmina_layers.values()]
    grown = [one for one in stats if one["successful_adaptations"]]
    assert grown, grown_run.report.to_markdown()
    for layer_stats in grown:
        assert layer_stats["successful_adaptations"] > 0
        assert layer_stats["performance_improvement"] > 0


def test_the_report_says_what_was_tried_and_what_it_brought(grown_run: GrownRun) -> None:
    report = grown_run.report
    assert report.final_params > report.host_params
    assert report.final_params <= 3 * report.host_params
    assert report.kept
    for item in report.kept:
        assert item.interval is not None
        assert item.price is not None
        assert item.interval[0] > item.price
    assert all(item.outcome != "open" for item in report.adaptations)


def test_field_reports_reach_tamiyo_karn_urza_and_nissa(grown_run: GrownRun, client: EsperClient) -> None:
    report = grown_run.report
    measured = [item for item in report.adaptations if item.contribution is not None]
    assert measured
    assert sum(arm.reports for arm in client.tamiyo.get_posterior()) >= len(measured)
    trials = [blueprint.statistics.trials for blueprint in client.urza.search_blueprints() if blueprint.statistics]
    assert sum(trials) >= len(measured)
    metrics = client.nissa.get_current_metrics(report.run_id)
    assert metrics.morphogenetic.adaptations_kept == len(report.kept)
    _, adaptations = client.tolaria.get_run(report.run_id)
    assert {item.adaptation_id for item in adaptations if item.report} == {item.id for item in report.adaptations}


def test_nissa_says_the_system_is_healthy(grown_run: GrownRun, client: EsperClient) -> None:
    nissa = client.nissa
    health = nissa.get_system_health()
    assert health.overall_status == SystemHealth.HEALTHY, health
    assert health.active_kernels > 0

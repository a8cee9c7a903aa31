"""Alerts and dashboard ask for metrics and labels that Nissa exposes, and for no others."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import yaml

from esper.contracts.decision import AnomalySeverity
from esper.contracts.metrics import HealthReport, SystemHealth
from esper.services.nissa.exposition import RunCollector
from tests.unit.deploy.conftest import ROOT

LABELS = {"run_id", "state", "tier", "component", "severity"}
RULES: list[dict[str, Any]] = [
    rule
    for group in yaml.safe_load((ROOT / "deploy/prometheus/esper.rules.yaml").read_text())["groups"]
    for rule in group["rules"]
]
DASHBOARD: dict[str, Any] = json.loads((ROOT / "deploy/grafana/esper-runs.json").read_text())


def exported() -> set[str]:
    """Give every metric name that Nissa's page can hold, counters as they are queried."""
    families = RunCollector([], [], HealthReport(overall_status=SystemHealth.HEALTHY)).collect()
    return {f"{one.name}_total" if one.type == "counter" else one.name for one in families}


def expressions() -> list[str]:
    """Give every expression of rules and panels."""
    shown = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    return [rule["expr"] for rule in RULES] + shown


@pytest.mark.parametrize("expression", expressions())
def test_an_expression_names_exported_metrics_and_known_labels(expression: str) -> None:
    names = set(re.findall(r"\besper_\w+", expression))
    assert names
    assert names <= exported()
    grouped = [one for group in re.findall(r"by \(([^)]*)\)", expression) for one in group.split(", ")]
    matched = re.findall(r"[{,]\s*(\w+)\s*(?:=~|!~|!=|=)", expression)
    assert {*grouped, *matched} <= LABELS
    assert expression.count("(") == expression.count(")")
    assert expression.count("{") == expression.count("}")


def test_only_counters_are_rated() -> None:
    for expression in expressions():
        for name in re.findall(r"(?:rate|increase)\((\w+)", expression):
            assert name.endswith("_total")


def test_severities_that_are_asked_for_exist() -> None:
    asked = {one for text in expressions() for one in re.findall(r'severity="(\w+)"', text)}
    assert asked
    assert asked <= {one.name.lower() for one in AnomalySeverity}


@pytest.mark.parametrize("rule", RULES, ids=[rule["alert"] for rule in RULES])
def test_an_alert_says_what_it_means(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in {"warning", "critical"}
    assert rule["annotations"].keys() == {"summary", "description"}
    shown = set(re.findall(r"\$labels\.(\w+)", json.dumps(rule["annotations"])))
    kept = set(re.findall(r"by \((\w+)\)", rule["expr"])) or LABELS
    assert shown <= kept


def test_panels_lie_side_by_side() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}
    assert len(places) == len(panels)
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in panels)
    assert len({rule["alert"] for rule in RULES}) == len(RULES)

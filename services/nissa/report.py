"""The report of a run as plain values, JSON or Markdown, from nothing but its chained events and its anomalies."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from enum import Enum, StrEnum
from typing import Any, Final

from esper.contracts.decision import AdaptationDecision, AdaptationPlan, Anomaly, ControlCommand, ControlResult
from esper.contracts.kernel import KernelReady
from esper.contracts.lifecycle import SeedLifecycleState
from esper.contracts.metrics import SystemMetrics
from esper.contracts.run import FieldReport, SeedEvent, SystemStatePacket
from esper.contracts.wire import from_wire, parse
from esper.services.nissa.chain import ChainedEvent, verify_chain
from esper.v1 import decision_pb2

FORMAT_VERSION: Final = 1
"""Version of the document's layout."""

_TRAIL: Final[Mapping[str, tuple[str, type[Any]]]] = {
    "plan": ("plans", AdaptationPlan),
    "seed": ("seed_events", SeedEvent),
    "kernel": ("kernels", KernelReady),
}


def build_report(
    events: Sequence[ChainedEvent], metrics: SystemMetrics, anomalies: Sequence[Anomaly], *, made_at: datetime
) -> dict[str, Any]:
    """Give the report of one run.

    Args:
        events: Its events in the order of the chain, at least one.
        metrics: Its figures after the last of them.
        anomalies: What was found.
        made_at: When the report is made.

    Raises:
        CorruptDataError: An event does not parse.
    """
    packets = [parse(event.payload, SystemStatePacket) for event in events if event.kind == "state"]
    adaptations, decisions = _adaptations(events)
    verdict = verify_chain(events)
    return {
        "format_version": FORMAT_VERSION,
        "run_id": events[0].run_id,
        "made_at": plain(made_at),
        "outcome": _outcome(packets),
        "configuration": _configuration(packets),
        "figures": {
            "training": plain(metrics.training),
            "morphogenetic": plain(metrics.morphogenetic),
            "kernels": plain(metrics.kernels),
        },
        "architecture": _architecture(packets),
        "growth_costs": plain(packets[-1].growth_costs) if packets else [],
        "decisions": decisions,
        "adaptations": adaptations,
        "interventions": _interventions(events),
        "anomalies": [plain(anomaly) for anomaly in anomalies],
        "audit": {
            "algorithm": "SHA-256 chain, esper-audit-v1",
            "intact": verdict.intact,
            "reason": verdict.reason,
            "events": len(events),
            "events_verified": verdict.length,
            "head": verdict.head.hex(),
        },
    }


def to_json(report: Mapping[str, Any]) -> str:
    """Give a report as JSON text."""
    return json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def plain(value: Any) -> Any:
    """Give a domain value as JSON values: enums by lower-case name, moments as ISO 8601, NaN as a word."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.value if isinstance(value, StrEnum) else value.name.lower()
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return value


def _outcome(packets: Sequence[SystemStatePacket]) -> dict[str, Any]:
    if not packets:
        return {"phase": None, "reason": "no state packet was received", "started_at": None, "last_packet_at": None}
    last = packets[-1]
    return {
        "phase": plain(last.phase),
        "reason": last.phase_reason,
        "started_at": plain(packets[0].created_at),
        "last_packet_at": plain(last.created_at),
        "epochs": last.epoch,
        "steps": last.step,
    }


def _configuration(packets: Sequence[SystemStatePacket]) -> dict[str, Any]:
    if not packets:
        return {}
    first, last = packets[0], packets[-1]
    sites = {layer.layer: plain(layer.site) for layer in last.layers}
    budget = plain(last.budget)
    return {
        "random_seed": first.random_seed,
        "planned_epochs": first.planned_epochs,
        "learning_rate": first.learning_rate,
        "allowed_blueprints": first.allowed_blueprints,
        "budget": {name: budget[name] for name in budget if name.startswith("max_")},
        "layers": [{"layer": name, "site": site} for name, site in sites.items()],
    }


def _architecture(packets: Sequence[SystemStatePacket]) -> dict[str, Any]:
    if not packets:
        return {}
    last = packets[-1]
    standing = [
        {"layer": layer.layer, **plain(seed)}
        for layer in last.layers
        for seed in layer.seeds
        if seed.state is not SeedLifecycleState.DORMANT
    ]
    return {
        "initial_parameters": packets[0].host_parameters,
        "final_parameters": last.current_parameters,
        "added_parameters": last.budget.added_parameters,
        "host_flops": last.host_flops,
        "added_flops": last.budget.added_flops,
        "seeds": standing,
    }


def _adaptations(events: Sequence[ChainedEvent]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Give every adaptation that left a trace beyond its decision; the counts of all decisions, and the other ones."""
    found: dict[str, dict[str, Any]] = {}
    others: list[dict[str, Any]] = []
    decided = 0

    def record_of(adaptation_id: str) -> dict[str, Any]:
        empty: dict[str, Any] = {"decision": None, "plans": [], "kernels": [], "seed_events": [], "field_report": None}
        return found.setdefault(adaptation_id, {"adaptation_id": adaptation_id, **empty})

    for event in events:
        if event.kind == "decision":
            decision = parse(event.payload, AdaptationDecision)
            decided += 1
            if decision.actionable:
                record_of(decision.adaptation_id)["decision"] = _decision(decision)
            else:
                others.append(_decision(decision))
        elif event.kind == "field_report":
            report = parse(event.payload, FieldReport)
            record_of(report.adaptation_id)["field_report"] = plain(report)
        elif event.kind in _TRAIL:
            name, cls = _TRAIL[event.kind]
            value = parse(event.payload, cls)
            if value.adaptation_id:
                record_of(value.adaptation_id)[name].append(plain(value))
    return list(found.values()), {
        "made": decided,
        "actionable": decided - len(others),
        "not_acted_on": others,
    }


def _decision(decision: AdaptationDecision) -> dict[str, Any]:
    shown = dict(plain(dataclasses.replace(decision, blueprint=None)))
    shown["blueprint"] = None if decision.blueprint is None else decision.blueprint.name
    return shown


def _interventions(events: Sequence[ChainedEvent]) -> list[dict[str, Any]]:
    """Give every command of an operator with the run's answer."""
    found: dict[str, dict[str, Any]] = {}
    for event in events:
        if event.kind != "control":
            continue
        message = decision_pb2.ControlMessage.FromString(event.payload)
        body = message.WhichOneof("body")
        if body == "command":
            command = from_wire(message.command, ControlCommand)
            shown = plain(dataclasses.replace(command, blueprint=None))
            found.setdefault(command.request_id, {"command": None, "result": None})["command"] = shown
        elif body == "result":
            result = from_wire(message.result, ControlResult)
            found.setdefault(result.request_id, {"command": None, "result": None})["result"] = plain(result)
    return list(found.values())

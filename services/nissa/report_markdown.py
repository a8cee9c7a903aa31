"""A run report for people: the same values as the JSON, as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

_BELIEFS: Final = (
    ("expected_reward", "what the candidate is expected to bring beyond its price, in units of loss"),
    ("exploration_bonus", "drawn above that for being uncertain, in units of loss"),
)


def to_markdown(report: Mapping[str, Any]) -> str:
    """Give a report as Markdown text."""
    parts = [
        f"# Run {_text(report['run_id'])}",
        _outcome(report),
        "## Configuration",
        _configuration(report["configuration"]),
        "## Figures",
        _figures(report["figures"]),
        "## Architecture",
        _architecture(report["architecture"]),
        "## What growth cost",
        _growth_costs(report["growth_costs"]),
        f"## Adaptations\n\n{_decisions(report['decisions'])}",
        *(_adaptation(one) for one in report["adaptations"]),
        "## Interventions",
        _interventions(report["interventions"]),
        "## Anomalies",
        _anomalies(report["anomalies"]),
        "## Audit",
        _audit(report["audit"]),
    ]
    return "\n\n".join(parts) + "\n"


def _outcome(report: Mapping[str, Any]) -> str:
    outcome = report["outcome"]
    reason = f" ({_text(outcome['reason'])})" if outcome["reason"] else ""
    return (
        f"Phase **{_text(outcome['phase'])}**{reason}, first packet {_text(outcome['started_at'])}, "
        f"last {_text(outcome['last_packet_at'])}; report made {_text(report['made_at'])}."
    )


def _configuration(configuration: Mapping[str, Any]) -> str:
    if not configuration:
        return "No state packet was received."
    rows = [(name, configuration[name]) for name in ("random_seed", "planned_epochs", "learning_rate")]
    rows.append(("allowed_blueprints", configuration["allowed_blueprints"] or "every one"))
    rows += list(configuration["budget"].items())
    rows += [("layer", f"{layer['layer']}: {_site(layer['site'])}") for layer in configuration["layers"]]
    return _table(("setting", "value"), rows)


def _site(site: Mapping[str, Any] | None) -> str:
    if site is None:
        return "shapes not seen"
    return f"{site['kind']} {site['input_shape']} -> {site['output_shape']}"


def _figures(figures: Mapping[str, Any]) -> str:
    rows = list(figures["training"].items())
    growth = figures["morphogenetic"]
    rows += [(name, value) for name, value in growth.items() if name != "seeds_by_state"]
    rows += [(f"seeds {state}", count) for state, count in growth["seeds_by_state"].items()]
    kernels = figures["kernels"]
    rows += [(name, kernels[name]) for name in ("kernels_ready", "kernels_failed")]
    return _table(("figure", "value"), rows)


def _architecture(architecture: Mapping[str, Any]) -> str:
    if not architecture:
        return "No state packet was received."
    rows = [(name, value) for name, value in architecture.items() if name != "seeds"]
    seeds = _table(
        ("layer", "source", "seed", "state", "alpha", "blueprint", "parameters"),
        [
            tuple(
                one[name] for name in ("layer", "source", "seed_index", "state", "alpha", "blueprint_id", "parameters")
            )
            for one in architecture["seeds"]
        ],
    )
    return f"{_table(('figure', 'value'), rows)}\n\n{seeds if architecture['seeds'] else 'No seed stands.'}"


def _growth_costs(costs: Sequence[Mapping[str, Any]]) -> str:
    if not costs:
        return "The run told none."
    rows = [(cost["phase"], cost["seconds"], cost["flops"]) for cost in costs]
    return f"In the training thread:\n\n{_table(('phase', 'seconds', 'FLOPs'), rows)}"


def _decisions(decisions: Mapping[str, Any]) -> str:
    counts = f"{decisions['made']} decisions, {decisions['actionable']} of them to be acted on."
    figures = ("epoch", "adaptation_type", "layer", "confidence", "urgency", "curve_state", "explanation")
    rows = [(*(one[name] for name in figures), _evidence(one["evidence"])) for one in decisions["not_acted_on"]]
    if not rows:
        return counts
    header = ("epoch", "asked for", "layer", "confidence", "urgency", "curve", "why", "evidence")
    return f"{counts} Not acted on:\n\n{_table(header, rows)}"


def _adaptation(one: Mapping[str, Any]) -> str:
    lines = [f"### {_text(one['adaptation_id'])}"]
    if one["decision"] is not None:
        decision = one["decision"]
        lines.append(
            f"Decided in epoch {decision['epoch']}: **{_text(decision['adaptation_type'])}** at "
            f"{_text(decision['layer'])}, confidence {_text(decision['confidence'])}, urgency "
            f"{_text(decision['urgency'])}, curve {_text(decision['curve_state'])}. {_text(decision['explanation'])}"
        )
        evidence = [(item["name"], item["value"], item["detail"]) for item in decision["evidence"]]
        evidence += [(name, decision[name], meaning) for name, meaning in _BELIEFS if decision[name] is not None]
        lines += [_table(("evidence", "value", "meaning"), evidence)] if evidence else []
    trail = [(plan["created_at"], f"plan {plan['status']}", plan["step"], plan["reason"]) for plan in one["plans"]]
    trail += [
        (event["created_at"], f"seed {event['from_state']} -> {event['to_state']}", event["step"], event["reason"])
        for event in one["seed_events"]
    ]
    lines += [_table(("when", "what", "step", "why"), sorted(trail, key=lambda row: row[0]))] if trail else []
    lines += [f"Kernel {_text(kernel['artifact_id'] or kernel['error'])}." for kernel in one["kernels"]]
    lines.append(_field_report(one["field_report"]))
    return "\n\n".join(lines)


def _field_report(report: Mapping[str, Any] | None) -> str:
    if report is None:
        return "No field report: not ended, or never begun."
    measured = report["contribution"]
    effect = "nothing was measured"
    if measured is not None:
        effect = (
            f"contribution {_text(measured['estimate'])} [{_text(measured['low'])}, {_text(measured['high'])}] at "
            f"{_text(measured['confidence_level'])} over {measured['num_examples']} examples"
        )
    return (
        f"Outcome **{_text(report['outcome'])}**: {effect}, price {_text(report['price'])}. {_text(report['reason'])}"
    )


def _interventions(interventions: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for one in interventions:
        command, result = one["command"] or {}, one["result"] or {}
        rows.append((command.get("created_at"), command.get("actor"), command.get("action"), result.get("detail")))
    return _table(("when", "who", "what", "answer"), rows) if rows else "None."


def _anomalies(anomalies: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        (
            one["severity"],
            one["detector"],
            one["subject"],
            one["first_seen_at"],
            one["last_seen_at"],
            "passed" if one["resolved"] else "open",
            _evidence(one["evidence"]),
        )
        for one in anomalies
    ]
    return _table(("severity", "detector", "subject", "first", "last", "state", "evidence"), rows) if rows else "None."


def _evidence(evidence: Iterable[Mapping[str, Any]]) -> str:
    return "; ".join(f"{item['name']} = {_shown(item['value'])}" for item in evidence)


def _audit(audit: Mapping[str, Any]) -> str:
    state = "intact" if audit["intact"] else f"BROKEN: {_text(audit['reason'])}"
    return (
        f"{audit['events_verified']} of {audit['events']} events verified, chain {state}.\n\n"
        f"Algorithm: {audit['algorithm']}. Head: `{audit['head']}`."
    )


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    lines += ["| " + " | ".join(_text(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def _text(value: Any) -> str:
    """Give a value as one cell: what came over the wire cannot break the table or add markup of its own."""
    flat = " ".join(_shown(value).split())
    return "".join(f"\\{char}" if char in "\\|*`[]<>#" else char for char in flat)


def _shown(value: Any) -> str:
    if value is None:
        return "not measured"
    return f"{value:.6g}" if isinstance(value, float) else str(value)

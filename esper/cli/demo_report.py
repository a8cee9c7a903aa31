"""The demo's report: Markdown, JSON and plots in one directory."""

from __future__ import annotations

import json
from pathlib import Path

from esper.cli.demo_run import DemoResult, as_plain
from esper.cli.digits import NUM_CONTROL, NUM_TRAIN, mean
from esper.contracts.run import Contribution


def write_report(result: DemoResult, directory: Path) -> Path:
    """Write ``report.md``, ``report.json`` and a plot a seed; give the path of ``report.md``."""
    directory.mkdir(parents=True, exist_ok=True)
    lines = ["# A network that grew on digits", "", *_setting(result), "", *_table(result), "", *_margins(result)]
    for run in result.runs:
        plot = run.report.plot(directory / f"seed-{run.seed}.png")
        lines += ["", f"## Seed {run.seed}", "", f"![loss and parameters]({plot.name})", ""]
        lines += run.report.to_markdown().splitlines()[2:]
    (directory / "report.json").write_text(json.dumps(as_plain(result), indent=2), encoding="utf-8")
    path = directory / "report.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _setting(result: DemoResult) -> list[str]:
    settings = result.settings
    return [
        f"Host: perceptron 64-16-10. Data: scikit-learn's digits: {NUM_TRAIN} to train, {NUM_CONTROL} to decide by,",
        f"the rest sealed until the end. {settings.epochs} epochs, {settings.seeds} seeds; every arm sees the same",
        "batches in the same order.",
    ]


def _table(result: DemoResult) -> list[str]:
    rows = [
        "| seed | parameters | tried | kept | grown | host alone | static, grown size |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in result.runs:
        report = run.report
        rows.append(
            f"| {run.seed} | {report.host_params:,} -> {report.final_params:,} | {len(report.adaptations)} "
            f"| {len(report.kept)} | {run.grown_accuracy:.2%} | {run.host_accuracy:.2%} "
            f"| {run.static_accuracy:.2%} ({run.static_parameters:,}) |"
        )
    if len(result.runs) > 1:
        means = [mean([getattr(run, f"{arm}_accuracy") for run in result.runs]) for arm in ("grown", "host", "static")]
        rows.append(f"| mean | | | | {means[0]:.2%} | {means[1]:.2%} | {means[2]:.2%} |")
    return rows


def _margins(result: DemoResult) -> list[str]:
    named = (("host alone", result.margin("host")), ("static net of the grown size", result.margin("static")))
    return [f"- Grown minus {name}: {describe_margin(margin)}" for name, margin in named if margin is not None]


def describe_margin(margin: Contribution) -> str:
    """Say what a paired margin shows, in percentage points, without making more of it than there is."""
    text = f"{100 * margin.estimate:+.2f} points (95 % interval {100 * margin.low:+.2f} to {100 * margin.high:+.2f})"
    if margin.low > 0:
        return f"{text}: better."
    if margin.high < 0:
        return f"{text}: worse."
    return f"{text}: no difference shown."

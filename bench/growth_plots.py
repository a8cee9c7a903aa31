"""Plots of the growth measure: control accuracy over FLOPs arm by arm, and what every adaptation contributed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from bench.growth_arms import GROWN
from bench.growth_figures import CellRuns
from bench.growth_training import Outcome

_COLOURS: Final = {"kept": "tab:green", "culled": "tab:red", "failed": "black", "rolled_back": "tab:purple"}


def plot_cell(runs: CellRuns, directory: Path) -> list[Path]:
    """Draw a cell; gives the files."""
    stem = runs.cell.name.replace("/", "-")
    return [_plot_curves(runs, directory / f"{stem}-curves.png"), _plot_tried(runs, directory / f"{stem}-tried.png")]


def _axes(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def _plot_curves(runs: CellRuns, path: Path) -> Path:
    """Draw control accuracy over FLOPs: mean over the seeds, epoch by epoch up to the last that all have."""
    from matplotlib import colormaps

    figure, axes = _axes(10, 6)
    colours = colormaps["tab20"]
    for place, arm in enumerate(runs.arms):
        curve = mean_curve(runs.each(arm))
        if curve:
            style: dict[str, Any] = (
                {"linewidth": 2.5, "color": "black"} if arm == GROWN else {"linewidth": 1.0, "color": colours(place)}
            )
            axes.plot([flops for flops, _ in curve], [100 * accuracy for _, accuracy in curve], label=arm, **style)
    axes.set_xscale("log")
    axes.set_xlabel("FLOPs spent, growth's own included")
    axes.set_ylabel("accuracy on the control split, %")
    axes.set_title(f"{runs.cell.name}, mean over {len(runs.seeds)} seeds")
    axes.legend(fontsize=7)
    figure.savefig(path)
    return path


def mean_curve(outcomes: list[Outcome]) -> list[tuple[float, float]]:
    """Give mean FLOPs and mean control accuracy by epoch; empty where nothing was held out."""
    found: list[tuple[float, float]] = []
    for points in zip(*(outcome.curve for outcome in outcomes), strict=False):
        accuracies = [point.accuracy for point in points if point.accuracy is not None]
        if len(accuracies) < len(points):
            return []
        flops = sum(point.flops for point in points) / len(points)
        found.append((flops, sum(accuracies) / len(accuracies)))
    return found


def _plot_tried(runs: CellRuns, path: Path) -> Path:
    """Draw the measured contribution of every adaptation with its interval, and its price."""
    tried = [item for outcome in runs.each(GROWN) for item in outcome.tried if item.contribution is not None]
    figure, axes = _axes(10, 1.5 + 0.22 * max(1, len(tried)))
    for place, item in enumerate(tried):
        assert item.contribution is not None
        colour = _COLOURS.get(item.outcome, "grey")
        if item.low is not None and item.high is not None:
            axes.plot([item.low, item.high], [place, place], color=colour, linewidth=1.5)
        axes.plot([item.contribution], [place], "o", color=colour, markersize=4)
        if item.price is not None:
            axes.plot([item.price], [place], "|", color="black", markersize=8)
    axes.axvline(0.0, color="grey", linewidth=0.8)
    axes.set_yticks(range(len(tried)), [f"{item.blueprint} at {item.layer}" for item in tried], fontsize=6)
    axes.set_xlabel("contribution: control loss with the seed off minus on; bar: interval; tick: price")
    axes.set_title(f"{runs.cell.name}: green kept, red culled ({len(tried)} measured)")
    figure.savefig(path)
    return path

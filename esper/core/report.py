"""The report of a run: what was tried where, what it brought, and how the run went."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from esper.contracts.run import GROWING_TYPES, Contribution, GrowthCost


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaptationSummary:
    """One adaptation of a run."""

    id: str
    """Adaptation."""
    layer: str
    """Dotted module name."""
    source: str = ""
    """Layer whose input its seed reads; empty where the seed reads that of its own layer."""
    seed_index: int | None
    """Seed within the layer; ``None`` when no seed was meant."""
    adaptation_type: str
    """What was asked for."""
    blueprint: str
    """Name of the blueprint; empty when none was used."""
    state: str
    """Final life-cycle state, or the outcome where no seed was meant; lower case."""
    outcome: str
    """``kept``, ``culled``, ``failed``, ``rolled_back`` or ``open``."""
    contribution: float | None
    """Control loss with the seed off minus on; ``None`` when nothing was measured."""
    interval: tuple[float, float] | None
    """Interval of the contribution."""
    price: float | None
    """What the contribution had to beat, in units of loss."""
    parameters: int
    """Trainable parameters of the seed."""
    steps: int
    """Optimizer steps from germination to its end."""
    begun_epoch: int
    """Epoch in which it began."""
    graft_steps: int
    """Steps spent blended in; 0 where it was outrun in its race, or gone, while it learnt alone."""
    trace_id: str
    """Trace of the adaptation, 32 hex digits; empty when tracing is off."""
    reason: str
    """Why it ended so."""

    @property
    def place(self) -> str:
        """Layer, and source where it is another, as people read it; empty when no layer was meant."""
        return place_of(self.layer, self.source)

    @property
    def grew(self) -> bool:
        """Whether a seed was to germinate."""
        return self.adaptation_type in GROWING_TYPES

    @staticmethod
    def interval_of(contribution: Contribution | None) -> tuple[float, float] | None:
        """Give the interval of a contribution as a pair."""
        return None if contribution is None else (contribution.low, contribution.high)


@dataclass(frozen=True, kw_only=True, slots=True)
class EpochRecord:
    """One epoch of a run."""

    epoch: int
    """Epochs completed."""
    step: int
    """Optimizer steps completed."""
    train_loss: float | None
    """Mean training loss."""
    control_loss: float
    """Mean loss on the control split."""
    control_accuracy: float | None
    """Accuracy on the control split, 0 to 1."""
    parameters: int
    """Parameters that the model's output came from: seeds that learn alone have no part in it."""
    seconds: float
    """Wall time of the epoch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseCost:
    """What one phase of growth cost the training thread since the session was opened."""

    phase: str
    """Name of the phase (``esper.contracts.run.GrowthPhase``), lower case."""
    seconds: float
    """Wall time."""
    flops: int | None
    """FLOPs; ``None`` where they were not counted (``SessionConfig.counts_flops``)."""

    @classmethod
    def of(cls, cost: GrowthCost) -> PhaseCost:
        """Give a cost as reports have it."""
        return cls(phase=cost.phase.name.lower(), seconds=cost.seconds, flops=cost.flops)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunReport:
    """What became of a run."""

    run_id: str
    """Run."""
    phase: str
    """How it ended, lower case."""
    host_params: int
    """Parameters of the host."""
    final_params: int
    """Parameters at the end."""
    adaptations: tuple[AdaptationSummary, ...] = ()
    """Every adaptation, oldest first."""
    history: tuple[EpochRecord, ...] = ()
    """Every epoch."""
    rollbacks: int = 0
    """Times the whole training state was taken back."""
    notes: tuple[str, ...] = field(default_factory=tuple)
    """What a reader should know, e.g. services that were away."""
    costs: tuple[PhaseCost, ...] = ()
    """What growth cost the training thread, phase by phase."""

    @property
    def kept(self) -> tuple[AdaptationSummary, ...]:
        """Seeds that were kept; a removal, or settings that stayed changed, grew nothing and is none of them."""
        return tuple(item for item in self.adaptations if item.outcome == "kept" and item.grew)

    def to_json(self) -> str:
        """Give the report as JSON text; a figure that is not finite stands there as a word."""
        return json.dumps(_plain(asdict(self)), indent=2, allow_nan=False)

    def to_markdown(self) -> str:
        """Give the report as Markdown text."""
        first, last = (self.history[0], self.history[-1]) if self.history else (None, None)
        lines = [
            f"# Run {self.run_id}",
            "",
            f"Ended {self.phase} after {len(self.history)} epochs; {self.host_params:,} parameters before, "
            f"{self.final_params:,} after; {len(self.kept)} of {len(self.adaptations)} adaptations kept.",
        ]
        if first is not None and last is not None:
            lines += ["", f"Control loss {first.control_loss:.4f} -> {last.control_loss:.4f}."]
        lines += ["", "## Adaptations", "", *_adaptation_rows(self.adaptations)]
        lines += ["", "## What growth cost", "", *_cost_rows(self.costs, self.history), "", "## History", ""]
        lines += _history_rows(self.history)
        if self.notes:
            lines += ["", "## Notes", "", *(f"- {note}" for note in self.notes)]
        return "\n".join(lines) + "\n"

    def plot(self, path: str | Path) -> Path:
        """Draw loss, accuracy and parameters over the epochs, with a mark where a seed was kept; give the file."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 6), layout="constrained")
        FigureCanvasAgg(figure)
        upper, lower = figure.subplots(2, 1, sharex=True)
        epochs = [record.epoch for record in self.history]
        upper.plot(epochs, [record.train_loss for record in self.history], label="train")
        upper.plot(epochs, [record.control_loss for record in self.history], label="control")
        upper.set_ylabel("loss")
        lower.step(epochs, [record.parameters for record in self.history], where="post", label="parameters")
        lower.set_ylabel("parameters")
        lower.set_xlabel("epoch")
        _mark_kept(upper, self.kept)
        upper.legend()
        target = Path(path)
        figure.savefig(target)
        return target


def place_of(layer: str, source: str) -> str:
    """Give where a seed stands, as people read it, with the layer whose input it reads where that is another."""
    return f"{layer} from {source}" if source else layer


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _cell(text: str) -> str:
    """Give a text as one cell: an error's own words cannot break the table."""
    return " ".join(text.split()).replace("|", "\\|")


def _adaptation_rows(adaptations: tuple[AdaptationSummary, ...]) -> list[str]:
    if not adaptations:
        return ["None was tried."]
    rows = [
        "| epoch | layer | blueprint | outcome | contribution (interval) | price | parameters | reason |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for item in adaptations:
        effect = "not measured"
        if item.contribution is not None and item.interval is not None:
            effect = f"{item.contribution:+.4f} ({item.interval[0]:+.4f} to {item.interval[1]:+.4f})"
        price = "" if item.price is None else f"{item.price:.4f}"
        rows.append(
            f"| {item.begun_epoch} | {_cell(item.place)} | {_cell(item.blueprint or item.adaptation_type)} "
            f"| {item.outcome} | {effect} | {price} | {item.parameters:,} | {_cell(item.reason)} |"
        )
    return rows


def _cost_rows(costs: tuple[PhaseCost, ...], history: tuple[EpochRecord, ...]) -> list[str]:
    """Give the time of each phase, with its share of the epochs' wall time, and its FLOPs where they were counted."""
    if not costs:
        return ["Not measured."]
    whole_s = sum(record.seconds for record in history)
    rows = ["| phase | seconds | share of the epochs' time | FLOPs |", "|---|---|---|---|"]
    for cost in costs:
        share = f"{cost.seconds / whole_s:.1%}" if whole_s else "no epoch ended"
        flops = "not counted" if cost.flops is None else f"{cost.flops:,}"
        rows.append(f"| {cost.phase} | {cost.seconds:.3f} | {share} | {flops} |")
    return rows


def _history_rows(history: tuple[EpochRecord, ...]) -> list[str]:
    rows = ["| epoch | train loss | control loss | control accuracy | parameters |", "|---|---|---|---|---|"]
    for record in history:
        train = "" if record.train_loss is None else f"{record.train_loss:.4f}"
        accuracy = "" if record.control_accuracy is None else f"{record.control_accuracy:.4f}"
        rows.append(f"| {record.epoch} | {train} | {record.control_loss:.4f} | {accuracy} | {record.parameters:,} |")
    return rows


def _mark_kept(axes: Any, kept: tuple[AdaptationSummary, ...]) -> None:
    for item in kept:
        axes.axvline(item.begun_epoch, linestyle="--", linewidth=0.8, color="grey")
        axes.annotate(item.blueprint, (item.begun_epoch, 0.95), xycoords=("data", "axes fraction"), fontsize=7)

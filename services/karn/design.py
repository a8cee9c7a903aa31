"""What a design looks like from outside: its figures, its cell in the archive, and how far two designs are apart.

    figure        meaning                                                                   range
    size          log8 of parameters over those of a square map of the layer, plus a half   0 to 1
    work          the same for operations per example                                       0 to 1
    depth         nodes on the longest path, over 12                                        0 to 1
    share of f    nodes of operator family f over all nodes                                 0 to 1
    reach         largest kernel times dilation, over 15                                    0 to 1
    reads x, h    whether the layer's input, output is read                                 0 or 1
    width         widest inner value over four times the output's features                  0 to 1

Every figure is within 0 to 1, so the distance of two designs, their Euclidean distance over the root of the number of
figures, is too.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
from numpy.typing import NDArray

from esper.blueprints import Plan, plan
from esper.blueprints.cost import plan_cost
from esper.blueprints.tags import KINDS
from esper.contracts.blueprint import BlueprintCost, BlueprintIR, Site

FAMILIES: Final[Mapping[str, Collection[str]]] = {
    "linear": KINDS["linear"],
    "conv": KINDS["conv"],
    "attention": KINDS["attention"],
    "norm": ("layer_norm", "rms_norm", "group_norm"),
    "activation": ("activation",),
    "gate": ("mul", "scale", "multiply"),
}
"""Families of operators that the figures tell apart."""

NUM_FIGURES: Final = 3 + len(FAMILIES) + 4
"""Length of a design's row of figures."""

_KINDS: Final = ("conv", "attention", "linear")


@dataclass(frozen=True)
class DesignView:
    """A legal design at a site, measured."""

    layout: Plan
    """The design laid out at the site."""

    @cached_property
    def cost(self) -> BlueprintCost:
        """Exact cost at the site."""
        return plan_cost(self.layout)

    @cached_property
    def depth(self) -> int:
        """Nodes on the longest path."""
        depths: dict[str, int] = {"x": 0, "h": 0}
        for step in self.layout.steps:
            depths[step.node.name] = 1 + max((depths[source] for source in step.node.inputs), default=0)
        return max(depths.values())

    @cached_property
    def kind(self) -> str:
        """Heaviest family of operators: ``conv``, ``attention``, ``linear`` or ``pointwise``."""
        present = {step.node.op for step in self.layout.steps}
        return next((kind for kind in _KINDS if present.intersection(FAMILIES[kind])), "pointwise")

    @property
    def cost_band(self) -> int:
        """Class of the parameter count against the layer's own square map: 0 to 4, each four times the one before."""
        ratio = max(self.cost.parameters, 1) / _own_parameters(self.layout)
        return int(min(4, max(0, math.floor(math.log(ratio, 4)) + 3)))

    @property
    def cell(self) -> str:
        """Cell of the archive, e.g. ``cost=2/conv/depth=3``; depths from 8 on share one."""
        return f"cost={self.cost_band}/{self.kind}/depth={min(self.depth, 8)}"

    @cached_property
    def figures(self) -> NDArray[np.float64]:
        """The row of figures, [NUM_FIGURES], each within 0 to 1."""
        steps, own = self.layout.steps, _own_parameters(self.layout)
        counts = [sum(step.node.op in members for step in steps) / len(steps) for members in FAMILIES.values()]
        reads = {source for step in steps for source in step.node.inputs}
        widest = max(step.output.features for step in steps) / (4.0 * self.layout.h.features)
        row = [
            _log_share(self.cost.parameters / own),
            _log_share(self.cost.flops / (2.0 * own * self.layout.h.num_positions)),
            min(1.0, self.depth / 12.0),
            *counts,
            min(1.0, _reach(self.layout) / 15.0),
            float("x" in reads),
            float("h" in reads),
            min(1.0, widest),
        ]
        return np.array(row, dtype=np.float64)


def view(ir: BlueprintIR, site: Site) -> DesignView:
    """Give a design as it stands at a site.

    Raises:
        InvalidBlueprintError: It is not legal there.
    """
    return DesignView(plan(ir, site))


def novelty(one: NDArray[np.float64], others: Sequence[NDArray[np.float64]]) -> float:
    """Give the distance of a design to the nearest of others, 0 to 1; 1 when there are none."""
    if not others:
        return 1.0
    distances = np.linalg.norm(np.stack(others) - one, axis=1) / math.sqrt(NUM_FIGURES)
    return float(min(1.0, distances.min()))


def _own_parameters(layout: Plan) -> int:
    return layout.x.features * layout.h.features


def _log_share(ratio: float) -> float:
    return min(1.0, max(0.0, math.log(max(ratio, 1e-9), 8) / 3.0 + 0.5))


def _reach(layout: Plan) -> int:
    reaches = [
        int(step.call.attributes["kernel"]) * int(step.call.attributes.get("dilation", 1))
        for step in layout.steps
        if "kernel" in step.call.attributes
    ]
    return max(reaches, default=0)

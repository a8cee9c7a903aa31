"""Blueprints as modules: straight-line torch code, made of torch's own layers and nothing of Esper's.

The module is a ``torch.fx.GraphModule``: it can be scripted, exported, copied, saved by its ``state_dict`` and read by
its ``code``, and it lives on without Esper once it has been exported.
"""

from __future__ import annotations

import torch
from torch import fx, nn

from esper.blueprints.operator_base import NODE_KEY, Emitter
from esper.blueprints.plan import Plan, plan
from esper.blueprints.types import Layout
from esper.contracts.blueprint import BlueprintIR, Site
from esper.contracts.errors import InvalidInputError


def to_module(ir: BlueprintIR, site: Site, *, seed: int) -> fx.GraphModule:
    """Build ``forward(x, h) -> delta`` for a site, float32, in training mode, on the CPU.

    ``x`` and ``h`` carry a batch dimension of any size first; at a site of plain vectors any number of leading
    dimensions. Equal seeds give equal weights, and torch's own random state is left alone.

    Raises:
        InvalidBlueprintError: The blueprint is not legal at the site.
        InvalidInputError: The seed is outside 0 .. 2**63 - 1.
    """
    return build_plan(plan(ir, site), seed=seed)


def build_plan(layout: Plan, *, seed: int) -> fx.GraphModule:
    """Build the module of a blueprint already laid out; see ``to_module``."""
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise InvalidInputError.of("seed", "be a whole number in [0, 2**63)", seed)
    graph, root = fx.Graph(), nn.Module()
    emitter = Emitter(graph, root, torch.Generator().manual_seed(seed))
    x, h = graph.placeholder("x"), graph.placeholder("h")
    values = {"x": x, "h": h}
    reshaped = _flatten_inputs(layout, emitter, values)
    for step in layout.steps:
        args = [values[source] for source in step.node.inputs]
        known = len(graph.nodes)
        values[step.node.name] = step.operator.emit(emitter, args, step.call, step.output)
        for emitted in list(graph.nodes)[known:]:
            emitted.meta[NODE_KEY] = step.node.name
    delta = values[layout.ir.output]
    graph.output(emitter.method("reshape_as", delta, h) if reshaped else delta)
    for node in reversed(graph.nodes):
        if not node.users and node.op not in ("output", "placeholder"):
            graph.erase_node(node)
    graph.lint()
    return fx.GraphModule(root, graph, class_name="Seed")


def _flatten_inputs(layout: Plan, emitter: Emitter, values: dict[str, fx.Node]) -> bool:
    """Bring x and h to (batch, ...) where the graph needs it; say whether the delta must be brought back."""
    rank = len(layout.site.output_shape)
    if layout.h.layout is Layout.VECTOR and not layout.keeps_leading:
        for name, kind in (("x", layout.x), ("h", layout.h)):
            if _is_read(layout, name):
                values[name] = emitter.method("reshape", values[name], -1, kind.features)
        return True
    if layout.h.layout is Layout.TOKENS and rank > 2:
        for name in ("x", "h"):
            if _is_read(layout, name):
                values[name] = emitter.function(torch.flatten, values[name], 1, rank - 1)
        return True
    return False


def _is_read(layout: Plan, name: str) -> bool:
    return any(name in step.node.inputs for step in layout.steps)

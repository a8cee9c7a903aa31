"""Where in a built blueprint something goes wrong: the node by its name in the IR, for the contract test to say.

Runs the module node by node, so it is for modules that have already failed: it costs several passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import fx, nn

from esper.blueprints.flops import count_flops
from esper.blueprints.operator_base import NODE_KEY
from esper.blueprints.plan import Plan

Inputs = tuple[torch.Tensor, torch.Tensor]
"""x and h."""

_PARTS: Final = ("node_", "down_", "up_", "norm_")


class _Walk(fx.Interpreter):
    """Runs the module and keeps, per IR node, its last output; ``at`` is the node that runs."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.at = ""
        self.outputs: dict[str, torch.Tensor] = {}
        self.flops: dict[str, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run one fx node and keep what it gave under the IR node's name."""
        name = n.meta.get(NODE_KEY)
        if name is None:
            return super().run_node(n)
        self.at, found = name, []
        flops = count_flops(lambda: found.append(super(_Walk, self).run_node(n)))
        self.flops[name] = self.flops.get(name, 0) + flops
        if isinstance(found[0], torch.Tensor):
            self.outputs[name] = found[0]
        return found[0]


def failing_node(module: fx.GraphModule, inputs: Inputs) -> str:
    """Give the node at which the module raises; empty when it runs."""
    walk = _Walk(module)
    try:
        with torch.no_grad():
            walk.run(*inputs)
    except Exception:  # noqa: BLE001 - the question is where, not what
        return walk.at
    return ""


def overflowing_node(module: fx.GraphModule, inputs: Inputs) -> str:
    """Give the first node whose output is not finite; empty when all are."""
    walk = _Walk(module)
    with torch.no_grad():
        walk.run(*inputs)
    return next((name for name, value in walk.outputs.items() if not torch.isfinite(value).all()), "")


def blocked_edge(module: fx.GraphModule, inputs: Inputs) -> str:
    """Give ``node 'a' passes no gradient to 'b'`` for the edge nearest to the output; empty where none is blocked."""
    walk = _Walk(module)
    delta = walk.run(*inputs)
    values = {name: value for name, value in walk.outputs.items() if value.requires_grad}
    if not delta.requires_grad:
        return "no parameter reaches the output"
    weights = torch.linspace(-1.0, 1.0, delta.numel(), dtype=delta.dtype).reshape(delta.shape)
    found: Sequence[torch.Tensor | None] = torch.autograd.grad(
        (delta * weights).sum(), list(values.values()), allow_unused=True
    )
    sizes = {
        name: 0.0 if gradient is None else float(gradient.abs().max())
        for name, gradient in zip(values, found, strict=True)
    }
    for reader in reversed(list(module.graph.nodes)):
        name = reader.meta.get(NODE_KEY, "")
        for source in reader.all_input_nodes:
            other = source.meta.get(NODE_KEY, name)
            if other != name and sizes.get(name) and sizes.get(other) == 0.0:
                return f"node '{name}' passes no gradient to '{other}'"
    return ""


def wrong_parameters(module: nn.Module, layout: Plan) -> str:
    """Give each node whose parameters are not as declared; empty when all are."""
    counted: dict[str, int] = {}
    for name, parameter in module.named_parameters():
        node = _node_of(name)
        counted[node] = counted.get(node, 0) + parameter.numel()
    declared = {step.node.name: step.work.parameters for step in layout.steps}
    return _differences(counted, declared)


def wrong_flops(module: fx.GraphModule, layout: Plan, inputs: Inputs) -> str:
    """Give each node whose work is not as declared; empty when all is. ``inputs`` hold one example."""
    walk = _Walk(module)
    with torch.no_grad():
        walk.run(*inputs)
    return _differences(walk.flops, {step.node.name: step.work.flops for step in layout.steps})


def _node_of(parameter: str) -> str:
    owner = parameter.split(".", maxsplit=1)[0]
    part = next((part for part in _PARTS if owner.startswith(part)), "")
    return owner.removeprefix(part)


def _differences(counted: dict[str, int], declared: dict[str, int]) -> str:
    return ", ".join(
        f"node '{name}' has {counted.get(name, 0)} and declares {wanted}"
        for name, wanted in declared.items()
        if counted.get(name, 0) != wanted
    )

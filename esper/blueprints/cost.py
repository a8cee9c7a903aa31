"""The exact cost of a blueprint at a site.

Parameters are counted, not estimated. Operations are those of matrix products, convolutions and attention, as
``torch.utils.flop_counter`` counts them; elementwise work, norms and pooling are bound by memory and show in the
activations. Activations are the distinct tensors that autograd keeps for backward when all of x, h and the parameters
want gradients, without x, h and the parameters themselves.
"""

from __future__ import annotations

from esper.blueprints.plan import Plan, plan
from esper.contracts.blueprint import BlueprintCost, BlueprintIR, Site

_FLOAT_BYTES = 4


def cost(ir: BlueprintIR, site: Site) -> BlueprintCost:
    """Give the exact cost of one example.

    Raises:
        InvalidBlueprintError: The blueprint is not legal at the site.
    """
    return plan_cost(plan(ir, site))


def plan_cost(layout: Plan) -> BlueprintCost:
    """Give the exact cost of a blueprint already laid out."""
    return BlueprintCost(
        parameters=sum(step.work.parameters for step in layout.steps),
        flops=sum(step.work.flops for step in layout.steps),
        activation_bytes=_kept_bytes(layout),
    )


def _kept_bytes(layout: Plan) -> int:
    owner = {"x": "x", "h": "h"}
    kept: set[str] = set()
    sizes = {"x": 0, "h": 0}
    extra_bytes = 0
    for step in layout.steps:
        name, work = step.node.name, step.work
        owner[name] = owner[step.node.inputs[0]] if work.is_view else name
        sizes[name] = step.output.num_elements
        kept.update(owner[step.node.inputs[index]] for index in work.saves_inputs)
        if work.saves_output:
            kept.add(owner[name])
        extra_bytes += work.saved_bytes
    return extra_bytes + _FLOAT_BYTES * sum(sizes[name] for name in kept)

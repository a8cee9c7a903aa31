"""What a seed costs, as a price in units of loss that its effect must beat.

    symbol        meaning                                                                        unit
    L             control loss when the seed is begun; of t, when its kernel is there             loss
    n, f          parameters and forward FLOPs per example of the kernel, over those of the host  1
    t             time of a forward pass with the seed over that of the host alone, minus 1       1
    price         L (price_per_host_share n + price_per_host_flops f + price_per_host_latency t)  loss

Parameters and FLOPs are counted, so equal runs have equal prices. Time is measured, so a price of it makes equal runs
differ; it is charged only where ``GrowthConfig.price_per_host_latency`` asks for it, once the kernel is there.
"""

from __future__ import annotations

import math
import time
from statistics import median
from typing import Final

import torch

from esper.contracts.blueprint import BlueprintCost
from esper.core.adaptation import Adaptation
from esper.core.context import RunContext
from esper.execution.overrides import GrowingModel, SeedRef, evaluating, seeds_at

_PASSES: Final = 5
"""Passes timed with the seed and without, in turn; the median of each counts."""


def price_of(cost: BlueprintCost, context: RunContext) -> float:
    """Give the price of what is counted, at the present control loss; a host of no FLOPs has no price of them."""
    growth = context.growth
    share = growth.price_per_host_share * (cost.parameters / max(1, context.host_parameters))
    if context.host_flops:
        share += growth.price_per_host_flops * (cost.flops / context.host_flops)
    return share * context.control_loss


def present_price(context: RunContext, adaptation: Adaptation) -> float:
    """Give what a seed that was begun costs at the present control loss: the same shares of it."""
    assert adaptation.cost is not None
    slowdown = adaptation.slowdown or 0.0
    time_price = context.growth.price_per_host_latency * slowdown * context.control_loss
    return price_of(adaptation.cost, context) + time_price


def charge(context: RunContext, adaptation: Adaptation) -> None:
    """Price a seed at the present control loss; where that is no number it stays unpriced, and cannot pay."""
    if adaptation.cost is not None and adaptation.price is None and math.isfinite(context.control_loss):
        adaptation.price = price_of(adaptation.cost, context)


def charge_latency(context: RunContext, adaptation: Adaptation) -> None:
    """Add the price of a live seed's time to its price, once; nothing where no price is asked for it.

    Where the present control loss is no number it is left for later, as in :func:`charge`.
    """
    rate = context.growth.price_per_host_latency
    if rate == 0.0 or adaptation.slowdown is not None or adaptation.price is None:
        return
    if not math.isfinite(context.control_loss):
        return
    adaptation.slowdown = slowdown_of(context, SeedRef(adaptation.layer, adaptation.seed_index))
    adaptation.price += rate * adaptation.slowdown * context.control_loss


def slowdown_of(context: RunContext, ref: SeedRef) -> float:
    """Measure what a forward pass takes longer with one live seed than the host alone, as a share of the host's, >= 0.

    Timed on the first control batch, alternately, each after one pass that is not counted; the model is untouched.
    """
    model, inputs = context.model, context.control.batches[0][0]
    alone = {
        SeedRef(name, seed.index): 0.0 for name, layer in model.kasmina_layers.items() for seed in layer.live_seeds()
    }
    times: dict[float, list[float]] = {0.0: [], 1.0: []}
    with evaluating(model):
        for _ in range(1 + _PASSES):
            for alpha, found in times.items():
                with seeds_at(model, {**alone, ref: alpha}):
                    found.append(_seconds(model, inputs))
    off_s, on_s = (median(found[1:]) for found in times.values())
    return max(0.0, on_s / off_s - 1.0)


def _seconds(model: GrowingModel, inputs: torch.Tensor) -> float:
    """Time one forward pass, the device's own work included."""
    begun_s = time.perf_counter()
    model(inputs)
    if inputs.is_cuda:
        torch.cuda.synchronize(inputs.device)
    return time.perf_counter() - begun_s

"""How long a design takes at a site, by the clock of this machine."""

from __future__ import annotations

import logging
import math
import time
from statistics import median
from typing import Final

import torch

from esper.blueprints import content_id, to_module
from esper.contracts.blueprint import BlueprintIR, Site
from esper.contracts.memory import raise_if_out_of_memory

log = logging.getLogger(__name__)

_PASSES: Final = 5


def median_latency_ms(ir: BlueprintIR, site: Site) -> float:
    """Give the median of five timed forward passes of one example, in milliseconds; infinite where a pass fails.

    Timed is the module of the blueprint contract test, as it is born, at all the positions of the site: in float32, on
    the CPU, after one pass that is not timed. The figure says which of two designs is the slower one on this machine
    while it is as busy as now, and no more.

    Raises:
        InvalidBlueprintError: The design is not legal at the site.
        CapacityExceededError: Memory ran out.
    """
    module = to_module(ir, site, seed=0)
    random = torch.Generator().manual_seed(0)
    x, h = (torch.randn(1, *shape, generator=random) for shape in (site.input_shape, site.output_shape))
    taken_ms: list[float] = []
    try:
        with torch.no_grad():
            for _ in range(1 + _PASSES):
                begun_s = time.perf_counter()
                module(x, h)
                taken_ms.append((time.perf_counter() - begun_s) * 1e3)
    except Exception as error:  # noqa: BLE001 - whatever a graph raises; it never gives a result, so never in time
        raise_if_out_of_memory(error)
        log.warning("design_cannot_run", extra={"blueprint_id": content_id(ir), "error": str(error)})
        return math.inf
    return median(taken_ms[1:])

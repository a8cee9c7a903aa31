"""What an earlier run left standing in a model, cleared away before the next one begins."""

from __future__ import annotations

import logging

from torch.optim import Optimizer

from esper.contracts.lifecycle import SeedLifecycleState
from esper.core import optimizers
from esper.core.morphable import MorphableModel

log = logging.getLogger(__name__)

_STAYS = frozenset({SeedLifecycleState.DORMANT, SeedLifecycleState.FOSSILIZED})


def clear_leftovers(model: MorphableModel, optimizer: Optimizer) -> None:
    """Bring every seed back to DORMANT that a run left unproven: loading, on trial, failed or resting.

    Kept seeds stay. So do seeds that no run has begun: whoever germinated one by hand sees to it.
    """
    for name, layer in model.kasmina_layers.items():
        for index in range(layer.num_seeds):
            state, seed = layer.state_layout.state(index), layer.find_seed(index)
            if state in _STAYS or (seed is not None and not seed.adaptation_id):
                continue
            if seed is not None:
                optimizers.leave(optimizer, layer.seed_parameters(index))
            log.warning("seed_left_over", extra={"layer": name, "seed_index": index, "state": state.name})
            layer.clear_seed(index)

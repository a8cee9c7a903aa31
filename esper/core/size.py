"""How large a model is, as it computes its output."""

from __future__ import annotations

from esper.core.morphable import MorphableModel


def output_parameters(model: MorphableModel) -> int:
    """Count the parameters that the model's output comes from: the host's, and those of seeds that have a share in it.

    A seed that learns alone has none: it is taken away without a trace unless it is blended in.
    """
    silent = [seed for layer in model.kasmina_layers.values() for seed in layer.live_seeds() if seed.is_silent]
    alone = sum(parameter.numel() for seed in silent for parameter in seed.parameters())
    return sum(parameter.numel() for parameter in model.parameters()) - alone

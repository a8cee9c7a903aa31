"""A running average (EMA, SWA) of a model that grows: its seeds appear in the average when they appear in the model.

``torch.optim.swa_utils.AveragedModel`` pairs parameters by their number, so one that was made before a seed came pairs
the wrong ones after. This one brings its copy to the model's structure first; what is new begins at the model's value.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from esper.contracts.errors import InvalidInputError
from esper.core.loading import load_whole
from esper.core.morphable import MorphableModel
from esper.execution.grown import GrownSeed

_Identity = tuple[bytes, str, str]


class GrowingAverage(AveragedModel):
    """An ``AveragedModel`` that grows with its model; takes the same arguments.

    ``average.module`` is the averaged model: evaluate with it, or give it to ``esper.export``. Seeds stand there in the
    state and with the alpha they have in the model; one that was culled is gone from the average too.

    Raises:
        InvalidInputError: The model is not wrapped.
    """

    module: MorphableModel

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        _require_wrapped(model)
        super().__init__(model, *args, **kwargs)

    def update_parameters(self, model: nn.Module) -> None:
        """Bring the copy to the model's structure, and take the model's present values into the average.

        Raises:
            InvalidInputError: The model is not wrapped.
            InvalidStateError: A live seed was not built from a blueprint.
        """
        self._follow(_require_wrapped(model))
        super().update_parameters(model)
        self._set_alphas()

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Build the seeds that the state dict names, clear others, and load every value; strictly, all or nothing."""
        if strict:
            module, load = self.module, super().load_state_dict
            return load_whole(
                self,
                module.kasmina_layers,
                module.seed_states,
                state_dict,
                assign=assign,
                prefix="module.",
                load=load,
            )
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def _follow(self, model: MorphableModel) -> None:
        """Give the copy the model's seeds: averages of those it had stay, values of new ones are the model's."""
        had, averages = _identities(self.module.grown_structure()), dict(self.module.named_parameters())
        structure = model.grown_structure()
        known = _identities(structure)
        for name, layer in self.module.kasmina_layers.items():
            layer.clear_others([at for place, at in had if place == name and had[place, at] == known.get((place, at))])
        self.module.rebuild(structure)
        values = dict(model.named_parameters())
        with torch.no_grad():
            for (name, index), identity in known.items():
                source = averages if had.get((name, index)) == identity else values
                prefix = f"{name}.seeds.{index}."
                for key, parameter in self.module.kasmina_layer(name).require_seed(index).named_parameters():
                    parameter.copy_(source[prefix + key])

    def _set_alphas(self) -> None:
        """Alphas are buffers, and no average of them is meant: each is the model's present one again."""
        for layer in self.module.kasmina_layers.values():
            for seed in layer.live_seeds():
                layer.set_alpha(seed.index, float(layer.state_layout.alpha_blend[seed.index]))


def _identities(structure: list[GrownSeed]) -> dict[tuple[str, int], _Identity]:
    return {(grown.layer, grown.seed_index): (grown.ir, grown.blueprint_id, grown.adaptation_id) for grown in structure}


def _require_wrapped(model: nn.Module) -> MorphableModel:
    if not isinstance(model, MorphableModel):
        raise InvalidInputError.of("model", "be wrapped: esper.wrap(model)", type(model).__name__)
    return model

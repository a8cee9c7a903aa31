"""The mean of a model's weights over the steps of an epoch: where effects are measured, instead of at the last step's.

    w_t   weight after step t of the epoch; running mean m_t = m_{t-1} + (w_t - m_{t-1}) / t

Weights of a training under way move at its full rate, and what one seed brings at the last step is as much that step's
noise as the seed's effect. The mean is near where a fallen rate would end (experiment 0007). Statistics of batch norms
are averaged with the weights: to first order they are the statistics of the mean.

Source: P. Izmailov et al., Averaging weights leads to wider optima and better generalization, UAI 2018.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase

from esper.core.morphable import MorphableModel


class EpochMean:
    """Running mean of weights since the first step noted in an epoch; belongs to the training thread.

    What joins the model later in the epoch is not averaged in that epoch.
    """

    def __init__(self, model: MorphableModel) -> None:
        self._model = model
        self._names: list[str] = []
        self._live: list[Tensor] = []
        self._means: list[Tensor] = []
        self._steps = 0

    @torch.no_grad()
    def note(self) -> None:
        """Take in the weights after a step; the first step of an epoch copies them."""
        self._steps += 1
        if self._steps == 1:
            self._watch(dict(_averaged(self._model)))
            self._means = [one.detach().clone() for one in self._live]
        else:
            torch._foreach_lerp_(self._means, self._live, 1.0 / self._steps)

    def restart(self) -> None:
        """Forget the epoch that is over."""
        self._steps = 0
        self._watch({})
        self._means = []

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Let the model stand at the mean meanwhile; afterwards every bit is as before. Without a step: as it is."""
        if not self._live:
            yield
            return
        before = [one.detach().clone() for one in self._live]
        self._put(self._means)
        try:
            yield
        finally:
            self._put(before)

    def state_dict(self) -> dict[str, Any]:
        """Give the mean by name; empty at the end of an epoch."""
        return {"steps": self._steps, "means": dict(zip(self._names, self._means, strict=True))}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave; the model holds its seeds already."""
        found = dict(_averaged(self._model))
        self._steps = int(state["steps"])
        self._watch({name: found[name] for name in state["means"]})
        self._means = [mean.detach().clone() for mean in state["means"].values()]

    def _watch(self, live: Mapping[str, Tensor]) -> None:
        self._names, self._live = list(live), list(live.values())

    @torch.no_grad()
    def _put(self, values: list[Tensor]) -> None:
        torch._foreach_copy_(self._live, values)


def _averaged(model: MorphableModel) -> Iterator[tuple[str, Tensor]]:
    """Give what is averaged, by name: weights that learn, statistics of norms."""
    yield from ((name, one) for name, one in model.named_parameters() if one.requires_grad)
    for prefix, module in model.named_modules():
        if isinstance(module, _NormBase) and module.running_mean is not None and module.running_var is not None:
            yield f"{prefix}.running_mean", module.running_mean
            yield f"{prefix}.running_var", module.running_var

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

from esper.contracts.run import GrowthPhase
from esper.core.costs import CostMeter
from esper.core.morphable import MorphableModel


class EpochMean:
    """Running mean of weights since the first step noted in an epoch; belongs to the training thread.

    What joins the model later in the epoch is not averaged in that epoch. Means are kept in float32 at least: in a
    short type the small steps of a late mean round away. Costs a copy of the weights, and a pass over them every step.
    """

    def __init__(self, model: MorphableModel, costs: CostMeter | None = None) -> None:
        self._model = model
        self._costs = costs or CostMeter()
        self._names: list[str] = []
        self._live: list[Tensor] = []
        self._means: list[Tensor] = []
        self._steps = 0

    @torch.no_grad()
    def note(self) -> None:
        """Take in the weights after a step; the first step of an epoch copies them."""
        with self._costs.phase(GrowthPhase.EVALUATION):
            self._take_in()

    def _take_in(self) -> None:
        self._steps += 1
        if self._steps == 1:
            self._watch(dict(_averaged(self._model)))
            self._means = [one.detach().to(_mean_dtype(one), copy=True) for one in self._live]
        else:
            values = [one.to(mean.dtype) for one, mean in zip(self._live, self._means, strict=True)]
            torch._foreach_lerp_(self._means, values, 1.0 / self._steps)

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
        """Give the mean by name, of what is still in the model; empty at the end of an epoch."""
        found = dict(_averaged(self._model)) if self._live else {}
        means = zip(self._names, self._live, self._means, strict=True)
        return {"steps": self._steps, "means": {name: mean for name, live, mean in means if found.get(name) is live}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave of what the model has; the model holds its seeds already."""
        found, means = dict(_averaged(self._model)), state["means"]
        live = {name: found[name] for name, mean in means.items() if name in found and found[name].shape == mean.shape}
        self._steps = int(state["steps"])
        self._watch(live)
        self._means = [means[name].detach().to(one.device, _mean_dtype(one), copy=True) for name, one in live.items()]

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


def _mean_dtype(value: Tensor) -> torch.dtype:
    return torch.promote_types(value.dtype, torch.float32)

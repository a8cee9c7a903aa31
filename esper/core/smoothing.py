"""The mean of a model's weights over the steps of an epoch: where effects are measured, instead of at the last step's.

    w_t   weight after step t of the epoch; running mean m_t = m_{t-1} + (w_t - m_{t-1}) / t

Weights of a training under way move at its full rate, and what one seed brings at the last step is as much that step's
noise as the seed's effect. The mean is near where a fallen rate would end (experiment 0007). Statistics of batch norms
are averaged with the weights: to first order they are the statistics of the mean.

Source: P. Izmailov et al., Averaging weights leads to wider optima and better generalization, UAI 2018.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase

from esper.contracts.run import GrowthPhase
from esper.core.costs import CostMeter
from esper.core.morphable import MorphableModel


@dataclass(slots=True)
class _Cohort:
    """What is averaged since the same step."""

    names: list[str]
    live: list[Tensor]
    means: list[Tensor]
    steps: int
    """Steps that the means are over."""

    @classmethod
    def of(cls, live: Mapping[str, Tensor]) -> _Cohort:
        """Begin with one step."""
        copies = [one.detach().to(_mean_dtype(one), copy=True) for one in live.values()]
        return cls(list(live), list(live.values()), copies, 1)

    def take_in(self) -> None:
        """Take in the weights after a step."""
        self.steps += 1
        values = [one.to(mean.dtype) for one, mean in zip(self.live, self.means, strict=True)]
        torch._foreach_lerp_(self.means, values, 1.0 / self.steps)


class EpochMean:
    """Running mean of weights since the first step noted in an epoch; belongs to the training thread.

    What joins the model later in the epoch is averaged since then, where :meth:`welcome` has said so. Means are kept in
    float32 at least: in a short type the small steps of a late mean round away. Costs a copy of the weights, and a pass
    over them every step.
    """

    def __init__(self, model: MorphableModel, costs: CostMeter | None = None) -> None:
        self._model = model
        self._costs = costs or CostMeter()
        self._cohorts: list[_Cohort] = []
        self._has_joiners = True

    def welcome(self) -> None:
        """Average what has joined the model from the next step on."""
        self._has_joiners = True

    @torch.no_grad()
    def note(self) -> None:
        """Take in the weights after a step; the first step of an epoch copies them."""
        with self._costs.phase(GrowthPhase.EVALUATION):
            for cohort in self._cohorts:
                cohort.take_in()
            if self._has_joiners:
                self._has_joiners = False
                self._take_in_joiners()

    def _take_in_joiners(self) -> None:
        known = {id(one) for cohort in self._cohorts for one in cohort.live}
        joined = {name: one for name, one in _averaged(self._model) if id(one) not in known}
        if joined:
            self._cohorts.append(_Cohort.of(joined))

    def restart(self) -> None:
        """Forget the epoch that is over."""
        self._cohorts = []
        self._has_joiners = True

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Let the model stand at the mean meanwhile; afterwards every bit is as before. Without a step: as it is."""
        before = [[one.detach().clone() for one in cohort.live] for cohort in self._cohorts]
        self._put([cohort.means for cohort in self._cohorts])
        try:
            yield
        finally:
            self._put(before)

    def state_dict(self) -> dict[str, Any]:
        """Give the means by name, and how many steps they are over, of what is still in the model."""
        found = dict(_averaged(self._model)) if self._cohorts else {}
        means: dict[str, Tensor] = {}
        steps: dict[str, int] = {}
        for cohort in self._cohorts:
            for name, live, mean in zip(cohort.names, cohort.live, cohort.means, strict=True):
                if found.get(name) is live:
                    means[name], steps[name] = mean, cohort.steps
        return {
            "steps": max(steps.values(), default=0),
            "means": means,
            "steps_of": steps,
            "has_joiners": self._has_joiners,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave of what the model has; the model holds its seeds already."""
        self.restart()
        found, means = dict(_averaged(self._model)), state["means"]
        steps = state.get("steps_of", dict.fromkeys(means, int(state["steps"])))  # earlier versions: one for all
        names = [name for name, mean in means.items() if name in found and found[name].shape == mean.shape]
        for count in sorted({steps[name] for name in names}, reverse=True):
            live = {name: found[name] for name in names if steps[name] == count}
            copies = [means[name].detach().to(one.device, _mean_dtype(one), copy=True) for name, one in live.items()]
            self._cohorts.append(_Cohort(list(live), list(live.values()), copies, count))
        self._has_joiners = bool(state.get("has_joiners", not self._cohorts))

    @torch.no_grad()
    def _put(self, values: Sequence[list[Tensor]]) -> None:
        for cohort, own in zip(self._cohorts, values, strict=True):
            torch._foreach_copy_(cohort.live, own)


def _averaged(model: MorphableModel) -> Iterator[tuple[str, Tensor]]:
    """Give what is averaged, by name: weights that learn, statistics of norms."""
    yield from ((name, one) for name, one in model.named_parameters() if one.requires_grad)
    for prefix, module in model.named_modules():
        if isinstance(module, _NormBase) and module.running_mean is not None and module.running_var is not None:
            yield f"{prefix}.running_mean", module.running_mean
            yield f"{prefix}.running_var", module.running_var


def _mean_dtype(value: Tensor) -> torch.dtype:
    return torch.promote_types(value.dtype, torch.float32)

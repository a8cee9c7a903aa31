"""Grafted seeds in the run's optimizer, with a step size of their own.

A seed's parameters are in a group of its layer (decision 0003), so their step is the group's: its learning rate, decay
and schedule. What a seed takes of that step is its own pace f:

    p <- p' + f (p - p')         p' before the optimizer's step, p after it
    f = rate * tail(t)           t = share of the steps from the graft to the planned end that is over
    tail(t) = 1 for t < 1 - w, then falls as (1 + cos(pi (t - 1 + w) / w)) / 2 to 1 %

For every optimizer whose step is proportional to its learning rate, decay included, that is a learning rate f times the
group's; moments are the optimizer's. A seed that is grafted late has few steps left: without the fall they end in the
noise of a rate that was chosen for the host's whole training (experiment 0002).

Source of the fall: I. Loshchilov, F. Hutter, SGDR: Stochastic gradient descent with warm restarts, arXiv:1608.03983.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from esper.core import optimizers
from esper.core.clock import RunClock
from esper.core.growth import GrowthConfig
from esper.execution.layers.base import KasminaLayer

_LEAST: Final = 0.01


@dataclass(frozen=True, slots=True)
class _Paced:
    """The parameters of one seed in one optimizer."""

    part: Optimizer
    parameters: list[Tensor]
    before: list[Tensor]
    begun_step: int


class SeedPacer:
    """Lets seeds join and leave the run's optimizer, and take their share of its steps; belongs to the training thread.

    With no seed grafted, or at a pace of 1, it does nothing.
    """

    def __init__(self, optimizer: Optimizer, clock: RunClock, growth: GrowthConfig) -> None:
        self._optimizer, self._clock, self._growth = optimizer, clock, growth
        self._paced: dict[tuple[str, int], list[_Paced]] = {}
        self._handles: list[RemovableHandle] = []

    def join(self, layer: KasminaLayer, name: str, seed_index: int) -> None:
        """Add a seed's parameters to groups of its layer.

        Raises:
            InvalidInputError: As :func:`esper.core.optimizers.join`.
        """
        optimizers.join(self._optimizer, layer, layer.seed_parameters(seed_index), layer_name=name)
        self._pace(layer, (name, seed_index), self._clock.step)

    def leave(self, layer: KasminaLayer, name: str, seed_index: int) -> None:
        """Remove a seed's parameters and their state; one that never joined is skipped."""
        rows = self._paced.pop((name, seed_index), [])
        self._watch()
        if layer.find_seed(seed_index) is not None:
            optimizers.leave(self._optimizer, layer.seed_parameters(seed_index))
        elif rows:  # its kernel failed on its way out, and was freed
            optimizers.leave(self._optimizer, [value for row in rows for value in row.parameters])

    def pace(self, begun_step: int) -> float:
        """Give the share of its group's step that a seed grafted at ``begun_step`` takes now, > 0."""
        growth, clock = self._growth, self._clock
        if clock.planned_epochs is None:
            return growth.graft_rate
        planned = clock.planned_epochs * clock.steps_per_epoch
        over = (clock.step - begun_step) / max(1, planned - begun_step)
        return growth.graft_rate * tail_factor(over, growth.graft_tail)

    def state_dict(self) -> dict[str, Any]:
        """Give the step at which each seed joined."""
        return {"begun": [(name, index, rows[0].begun_step) for (name, index), rows in self._paced.items()]}

    def load_state_dict(self, state: Mapping[str, Any], layers: Mapping[str, KasminaLayer]) -> None:
        """Take over what :meth:`state_dict` gave; the seeds stand in the layers and the optimizer already."""
        self.clear()
        for name, index, begun_step in state["begun"]:
            self._pace(layers[name], (name, index), begun_step)

    def clear(self) -> None:
        """Let go of every seed without touching the optimizer's groups; idempotent."""
        self._paced.clear()
        self._watch()

    def _pace(self, layer: KasminaLayer, place: tuple[str, int], begun_step: int) -> None:
        own = {id(parameter): parameter for parameter in layer.seed_parameters(place[1])}
        rows: list[_Paced] = []
        for part in optimizers.parts(self._optimizer):
            held: list[Tensor] = [value for group in part.param_groups for value in group["params"] if id(value) in own]
            rows.append(_Paced(part, held, [torch.empty_like(value) for value in held], begun_step))
        self._paced[place] = rows
        self._watch()

    def _watch(self) -> None:
        """Be called around the optimizer's steps exactly while a seed is paced."""
        if self._paced and not self._handles:
            for part in optimizers.parts(self._optimizer):
                self._handles.append(part.register_step_pre_hook(self._keep))
                self._handles.append(part.register_step_post_hook(self._take))
        elif not self._paced:
            for handle in self._handles:
                handle.remove()
            self._handles.clear()

    @torch.no_grad()
    def _keep(self, part: Optimizer, *_: object) -> None:
        for row in self._of(part):
            torch._foreach_copy_(row.before, row.parameters)

    @torch.no_grad()
    def _take(self, part: Optimizer, *_: object) -> None:
        for row in self._of(part):
            torch._foreach_lerp_(row.parameters, row.before, 1.0 - self.pace(row.begun_step))

    def _of(self, part: Optimizer) -> list[_Paced]:
        rows = (row for rows in self._paced.values() for row in rows)
        return [row for row in rows if row.part is part and row.parameters and self.pace(row.begun_step) != 1.0]


def tail_factor(over: float, tail: float) -> float:
    """Give what is left of a rate when the share ``over`` of its time is over; see the legend. 1 without a tail."""
    if tail == 0.0:
        return 1.0
    fallen = min(1.0, max(0.0, (over - 1.0 + tail) / tail))
    return _LEAST + (1.0 - _LEAST) * 0.5 * (1.0 + math.cos(math.pi * fallen))

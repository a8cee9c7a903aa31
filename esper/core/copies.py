"""Copies of parts of the training state, for a change that may have to be taken back: they are put back to the bit.

What was copied is known again by the object itself, not by its name: a seed that came to where another stood is not
mistaken for it. Names stand for the objects in a checkpoint alone. Belongs to the training thread.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from esper.core import optimizers
from esper.core.capture import cloned
from esper.core.morphable import MorphableModel


class StateCopy:
    """What the optimizer kept of some parameters (moments, counts of steps)."""

    def __init__(self, optimizer: Optimizer, rows: list[tuple[Tensor, dict[str, Any]]]) -> None:
        self._optimizer, self._rows = optimizer, rows

    @classmethod
    def of(cls, optimizer: Optimizer, group: int | None) -> StateCopy:
        """Copy what is kept of the parameters of a group, or of all."""
        pairs = optimizers.chosen(optimizer, group)
        rows = [(value, cloned(part.state.get(value, {}))) for part, own in pairs for value in own["params"]]
        return cls(optimizer, rows)

    def put_back(self, group: int | None) -> None:
        """Let it be kept again of those in the group that were copied; who came since keeps its own."""
        held = {id(parameter): saved for parameter, saved in self._rows}
        for part, own in optimizers.chosen(self._optimizer, group):
            for parameter in own["params"]:
                if held.get(id(parameter)):
                    part.state[parameter] = cloned(held[id(parameter)])
                elif id(parameter) in held:  # it had not taken a step yet
                    part.state.pop(parameter, None)
        for part in optimizers.parts(self._optimizer):
            optimizers.await_momentum(part)

    def state_dict(self, model: nn.Module) -> dict[str, Any]:
        """Give it by the parameters' names, of those that are in the model still."""
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        return {names[id(value)]: saved for value, saved in self._rows if id(value) in names}

    @classmethod
    def from_state(cls, optimizer: Optimizer, model: nn.Module, state: Mapping[str, Any]) -> StateCopy:
        """Take over what :meth:`state_dict` gave; model and optimizer are those of the same moment already.

        Raises:
            KeyError: It names a parameter that the model lacks.
        """
        parameters = dict(model.named_parameters())
        groups = {id(value): own for _, own in optimizers.chosen(optimizer, None) for value in own["params"]}
        rows: list[tuple[Tensor, dict[str, Any]]] = []
        for name, saved in state.items():
            parameter = parameters[name]
            own = groups.get(id(parameter), {})
            rows.append((parameter, {key: _at_home(key, item, parameter, own) for key, item in saved.items()}))
        return cls(optimizer, rows)


class WeightCopy:
    """The weights that the optimizer moves, and the model's buffers beside them.

    Seeds that learn alone have no part in it: they have an optimizer of their own, and go on. No operator of a
    blueprint has buffers.
    """

    def __init__(self, optimizer: Optimizer, model: MorphableModel) -> None:
        self._optimizer, self._model = optimizer, model
        self._moved = self._parameters()
        self._values = {name: value.detach().clone() for name, value in self._named()}

    @property
    def fits(self) -> bool:
        """Whether the network is the one that was copied: no seed has joined or left the optimizer since."""
        if {id(value) for value in self._moved} != {id(value) for value in self._parameters()}:
            return False
        shapes = {name: value.shape for name, value in self._values.items()}
        return shapes == {name: value.shape for name, value in self._named()}

    @torch.no_grad()
    def put_back(self) -> None:
        """Let every weight and buffer be as it was. REQUIRES: :attr:`fits`."""
        assert self.fits
        for name, value in self._named():
            value.copy_(self._values[name])

    def state_dict(self) -> dict[str, Tensor] | None:
        """Give it by name; ``None`` when it cannot fit again, for what was copied has left the optimizer."""
        present = {id(value) for value in self._parameters()}
        return self._values if all(id(value) in present for value in self._moved) else None

    @classmethod
    def from_state(cls, optimizer: Optimizer, model: MorphableModel, state: Mapping[str, Tensor]) -> WeightCopy:
        """Take over what :meth:`state_dict` gave; model and optimizer are those of the same moment already.

        Raises:
            KeyError: It names what the optimizer and the model lack.
        """
        made = cls(optimizer, model)
        made._moved = [value for name, value in model.named_parameters() if name in state]
        made._values = {name: saved.to(made._values[name].device, copy=True) for name, saved in state.items()}
        return made

    def _parameters(self) -> list[Tensor]:
        return [value for _, own in optimizers.chosen(self._optimizer, None) for value in own["params"]]

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        """Give what is copied, by name: the optimizer's parameters, and buffers that belong to the model's state."""
        moved = {id(value) for value in self._parameters()}
        yield from ((name, value) for name, value in self._model.named_parameters() if id(value) in moved)
        for prefix, module in self._model.named_modules():
            for name, buffer in module.named_buffers(prefix, recurse=False):
                if name.rpartition(".")[2] not in module._non_persistent_buffers_set:  # alphas go on
                    yield name, buffer


def _at_home(key: str, item: Any, parameter: Tensor, group: Mapping[str, Any]) -> Any:
    """Give a value where torch keeps it: beside its parameter, but for the count of steps of a loop on the host."""
    if not isinstance(item, Tensor) or (key == "step" and not (group.get("fused") or group.get("capturable"))):
        return cloned(item)
    return item.to(parameter.device, copy=True)

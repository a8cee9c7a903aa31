"""Surgery on live optimizers: parameters of seeds join and leave; the state of all others is untouched to the bit.

A seed's parameters join the *group of the layer they stand in*, so that learning rate, weight decay and any LR
scheduler (which is tied to the number of groups) reach them like the layer's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from esper.contracts.errors import InvalidInputError


def group_of(optimizer: Optimizer, layer: nn.Module) -> int:
    """Give the index of the group that holds the layer's own parameters; 0 when none of them is optimized."""
    own = {id(parameter) for parameter in layer.parameters(recurse=False)}
    for index, group in enumerate(optimizer.param_groups):
        if any(id(parameter) in own for parameter in group["params"]):
            return index
    return 0


def join(optimizer: Optimizer, parameters: Iterable[nn.Parameter], group_index: int) -> None:
    """Add parameters to a group; their state starts as a fresh parameter's does.

    Raises:
        InvalidInputError: A parameter is in the optimizer already, or the group does not exist.
    """
    if not 0 <= group_index < len(optimizer.param_groups):
        raise InvalidInputError.of("group_index", f"lie in [0, {len(optimizer.param_groups)})", group_index)
    present = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    added = list(parameters)
    if any(id(parameter) in present for parameter in added):
        raise InvalidInputError.of("parameters", "be new to the optimizer", f"{len(added)} parameters, some present")
    optimizer.param_groups[group_index]["params"].extend(added)


def leave(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Remove parameters and their state; those that never joined are skipped."""
    gone = {id(parameter): parameter for parameter in parameters}
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in gone]
    for parameter in gone.values():
        optimizer.state.pop(parameter, None)


def carry_state(source: Optimizer, target: Optimizer, parameters: Sequence[nn.Parameter]) -> None:
    """Copy the running moments of ``parameters`` between two optimizers of the same class; else start afresh."""
    if type(source) is not type(target):
        return
    for parameter in parameters:
        state = source.state.get(parameter)
        if state:
            target.state[parameter] = {key: _copied(value) for key, value in state.items()}


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value

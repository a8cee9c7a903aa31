"""The whole training state as plain data with tensors: captured, and put back bit for bit.

Components: ``tolaria`` (counters, optimizer, tracked objects, random streams), ``kasmina`` (model with its grown
structure, seed states), ``orchestrator`` (adaptations, budget, what is under way).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim import Optimizer

from esper.contracts.errors import CorruptDataError, EsperError, InvalidInputError
from esper.core.morphable import MorphableModel

TrainingState = dict[str, dict[str, Any]]
"""Component name to nested plain data with tensors."""


class Stateful(Protocol):
    """A scheduler, gradient scaler, EMA or anything else with a state of its own."""

    def state_dict(self) -> dict[str, Any]:
        """Give the state."""

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any:
        """Take a state over."""


def cloned(value: Any) -> Any:
    """Give a copy of nested plain data whose tensors share no memory with the original."""
    match value:
        case torch.Tensor():
            return value.detach().clone()
        case Mapping():
            return {key: cloned(item) for key, item in value.items()}
        case list():
            return [cloned(item) for item in value]
        case tuple():
            return tuple(cloned(item) for item in value)
    return value


def capture_optimizer(optimizer: Optimizer, model: nn.Module) -> dict[str, Any]:
    """Give the optimizer's state, with the name of every parameter in every group.

    Raises:
        InvalidInputError: A parameter is not one of the model's.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups: list[list[str]] = []
    for index, group in enumerate(optimizer.param_groups):
        unknown = sum(id(parameter) not in names for parameter in group["params"])
        if unknown:
            raise InvalidInputError.of(f"optimizer.param_groups[{index}]", "hold the model's parameters", unknown)
        groups.append([names[id(parameter)] for parameter in group["params"]])
    return {"names": groups, "state": optimizer.state_dict()}


def restore_optimizer(optimizer: Optimizer, model: nn.Module, captured: Mapping[str, Any]) -> None:
    """Put groups, their order and their state back.

    Raises:
        CorruptDataError: A group or parameter named there is not in the optimizer or model.
    """
    parameters = dict(model.named_parameters())
    if len(captured["names"]) != len(optimizer.param_groups):
        raise CorruptDataError(
            f"optimizer must have {len(captured['names'])} groups, got {len(optimizer.param_groups)}",
            parameter="optimizer",
        )
    missing = [name for names in captured["names"] for name in names if name not in parameters]
    if missing:
        raise CorruptDataError(f"model must have parameter {missing[0]!r} ({len(missing)} are missing)")
    optimizer.state.clear()
    for group, names in zip(optimizer.param_groups, captured["names"], strict=True):
        group["params"] = [parameters[name] for name in names]
    with fitting("optimizer"):
        optimizer.load_state_dict(cloned(captured["state"]))


@contextmanager
def fitting(what: str) -> Iterator[None]:
    """Turn what torch raises when a state does not fit into the error tree.

    Raises:
        CorruptDataError: The state does not fit.
    """
    try:
        yield
    except EsperError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        message = f"state must fit this run's {what}, got {type(error).__name__}: {error}"
        raise CorruptDataError(message, parameter=what) from error


def capture_model(model: MorphableModel) -> dict[str, Any]:
    """Give the model's state with its grown structure, and the native seed states."""
    snapshot = torch.frombuffer(bytearray(model.seed_states.snapshot()), dtype=torch.uint8)
    return {"model": dict(model.state_dict()), "seed_states": snapshot, "seed_step": model.seed_states.step}


def restore_model(model: MorphableModel, captured: Mapping[str, Any]) -> None:
    """Rebuild the grown structure and load every value.

    Raises:
        EsperError: The state does not fit the model, or is corrupt.
    """
    with fitting("model"):
        model.load_state_dict(captured["model"])
    model.seed_states.restore(bytes(captured["seed_states"].numpy().tobytes()))
    model.seed_states.step = captured["seed_step"]
    for layer in model.kasmina_layers.values():
        layer.refresh_terms()

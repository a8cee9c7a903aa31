"""The whole training state as plain data with tensors: captured, and put back bit for bit.

Components: ``tolaria`` (counters, optimizer, tracked objects, random streams), ``kasmina`` (model with its grown
structure, seed states), ``orchestrator`` (adaptations, budget, what is under way).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim import Optimizer

from esper.contracts.errors import CorruptDataError, EsperError, InvalidInputError
from esper.core import optimizers
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
        case Counter():  # MultiStepLR's milestones
            return Counter(value)
        case Mapping():
            return {key: cloned(item) for key, item in value.items()}
        case list():
            return [cloned(item) for item in value]
        case tuple():
            return tuple(cloned(item) for item in value)
    return value


def capture_optimizer(optimizer: Optimizer, model: nn.Module) -> dict[str, Any]:
    """Give the state of the optimizer, or of each that a wrapper holds, with the names of every group's parameters.

    Raises:
        InvalidInputError: A parameter is not one of the model's.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {"parts": [_capture_part(part, names) for part in optimizers.parts(optimizer)]}


def _capture_part(part: Optimizer, names: Mapping[int, str]) -> dict[str, Any]:
    groups: list[list[str]] = []
    for index, group in enumerate(part.param_groups):
        unknown = sum(id(parameter) not in names for parameter in group["params"])
        if unknown:
            raise InvalidInputError.of(f"optimizer.param_groups[{index}]", "hold the model's parameters", unknown)
        groups.append([names[id(parameter)] for parameter in group["params"]])
    return {"class": type(part).__name__, "names": groups, "state": part.state_dict()}


def restore_optimizer(optimizer: Optimizer, model: nn.Module, captured: Mapping[str, Any]) -> None:
    """Put groups, their order and their state back; the groups stay the objects they are.

    Every part is checked before any is changed.

    Raises:
        CorruptDataError: Class, number of groups or a parameter named there is not the optimizer's or model's.
    """
    parameters = dict(model.named_parameters())
    parts = optimizers.parts(optimizer)
    with fitting("optimizer"):
        if len(captured["parts"]) != len(parts):
            raise _misfit(f"hold {len(captured['parts'])} optimizers", len(parts))
        for part, saved in zip(parts, captured["parts"], strict=True):
            _check_part(part, saved, parameters)
        for part, saved in zip(parts, captured["parts"], strict=True):
            _restore_part(part, saved, parameters)
        optimizers.refresh_mirror(optimizer)


def _check_part(part: Optimizer, saved: Mapping[str, Any], parameters: Mapping[str, nn.Parameter]) -> None:
    if saved["class"] != type(part).__name__:
        raise _misfit(f"be {saved['class']} as saved", type(part).__name__)
    if len(saved["names"]) != len(part.param_groups):
        raise _misfit(f"have {len(saved['names'])} groups", len(part.param_groups))
    missing = [name for names in saved["names"] for name in names if name not in parameters]
    if missing:
        raise CorruptDataError(f"model must have parameter {missing[0]!r} ({len(missing)} are missing)")
    sizes = [len(group["params"]) for group in saved["state"]["param_groups"]]
    if sizes != [len(names) for names in saved["names"]]:
        raise _misfit(f"name {sizes} parameters in its groups", [len(names) for names in saved["names"]])
    for number, (own, other) in enumerate(zip(part.param_groups, saved["state"]["param_groups"], strict=True)):
        for key in own.keys() & other.keys() - {"params"}:
            if own[key] is not None and other[key] is not None and _kind(own[key]) != _kind(other[key]):
                raise _misfit(f"have {_kind(own[key])} for {key!r} in group {number}", _kind(other[key]))


def _restore_part(part: Optimizer, saved: Mapping[str, Any], parameters: Mapping[str, nn.Parameter]) -> None:
    groups = list(part.param_groups)
    part.state.clear()
    for group, names in zip(groups, saved["names"], strict=True):
        group["params"][:] = [parameters[name] for name in names]
    part.load_state_dict(cloned(saved["state"]))
    for group, loaded in zip(groups, list(part.param_groups), strict=True):
        # torch puts new dictionaries in; wrappers, schedulers and users hold on to the old ones.
        params = group["params"]
        group.clear()
        group.update({**loaded, "params": params})
    part.param_groups[:] = groups
    optimizers.await_momentum(part)


def _kind(value: object) -> str:
    return "a number" if isinstance(value, int | float | torch.Tensor) else type(value).__name__


def _misfit(rule: str, received: object) -> CorruptDataError:
    return CorruptDataError(f"optimizer must {rule}, got {received}", parameter="optimizer")


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
        if type(captured["seed_step"]) is not int:
            raise CorruptDataError(f"seed_step must be int, got {type(captured['seed_step']).__name__}")
        model.load_state_dict(captured["model"])
        model.seed_states.restore(bytes(captured["seed_states"].numpy().tobytes()))
    model.seed_states.step = captured["seed_step"]
    for layer in model.kasmina_layers.values():
        layer.refresh_terms()

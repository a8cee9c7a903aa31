"""Surgery on live optimizers: parameters of seeds join and leave; the state of all others is untouched to the bit.

A seed's parameters join a *group of the layer they stand in*, so that learning rate, weight decay, clipping per group
and any LR scheduler (which is tied to the number of groups) reach them like the layer's own. Where the layer's weight
and bias are in different groups, matrices follow the weight and vectors the bias. No group is ever added or taken away.

Inside its group a seed stands where ``model.parameters()`` has it: behind its layer's own. So the ``state_dict`` of an
optimizer goes into one that is made afresh over the grown model.

A wrapper that holds several optimizers (an attribute ``optimizers``, or ``optimizer`` for one) is reached through.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import nn
from torch.optim import SGD, Adagrad, Muon, Optimizer, SparseAdam

from esper.contracts.errors import InvalidInputError

Group = dict[str, Any]
"""One of an optimizer's ``param_groups``."""

_NO_CLOSURE: Final = (
    "take its step without a closure: a closure runs the loss several times a step (LBFGS), and every run would be "
    "seen as a step of the seeds. Use SGD, Adam(W), RMSprop, Adagrad, Muon ..."
)


def parts(optimizer: Optimizer) -> tuple[Optimizer, ...]:
    """Give the optimizers that hold state: the optimizer itself, or those that a wrapper holds, in its order."""
    held = getattr(optimizer, "optimizers", None)
    if isinstance(held, Mapping):
        held = list(held.values())
    if isinstance(held, Sequence) and held:
        return tuple(part for inner in held for part in parts(inner))
    inner = getattr(optimizer, "optimizer", None)
    if inner is not None and inner is not optimizer and hasattr(inner, "param_groups"):
        return parts(inner)
    return (optimizer,)


def groups(optimizer: Optimizer) -> list[Group]:
    """Give the groups of all parts, in order."""
    return [group for part in parts(optimizer) for group in part.param_groups]


def chosen(optimizer: Optimizer, group: int | None) -> list[tuple[Optimizer, Group]]:
    """Give one of the groups, by its place in :func:`groups`, or all for ``None``; each with the part that holds it."""
    pairs = [(part, own) for part in parts(optimizer) for own in part.param_groups]
    return pairs if group is None else [pairs[group]]


def reset_state(optimizer: Optimizer, group: int | None) -> None:
    """Begin anew what is kept of each parameter of a group, or of all: the next step is a fresh optimizer's first.

    What an optimizer of other makers keeps in the group itself (an estimate of the rate, say) is a setting and stays.
    """
    for part, own in chosen(optimizer, group):
        for parameter in own["params"]:
            part.state.pop(parameter, None)
            _begin_state(part, own, parameter)


def require_supported(optimizer: Optimizer) -> None:
    """Check that seeds can join and leave the optimizer, and that a session can step it.

    Raises:
        InvalidInputError: It is no optimizer, needs a closure, or takes sparse gradients only.
    """
    for part in parts(optimizer):
        if not isinstance(part, Optimizer):
            raise InvalidInputError.of("optimizer", "be a torch.optim.Optimizer, or hold some", type(part).__name__)
        closure = inspect.signature(type(part).step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise InvalidInputError.of("optimizer", _NO_CLOSURE, type(part).__name__)
        if isinstance(part, SparseAdam):
            raise InvalidInputError.of("optimizer", "take dense gradients, for those of seeds are", type(part).__name__)


def check_fit(optimizer: Optimizer, layer: nn.Module, parameters: Iterable[nn.Parameter], layer_name: str = "") -> None:
    """Check that :func:`join` would find a group for every parameter; changes nothing.

    Raises:
        InvalidInputError: No group takes one of them; the message names it and the optimizer.
    """
    names = _names(layer, layer_name)
    for parameter in parameters:
        _place(optimizer, layer, parameter, names)


def join(optimizer: Optimizer, layer: nn.Module, parameters: Iterable[nn.Parameter], layer_name: str = "") -> None:
    """Add a seed's parameters to groups of its layer; their state starts as a fresh parameter's does. All or none.

    ``layer_name`` is the layer's dotted name in the model: for messages, and for optimizers made with names.

    Raises:
        InvalidInputError: A parameter is in the optimizer already, or no group takes it.
    """
    added, names = list(parameters), _names(layer, layer_name)
    present = {id(parameter) for group in groups(optimizer) for parameter in group["params"]}
    if any(id(parameter) in present for parameter in added):
        raise InvalidInputError.of("parameters", "be new to the optimizer", f"{len(added)} parameters, some present")
    order = {id(parameter): number for number, parameter in enumerate(layer.parameters())}
    places = [_place(optimizer, layer, parameter, names) for parameter in added]
    for parameter, (part, group) in zip(added, places, strict=True):
        _insert(group, parameter, order, names)
        _begin_state(part, group, parameter)
    refresh_mirror(optimizer)


def leave(optimizer: Optimizer, parameters: Iterable[torch.Tensor]) -> None:
    """Remove parameters and their state; those that never joined are skipped."""
    gone = {id(parameter): parameter for parameter in parameters}
    for group in groups(optimizer):
        kept = [number for number, parameter in enumerate(group["params"]) if id(parameter) not in gone]
        for column in ("params", "param_names"):
            if column in group:
                group[column][:] = [group[column][number] for number in kept]
    for part in parts(optimizer):
        for parameter in gone.values():
            part.state.pop(parameter, None)
        if isinstance(part, SGD):
            _LateMomentum.of(part).close_if_done(part)
    refresh_mirror(optimizer)


def refresh_mirror(optimizer: Optimizer) -> None:
    """Bring the groups that a wrapper keeps beside those of its parts to the same parameters; else change nothing.

    A scaler or a clipper that is given the wrapper reads them.
    """
    inner, mirror = groups(optimizer), getattr(optimizer, "param_groups", None)
    lists = {id(group["params"]) for group in inner}
    if mirror is None or any(id(group["params"]) in lists for group in mirror):
        return
    held = {id(parameter) for group in inner for parameter in group["params"]}
    for group in mirror:
        group["params"][:] = [parameter for parameter in group["params"] if id(parameter) in held]
    known = {id(parameter): group for group in mirror for parameter in group["params"]}
    for group in inner:
        nearest = next((known[id(p)] for p in group["params"] if id(p) in known), mirror[0])
        nearest["params"].extend(p for p in group["params"] if id(p) not in known)


def _place(
    optimizer: Optimizer, layer: nn.Module, parameter: nn.Parameter, names: Mapping[int, str]
) -> tuple[Optimizer, Group]:
    """Choose the group of a seed's parameter: of its layer and its rank, of its layer, of its rank, the first."""
    own = {id(value) for value in layer.parameters()}
    pairs = [(part, group) for part in parts(optimizer) for group in part.param_groups]
    found = []
    for number, (part, group) in enumerate(pairs):
        if _takes(part, group, parameter):
            near = [value for value in group["params"] if id(value) in own]
            same_rank = any(_is_matrix(value) is _is_matrix(parameter) for value in near or group["params"])
            found.append(((not near, not same_rank, number), part, group))
    if not found:
        kinds = ", ".join(type(part).__name__ for part in parts(optimizer))
        rule = (
            f"fit a group of the optimizer ({kinds} takes 2-D parameters only: give it to a wrapper with AdamW beside)"
        )
        name = names.get(id(parameter), "of the seed")
        raise InvalidInputError.of(f"parameter {name}", rule, tuple(parameter.shape))
    _, part, group = min(found, key=lambda item: item[0])
    return part, group


def _takes(part: Optimizer, group: Group, parameter: nn.Parameter) -> bool:
    """Whether a group may hold the parameter: those of Muon and its kin orthogonalise matrices, and nothing else."""
    if isinstance(part, Muon):
        return parameter.ndim == 2
    is_kin = group.get("use_muon", "muon" in type(part).__name__.lower() and "use_muon" not in group)
    return _is_matrix(parameter) or not is_kin


def _is_matrix(parameter: torch.Tensor) -> bool:
    return parameter.ndim >= 2


def _insert(group: Group, parameter: nn.Parameter, order: Mapping[int, int], names: Mapping[int, str]) -> None:
    """Put the parameter behind those of its layer that come before it, or before those that come after it."""
    rank = order.get(id(parameter), len(order))
    ranks = [order.get(id(value)) for value in group["params"]]
    before = [at + 1 for at, found in enumerate(ranks) if found is not None and found < rank]
    after = [at for at, found in enumerate(ranks) if found is not None and found > rank]
    at = before[-1] if before else after[0] if after else len(ranks)
    group["params"].insert(at, parameter)
    if "param_names" in group:
        group["param_names"].insert(at, names.get(id(parameter), "seed"))


def _begin_state(part: Optimizer, group: Group, parameter: nn.Parameter) -> None:
    """Make the state that a parameter lacks which was not there when the optimizer was made, or took its first step."""
    if isinstance(part, Adagrad):  # makes its state when it is made
        donor = Adagrad([parameter], **{name: group[name] for name in Adagrad([parameter]).defaults})
        part.state[parameter] = donor.state[parameter]
    elif isinstance(part, SGD) and group["fused"] and group["momentum"]:
        _LateMomentum.of(part).waiting.append((group, parameter))


def await_momentum(part: Optimizer) -> None:
    """See to it that parameters without momentum yet get theirs; for an optimizer whose state has just been loaded."""
    for group in part.param_groups if isinstance(part, SGD) else ():
        for parameter in group["params"] if group["fused"] and group["momentum"] else ():
            if _momentum(part, parameter) is None:
                _LateMomentum.of(part).waiting.append((group, parameter))


class _LateMomentum:
    """Gives parameters of fused SGD their momentum when their first gradient comes later than their group's first.

    The fused kernel takes momentum from all parameters with a gradient, or from none; zeros give what a first step
    gives, but that it is dampened where the group has dampening. Runs before each step, and has nothing to do once
    nobody waits; torch lets no hook leave while hooks run, so it goes with the next surgery.
    """

    def __init__(self, part: Optimizer) -> None:
        self.waiting: list[tuple[Group, nn.Parameter]] = []
        self._handle = part.register_step_pre_hook(self)

    @classmethod
    def of(cls, part: Optimizer) -> _LateMomentum:
        """Give the one of this optimizer, which is made where there is none."""
        found = (hook for hook in part._optimizer_step_pre_hooks.values() if isinstance(hook, cls))
        return next(found, None) or cls(part)

    def __call__(self, part: Optimizer, *_: Any) -> None:
        if self.waiting:
            self.waiting = [(group, value) for group, value in self.waiting if not self._is_done(part, group, value)]

    def close_if_done(self, part: Optimizer) -> None:
        """Leave the optimizer where nobody waits; who is in it no longer does not."""
        self(part)
        if not self.waiting:
            self._handle.remove()

    @staticmethod
    def _is_done(part: Optimizer, group: Group, parameter: nn.Parameter) -> bool:
        if all(value is not parameter for value in group["params"]):
            return True
        if _momentum(part, parameter) is not None:
            return True
        is_due = parameter.grad is not None and any(_momentum(part, other) is not None for other in group["params"])
        if is_due:
            part.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return is_due


def _momentum(part: Optimizer, parameter: nn.Parameter) -> torch.Tensor | None:
    found: torch.Tensor | None = part.state.get(parameter, {}).get("momentum_buffer")
    return found


def _names(layer: nn.Module, layer_name: str) -> dict[int, str]:
    prefix = f"{layer_name}." if layer_name else ""
    return {id(parameter): f"{prefix}{name}" for name, parameter in layer.named_parameters()}

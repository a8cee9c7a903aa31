"""Wrapping a model: its layers come to hold seeds, in place, and nothing else changes; and the way back."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Final

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from esper.contracts.errors import InvalidInputError, InvalidStateError, UnsupportedLayerError, UnwrappableModelError
from esper.core.morphable import MorphableModel
from esper.execution._native import SignalRing
from esper.execution.layers import (
    DEFAULT_TELEMETRY_INTERVAL_STEPS,
    KasminaLayer,
    LayerRecord,
    kasmina_class_of,
    require_kasmina_class,
    supported_classes,
    supported_names,
)
from esper.execution.layers.pulse import Pulse
from esper.execution.layers.record import NestedPathGuard
from esper.execution.layers.skips import SkipInputs
from esper.execution.state import LayerStateLayout, SeedStates
from esper.telemetry.client import OonaClient

Patterns = str | Sequence[str] | None
"""Name patterns as the shell has them (``encoder.*``); one or several."""

_MAX_SEEDS_PER_LAYER: Final = 64
_FIRST: Final = {
    nn.DataParallel: "it copies layers in every step, so seeds would be lost: use DistributedDataParallel",
    nn.parallel.DistributedDataParallel: "wrap the model first, then give it to DistributedDataParallel",
    torch.jit.ScriptModule: "a scripted module's layers are no Python objects: wrap the model before scripting",
}


class SkippedLayersWarning(UserWarning):
    """Some layers cannot hold seeds and stayed as they were."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerTelemetry:
    """How layers measure themselves."""

    interval_steps: int = DEFAULT_TELEMETRY_INTERVAL_STEPS
    """A layer measures its first forward pass and then one in every so many-th pass of the model."""
    ring_capacity: int = 1 << 16
    """Signals that wait for the publisher before further ones are dropped and counted; 56 bytes each."""

    def __post_init__(self) -> None:
        for name, unit, value in (
            ("interval_steps", "step", self.interval_steps),
            ("ring_capacity", "signal", self.ring_capacity),
        ):
            if type(value) is not int or not 1 <= value <= 1 << 24:
                raise InvalidInputError.of(f"telemetry.{name}", f"be 1 {unit} to 2**24", value)


@dataclass
class _Choice:
    """What a look through the model's modules found."""

    eligible: dict[str, nn.Module] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def wrap(
    model: nn.Module,
    *,
    target_layers: Iterable[type[nn.Module]] | None = None,
    seeds_per_layer: int = 4,
    include: Patterns = None,
    exclude: Patterns = None,
    min_params: int = 0,
    telemetry: bool | LayerTelemetry = True,
    run_id: str | None = None,
) -> MorphableModel:
    """Let the model's layers hold seeds, by swapping their classes in place, and give the model that grows.

    Parameters, names, ``state_dict`` keys, hooks and optimizers stay the very same objects; outputs and gradients are
    unchanged to the bit. A module that stands at several places is one layer, named after the first.

    Args:
        model: The host; it is changed in place.
        target_layers: Classes of layers to use; every registered kind by default.
        seeds_per_layer: Seeds of each layer, 1 to 64.
        include: Use only layers whose dotted name matches one of these patterns.
        exclude: Leave out layers whose dotted name matches one of these.
        min_params: Leave out layers with fewer parameters of their own.
        telemetry: Whether layers measure a sample of their forward passes, or how.
        run_id: Name of the run on the bus; one is made up by default.

    Raises:
        InvalidInputError: A number or pattern breaks its rule.
        UnsupportedLayerError: A target class, or a layer that ``include`` names in full, cannot hold seeds.
        UnwrappableModelError: The model is wrapped already, is of a kind that cannot be, or has no eligible layer.

    Warns:
        SkippedLayersWarning: Once, naming layers with parameters that cannot hold seeds.
    """
    _check_numbers(seeds_per_layer, min_params)
    _check_model(model)
    targets = _targets(target_layers)
    choice = _choose(model, targets, _patterns(include, "include"), _patterns(exclude, "exclude"), min_params)
    if not choice.eligible:
        raise UnwrappableModelError(_nothing_eligible(model, choice), parameter="model")
    if choice.skipped:
        shown = "; ".join(f"{name}: {why}" for name, why in list(choice.skipped.items())[:8])
        more = f" and {len(choice.skipped) - 8} more" if len(choice.skipped) > 8 else ""
        message = f"layers that cannot hold seeds were left alone: {shown}{more}"
        warnings.warn(message, SkippedLayersWarning, stacklevel=2)
    settings = LayerTelemetry() if telemetry is True else telemetry
    return _build(model, choice.eligible, seeds_per_layer, settings or None, run_id)


def _build(
    model: nn.Module,
    eligible: Mapping[str, nn.Module],
    seeds_per_layer: int,
    telemetry: LayerTelemetry | None,
    run_id: str | None,
) -> MorphableModel:
    ring = SignalRing(telemetry.ring_capacity) if telemetry else None
    client = OonaClient(run_id, ring) if ring is not None else None
    interval_steps = telemetry.interval_steps if telemetry else DEFAULT_TELEMETRY_INTERVAL_STEPS
    states, pulse = SeedStates(len(eligible) * seeds_per_layer), Pulse(interval_steps)
    layers: dict[str, KasminaLayer] = {}
    skips = SkipInputs(model, layers)
    for number, (name, module) in enumerate(eligible.items()):
        layout = LayerStateLayout(states, name, number * seeds_per_layer, seeds_per_layer)
        record = LayerRecord(layout, layer_id=number, pulse=pulse, skips=skips)
        if client is not None:
            record.client, record.ring = client, ring
            record.switch_telemetry(True)
            record.layer_id = client.register_layer(name)
        layers[name] = _swap(module, record)
    _guard_encoders(model)
    return MorphableModel(model, layers, states, client, pulse)


def _guard_encoders(model: nn.Module) -> None:
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder):
            inside = [module for module in encoder.modules() if isinstance(module, KasminaLayer)]
            guard = NestedPathGuard(encoder, inside)
            for layer in inside:
                layer._kasmina.guards = (*layer._kasmina.guards, guard)


def unwrap(model: MorphableModel) -> nn.Module:
    """Give back the model that was wrapped: the very same modules, of their own classes again.

    The wrapper must not be used afterwards. Its bus client, if it was connected, is the caller's to close.

    Raises:
        InvalidInputError: Not a wrapped model.
        InvalidStateError: A kernel stands somewhere, a layer's class has changed since (parametrisations,
            ``fully_shard``), or the model was unwrapped before.
    """
    if not isinstance(model, MorphableModel):
        raise InvalidInputError.of("model", "be what wrap() gave", type(model).__name__)
    if any("_kasmina" not in vars(layer) for layer in model.kasmina_layers.values()):
        raise InvalidStateError("model must be wrapped, got one that was unwrapped before")
    model.require_dormant()
    model.require_own_classes()
    for layer in model.kasmina_layers.values():
        layer.set_terms(())
        layer.remove_forward()
        host_class = type(layer).host_class
        del layer.__dict__["_kasmina"]
        layer.__class__ = host_class  # type: ignore[assignment]
    return model.host_module


def _swap(module: nn.Module, record: LayerRecord) -> KasminaLayer:
    kasmina_class = require_kasmina_class(type(module))
    object.__setattr__(module, "_kasmina", record)
    module.__class__ = kasmina_class
    assert isinstance(module, KasminaLayer)
    record.state_layout.attach_owner(module)
    module.refresh_forward()
    return module


def _check_numbers(seeds_per_layer: int, min_params: int) -> None:
    if type(seeds_per_layer) is not int or not 1 <= seeds_per_layer <= _MAX_SEEDS_PER_LAYER:
        raise InvalidInputError.of("seeds_per_layer", f"be 1 to {_MAX_SEEDS_PER_LAYER} seeds", seeds_per_layer)
    if type(min_params) is not int or min_params < 0:
        raise InvalidInputError.of("min_params", "be at least 0 parameters", min_params)


def _check_model(model: nn.Module) -> None:
    candidate: object = model
    if not isinstance(candidate, nn.Module):
        raise UnwrappableModelError(f"model must be a torch.nn.Module, got {type(model).__name__}", parameter="model")
    if isinstance(model, torch._dynamo.eval_frame.OptimizedModule):
        raise UnwrappableModelError("model must be wrapped first, then compiled, got a compiled one", parameter="model")
    for name, module in model.named_modules():
        if isinstance(module, KasminaLayer | MorphableModel):
            where = f" (layer {name!r})" if name else ""
            raise UnwrappableModelError(f"model must be wrapped once, got one that is wrapped already{where}")
        for kind, why in _FIRST.items():
            if isinstance(module, kind):
                raise UnwrappableModelError(f"model must not hold a {kind.__name__}: {why}", parameter="model")


def _targets(target_layers: Iterable[type[nn.Module]] | None) -> tuple[type[nn.Module], ...]:
    if target_layers is None:
        return supported_classes()
    found = tuple(target_layers)
    if not found:
        raise InvalidInputError.of("target_layers", "name at least one class", found)
    for cls in found:
        require_kasmina_class(cls)
    return found


def _patterns(patterns: Patterns, parameter: str) -> tuple[str, ...] | None:
    if patterns is None:
        return None
    found = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    if not found or any(type(pattern) is not str or not pattern for pattern in found):
        raise InvalidInputError.of(parameter, "be one or more name patterns", patterns)
    return found


def _choose(
    model: nn.Module,
    targets: tuple[type[nn.Module], ...],
    include: tuple[str, ...] | None,
    exclude: tuple[str, ...] | None,
    min_params: int,
) -> _Choice:
    choice = _Choice()
    watched = (nn.Module,) if targets == supported_classes() else targets
    inside_fused: set[int] = set()
    for name, module in model.named_modules():
        if not name or id(module) in inside_fused:
            continue
        if isinstance(module, nn.MultiheadAttention) or _is_quantised(module):
            # What is inside is never called: attention and packed layers read its weights themselves.
            inside_fused.update(id(child) for child in module.modules() if child is not module)
        if include is not None and not any(fnmatchcase(name, pattern) for pattern in include):
            continue
        if exclude is not None and any(fnmatchcase(name, pattern) for pattern in exclude):
            continue
        why = _why_not(module, targets, watched)
        if why is None:
            if sum(value.numel() for value in module.parameters()) >= min_params:
                choice.eligible[name] = module
        elif why:
            if include is not None and name in include:
                raise UnsupportedLayerError(
                    f"layer {name!r} must be one of {', '.join(supported_names())}, got {why}", parameter="include"
                )
            choice.skipped[name] = why
    return choice


def _why_not(
    module: nn.Module, targets: tuple[type[nn.Module], ...], watched: tuple[type[nn.Module], ...]
) -> str | None:
    """Say why a module cannot hold seeds; ``None`` where it can, empty where nobody would expect it to."""
    name = type(module).__name__
    if type(module) in targets:
        own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        if any(is_lazy(value) for value in own):
            return f"{name} has no shape yet: run one forward pass first"
        clash = "seeds" in module._modules or "_kasmina" in vars(module)
        return f"{name} has an attribute of the name that Esper needs" if clash else None
    if kasmina_class_of(type(module)) is not None or not isinstance(module, watched):
        return ""  # a kind that was not asked for
    if torch.nn.utils.parametrize.is_parametrized(module):
        return f"{name} is parametrised: its weight is computed anew in every pass"
    if _is_quantised(module):
        return f"{name} is quantised: it cannot be trained"
    is_leaf = next(module.children(), None) is None
    has_own = next(module.parameters(recurse=False), None) is not None
    return f"{name} is not a registered kind" if is_leaf and has_own else ""


def _is_quantised(module: nn.Module) -> bool:
    return ".quantized" in type(module).__module__


def _nothing_eligible(model: nn.Module, choice: _Choice) -> str:
    if kasmina_class_of(type(model)) is not None and not any(True for _ in model.children()):
        return f"model must hold its layers as submodules, got a bare {type(model).__name__}: use nn.Sequential(layer)"
    found = "; ".join(f"{name}: {why}" for name, why in list(choice.skipped.items())[:8])
    return f"model must have a layer that can hold seeds, got none ({found or 'no candidate'})"

"""Which kinds of layer can hold seeds: the class that stands in for each."""

from __future__ import annotations

import copyreg
from typing import Any, cast

from torch import nn

from esper.contracts.blueprint import SiteKind
from esper.contracts.errors import AlreadyExistsError, InvalidInputError, UnsupportedLayerError
from esper.execution.layers.base import KasminaLayer

_CLASSES: dict[type[nn.Module], type[KasminaLayer]] = {}


def add_class(cls: type[KasminaLayer]) -> type[KasminaLayer]:
    """Register a Kasmina class under its ``host_class``; usable as a decorator.

    Raises:
        AlreadyExistsError: Another class stands in for the same layer.
    """
    taken = _CLASSES.get(cls.host_class)
    if taken is not None and taken is not cls:
        raise AlreadyExistsError(f"{cls.host_class.__name__} must be registered once, got {taken.__name__} already")
    _CLASSES[cls.host_class] = cls
    return cls


def register_layer(layer_class: type[nn.Module], *, kind: SiteKind) -> type[KasminaLayer]:
    """Let a user's own kind of layer hold seeds; gives the class that stands in for it.

    The layer's forward takes a tensor with the batch dimension first and gives one; seeds at it read both.

    Raises:
        InvalidInputError: Not a class of modules, or one that has an attribute Esper needs.
        AlreadyExistsError: The class is registered already.
    """
    candidate: object = layer_class
    if not (isinstance(candidate, type) and issubclass(candidate, nn.Module)):
        raise InvalidInputError.of("layer_class", "be a subclass of torch.nn.Module", layer_class)
    ours = {"seeds", *dir(KasminaLayer)} - set(dir(nn.Module))
    clashes = sorted(name for name in ours if hasattr(layer_class, name))
    if clashes:
        raise InvalidInputError.of("layer_class", f"leave the names {', '.join(clashes)} to Esper", layer_class)
    body: dict[str, Any] = {
        "host_class": layer_class,
        "site_kind": SiteKind(kind),
        "__reduce_ex__": _reduce_by_host_class,
        "__doc__": f"{layer_class.__name__} that can hold seeds.",
        "__module__": __name__,
    }
    return add_class(type(f"Kasmina{layer_class.__name__}", (KasminaLayer, layer_class), body))


def _reduce_by_host_class(layer: KasminaLayer, protocol: int) -> tuple[Any, ...]:
    """Pickle a layer under its host's class: its own was made at run time, so no import finds it."""
    made, args, *rest = cast("tuple[Any, ...]", super(KasminaLayer, layer).__reduce_ex__(max(protocol, 2)))
    host_class = type(layer).host_class
    if made is copyreg.__newobj__ and args == (_CLASSES[host_class],):  # type: ignore[attr-defined]
        return (_bare_layer, (host_class,), *rest)
    return (made, args, *rest)


def _bare_layer(layer_class: type[nn.Module]) -> KasminaLayer:
    kasmina_class = require_kasmina_class(layer_class)
    return kasmina_class.__new__(kasmina_class)


def kasmina_class_of(layer_class: type[nn.Module]) -> type[KasminaLayer] | None:
    """Give the class that stands in for a layer class; ``None`` where that kind cannot hold seeds."""
    return _CLASSES.get(layer_class)


def require_kasmina_class(layer_class: type[nn.Module]) -> type[KasminaLayer]:
    """Give the class that stands in for a layer class.

    Raises:
        UnsupportedLayerError: That kind cannot hold seeds; names the kinds that can.
    """
    found = _CLASSES.get(layer_class)
    if found is None:
        name = getattr(layer_class, "__name__", repr(layer_class))
        raise UnsupportedLayerError(
            f"layer must be one of {', '.join(supported_names())}, got {name}; register_layer adds a kind",
            parameter="target_layers",
        )
    return found


def supported_classes() -> tuple[type[nn.Module], ...]:
    """Give the layer classes that can hold seeds, in the order they were registered."""
    return tuple(_CLASSES)


def supported_names() -> tuple[str, ...]:
    """Give the names of the layer classes that can hold seeds."""
    return tuple(cls.__name__ for cls in _CLASSES)

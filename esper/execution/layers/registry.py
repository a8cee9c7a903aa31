"""Which kinds of layer can hold seeds: the class that stands in for each."""

from __future__ import annotations

import copyreg
from typing import Any, Final, cast

from torch import nn

from esper.contracts.blueprint import SiteKind
from esper.contracts.errors import AlreadyExistsError, InvalidInputError, UnsupportedLayerError
from esper.execution.layers.base import KasminaLayer
from esper.execution.layers.forms import form_of, pair_forms

_CLASSES: dict[type[nn.Module], type[KasminaLayer]] = {}
_ASKED_WHILE_TRACED: Final = (
    "seed_input",
    "seed_output",
    "with_output",
    "unbatched_dims",
    "to_site",
    "from_site",
)


def add_class(cls: type[KasminaLayer]) -> type[KasminaLayer]:
    """Register a Kasmina class under its ``host_class``; usable as a decorator.

    Raises:
        AlreadyExistsError: Another class stands in for the same layer.
    """
    taken = _CLASSES.get(cls.host_class)
    if taken is not None and taken is not cls:
        raise AlreadyExistsError(f"{cls.host_class.__name__} must be registered once, got {taken.__name__} already")
    if taken is None:
        _CLASSES[cls.host_class] = cls
        pair_forms(cls, _busy_form(cls))
    return cls


def _busy_form(cls: type[KasminaLayer]) -> type[KasminaLayer]:
    """Give the busy form of a class, which it stands in for as that does for the layer's own class.

    It goes by the same name: what a layer is called does not change while it is busy.
    """
    body: dict[str, Any] = {
        "host_class": cls,
        "forward": KasminaLayer.busy_forward,
        "__reduce_ex__": _reduce_by_host_class,
        "__doc__": cls.__doc__,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        # Found at once: dynamo has a guard for each class that it passes over on its way to an attribute.
        **{name: getattr(cls, name) for name in _ASKED_WHILE_TRACED},
    }
    return type(cls.__name__, (cls,), body)


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
    cls = type(layer)
    at_rest = form_of(cls, is_busy=False)
    if at_rest is not None and made is copyreg.__newobj__ and args == (cls,):  # type: ignore[attr-defined]
        return (_bare_layer, (at_rest.host_class, cls is not at_rest), *rest)
    return (made, args, *rest)


def _bare_layer(layer_class: type[nn.Module], is_busy: bool) -> KasminaLayer:
    form = form_of(require_kasmina_class(layer_class), is_busy=is_busy)
    assert form is not None
    return form.__new__(form)


def kasmina_class_of(layer_class: type[nn.Module]) -> type[KasminaLayer] | None:
    """Give the class that stands in for a layer class; ``None`` where that kind cannot hold seeds.

    For a class that can hold seeds it is the busy form.
    """
    return _CLASSES.get(layer_class) or form_of(layer_class, is_busy=True)


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

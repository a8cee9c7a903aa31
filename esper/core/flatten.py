"""Nested plain data with tensors, taken apart into a JSON tree and named tensors, and put together again bit for bit.

What JSON has no form for is written as an object with one reserved key: a tensor as ``{"$tensor": name}``, a tuple
as ``{"$tuple": [...]}``, a mapping whose keys are not all text as ``{"$items": [[key, value], ...]}``, a ``Counter`` in
the same way under ``$counter``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import torch

from esper.contracts.errors import CorruptDataError, InvalidInputError

_TENSOR: Final = "$tensor"
_ARRAY: Final = "$array"
_TUPLE: Final = "$tuple"
_ITEMS: Final = "$items"
_COUNTER: Final = "$counter"
_MAX_DEPTH: Final = 32


def flatten(value: object, prefix: str = "") -> tuple[Any, dict[str, torch.Tensor]]:
    """Give the JSON tree and the tensors of ``value``; the tensors are the very same objects, not copies.

    Raises:
        InvalidInputError: A leaf is neither plain data nor a tensor; the message names its place.
    """
    tensors: dict[str, torch.Tensor] = {}
    return _down(value, prefix or "value", tensors, 0), tensors


def unflatten(tree: object, tensors: Mapping[str, torch.Tensor]) -> Any:
    """Give back what :func:`flatten` took apart.

    Raises:
        CorruptDataError: The tree names a tensor that is not there, or is nested too deeply.
    """
    return _up(tree, tensors, 0)


def _down(value: object, path: str, tensors: dict[str, torch.Tensor], depth: int) -> Any:
    if depth > _MAX_DEPTH:
        raise InvalidInputError.of(path, f"be nested at most {_MAX_DEPTH} deep", type(value).__name__)
    match value:
        case torch.Tensor():
            return {_TENSOR: _kept(value.detach(), path, tensors)}
        case np.ndarray():
            return {_ARRAY: _kept(torch.from_numpy(np.ascontiguousarray(value)), path, tensors)}
        case bool() | str() | None:
            return value
        case int() | np.integer():
            return int(value)
        case float() | np.floating():
            return float(value)
        case list():
            return [_down(item, f"{path}.{index}", tensors, depth + 1) for index, item in enumerate(value)]
        case tuple():
            return {_TUPLE: [_down(item, f"{path}.{index}", tensors, depth + 1) for index, item in enumerate(value)]}
        case Mapping():
            return _mapping_down(value, path, tensors, depth)
    raise InvalidInputError.of(path, "be plain data or a tensor", type(value).__name__)


def _kept(tensor: torch.Tensor, path: str, tensors: dict[str, torch.Tensor]) -> str:
    """Keep a tensor under its path, or beside one that has the same: keys may hold dots, and 1 and "1" read alike."""
    name, number = path, 1
    while name in tensors:
        number += 1
        name = f"{path}~{number}"
    tensors[name] = tensor
    return name


def _mapping_down(value: Mapping[Any, Any], path: str, tensors: dict[str, torch.Tensor], depth: int) -> Any:
    items = [(key, _down(item, f"{path}.{key}", tensors, depth + 1)) for key, item in value.items()]
    if isinstance(value, Counter):  # MultiStepLR's milestones
        return {_COUNTER: [[_down(key, f"{path}.key", tensors, depth + 1), item] for key, item in items]}
    if all(isinstance(key, str) and not key.startswith("$") for key, _ in items):
        return dict(items)
    return {_ITEMS: [[_down(key, f"{path}.key", tensors, depth + 1), item] for key, item in items]}


def _up(tree: Any, tensors: Mapping[str, torch.Tensor], depth: int) -> Any:
    if depth > 2 * _MAX_DEPTH:
        raise CorruptDataError(f"tree must be nested at most {2 * _MAX_DEPTH} deep")
    if isinstance(tree, list):
        return [_up(item, tensors, depth + 1) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if _TENSOR in tree:
        return _tensor(tree[_TENSOR], tensors)
    if _ARRAY in tree:
        return _tensor(tree[_ARRAY], tensors).numpy()
    if _TUPLE in tree:
        return tuple(_up(item, tensors, depth + 1) for item in tree[_TUPLE])
    for key, kind in ((_ITEMS, dict), (_COUNTER, Counter)):
        if key in tree:
            return kind({_up(name, tensors, depth + 1): _up(item, tensors, depth + 1) for name, item in tree[key]})
    return {key: _up(item, tensors, depth + 1) for key, item in tree.items()}


def _tensor(name: object, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    if not isinstance(name, str) or name not in tensors:
        raise CorruptDataError(f"tensor must be present in the data, got {name!r}", parameter=str(name))
    return tensors[name]

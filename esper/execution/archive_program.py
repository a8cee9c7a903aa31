"""The graph of an exported program: listed operators, plain words, arithmetic; nothing that loading it would evaluate.

``torch.export.load`` hands expressions to ``sympify``, guards to ``exec``, and writes names into source that it then
compiles: each of them is text in the archive's JSON.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Final

from torch.utils import _pytree as pytree

from esper.execution.archive_errors import refuse

MODEL: Final = "models/model.json"
"""Record of the graph."""
WEIGHTS: Final = "data/weights/model_weights_config.json"
"""Record of where each weight lies."""
CONSTANTS: Final = "data/constants/model_constants_config.json"
"""Record of the constants, of which a kernel has none."""
_WEIGHT_FOLDER: Final = "data/weights/"
TEXTS: Final = frozenset({MODEL, WEIGHTS, CONSTANTS})
"""Records of text."""

OPERATORS: Final = frozenset(
    f"torch.ops.aten.{name}" for name in (
        "adaptive_avg_pool1d.default", "adaptive_avg_pool2d.default", "add.Tensor", "amax.default",
        "avg_pool1d.default", "avg_pool2d.default", "cat.default", "contiguous.default", "conv1d.default",
        "conv2d.default", "flatten.using_ints", "gelu.default", "group_norm.default", "layer_norm.default",
        "linear.default", "max_pool1d.default", "max_pool2d.default", "mean.dim", "mul.Tensor", "narrow.default",
        "pad.default", "relu.default", "reshape.default", "reshape_as.default", "rms_norm.default",
        "scaled_dot_product_attention.default", "sigmoid.default", "silu.default", "softplus.default", "tanh.default",
        "transpose.int", "unflatten.int", "unsqueeze.default", "sym_size.int",
    )
)  # fmt: skip
"""Operators that exported forms of the closed operator set use."""

_VALUES: Final = frozenset(
    {"as_tensor", "as_tensors", "as_int", "as_ints", "as_float", "as_floats", "as_bool", "as_none", "as_expr"}
)
_MAX_DEPTH: Final = 64
_WORD: Final = re.compile(r"(?!__)[\w.+-]*", re.ASCII)
_SYMBOL: Final = r"Symbol\('s\d+', positive=True, integer=True\)"
_EXPRESSION: Final = re.compile(rf"({_SYMBOL}|(Mul|Add|Integer|Mod)\(|\d+|[(), *+-])+", re.ASCII)
_GUARD: Final = re.compile(r"(L\['[xh]'\]\.size\(\)\[\d\]|\d+|[()*+ -]|[=<>]=|//)+", re.ASCII)
_IN_SPEC: Final = pytree.treespec_dumps(pytree.tree_structure(((0, 0), {})))
_OUT_SPEC: Final = pytree.treespec_dumps(pytree.tree_structure(0))


def inspect_text(data: bytes, name: str, sizes: Mapping[str, int]) -> None:
    """Do nothing when one of the ``TEXTS`` says nothing that loading it would run.

    Args:
        data: The text.
        name: Record it comes from.
        sizes: Size of every record of the archive by its name, in bytes.

    Raises:
        CorruptDataError: It does; the message names the record and what it is.
    """
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise refuse("be JSON", error, record=name) from error
    _check(value, name, 0)
    if name == CONSTANTS and value != {"config": {}}:
        raise refuse("name no constants", list(value), record=name)
    if name == WEIGHTS:
        _check_weights(value, name, sizes)


def _check_weights(value: Any, name: str, sizes: Mapping[str, int]) -> None:
    entries = value.get("config") if isinstance(value, dict) else None
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise refuse("describe weights", type(value).__name__, record=name)
    for weight, entry in entries.items():
        path = entry.get("path_name")
        if entry.get("use_pickle") is not False or not re.fullmatch(r"weight_\d+", str(path), re.ASCII):
            raise refuse(f"hold '{weight}' as raw numbers", path, record=name)
        numbers = _numbers_of(entry)
        if numbers > sizes.get(f"{_WEIGHT_FOLDER}{path}", 0):  # some seen many times: a copy would write them out
            raise refuse(f"give '{weight}' no more numbers than its record has bytes", numbers, record=name)


def _numbers_of(entry: Mapping[str, Any]) -> int | float:
    """Give how many numbers a weight has; infinity where nothing says so plainly."""
    match entry:
        case {"tensor_meta": {"sizes": [*dims]}} if all(_is_size(dim) for dim in dims):
            return math.prod(int(dim["as_int"]) for dim in dims)
    return math.inf


def _is_size(dim: Any) -> bool:
    return isinstance(dim, dict) and type(dim.get("as_int")) is int and dim["as_int"] >= 0


def _check(value: Any, name: str, depth: int) -> None:
    """Check a value and all within it; every string is a plain word but where the format wants more."""
    if depth > _MAX_DEPTH:
        raise refuse(f"be nested at most {_MAX_DEPTH} deep", depth, record=name)
    if isinstance(value, dict):
        for key, part in value.items():
            rule = _RULES.get(key)
            if not _WORD.fullmatch(key) or (key.startswith("as_") and key not in _VALUES):
                raise refuse("have keys that a kernel needs", key, record=name)
            if rule is None:
                _check(part, name, depth + 1)
            elif not rule(part):
                raise refuse(f"have a '{key}' that a kernel needs", str(part)[:200], record=name)
    elif isinstance(value, list):
        for part in value:
            _check(part, name, depth + 1)
    elif isinstance(value, str) and not _WORD.fullmatch(value):
        raise refuse("say what it says in plain words", value[:200], record=name)


def _is_text(pattern: re.Pattern[str]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and pattern.fullmatch(value) is not None


_RULES: Final[dict[str, Callable[[Any], bool]]] = {
    "target": lambda value: isinstance(value, str) and value in OPERATORS,
    "expr_str": _is_text(_EXPRESSION),
    "guards_code": lambda value: isinstance(value, list) and all(map(_is_text(_GUARD), value)),
    "in_spec": lambda value: value == _IN_SPEC,
    "out_spec": lambda value: value == _OUT_SPEC,
    "metadata": lambda value: value == {},
    "custom_obj_values": lambda value: value == {},
    "treespec_namedtuple_fields": lambda value: value == {},
    "verifiers": lambda value: value == ["TRAINING"],
}

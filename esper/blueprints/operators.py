"""The closed operator set, by name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from esper.blueprints.operator_attention import Attention
from esper.blueprints.operator_base import Attribute, Call, Emitter, Operator, Work
from esper.blueprints.operator_maps import Conv, DepthwiseConv, Linear, LowRank
from esper.blueprints.operator_pointwise import (
    Activation,
    Add,
    Concat,
    GroupNorm,
    LayerNorm,
    Mul,
    Multiply,
    RmsNorm,
    Scale,
    Shift,
)
from esper.blueprints.operator_shapes import (
    Align,
    Flatten,
    GlobalPool,
    ImageView,
    Like,
    Pool,
    SignalView,
    ToSignal,
    ToTokens,
    Transpose,
)

__all__ = ["OPERATORS", "Attribute", "Call", "Emitter", "Operator", "Work"]

_ALL: Final[tuple[Operator, ...]] = (
    Linear(),
    LowRank(),
    Conv(),
    DepthwiseConv(),
    LayerNorm(),
    GroupNorm(),
    RmsNorm(),
    Activation(),
    Scale(),
    Shift(),
    Multiply(),
    Add(),
    Mul(),
    Concat(),
    Attention(),
    GlobalPool(),
    Pool(),
    Align(),
    Flatten(),
    SignalView(),
    ImageView(),
    ToTokens(),
    ToSignal(),
    Transpose(),
    Like(),
)

OPERATORS: Final[Mapping[str, Operator]] = MappingProxyType({operator.name: operator for operator in _ALL})
"""Every operator by its name in the IR; format version 1."""

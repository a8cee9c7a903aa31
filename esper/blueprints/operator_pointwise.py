"""Operators without spatial reach: norms, activations, learned scale and shift, sums, products, concatenation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Final

import torch
import torch.nn.functional as F
from torch import fx, nn
from typing_extensions import override

from esper.blueprints.operator_base import MAX_FEATURES, Attribute, Call, Emitter, Operator, Work
from esper.blueprints.types import Layout, Mixing, TensorType

_AFFINE: Final = Attribute(name="affine", kind=bool, default=True)
_FLOAT_BYTES: Final = 4
_BORN: Final[dict[str, Any]] = {"device": "cpu", "dtype": torch.float32}


def broadcast_features(emitter: Emitter, arg: fx.Node, layout: Layout) -> fx.Node:
    """Give a vector of features a shape that broadcasts over the positions of another layout."""
    dims = {Layout.VECTOR: (), Layout.TOKENS: (-2,), Layout.SIGNAL: (-1,), Layout.IMAGE: (-1, -1)}[layout]
    for dim in dims:
        arg = emitter.method("unsqueeze", arg, dim)
    return arg


class _SameType(Operator):
    """An operator whose output has its first input's type."""

    @override
    def infer(self, call: Call) -> TensorType:
        return call.inputs[0]


class LayerNorm(_SameType):
    """Normalisation over the features (and, on signals and images, over the positions too)."""

    name: ClassVar = "layer_norm"
    attributes: ClassVar = (_AFFINE,)

    @override
    def infer(self, call: Call) -> TensorType:
        source = call.inputs[0]
        joins = source.layout in (Layout.SIGNAL, Layout.IMAGE)
        call.need_several("norm", source.num_elements if joins else source.features, "values")
        return source

    @override
    def work(self, call: Call, output: TensorType) -> Work:
        rows = output.num_positions if output.layout is Layout.TOKENS else 1
        return Work(
            parameters=2 * output.features if call.flag("affine") else 0,
            saves_inputs=(0,),
            saved_bytes=2 * rows * _FLOAT_BYTES,
        )

    @override
    def mixing(self, call: Call) -> Mixing:
        return Mixing.FULL if call.inputs[0].layout in (Layout.SIGNAL, Layout.IMAGE) else Mixing.NONE

    @override
    def emit(self, emitter: Emitter, args: Sequence[fx.Node], call: Call, output: TensorType) -> fx.Node:
        affine, module = call.flag("affine"), nn.Module()
        if output.layout in (Layout.SIGNAL, Layout.IMAGE):
            module = nn.GroupNorm(1, output.features, affine=affine, **_BORN)
        else:
            module = nn.LayerNorm(output.features, elementwise_affine=affine, **_BORN)
        return emitter.module(call.node, module, args[0])


class GroupNorm(_SameType):
    """Normalisation over groups of features and all positions of an example."""

    name: ClassVar = "group_norm"
    attributes: ClassVar = (Attribute(name="groups", kind=int, default=1, low=1, high=MAX_FEATURES), _AFFINE)

    @override
    def infer(self, call: Call) -> TensorType:
        source = call.need_layout(Layout.VECTOR, Layout.SIGNAL, Layout.IMAGE)
        groups = call.integer("groups")
        if source.features % groups:
            raise call.refuse("groups", f"divide the {source.features} features", groups)
        if source.num_elements // groups < 2:
            raise call.refuse("groups", "leave at least 2 elements to a group", groups)
        return source

    @override
    def work(self, call: Call, output: TensorType) -> Work:
        return Work(
            parameters=2 * output.features if call.flag("affine") else 0,
            saves_inputs=(0,),
            saved_bytes=2 * call.integer("groups") * _FLOAT_BYTES,
        )

    @override
    def mixing(self, call: Call) -> Mixing:
        return Mixing.FULL if call.inputs[0].positions else Mixing.NONE

    @override
    def keeps_leading(self, call: Call) -> bool:
        return call.inputs[0].layout is not Layout.VECTOR

    @override
    def emit(self, emitter: Emitter, args: Sequence[fx.Node], call: Call, output: TensorType) -> fx.Node:
        module = nn.GroupNorm(call.integer("groups"), output.features, affine=call.flag("affine"), **_BORN)
        return emitter.module(call.node, module, args[0])


class RmsNorm(_SameType):
    """Division by the root mean square of the features."""

    name: ClassVar = "rms_norm"
    attributes: ClassVar = (_AFFINE,)

    @override
    def infer(self, call: Call) -> TensorType:
        source = call.need_layout(Layout.VECTOR, Layout.TOKENS)
        call.need_several("norm", source.features, "values")
        return source

    @override
    def work(self, call: Call, output: TensorType) -> Work:
        rows = 1 if output.layout is Layout.VECTOR else output.num_positions
        normalised = _FLOAT_BYTES * output.num_elements if call.flag("affine") else 0
        return Work(
            parameters=output.features if call.flag("affine") else 0,
            saves_inputs=(0,),
            saved_bytes=rows * _FLOAT_BYTES + normalised,
        )

    @override
    def emit(self, emitter: Emitter, args: Sequence[fx.Node], call: Call, output: TensorType) -> fx.Node:
        # The factors are multiplied apart: torch warns of a module whose weights are not in autocast's dtype.
        module = nn.RMSNorm(output.features, eps=1e-6, elementwise_affine=False)
        normalised = emitter.module(call.node, module, args[0], part="norm")
        if not call.flag("affine"):
            return normalised
        factors = emitter.parameter(call.node, torch.ones(output.features, **_BORN))
        return emitter.function(torch.mul, normalised, factors)


_ACTIVATIONS: Final[dict[str, tuple[Callable[..., Any], str]]] = {
    "relu": (F.relu, "output"),
    "gelu": (F.gelu, "input"),
    "silu": (F.silu, "input"),
    "tanh": (torch.tanh, "output"),
    "sigmoid": (torch.sigmoid, "output"),
    "softplus": (F.softplus, "input"),
}


class Activation(_SameType):
    """Elementwise non-linearity."""

    name: ClassVar = "activation"
    attributes: ClassVar = (Attribute(name="fn", kind=str, default="gelu", words=tuple(_ACTIVATIONS)),)

    @override
    def work(self, call: Call, output: TensorType) -> Work:
        saves_output = _ACTIVATIONS[call.word("fn")][1] == "output"
        return Work(saves_inputs=() if saves_output else (0,), saves_output=saves_output)

    @override
    def emit(self, emitter: Emitter, args: Sequence[fx.Node], call: Call, output: TensorType) -> fx.Node:
        return emitter.function(_ACTIVATIONS[call.word("fn")][0], args[0])


class Scale(_SameType):
    """Product with one learned factor per feature, which begins at ``value``."""

    name: ClassVar = "scale"
    attributes: ClassVar = (Attribute(name="value", kind=float, default=1.0, low=-1e3, high=1e3),)

    @override
    def work(self, call: Call, output: TensorType) -> Work:
        return Work(parameters=output.features, saves_inputs=(0,))

    @override
    def emit(self, emitter: Emitter, args: Sequence[fx.Node], call: Call, output: TensorType) -> fx.Node:
        factor = emitter.parameter(call.node, torch.full((output.features,), call.real("value"), **_BORN))
        return emitter.function(torch.mul, args[0], _over_positions(emitter, factor, output.layout))


class Shift(_SameType):
    """Sum with one learned offset per feature, which begins at ``value``."""

    name: ClassVar = "shift"
    attributes: ClassVar = (Attribute(name="value", kind=float, default=0.0, low=-1e3, high=1e3),)

    @override
    def work(self, call: Call, output: TensorType) -> Work:
        return Work(parameters=output.features)

    @override
    def emit(self, emitter: Emitter, args: Sequence[fx.Node], call: Call, output: TensorType) -> fx.Node:
        offset = emitter.parameter(call.node, torch.full((output.features,), call.real("value"), **_BORN))
        return emitter.function(torch.add, args[0], _over_positions(emitter, offset, output.layout))


def _over_positions(emitter: Emitter, parameter: fx.Node, layout: Layout) -> fx.Node:
    return parameter if layout is Layout.TOKENS else broadcast_features(emitter, parameter, layout)


class Multiply(_SameType):
    """Product with a constant that is not learned."""

    name: ClassVar = "multiply"
    attributes: ClassVar = (Attribute(name="value", kind=float, default=1.0, low=-1e3, high=1e3),)

    @override
    def work(self, call: Call, output: TensorType) -> Work:
        return Work()

    @override
    def emit(self, emitter: Emitter, args: Sequence[fx.Node], call: Call, output: TensorType) -> fx.Node:
        return emitter.function(torch.mul, args[0], call.real("value"))


class _Pairwise(Operator):
    """Elementwise operator of two values; the second may be one vector, or one feature, for all positions."""

    arity: ClassVar = 2
    function: ClassVar[Callable[..., Any]]

    @override
    def infer(self, call: Call) -> TensorType:
        first, second = call.inputs
        gate = first.with_features(1)
        vector = TensorType(Layout.VECTOR, first.features)
        if second not in (first, gate, vector):
            raise call.refuse("second input", f"be {first}, {gate} or {vector}", str(second))
        return first

    @override
    def emit(self, emitter: Emitter, args: Sequence[fx.Node], call: Call, output: TensorType) -> fx.Node:
        first, second = call.inputs
        arg = args[1]
        if second.layout is not first.layout:
            arg = broadcast_features(emitter, arg, first.layout)
        return emitter.function(type(self).function, args[0], arg)


class Add(_Pairwise):
    """Sum of two values."""

    name: ClassVar = "add"
    function: ClassVar[Callable[..., Any]] = torch.add

    @override
    def work(self, call: Call, output: TensorType) -> Work:
        return Work()


class Mul(_Pairwise):
    """Product of two values: a gate."""

    name: ClassVar = "mul"
    function: ClassVar[Callable[..., Any]] = torch.mul

    @override
    def work(self, call: Call, output: TensorType) -> Work:
        return Work(saves_inputs=(0, 1))


class Concat(Operator):
    """The features of two values side by side."""

    name: ClassVar = "concat"
    arity: ClassVar = 2

    @override
    def infer(self, call: Call) -> TensorType:
        first, second = call.inputs
        if second.with_features(first.features) != first:
            raise call.refuse("second input", f"be like {first} in all but the features", str(second))
        return first.with_features(first.features + second.features)

    @override
    def work(self, call: Call, output: TensorType) -> Work:
        return Work()

    @override
    def emit(self, emitter: Emitter, args: Sequence[fx.Node], call: Call, output: TensorType) -> fx.Node:
        return emitter.function(torch.cat, [args[0], args[1]], output.channel_dim)

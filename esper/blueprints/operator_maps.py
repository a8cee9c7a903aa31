"""Operators with weights that map features: linear, low-rank, convolutions."""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from typing import ClassVar, Final

import torch.nn.functional as F
from torch import fx, nn
from typing_extensions import override

from esper.blueprints.operator_base import (
    BIAS,
    INIT,
    MAX_FEATURES,
    Attribute,
    Call,
    Emitter,
    Operator,
    Work,
    bare,
    features_attribute,
    initialise,
)
from esper.blueprints.types import Layout, Mixing, TensorType

MAX_KERNEL: Final = 31
"""Largest kernel of a convolution, per axis."""

_CONVS: Final = {Layout.SIGNAL: nn.Conv1d, Layout.IMAGE: nn.Conv2d}


def _pointwise(source: TensorType, features: int, *, bias: bool) -> nn.Module:
    conv = _CONVS.get(source.layout)
    if conv is None:
        return bare(nn.Linear, source.features, features, bias=bias)
    return bare(conv, source.features, features, 1, bias=bias)


class Linear(Operator):
    """Linear map over the features, the same at every position."""

    name: ClassVar = "linear"
    attributes: ClassVar = (features_attribute(), BIAS, INIT)

    @override
    def infer(self, call: Call) -> TensorType:
        return call.inputs[0].with_features(call.integer("features"))

    @override
    def work(self, call: Call, output: TensorType) -> Work:
        source = call.inputs[0]
        weights = source.features * output.features
        return Work(
            parameters=weights + (output.features if call.flag("bias") else 0),
            flops=2 * weights * source.num_positions,
            saves_inputs=(0,),
        )

    @override
    def emit(self, emitter: Emitter, args: Sequence[fx.Node], call: Call, output: TensorType) -> fx.Node:
        module = _pointwise(call.inputs[0], output.features, bias=call.flag("bias"))
        return emitter.module(call.node, initialise(module, call.word("init"), emitter.generator), args[0])


class LowRank(Operator):
    """Product of two linear maps without bias through ``rank`` features; ``init`` sets the second."""

    name: ClassVar = "low_rank"
    attributes: ClassVar = (
        features_attribute(),
        Attribute(name="rank", kind=int, default=8, low=1, high=MAX_FEATURES),
        INIT,
    )

    @override
    def infer(self, call: Call) -> TensorType:
        return call.inputs[0].with_features(call.integer("features"))

    @override
    def work(self, call: Call, output: TensorType) -> Work:
        source, rank = call.inputs[0], call.integer("rank")
        weights = rank * (source.features + output.features)
        return Work(
            parameters=weights,
            flops=2 * weights * source.num_positions,
            saves_inputs=(0,),
            saved_bytes=4 * rank * source.num_positions,
        )

    @override
    def emit(self, emitter: Emitter, args: Sequence[fx.Node], call: Call, output: TensorType) -> fx.Node:
        source, rank = call.inputs[0], call.integer("rank")
        down = initialise(_pointwise(source, rank, bias=False), "default", emitter.generator)
        inner = emitter.module(call.node, down, args[0], part="down")
        up = _pointwise(source.with_features(rank), output.features, bias=False)
        return emitter.module(call.node, initialise(up, call.word("init"), emitter.generator), inner, part="up")


class _Convolution(Operator):
    """What the two convolutions share: padding that keeps the size, stride, dilation, causality."""

    @override
    def infer(self, call: Call) -> TensorType:
        source = call.need_layout(Layout.SIGNAL, Layout.IMAGE)
        if call.flag("causal") and source.layout is not Layout.SIGNAL:
            raise call.refuse("causal", "be false except on a signal", True)
        stride = call.integer("stride")
        if stride > 1:
            # Besides, torch 2.13 (oneDNN, bfloat16, CPU) leaves the weight's gradient uninitialised there.
            call.need_several("stride", source.num_positions, "positions")
        positions = tuple((size - 1) // stride + 1 for size in source.positions)
        return TensorType(source.layout, self._features(call), positions)

    @abc.abstractmethod
    def _features(self, call: Call) -> int:
        """Give the number of output features."""

    @abc.abstractmethod
    def _groups(self, call: Call) -> int:
        """Give the number of groups."""

    @override
    def work(self, call: Call, output: TensorType) -> Work:
        source = call.inputs[0]
        per_output = source.features // self._groups(call) * call.integer("kernel") ** len(source.positions)
        pads = call.flag("causal") and self._reach(call) > 0
        return Work(
            parameters=output.features * (per_output + (1 if call.flag("bias") else 0)),
            flops=2 * per_output * output.num_elements,
            saves_inputs=() if pads else (0,),
            saved_bytes=4 * source.features * (source.num_positions + self._reach(call)) if pads else 0,
        )

    @override
    def mixing(self, call: Call) -> Mixing:
        if call.integer("kernel") == 1 and call.integer("stride") == 1:
            return Mixing.NONE
        return Mixing.CAUSAL if call.flag("causal") and call.integer("stride") == 1 else Mixing.FULL

    @override
    def emit(self, emitter: Emitter, args: Sequence[fx.Node], call: Call, output: TensorType) -> fx.Node:
        source, arg, reach = call.inputs[0], args[0], self._reach(call)
        causal = call.flag("causal")
        if causal and reach > 0:
            arg = emitter.function(F.pad, arg, (reach, 0))
        module = bare(
            _CONVS[source.layout],
            source.features,
            output.features,
            call.integer("kernel"),
            stride=call.integer("stride"),
            padding=0 if causal else reach // 2,
            dilation=call.integer("dilation"),
            groups=self._groups(call),
            bias=call.flag("bias"),
        )
        return emitter.module(call.node, initialise(module, call.word("init"), emitter.generator), arg)

    @staticmethod
    def _reach(call: Call) -> int:
        return call.integer("dilation") * (call.integer("kernel") - 1)


_CONV_ATTRIBUTES: Final = (
    Attribute(name="kernel", kind=int, default=3, low=1, high=MAX_KERNEL, odd=True),
    Attribute(name="stride", kind=int, default=1, low=1, high=MAX_KERNEL),
    Attribute(name="dilation", kind=int, default=1, low=1, high=MAX_KERNEL),
    Attribute(name="causal", kind=bool, default=False),
    BIAS,
    INIT,
)


class Conv(_Convolution):
    """Convolution over a signal or image, padded to keep its size (divided by the stride, rounded up)."""

    name: ClassVar = "conv"
    attributes: ClassVar = (
        features_attribute(),
        Attribute(name="groups", kind=int, default=1, low=1, high=MAX_FEATURES),
        *_CONV_ATTRIBUTES,
    )

    @override
    def infer(self, call: Call) -> TensorType:
        output = super().infer(call)
        groups = call.integer("groups")
        if math.gcd(call.inputs[0].features, output.features) % groups:
            rule = f"divide the features {call.inputs[0].features} and {output.features}"
            raise call.refuse("groups", rule, groups)
        return output

    @override
    def _features(self, call: Call) -> int:
        return call.integer("features")

    @override
    def _groups(self, call: Call) -> int:
        return call.integer("groups")


class DepthwiseConv(_Convolution):
    """Convolution of every feature by itself, padded to keep its size."""

    name: ClassVar = "depthwise_conv"
    attributes: ClassVar = _CONV_ATTRIBUTES

    @override
    def _features(self, call: Call) -> int:
        return call.inputs[0].features

    @override
    def _groups(self, call: Call) -> int:
        return call.inputs[0].features

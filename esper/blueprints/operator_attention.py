"""Attention between tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import fx
from typing_extensions import override

from esper.blueprints.operator_base import Attribute, Call, Emitter, Operator, Work
from esper.blueprints.types import Layout, Mixing, TensorType

MAX_HEADS = 64
"""Most heads of one attention."""


class Attention(Operator):
    """Scaled dot-product attention of queries, keys and values, without weights of its own."""

    name: ClassVar = "attention"
    arity: ClassVar = 3
    attributes: ClassVar = (
        Attribute(name="heads", kind=int, default=1, low=1, high=MAX_HEADS),
        Attribute(name="causal", kind=bool, default=False),
    )

    @override
    def infer(self, call: Call) -> TensorType:
        queries, keys, values = call.inputs
        call.need_layout(Layout.TOKENS)
        for part, other in (("keys", keys), ("values", values)):
            if other != queries:
                raise call.refuse(part, f"be {queries} like the queries", str(other))
        call.need_several("attention", queries.num_positions, "tokens")
        heads = call.integer("heads")
        if queries.features % heads:
            raise call.refuse("heads", f"divide the {queries.features} features", heads)
        return queries

    @override
    def work(self, call: Call, output: TensorType) -> Work:
        length = output.num_positions
        return Work(
            flops=4 * length * length * output.features,
            saves_inputs=(0, 1, 2),
            saves_output=True,
            saved_bytes=4 * length * call.integer("heads"),
        )

    @override
    def mixing(self, call: Call) -> Mixing:
        return Mixing.CAUSAL if call.flag("causal") else Mixing.FULL

    @override
    def emit(self, emitter: Emitter, args: Sequence[fx.Node], call: Call, output: TensorType) -> fx.Node:
        heads = call.integer("heads")
        split = [
            emitter.function(torch.transpose, emitter.function(torch.unflatten, arg, 2, (heads, -1)), 1, 2)
            for arg in args
        ]
        mixed = emitter.function(F.scaled_dot_product_attention, *split, is_causal=call.flag("causal"))
        return emitter.function(torch.flatten, emitter.function(torch.transpose, mixed, 1, 2), 2)

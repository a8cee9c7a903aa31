"""Layers that hold seeds, and the registry of kinds."""

from __future__ import annotations

from esper.execution.layers.base import KasminaLayer
from esper.execution.layers.kinds import (
    KasminaBatchNorm1d,
    KasminaBatchNorm2d,
    KasminaConv1d,
    KasminaConv2d,
    KasminaLayerNorm,
    KasminaLinear,
    KasminaMultiheadAttention,
)
from esper.execution.layers.record import DEFAULT_TELEMETRY_INTERVAL_STEPS, KernelSource, LayerRecord
from esper.execution.layers.registry import (
    kasmina_class_of,
    register_layer,
    require_kasmina_class,
    supported_classes,
    supported_names,
)

__all__ = [
    "DEFAULT_TELEMETRY_INTERVAL_STEPS",
    "KasminaBatchNorm1d",
    "KasminaBatchNorm2d",
    "KasminaConv1d",
    "KasminaConv2d",
    "KasminaLayer",
    "KasminaLayerNorm",
    "KasminaLinear",
    "KasminaMultiheadAttention",
    "KernelSource",
    "LayerRecord",
    "kasmina_class_of",
    "register_layer",
    "require_kasmina_class",
    "supported_classes",
    "supported_names",
]

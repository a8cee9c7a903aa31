"""The Kasmina forms of torch's layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from esper.contracts.blueprint import SiteKind
from esper.execution.layers.base import KasminaLayer
from esper.execution.layers.registry import add_class


@add_class
class KasminaLinear(nn.Linear, KasminaLayer):
    """``nn.Linear`` that can hold seeds."""

    host_class = nn.Linear
    site_kind = SiteKind.LINEAR

    def unbatched_dims(self) -> int | None:
        """Give 1: a bare vector of features."""
        return 1


@add_class
class KasminaConv1d(nn.Conv1d, KasminaLayer):
    """``nn.Conv1d`` that can hold seeds."""

    host_class = nn.Conv1d
    site_kind = SiteKind.CONV1D

    def unbatched_dims(self) -> int | None:
        """Give 2: (channels, length)."""
        return 2


@add_class
class KasminaConv2d(nn.Conv2d, KasminaLayer):
    """``nn.Conv2d`` that can hold seeds."""

    host_class = nn.Conv2d
    site_kind = SiteKind.CONV2D

    def unbatched_dims(self) -> int | None:
        """Give 3: (channels, height, width)."""
        return 3


@add_class
class KasminaLayerNorm(nn.LayerNorm, KasminaLayer):
    """``nn.LayerNorm`` that can hold seeds."""

    host_class = nn.LayerNorm
    site_kind = SiteKind.LAYER_NORM

    def unbatched_dims(self) -> int | None:
        """Give the number of normalised dimensions."""
        return len(self.normalized_shape)


@add_class
class KasminaBatchNorm1d(nn.BatchNorm1d, KasminaLayer):
    """``nn.BatchNorm1d`` that can hold seeds."""

    host_class = nn.BatchNorm1d
    site_kind = SiteKind.BATCH_NORM1D


@add_class
class KasminaBatchNorm2d(nn.BatchNorm2d, KasminaLayer):
    """``nn.BatchNorm2d`` that can hold seeds."""

    host_class = nn.BatchNorm2d
    site_kind = SiteKind.BATCH_NORM2D


@add_class
class KasminaMultiheadAttention(nn.MultiheadAttention, KasminaLayer):
    """``nn.MultiheadAttention`` that can hold seeds: x is the query, h the attention's output, both batch first."""

    host_class = nn.MultiheadAttention
    site_kind = SiteKind.ATTENTION

    def seed_output(self, out: Any) -> Tensor:
        """Give the attention's output, without its weights."""
        found: Tensor = out[0]
        return found

    def with_output(self, out: Any, blended: Tensor) -> Any:
        """Give the pair with the attention's output replaced."""
        return (blended, *out[1:])

    def seed_input(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """Give the query."""
        found: Tensor = args[0] if args else kwargs["query"]
        return found

    def unbatched_dims(self) -> int | None:
        """Give 2: (length, features)."""
        return 2

    def to_site(self, value: Tensor) -> Tensor:
        """Give the value as (batch, length, features)."""
        if value.dim() == 2:
            return value.unsqueeze(0)
        return value if self.batch_first else value.transpose(0, 1)

    def from_site(self, value: Tensor, *, like: Tensor) -> Tensor:
        """Undo ``to_site``."""
        if like.dim() == 2:
            return value.squeeze(0)
        return value if self.batch_first else value.transpose(0, 1)

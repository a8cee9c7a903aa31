"""Types of the values that flow through a blueprint: how features and positions lie in a tensor.

Legend (the batch dimension comes first and is left out):

    layout   shape        what it is
    VECTOR   (F)          one feature vector per example; a linear site may carry further leading dimensions
    TOKENS   (L, F)       a sequence, features last
    SIGNAL   (F, L)       a sequence, features first
    IMAGE    (F, H, W)    a feature map
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import Final

from esper.contracts.blueprint import Site, SiteKind
from esper.contracts.errors import InvalidBlueprintError


class Layout(Enum):
    """Where features and positions lie in a tensor."""

    VECTOR = "vector"
    TOKENS = "tokens"
    SIGNAL = "signal"
    IMAGE = "image"


class Mixing(IntEnum):
    """How far information travels between positions of a sequence or map."""

    NONE = 0
    """Every position is computed from itself alone."""
    CAUSAL = 1
    """A position sees itself and earlier ones."""
    FULL = 2
    """A position may see every other."""


@dataclass(frozen=True, slots=True)
class TensorType:
    """Layout and sizes of one value, without the batch dimension."""

    layout: Layout
    """Where features and positions lie."""
    features: int
    """Number of features, > 0."""
    positions: tuple[int, ...] = ()
    """Sizes of the position axes, each > 0; empty for VECTOR."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape without the batch dimension."""
        if self.layout is Layout.TOKENS:
            return (*self.positions, self.features)
        return (self.features, *self.positions)

    @property
    def num_positions(self) -> int:
        """Number of positions; 1 for VECTOR."""
        return math.prod(self.positions)

    @property
    def num_elements(self) -> int:
        """Number of elements of one example."""
        return self.features * self.num_positions

    @property
    def channel_dim(self) -> int:
        """Index of the feature axis in the batched tensor."""
        return 1 if self.layout in (Layout.SIGNAL, Layout.IMAGE) else -1

    def with_features(self, features: int) -> TensorType:
        """Give the same layout and positions with another number of features."""
        return TensorType(self.layout, features, self.positions)

    def __str__(self) -> str:
        return f"{self.layout.value}{self.shape}"


_FEATURES_LAST: Final = frozenset({SiteKind.LINEAR, SiteKind.ATTENTION, SiteKind.LAYER_NORM})
_RANKS: Final = {
    SiteKind.LINEAR: (1, 2, 3, 4),
    SiteKind.CONV1D: (2,),
    SiteKind.CONV2D: (3,),
    SiteKind.ATTENTION: (2,),
    SiteKind.LAYER_NORM: (1, 2, 3, 4),
    SiteKind.BATCH_NORM1D: (1, 2),
    SiteKind.BATCH_NORM2D: (3,),
}


def site_types(site: Site) -> tuple[TensorType, TensorType]:
    """Give the types of the layer's input x and output h.

    Several leading axes of a features-last site (a map of tokens) count as one sequence.

    Raises:
        InvalidBlueprintError: The shapes do not fit the site's kind.
    """
    ranks = _RANKS[site.kind]
    if len(site.output_shape) not in ranks or len(site.input_shape) != len(site.output_shape):
        rule = f"have input and output shapes of {' or '.join(map(str, ranks))} sizes for {site.kind.name}"
        raise InvalidBlueprintError.of("site", rule, (site.input_shape, site.output_shape))
    if site.kind in _FEATURES_LAST and site.input_shape[:-1] != site.output_shape[:-1]:
        rule = f"keep all sizes but the last for {site.kind.name}"
        raise InvalidBlueprintError.of("site", rule, (site.input_shape, site.output_shape))
    return _type(site.kind, site.input_shape), _type(site.kind, site.output_shape)


def _type(kind: SiteKind, shape: tuple[int, ...]) -> TensorType:
    if len(shape) == 1:
        return TensorType(Layout.VECTOR, shape[0])
    if kind in _FEATURES_LAST:
        return TensorType(Layout.TOKENS, shape[-1], (math.prod(shape[:-1]),))
    layout = Layout.SIGNAL if len(shape) == 2 else Layout.IMAGE
    return TensorType(layout, shape[0], shape[1:])


def stride_between(have: int, want: int) -> int:
    """Give how many input positions an output position stands for; 1 where only a border was cut off.

    A layer of stride 2 takes at least ``2 * want - 1`` positions, so fewer mean an unpadded layer of stride 1.
    """
    return 1 if have < 2 * want - 1 else max(1, round(have / want))


def resized_site(site: Site, extra: int) -> Site | None:
    """Give the same site with ``extra`` more output positions per axis (fewer when negative).

    A map of tokens changes along its first axis only. ``None`` for a site without positions, and where nothing
    would be left of one.
    """
    x, h = site_types(site)
    if not h.positions:
        return None
    if site.kind in _FEATURES_LAST:
        grown = (site.output_shape[0] + extra, *site.output_shape[1:-1])
        shapes = (*grown, x.features), (*grown, h.features)
    else:
        stride = stride_between(x.positions[0], h.positions[0])
        shapes = (
            (x.features, *(size + extra * stride for size in x.positions)),
            (h.features, *(size + extra for size in h.positions)),
        )
    if min(*shapes[0], *shapes[1]) < 1:
        return None
    return Site(kind=site.kind, input_shape=shapes[0], output_shape=shapes[1])


def allowed_mixing(site: Site) -> Mixing:
    """Give how far a seed may carry information between positions without seeing what the host keeps from it.

    A layer that treats the positions of a sequence one by one may belong to a causal model, and a site does not say:
    a seed there never looks ahead.
    """
    sequence = site.kind in _FEATURES_LAST and len(site.output_shape) > 1
    return Mixing.CAUSAL if sequence else Mixing.FULL

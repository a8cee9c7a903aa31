"""The templates that ship with Esper: designs that are known to help, each as one graph for every site it fits.

Graphs are written in the text form, so what a person reads here is what is built. ``C`` and ``I`` are the features of
the layer's output and input, so one template serves sites of any size; a template is offered wherever it is legal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from esper.contracts.blueprint import SiteKind


@dataclass(frozen=True, kw_only=True, slots=True)
class Template:
    """One design: its graph in text form, and what is said of it."""

    name: str
    """Name in the registry."""
    text: str
    """The graph, without header."""
    description: str
    """What it does and when it helps."""
    tags: tuple[str, ...]
    """Tags, the family first."""
    citation: str = ""
    """Where it comes from."""
    site_kinds: tuple[SiteKind, ...] = ()
    """Kinds of site it is meant for; empty means every kind where it is legal."""

    @property
    def source(self) -> str:
        """The graph with its header."""
        return f"blueprint 1\n{self.text}"


_GRIDS: Final = (SiteKind.CONV1D, SiteKind.CONV2D, SiteKind.BATCH_NORM1D, SiteKind.BATCH_NORM2D)
_VECTORS: Final = (SiteKind.LINEAR, SiteKind.LAYER_NORM, SiteKind.BATCH_NORM1D)
_SEQUENCES: Final = (SiteKind.LINEAR, SiteKind.ATTENTION, SiteKind.LAYER_NORM)

_MAPS: Final = (
    Template(
        name="norm_shift",
        text="""
            normed = layer_norm(h, affine=false)
            scaled = scale(normed, value=0.0)
            shifted = shift(scaled)
            return shifted
        """,
        description="Learned scale and offset of the normalised output: the cheapest correction there is.",
        tags=("normalization", "pointwise", "cheap"),
        citation="Li et al., Revisiting Batch Normalization for Practical Domain Adaptation, arXiv:1603.04779; "
        "Lian et al., Scaling & Shifting Your Features, arXiv:2210.08823",
    ),
    Template(
        name="lora",
        text="""
            near = align(x, h)
            update = low_rank(near, rank={max(1, min(8, min(I, C)))}, init=zero)
            return update
        """,
        description="Low-rank update of the layer's own linear map.",
        tags=("low_rank", "linear_map", "cheap"),
        citation="Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, arXiv:2106.09685",
    ),
    Template(
        name="bottleneck_adapter",
        text="""
            normed = layer_norm(h)
            down = linear(normed, features={max(4, C // 4)})
            act = activation(down, fn=gelu)
            up = linear(act, init=zero)
            return up
        """,
        description="Residual bottleneck on the layer's output: a few non-linear features at a quarter of the width.",
        tags=("adapter", "bottleneck"),
        citation="Houlsby et al., Parameter-Efficient Transfer Learning for NLP, arXiv:1902.00751",
    ),
    Template(
        name="gated_mlp",
        text="""
            near = align(x, h)
            value = linear(near, features={max(4, C // 2)})
            gate = linear(near, features={max(4, C // 2)})
            open = activation(gate, fn=silu)
            gated = mul(value, open)
            out = linear(gated, init=zero)
            return out
        """,
        description="Features of the layer's input, multiplied by a smooth gate: interactions a plain layer lacks.",
        tags=("gated", "mlp"),
        citation="Shazeer, GLU Variants Improve Transformer, arXiv:2002.05202",
    ),
    Template(
        name="glu",
        text="""
            near = align(x, h)
            value = linear(near, init=zero)
            gate = linear(near)
            open = activation(gate, fn=sigmoid)
            gated = mul(value, open)
            return gated
        """,
        description="Gated linear unit: a second linear map that each output lets through or not.",
        tags=("gated", "linear_map"),
        citation="Dauphin et al., Language Modeling with Gated Convolutional Networks, arXiv:1612.08083",
    ),
    Template(
        name="widen",
        text="""
            near = align(x, h)
            units = linear(near, features={C})
            act = activation(units, fn=gelu)
            out = linear(act, init=zero)
            return out
        """,
        description="As many new hidden units as the layer has outputs, beside it: widening that keeps the function.",
        tags=("widening", "mlp", "function_preserving"),
        citation="Chen et al., Net2Net: Accelerating Learning via Knowledge Transfer, arXiv:1511.05641 (Net2Wider)",
        site_kinds=(*_SEQUENCES, SiteKind.BATCH_NORM1D),
    ),
    Template(
        name="deepen",
        text="""
            act = activation(h, fn=gelu)
            out = linear(act, init=zero)
            return out
        """,
        description="A further layer after this one that begins as the identity: deepening that keeps the function.",
        tags=("deepening", "function_preserving"),
        citation="Chen et al., Net2Net: Accelerating Learning via Knowledge Transfer, arXiv:1511.05641 (Net2Deeper); "
        "He et al., Identity Mappings in Deep Residual Networks, arXiv:1603.05027",
    ),
)

_CONVOLUTIONS: Final = (
    Template(
        name="conv1x1",
        text="""
            near = align(x, h)
            units = conv(near, kernel=1)
            act = activation(units, fn=gelu)
            out = conv(act, kernel=1, init=zero)
            return out
        """,
        description="Two pointwise convolutions: new mixtures of channels, no spatial reach.",
        tags=("convolution", "pointwise"),
        citation="Lin et al., Network In Network, arXiv:1312.4400",
        site_kinds=_GRIDS,
    ),
    Template(
        name="conv3x3",
        text="""
            units = conv(x, features={max(4, C // 2)}, kernel=3, stride={S})
            near = align(units, h)
            act = activation(near, fn=gelu)
            out = conv(act, kernel=1, init=zero)
            return out
        """,
        description="New 3-wide filters beside the layer's own, brought back by a pointwise convolution.",
        tags=("convolution", "spatial"),
        citation="Simonyan & Zisserman, Very Deep Convolutional Networks, arXiv:1409.1556",
        site_kinds=_GRIDS,
    ),
    Template(
        name="depthwise_separable_conv",
        text="""
            normed = group_norm(h)
            depth = depthwise_conv(normed, kernel=3)
            act = activation(depth, fn=gelu)
            point = conv(act, kernel=1, init=zero)
            return point
        """,
        description="A spatial filter per channel, then a pointwise mixture: reach at a tenth of a full convolution.",
        tags=("convolution", "spatial", "depthwise"),
        citation="Howard et al., MobileNets, arXiv:1704.04861",
        site_kinds=_GRIDS,
    ),
    Template(
        name="dilated_conv",
        text="""
            down = conv(h, features={max(4, C // 4)}, kernel=1)
            wide = conv(down, features={max(4, C // 4)}, kernel=3, dilation=2)
            act = activation(wide, fn=gelu)
            out = conv(act, kernel=1, init=zero)
            return out
        """,
        description="A dilated bottleneck: twice the reach of a plain filter, for context the host does not see.",
        tags=("convolution", "spatial", "dilated", "bottleneck"),
        citation="Yu & Koltun, Multi-Scale Context Aggregation by Dilated Convolutions, arXiv:1511.07122",
        site_kinds=_GRIDS,
    ),
    Template(
        name="widen_conv",
        text="""
            units = conv(x, features={C}, kernel=3, stride={S})
            near = align(units, h)
            act = activation(near, fn=relu)
            out = conv(act, kernel=3, init=zero)
            return out
        """,
        description="As many new filters as the layer has, beside it, with a full convolution to bring them in.",
        tags=("widening", "convolution", "spatial", "function_preserving"),
        citation="Chen et al., Net2Net: Accelerating Learning via Knowledge Transfer, arXiv:1511.05641 (Net2Wider)",
        site_kinds=_GRIDS,
    ),
    Template(
        name="deepen_conv",
        text="""
            act = activation(h, fn=relu)
            out = conv(act, kernel=3, init=zero)
            return out
        """,
        description="A further convolution after this layer that begins as the identity.",
        tags=("deepening", "convolution", "spatial", "function_preserving"),
        citation="Chen et al., Net2Net: Accelerating Learning via Knowledge Transfer, arXiv:1511.05641 (Net2Deeper)",
        site_kinds=_GRIDS,
    ),
    Template(
        name="squeeze_excite",
        text="""
            pooled = global_pool(h)
            down = linear(pooled, features={max(4, C // 4)})
            act = activation(down, fn=gelu)
            up = linear(act, init=zero)
            gate = activation(up, fn=tanh)
            gated = mul(h, gate)
            return gated
        """,
        description="Channels weighed by what the whole map holds; the gate begins closed at 0 instead of at 1/2.",
        tags=("gated", "attention", "cheap"),
        citation="Hu et al., Squeeze-and-Excitation Networks, arXiv:1709.01507",
    ),
)

_VIEWS: Final = (
    Template(
        name="signal_conv",
        text="""
            signal = signal_view(x)
            first = conv(signal, features=16, kernel=5)
            norm1 = group_norm(first)
            act1 = activation(norm1, fn=relu)
            second = conv(act1, features=16, kernel=5, stride=2)
            norm2 = group_norm(second)
            act2 = activation(norm2, fn=relu)
            third = conv(act2, features=16, kernel=5, stride=2)
            norm3 = group_norm(third)
            act3 = activation(norm3, fn=relu)
            pooled = global_pool(act3)
            out = linear(pooled, init=zero)
            return out
        """,
        description="A small convolutional network on a signal that the host treats as a flat vector.",
        tags=("convolution", "spatial", "signal"),
        citation="Greydanus & Kobak, Scaling Down Deep Learning with MNIST-1D, arXiv:2011.14439; "
        "Wu & He, Group Normalization, arXiv:1803.08494",
        site_kinds=_VECTORS,
    ),
    Template(
        name="image_conv",
        text="""
            image = image_view(x)
            first = conv(image, features=8, kernel=3)
            norm1 = group_norm(first)
            act1 = activation(norm1, fn=relu)
            half = pool(act1, kind=max)
            second = conv(half, features=16, kernel=3)
            norm2 = group_norm(second)
            act2 = activation(norm2, fn=relu)
            quarter = pool(act2, kind=max)
            flat = flatten(quarter)
            out = linear(flat, init=zero)
            return out
        """,
        description="A small convolutional network on a square image that the host treats as a flat vector.",
        tags=("convolution", "spatial", "image"),
        citation="LeCun et al., Gradient-Based Learning Applied to Document Recognition, Proc. IEEE 86 (1998); "
        "Wu & He, Group Normalization, arXiv:1803.08494",
        site_kinds=_VECTORS,
    ),
)

_TOKENS: Final = (
    Template(
        name="low_rank_attention",
        text="""
            normed = layer_norm(h)
            tokens = to_tokens(normed)
            q = linear(tokens, features={max(4, C // 4)}, bias=false)
            k = linear(tokens, features={max(4, C // 4)}, bias=false)
            v = linear(tokens, features={max(4, C // 4)}, bias=false)
            mixed = attention(q, k, v)
            up = linear(mixed, init=zero)
            out = like(up, h)
            return out
        """,
        description="Attention between all positions at a quarter of the width.",
        tags=("attention", "low_rank"),
        citation="Vaswani et al., Attention Is All You Need, arXiv:1706.03762; "
        "Wang et al., Non-local Neural Networks, arXiv:1711.07971",
    ),
    Template(
        name="causal_attention",
        text="""
            normed = layer_norm(h)
            q = linear(normed, features={max(4, C // 4)}, bias=false)
            k = linear(normed, features={max(4, C // 4)}, bias=false)
            v = linear(normed, features={max(4, C // 4)}, bias=false)
            mixed = attention(q, k, v, causal=true)
            out = linear(mixed, init=zero)
            return out
        """,
        description="Attention to earlier positions only, for language models.",
        tags=("attention", "low_rank", "causal"),
        citation="Radford et al., Improving Language Understanding by Generative Pre-Training (2018)",
        site_kinds=_SEQUENCES,
    ),
    Template(
        name="causal_token_conv",
        text="""
            signal = to_signal(h)
            mixed = depthwise_conv(signal, kernel=5, causal=true)
            tokens = to_tokens(mixed)
            act = activation(tokens, fn=silu)
            out = linear(act, init=zero)
            return out
        """,
        description="Short filters over the preceding tokens, then a mixture of features; never looks ahead.",
        tags=("convolution", "depthwise", "causal"),
        citation="So et al., Primer: Searching for Efficient Transformers, arXiv:2109.08668; "
        "Poli et al., Hyena Hierarchy, arXiv:2302.10866",
        site_kinds=_SEQUENCES,
    ),
    Template(
        name="token_channel_mixer",
        text="""
            tokens = to_tokens(h)
            flipped = transpose(tokens)
            across = linear(flipped, features={max(4, L // 2)})
            act1 = activation(across, fn=gelu)
            back = linear(act1, features={L})
            mixed = transpose(back)
            down = linear(mixed, features={max(4, C // 2)})
            act2 = activation(down, fn=gelu)
            up = linear(act2, init=zero)
            out = like(up, h)
            return out
        """,
        description="Mixes positions, then channels, by small dense maps; tied to the site's length.",
        tags=("mixer", "mlp"),
        citation="Tolstikhin et al., MLP-Mixer: An all-MLP Architecture for Vision, arXiv:2105.01601",
    ),
)

TEMPLATES: Final = (*_MAPS, *_CONVOLUTIONS, *_VIEWS, *_TOKENS)
"""Every template, from plain maps to convolutions, views and token mixers."""

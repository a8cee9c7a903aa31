"""Every operator, in graphs whose shapes, parameters, work and kept tensors are held against torch itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx, nn

from esper.blueprints import BlueprintRegistry, cost, parse_text, plan, to_module
from esper.blueprints.flops import count_flops
from esper.blueprints.operators import OPERATORS, Emitter
from esper.contracts.blueprint import BlueprintIR, Site, SiteKind

Script = Callable[[nn.Module], torch.jit.ScriptModule]

VECTOR = Site(kind=SiteKind.LINEAR, input_shape=(16,), output_shape=(12,))
TOKENS = Site(kind=SiteKind.LINEAR, input_shape=(7, 16), output_shape=(7, 12))
SIGNAL = Site(kind=SiteKind.CONV1D, input_shape=(4, 20), output_shape=(12, 10))
IMAGE = Site(kind=SiteKind.CONV2D, input_shape=(4, 9, 7), output_shape=(12, 9, 7))
STRIDED = Site(kind=SiteKind.CONV2D, input_shape=(4, 16, 8), output_shape=(12, 8, 4))
UNPADDED = Site(kind=SiteKind.CONV2D, input_shape=(4, 12, 9), output_shape=(12, 10, 7))

GRAPHS = {
    "linear": (VECTOR, "a = linear(x, bias=false)"),
    "linear_on_image": (IMAGE, "a = linear(x)"),
    "low_rank": (TOKENS, "a = low_rank(x, rank=3)"),
    "low_rank_on_image": (IMAGE, "a = low_rank(x, rank=3)"),
    "orthogonal": (VECTOR, "b = linear(x, init=orthogonal); a = linear(b, init=kaiming)"),
    "conv": (IMAGE, "a = conv(x, kernel=5, groups=4, dilation=2)"),
    "conv_stride": (STRIDED, "a = conv(x, stride={S}, bias=false)"),
    "conv_orthogonal": (IMAGE, "a = conv(x, init=orthogonal)"),
    "conv_causal": (SIGNAL, "b = align(x, h); a = conv(b, causal=true, dilation=3)"),
    "conv_causal_pointwise": (SIGNAL, "b = align(x, h); a = conv(b, kernel=1, causal=true)"),
    "depthwise": (IMAGE, "a = depthwise_conv(h, kernel=7)"),
    "layer_norm": (TOKENS, "a = layer_norm(h)"),
    "layer_norm_on_image": (IMAGE, "a = layer_norm(h, affine=false)"),
    "group_norm": (IMAGE, "a = group_norm(h, groups=3)"),
    "group_norm_on_vector": (VECTOR, "a = group_norm(h, groups=3, affine=false)"),
    "rms_norm": (VECTOR, "a = rms_norm(h)"),
    "rms_norm_on_tokens": (TOKENS, "a = rms_norm(h, affine=false)"),
    "relu": (VECTOR, "b = linear(x); a = activation(b, fn=relu)"),
    "gelu": (VECTOR, "b = linear(x); a = activation(b, fn=gelu)"),
    "silu": (VECTOR, "b = linear(x); a = activation(b, fn=silu)"),
    "tanh": (VECTOR, "b = linear(x); a = activation(b, fn=tanh)"),
    "sigmoid": (VECTOR, "b = linear(x); a = activation(b, fn=sigmoid)"),
    "softplus": (VECTOR, "b = linear(x); a = activation(b, fn=softplus)"),
    "scale_shift": (IMAGE, "b = shift(h, value=0.5); a = scale(b, value=2.0)"),
    "scale_tokens": (TOKENS, "b = shift(h); a = scale(b)"),
    "scale_signal": (SIGNAL, "b = shift(h); a = scale(b)"),
    "multiply": (VECTOR, "b = multiply(h, value=0.25); a = scale(b)"),
    "add_vector": (IMAGE, "p = global_pool(h); a = add(h, p)"),
    "mul_vector": (TOKENS, "p = global_pool(h); l = linear(p); a = mul(h, l)"),
    "mul_signal": (SIGNAL, "p = global_pool(h, kind=max); a = mul(h, p)"),
    "mul_one_feature": (IMAGE, "p = conv(h, features=1); g = activation(p, fn=sigmoid); a = mul(h, g)"),
    "concat": (TOKENS, "c = concat(x, h); a = linear(c)"),
    "concat_image": (UNPADDED, "n = align(x, h); c = concat(n, h); a = conv(c, kernel=1)"),
    "attention": (TOKENS, "q = linear(h); k = linear(h); v = linear(h); a = attention(q, k, v, heads=3)"),
    "causal": (TOKENS, "q = linear(h); k = linear(h); v = linear(h); a = attention(q, k, v, causal=true)"),
    "global_max": (TOKENS, "l = linear(x); p = global_pool(l, kind=max); g = linear(p); a = mul(h, g)"),
    "pool": (IMAGE, "c = conv(h); p = pool(c, size=2); f = global_pool(p); g = linear(f); a = mul(h, g)"),
    "pool_max": (IMAGE, "c = conv(h); p = pool(c, kind=max, size=3); f = flatten(p); g = linear(f); a = mul(h, g)"),
    "pool_signal": (SIGNAL, "c = conv(h); p = pool(c, size=3); q = pool(p, kind=max); f = flatten(q); a = add(h, f)"),
    "align_average": (STRIDED, "c = conv(x); n = align(c, h); a = scale(n)"),
    "align_average_signal": (SIGNAL, "c = conv(x); n = align(c, h); a = scale(n)"),
    "align_crop": (UNPADDED, "c = conv(x); n = align(c, h); a = scale(n)"),
    "signal_view": (VECTOR, "s = signal_view(x, channels=2); c = conv(s, features=3); f = flatten(c); a = linear(f)"),
    "image_view": (VECTOR, "s = image_view(x); c = conv(s, features=3); p = pool(c); f = flatten(p); a = linear(f)"),
    "image_view_rows": (VECTOR, "s = image_view(h, height=3); c = conv(s, features=1); a = flatten(c)"),
    "to_tokens": (IMAGE, "t = to_tokens(h); l = linear(t); a = like(l, h)"),
    "to_tokens_signal": (SIGNAL, "t = to_tokens(h); l = linear(t); a = like(l, h)"),
    "to_signal": (TOKENS, "s = to_signal(h); c = conv(s); a = like(c, h)"),
    "image_to_signal": (IMAGE, "s = to_signal(h); c = conv(s); a = like(c, h)"),
    "same_layouts": (TOKENS, "t = to_tokens(h); l = like(t, h); a = scale(l)"),
    "signal_to_signal": (SIGNAL, "t = to_signal(h); l = conv(t); a = like(l, h)"),
    "image_like_signal": (IMAGE, "s = to_signal(h); c = conv(h); l = like(c, s); m = mul(l, s); a = like(m, h)"),
    "transpose": (TOKENS, "t = transpose(h); l = linear(t, features={L}); a = transpose(l)"),
}


@pytest.fixture(params=GRAPHS.values(), ids=list(GRAPHS))
def case(request: pytest.FixtureRequest) -> tuple[BlueprintIR, Site]:
    site, text = request.param
    return parse_text("\n".join(["blueprint 1", *text.split("; "), "return a"])), site


def inputs(site: Site, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(batch)
    x = torch.randn(batch, *site.input_shape, generator=generator)
    return x.requires_grad_(), torch.randn(batch, *site.output_shape, generator=generator).requires_grad_()


def kept_bytes(module: nn.Module, x: torch.Tensor, h: torch.Tensor) -> int:
    """Bytes of the distinct storages that autograd keeps, without x, h and the parameters."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), x, h)}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in own:
            kept[pointer] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        delta = module(x, h)
    assert delta.shape == h.shape
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_every_operator_has_a_graph_here() -> None:
    used = {
        node.op
        for site, text in GRAPHS.values()
        for node in parse_text("\n".join(["blueprint 1", *text.split("; "), "return a"])).nodes
    }
    assert used == set(OPERATORS)


def test_cost_is_what_torch_counts(case: tuple[BlueprintIR, Site]) -> None:
    ir, site = case
    module, declared = to_module(ir, site, seed=0), cost(ir, site)
    x, h = inputs(site, 1)
    assert sum(parameter.numel() for parameter in module.parameters()) == declared.parameters
    assert count_flops(lambda: module(x, h)) == declared.flops
    assert kept_bytes(module, x, h) == declared.activation_bytes


def test_work_grows_with_the_batch(case: tuple[BlueprintIR, Site]) -> None:
    ir, site = case
    module, declared = to_module(ir, site, seed=0), cost(ir, site)
    x, h = inputs(site, 3)
    assert count_flops(lambda: module(x, h)) == 3 * declared.flops
    assert kept_bytes(module, x, h) == 3 * declared.activation_bytes


def test_every_operator_gives_the_type_it_infers(case: tuple[BlueprintIR, Site]) -> None:
    for step in plan(*case).steps:
        graph, root = fx.Graph(), nn.Module()
        args = [graph.placeholder(f"arg{index}") for index in range(len(step.call.inputs))]
        emitter = Emitter(graph, root, torch.Generator().manual_seed(0))
        graph.output(step.operator.emit(emitter, args, step.call, step.output))
        values = [torch.randn(2, *source.shape) for source in step.call.inputs]
        assert fx.GraphModule(root, graph)(*values).shape == (2, *step.output.shape)


def test_scripted_form_gives_the_same_bits(case: tuple[BlueprintIR, Site], script: Script) -> None:
    ir, site = case
    module = to_module(ir, site, seed=0)
    scripted = script(module)
    for batch in (1, 3):
        x, h = inputs(site, batch)
        assert torch.equal(scripted(x, h), module(x, h))


def test_examples_of_a_batch_do_not_see_one_another(case: tuple[BlueprintIR, Site]) -> None:
    ir, site = case
    module = to_module(ir, site, seed=0)
    x, h = inputs(site, 3)
    apart = torch.cat([module(x[i : i + 1], h[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(module(x, h), apart, rtol=1e-4, atol=1e-5)


def test_registry_covers_every_layout(registry: BlueprintRegistry) -> None:
    for site in (VECTOR, TOKENS, SIGNAL, IMAGE, STRIDED, UNPADDED):
        assert len(registry.for_site(site)) >= 6

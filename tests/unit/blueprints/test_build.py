from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import safetensors.torch
import torch
from torch import nn

from esper.blueprints import BlueprintRegistry, parse_text, to_module
from esper.contracts.blueprint import BlueprintIR, Site, SiteKind
from esper.contracts.errors import InvalidInputError

Script = Callable[[nn.Module], torch.jit.ScriptModule]


def graph(*lines: str) -> BlueprintIR:
    return parse_text("\n".join(["blueprint 1", *lines]))


def inputs(site: Site, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(batch)
    x = torch.randn(batch, *site.input_shape, generator=generator)
    return x, torch.randn(batch, *site.output_shape, generator=generator)


def wake(module: nn.Module) -> nn.Module:
    """Move every parameter, so that the delta is no longer zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return module


def test_equal_seeds_give_equal_bits_and_other_seeds_do_not(registry: BlueprintRegistry, linear: Site) -> None:
    ir = registry.create_blueprint("gated_mlp").ir
    one, same, other = (to_module(ir, linear, seed=seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["node_value.weight"], other["node_value.weight"])


def test_building_leaves_the_global_random_state_alone(registry: BlueprintRegistry, site: Site) -> None:
    before = torch.get_rng_state()
    for blueprint in registry.for_site(site):
        to_module(blueprint.ir, site, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("seed", [-1, 2**63, 1.0, True])
def test_seed_out_of_range_is_refused(seed: int, registry: BlueprintRegistry, linear: Site) -> None:
    with pytest.raises(InvalidInputError, match=r"seed must be a whole number in \[0, 2\*\*63\)"):
        to_module(registry.create_blueprint("lora").ir, linear, seed=seed)


def test_delta_is_what_the_graph_says(linear: Site) -> None:
    ir = graph("a = linear(x)", "b = activation(a, fn=tanh)", "c = add(b, h)", "d = multiply(c, value=0.5)", "return d")
    module = to_module(ir, linear, seed=0)
    x, h = inputs(linear)
    weight, bias = module.state_dict()["node_a.weight"], module.state_dict()["node_a.bias"]
    torch.testing.assert_close(module(x, h), 0.5 * (torch.tanh(x @ weight.T + bias) + h))


def test_causal_convolution_never_looks_ahead(registry: BlueprintRegistry, tokens: Site) -> None:
    for name in ("causal_attention", "causal_token_conv"):
        module = wake(to_module(registry.create_blueprint(name).ir, tokens, seed=0))
        x, h = inputs(tokens)
        later = h.clone()
        later[:, 4:] = torch.randn(2, 3, 12)
        before, after = module(x, h), module(x, later)
        torch.testing.assert_close(after[:, :4], before[:, :4])
        assert not torch.allclose(after[:, 4:], before[:, 4:])


def test_crop_takes_the_centre() -> None:
    site = Site(kind=SiteKind.CONV2D, input_shape=(1, 6, 6), output_shape=(1, 4, 4))
    module = to_module(graph("a = align(x, h)", "return a"), site, seed=0)
    x, h = inputs(site)
    assert torch.equal(module(x, h), x[:, :, 1:5, 1:5])


@pytest.mark.parametrize("name", ["bottleneck_adapter", "signal_conv", "image_conv"])
def test_vector_sites_take_any_leading_dimensions(name: str, registry: BlueprintRegistry, linear: Site) -> None:
    module = wake(to_module(registry.create_blueprint(name).ir, linear, seed=0))
    x, h = torch.randn(2, 3, 5, 16), torch.randn(2, 3, 5, 12)
    delta = module(x, h)
    assert delta.shape == h.shape
    torch.testing.assert_close(delta[1, 2], module(x[1, 2], h[1, 2]))
    assert module(x[0, 0, 0], h[0, 0, 0]).shape == (12,)


def test_deep_copy_is_independent(registry: BlueprintRegistry, site: Site) -> None:
    for blueprint in registry.for_site(site):
        module = to_module(blueprint.ir, site, seed=0)
        twin = copy.deepcopy(module)
        wake(twin)
        x, h = inputs(site)
        assert not module(x, h).any()
        assert twin(x, h).any()


def test_weights_travel_as_safetensors(registry: BlueprintRegistry, site: Site) -> None:
    for blueprint in registry.for_site(site):
        trained = wake(to_module(blueprint.ir, site, seed=0))
        data = safetensors.torch.save(dict(trained.state_dict()))
        fresh = to_module(blueprint.ir, site, seed=9)
        fresh.load_state_dict(safetensors.torch.load(data))
        x, h = inputs(site)
        assert torch.equal(fresh(x, h), trained(x, h))


def test_scripted_templates_train_like_eager_ones(registry: BlueprintRegistry, site: Site, script: Script) -> None:
    x, h = inputs(site)
    for blueprint in registry.for_site(site):
        eager, other = (wake(to_module(blueprint.ir, site, seed=0)) for _ in range(2))
        scripted = script(other)
        eager(x, h).square().sum().backward()
        scripted(x, h).square().sum().backward()
        for mine, theirs in zip(eager.parameters(), scripted.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad)


@pytest.mark.parametrize("name", ["gated_mlp", "signal_conv"])
def test_export_keeps_the_batch_dynamic_at_vectors(name: str, registry: BlueprintRegistry, linear: Site) -> None:
    export_and_compare(registry.create_blueprint(name).ir, linear)


@pytest.mark.parametrize("name", ["conv3x3", "squeeze_excite", "low_rank_attention"])
def test_export_keeps_the_batch_dynamic_at_images(name: str, registry: BlueprintRegistry, conv2d: Site) -> None:
    export_and_compare(registry.create_blueprint(name).ir, conv2d)


def export_and_compare(ir: BlueprintIR, site: Site) -> None:
    module = wake(to_module(ir, site, seed=0))
    batch = torch.export.Dim("batch", min=1, max=1024)
    exported = torch.export.export(module, inputs(site, 2), dynamic_shapes={"x": {0: batch}, "h": {0: batch}})
    for size in (1, 5):
        x, h = inputs(site, size)
        torch.testing.assert_close(exported.module()(x, h), module(x, h))


def test_compiles_to_one_graph_for_every_batch(registry: BlueprintRegistry, linear: Site, conv2d: Site) -> None:
    for name, site in (("signal_conv", linear), ("conv3x3", conv2d), ("low_rank_attention", conv2d)):
        module = wake(to_module(registry.create_blueprint(name).ir, site, seed=0))
        compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="eager")
        for batch in (2, 3, 5):
            x, h = inputs(site, batch)
            torch.testing.assert_close(compiled(x, h), module(x, h))


def test_channels_last_inputs_give_the_same_delta(registry: BlueprintRegistry, conv2d: Site) -> None:
    x, h = inputs(conv2d)
    for blueprint in registry.for_site(conv2d):
        module = wake(to_module(blueprint.ir, conv2d, seed=0))
        there = module(x.to(memory_format=torch.channels_last), h.to(memory_format=torch.channels_last))
        torch.testing.assert_close(there, module(x, h), rtol=1e-4, atol=1e-5)


def test_half_precision_modules_run(registry: BlueprintRegistry, site: Site) -> None:
    x, h = (tensor.bfloat16() for tensor in inputs(site))
    for blueprint in registry.for_site(site):
        delta = wake(to_module(blueprint.ir, site, seed=0)).bfloat16()(x, h)
        assert delta.dtype is torch.bfloat16
        assert bool(torch.isfinite(delta).all())


def test_module_is_made_of_torch_alone(registry: BlueprintRegistry, site: Site) -> None:
    for blueprint in registry.for_site(site):
        module = to_module(blueprint.ir, site, seed=0)
        bases = {base for part in module.modules() for base in type(part).__mro__}
        assert not any(base.__module__.startswith("esper") for base in bases)
        code_names = module.forward.__globals__
        assert not any(getattr(value, "__module__", None) == "esper" for value in code_names.values())


def test_names_that_python_reserves_are_legal_node_names(linear: Site, script: Script) -> None:
    ir = graph("lambda = linear(x)", "forward = activation(lambda)", "self = linear(forward, init=zero)", "return self")
    module = to_module(ir, linear, seed=0)
    x, h = inputs(linear)
    assert torch.equal(script(module)(x, h), torch.zeros_like(h))


def test_weights_are_float32_whatever_the_default_dtype(linear: Site, registry: BlueprintRegistry) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        module = to_module(registry.create_blueprint("norm_shift").ir, linear, seed=2**63 - 1)
        adapter = to_module(registry.create_blueprint("bottleneck_adapter").ir, linear, seed=0)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {parameter.dtype for parameter in (*module.parameters(), *adapter.parameters())} == {torch.float32}

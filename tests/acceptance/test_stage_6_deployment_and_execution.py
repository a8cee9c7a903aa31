"""Stage 6: kernels come through three tiers and run at a seed; the layer's shape stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import esper
from esper.blueprints.registry import default_registry
from esper.client import EsperClient
from esper.contracts.errors import NotFoundError, ShapeMismatchError
from esper.contracts.kernel import CompileSpec
from esper.contracts.lifecycle import SeedLifecycleState
from tests.acceptance.conftest import fresh_net


def compiled_for(client: EsperClient, layer: Any, template: str = "bottleneck_adapter") -> str:
    spec = CompileSpec(ir=default_registry().create_blueprint(template).ir, site=layer.site)
    return client.tezzeret.compile(spec).artifact_id


async def test_a_kernel_loads_into_a_seed_and_runs(mesh: esper.Mesh, client: EsperClient) -> None:
    wrapped, batch = fresh_net()
    layer = wrapped.layer1
    layer.kernel_source = mesh.kernel_source
    mesh.kernel_source.name("kernel_123", compiled_for(client, layer))
    shape = layer(batch).shape
    assert await layer.load_kernel(seed_idx=0, artifact_id="kernel_123")
    assert layer.state_layout.lifecycle_states[0] == SeedLifecycleState.ACTIVE
    assert layer(batch).shape == shape
    layer.transition(0, SeedLifecycleState.EVALUATING)
    layer.set_alpha(0, 0.5)
    for _ in range(64):
        assert layer(batch).shape == shape
    assert layer.get_layer_stats()["kernel_execution_latency_ms"] < 5.0


async def test_several_seeds_run_at_once_with_correct_gradients(mesh: esper.Mesh, client: EsperClient) -> None:
    wrapped, batch = fresh_net()
    layer = wrapped.layer1
    layer.kernel_source = mesh.kernel_source
    for index, template in enumerate(("bottleneck_adapter", "lora", "gated_mlp")):
        await layer.load_kernel(seed_idx=index, artifact_id=compiled_for(client, layer, template))
        layer.transition(index, SeedLifecycleState.EVALUATING)
        layer.set_alpha(index, 0.25 * (index + 1))
    layer(batch).square().sum().backward()
    for index in range(3):
        gradients = [parameter.grad for parameter in layer.seed_parameters(index)]
        assert any(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)
        assert all(torch.isfinite(gradient).all() for gradient in gradients if gradient is not None)


async def test_a_kernel_of_another_shape_is_refused_and_the_host_goes_on(mesh: esper.Mesh, client: EsperClient) -> None:
    wrapped, batch = fresh_net()
    wrapped.layer2.kernel_source = mesh.kernel_source
    before = wrapped(batch)
    with pytest.raises(ShapeMismatchError):
        await wrapped.layer2.load_kernel(seed_idx=0, artifact_id=compiled_for(client, wrapped.layer1))
    assert wrapped.layer2.state_layout.lifecycle_states[0] == SeedLifecycleState.CULLED
    assert torch.equal(before, wrapped(batch))


async def test_an_unknown_kernel_is_refused_and_the_host_goes_on(mesh: esper.Mesh) -> None:
    wrapped, batch = fresh_net()
    wrapped.layer1.kernel_source = mesh.kernel_source
    before = wrapped(batch)
    with pytest.raises(NotFoundError):
        await wrapped.layer1.load_kernel(seed_idx=0, artifact_id="k" + "0" * 32)
    assert torch.equal(before, wrapped(batch))


def test_the_second_fetch_of_a_kernel_is_a_hit(mesh: esper.Mesh, client: EsperClient) -> None:
    wrapped, _ = fresh_net()
    artifact_id = compiled_for(client, wrapped.layer1, "norm_shift")
    mesh.fetch_kernel(artifact_id)
    before = {tier.tier: tier.hits for tier in mesh.kernel_source.stats()}
    mesh.fetch_kernel(artifact_id)
    after = {tier.tier: tier.hits for tier in mesh.kernel_source.stats()}
    assert after["l1"] == before["l1"] + 1
    assert after["l3"] == before["l3"]
